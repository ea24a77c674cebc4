"""Learning with deepfm_ops: the recommended defaults, and what they are compared with on the same model."""

import keras
from learning import BATCH, DIM, EPOCHS, HIDDEN, LAZY, ORDER_SIDES, PATIENCE, RATE, RECOMMENDED, clock

from deepfm_ops import DeepFM, optimizers


def fit(side, data, seed, epochs=EPOCHS, **options):
    keras.utils.set_random_seed(seed)
    shape = (data.num_features, len(data.columns), DIM, HIDDEN)
    inputs, labels = data.of("train")
    if (
        side == RECOMMENDED or side in ORDER_SIDES
    ):  # what DeepFM.from_features makes of a dictionary that was fitted on the training part
        counts = {"feature_counts": data.counts, "num_samples": len(labels)}
        model = DeepFM(*shape, field_sizes=data.columns.tolist(), **counts, **options)
        model.compile()
        patience = 4
    else:
        model = DeepFM(*shape, field_sizes=data.columns.tolist())
        optimizer = optimizers.LazyAdam if side == LAZY else keras.optimizers.Adam
        model.compile(optimizer(RATE), "binary_crossentropy")
        patience = PATIENCE
    stop = keras.callbacks.EarlyStopping("val_loss", patience=patience, restore_best_weights=True)
    timer = clock(keras)
    history = model.fit(
        inputs,
        labels,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=data.of("validation"),
        validation_batch_size=8192,
        verbose=0,
        callbacks=[stop, timer],
    )
    return lambda *x: model.predict(x, batch_size=8192, verbose=0).ravel(), history.history["val_loss"], timer.seconds
