"""Learning with DeepCTR's DeepFM on tf-keras.

It has a table per field, with a row for what is missing or unseen, and keeps numbers out of the embeddings; bags are
means.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tf_keras as keras
from deepctr.feature_column import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr.models import DeepFM
from learning import BATCH, DIM, EPOCHS, HIDDEN, PATIENCE, RATE, clock


def fit(side, data, seed, l2, dropout, patience=PATIENCE):
    keras.utils.set_random_seed(seed)
    ends = np.cumsum(data.columns)
    columns = []
    for number, (kind, size) in enumerate(zip(data.kinds, data.sizes, strict=True)):
        if kind == "numeric":
            columns.append(DenseFeat(f"f{number}", 1))
            continue
        columns.append(SparseFeat(f"f{number}", int(size) + 1, DIM))
        if kind == "multivalued":
            columns[-1] = VarLenSparseFeat(columns[-1], int(data.columns[number]), combiner="mean")

    def inputs_of(indices, values):
        found = {}
        for number, (kind, start) in enumerate(zip(data.kinds, data.starts, strict=True)):
            here = slice(ends[number] - data.columns[number], ends[number])
            local = np.where(indices[:, here] > 0, indices[:, here] - start + 1, 0).astype(np.int32)
            found[f"f{number}"] = values[:, here] if kind == "numeric" else local
        return found

    penalties = {"l2_reg_linear": l2, "l2_reg_embedding": l2}
    model = DeepFM(columns, columns, dnn_hidden_units=HIDDEN, dnn_dropout=dropout, seed=seed, **penalties)
    model.compile(keras.optimizers.Adam(RATE), "binary_crossentropy", metrics=["binary_crossentropy"])
    monitored = "val_binary_crossentropy"  # without the penalties
    stop = keras.callbacks.EarlyStopping(monitored, mode="min", patience=patience, restore_best_weights=True)
    (inputs, labels), (others, other_labels) = data.of("train"), data.of("validation")
    timer = clock(keras)
    history = model.fit(
        inputs_of(*inputs),
        labels,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(inputs_of(*others), other_labels),
        validation_batch_size=8192,
        verbose=0,
        callbacks=[stop, timer],
    )

    def predict(*x):
        return model.predict(inputs_of(*x), batch_size=8192, verbose=0).ravel()

    return predict, history.history[monitored], timer.seconds
