"""Checkpoints that a crash cannot spoil."""

import json
import os
import pathlib
import shutil

import keras

from deepfm_ops.combined import unscaled
from deepfm_ops.files import to_disk

WEIGHTS, STATE = "model.weights.h5", "state.json"


class Checkpoint(keras.callbacks.Callback):
    """Saves weights, optimizer and epoch at the end of an epoch, and resumes from there when `fit` is called again.

    A checkpoint is a folder, written under another name and renamed when all of it is on the disk: a process that is
    killed at any moment leaves whole checkpoints only. The newest is kept. (`keras.callbacks.BackupAndRestore`
    overwrites its files in place.)

    Args:
        folder: where the checkpoints are; one model's only.
        every: epochs between checkpoints.

    Attributes:
        epoch: epochs that were done when training began or resumed.

    Raises:
        ValueError: when training begins: a model that is not built (give it an Input, or call `build`); a
            checkpoint of another model or of another kind of optimizer.

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[Checkpoint("checkpoints")])

    """

    def __init__(self, folder, every=1):
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.folder, self.every, self.epoch = pathlib.Path(folder), every, 0

    def _whole(self):
        """The checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if path.is_dir())

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(f"{self.model.name} is not built, so a checkpoint could not be loaded into it")
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        self.epoch, self.model._initial_epoch = 0, None
        checkpoints = self._whole()
        if not checkpoints:
            return
        state = json.loads((checkpoints[-1] / STATE).read_text())
        if state["optimizer"] != self._optimizer():
            raise ValueError(f"{checkpoints[-1]} was written with {state['optimizer']}, not {self._optimizer()}")
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self.model.load_weights(checkpoints[-1] / WEIGHTS)
        self.epoch = state["epoch"]
        order = getattr(self.model, "epoch_order", None)  # of a DeepFM that is trained on arrays
        if order is not None and state.get("order_seed") is not None:
            order.seed = state["order_seed"]
        self.model._initial_epoch = self.epoch  # where Keras's own callback puts it

    def on_train_end(self, logs=None):
        self.model._initial_epoch = None

    def _optimizer(self):
        optimizer = unscaled(self.model.optimizer)
        parts = [getattr(optimizer, name) for name in ("tables", "dense") if hasattr(optimizer, name)]
        kinds = [type(part).__name__ for part in (optimizer, *parts)]
        return " ".join(kinds) + (" with averages" if optimizer.use_ema else "")

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        unfinished, before = self.folder / "unfinished", self._whole()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.model.save_weights(unfinished / WEIGHTS)
        state = {"epoch": epoch + 1, "optimizer": self._optimizer()}
        state["order_seed"] = getattr(getattr(self.model, "epoch_order", None), "seed", None)
        (unfinished / STATE).write_text(json.dumps(state))
        for path in (unfinished / WEIGHTS, unfinished / STATE, unfinished):
            to_disk(path)
        os.replace(unfinished, self.folder / f"epoch-{epoch + 1:08d}")
        to_disk(self.folder)
        for path in before:
            # Renamed first: what is half removed must not look like a checkpoint.
            os.replace(path, unfinished)
            shutil.rmtree(unfinished)
