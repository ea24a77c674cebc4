"""Checkpoints that a crash cannot spoil."""

import json
import os
import pathlib
import shutil

import keras

from deepfm_ops.combined import unscaled
from deepfm_ops.files import to_disk
from deepfm_ops.models.epochs import StreamCallback

WEIGHTS, STATE = "model.weights.h5", "state.json"


class Checkpoint(keras.callbacks.Callback):
    """Saves weights, optimizer, epoch and the position in a stream, and resumes there when `fit` is called again.

    A checkpoint is a folder, written under another name and renamed when all of it is on the disk: a process that is
    killed at any moment leaves whole checkpoints only. The newest is kept. (`keras.callbacks.BackupAndRestore`
    overwrites its files in place.)

    A run that is resumed in the middle of a stream goes on with the batch after the last one that was trained on, and
    ends with the weights of the run that was never interrupted, bit for bit where the model is deterministic.

    Args:
        folder: where the checkpoints are; one model's only.
        every: epochs between checkpoints.
        every_steps: batches between checkpoints, beside those at the ends of epochs; needs a stream.
        stream: that the model is trained on. None: the one that `DeepFM.fit` was given; other models' have to be named
            here.

    Attributes:
        epoch: epochs that were done when training began or resumed.

    Raises:
        ValueError: when training begins: a model that is not built (give it an Input, or call `build`); a
            checkpoint of another model, of another kind of optimizer or of another stream; `every_steps` without a
            stream, or with steps_per_epoch, whose epochs do not end where the stream does.

    Example:
        >>> model.fit(stream, epochs=20, callbacks=[Checkpoint("checkpoints", every_steps=1000)])

    """

    def __init__(self, folder, every=1, every_steps=None, stream=None):
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        self.folder, self.every, self.every_steps = pathlib.Path(folder), every, every_steps
        self.epoch = 0
        self._given = stream

    def _whole(self):
        """The checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if path.is_dir())

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(f"{self.model.name} is not built, so a checkpoint could not be loaded into it")
        self._stream = self._given if self._given is not None else getattr(self.model, "training_stream", None)
        if self._stream is None and self.every_steps is not None:
            raise ValueError("every_steps needs a stream: FeatureDictionary.stream, or Checkpoint(..., stream=...)")
        if self.every_steps is not None and self.params.get("steps"):
            raise ValueError("every_steps and steps_per_epoch exclude each other: an epoch would not end where it did")
        self._follower = None
        if self._given is not None and getattr(self.model, "training_stream", None) is not self._given:
            self._follower = StreamCallback(self._given)  # nobody else moves it
            self._given.track()
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        self.epoch, self.model._initial_epoch = 0, None
        checkpoints = self._whole()
        if not checkpoints:
            return
        state = json.loads((checkpoints[-1] / STATE).read_text())
        if state["optimizer"] != self._optimizer():
            raise ValueError(f"{checkpoints[-1]} was written with {state['optimizer']}, not {self._optimizer()}")
        position = state.get("stream")
        if position is not None and self._stream is None:
            raise ValueError(f"{checkpoints[-1]} was written while a stream was trained on, and now there is none")
        if position is not None:
            self._stream.restore(position)
        elif self._stream is not None:
            raise ValueError(f"{checkpoints[-1]} was written without the stream that is trained on now")
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
        if self._follower is not None:
            self._given.untrack()

    def _optimizer(self):
        optimizer = unscaled(self.model.optimizer)
        parts = [getattr(optimizer, name) for name in ("tables", "dense") if hasattr(optimizer, name)]
        kinds = [type(part).__name__ for part in (optimizer, *parts)]
        return " ".join(kinds) + (" with averages" if optimizer.use_ema else "")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._batch = epoch, 0 if self._stream is None else self._stream.batch
        if self._follower is not None:
            self._follower.on_epoch_begin(epoch)

    def on_train_batch_end(self, batch, logs=None):
        if self._follower is not None:
            self._follower.on_train_batch_end(batch)
        if self.every_steps is None:
            return
        # Counted from the start of the pass, so that a run that was resumed saves where the other one did; of a pass's
        # end the epoch's end is saved.
        before, self._batch = self._batch, self._stream.batch
        if self._batch // self.every_steps > before // self.every_steps:
            self._save(self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self._save(epoch + 1)

    def _save(self, epoch):
        unfinished, before = self.folder / "unfinished", self._whole()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.model.save_weights(unfinished / WEIGHTS)
        state = {"epoch": epoch, "optimizer": self._optimizer()}
        state["order_seed"] = getattr(getattr(self.model, "epoch_order", None), "seed", None)
        if self._stream is not None:
            state["stream"] = self._stream.state()
        (unfinished / STATE).write_text(json.dumps(state))
        for path in (unfinished / WEIGHTS, unfinished / STATE, unfinished):
            to_disk(path)
        batch = 0 if self._stream is None else self._stream.batch
        within = f"-{batch:012d}" if batch else ""
        os.replace(unfinished, self.folder / f"epoch-{epoch:08d}{within}")
        to_disk(self.folder)
        for path in before:
            # Renamed first: what is half removed must not look like a checkpoint.
            os.replace(path, unfinished)
            shutil.rmtree(unfinished)
