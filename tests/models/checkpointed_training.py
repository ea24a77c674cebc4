"""Trains with a checkpoint an epoch until it is killed: `python checkpointed_training.py FOLDER`."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from deepfm_ops import Checkpoint, DeepFM, optimizers

ROWS = 20000


class Report(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        # The table of an epoch is checked against its optimizer: both count the steps that were taken.
        assert int(self.model.optimizer.iterations) == checkpoint.epoch * 2
        print("resumed", checkpoint.epoch, flush=True)

    def on_epoch_end(self, epoch, logs=None):
        print("saved", epoch + 1, flush=True)


model = DeepFM(ROWS, 5, embedding_dim=16, hidden_units=(8,), seed=1)
model.compile(optimizers.LazyAdam(0.01), "binary_crossentropy")
checkpoint = Checkpoint(sys.argv[1])
indices = np.random.default_rng(0).integers(0, ROWS, (64, 5))
labels = (indices[:, :1] % 2).astype("f")
model.fit(
    (indices, np.ones((64, 5), "f")), labels, batch_size=32, epochs=10**6, verbose=0, callbacks=[checkpoint, Report()]
)
