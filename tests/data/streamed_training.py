"""Trains on a stream with checkpoints, for the tests that kill it: FOLDER, and the steps between checkpoints."""

import hashlib
import pathlib
import sys

import keras
import tensorflow as tf

from deepfm_ops import Checkpoint, DeepFM, FeatureDictionary

tf.config.threading.set_intra_op_parallelism_threads(1)  # TensorFlow's sums of the MLP depend on it
folder, every = pathlib.Path(sys.argv[1]), int(sys.argv[2])
features = FeatureDictionary.load(folder / "features")
keras.utils.set_random_seed(1)
model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=1)
model.compile()
stream = features.stream(str(folder / "*.csv"), 32, shuffle=True, seed=5, shuffle_rows=300)


class Report(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print(f"trained {stream.epoch} {stream.batch}", flush=True)


checkpoint = Checkpoint(folder / "checkpoints", every_steps=every)
model.fit(stream, epochs=3, verbose=0, callbacks=[checkpoint, Report()])
weights = b"".join(variable.numpy().tobytes() for variable in [*model.variables, *model.optimizer.variables])
print("ended", hashlib.sha256(weights).hexdigest(), flush=True)
