"""Checkpoints of a model whose tables are split over servers.

The model has, beside `fit`:

    sharded()              list of Sharded: tables, first-order weights, counts, all their slots and averages
    dense_variables()      {name: variable}: all others that a resumed run needs
    identity()             {name: what a checkpoint and the model have to have in common}, of what JSON can hold
    step                   batches of the epoch that callbacks were called for
    progress()             {"epoch": epochs done, "step": batches done of the next one, ...}, of what JSON can hold;
                           no step is in flight then, nor until the callback returns
    restore_progress(it)   goes on there
"""

import json
import pathlib

import keras

from deepfm_ops.cluster import storage


class Checkpoint(keras.callbacks.Callback):
    """Saves tables, slots, dense weights and progress, and resumes there when `fit` is called again.

    Each server writes its own rows, all of them at once. A checkpoint counts when all of it is on the disk: whatever is
    killed at any moment leaves whole ones only. It can be read by another number of servers than wrote it.

    Args:
        folder: where the checkpoints are, on a file system that all servers share; one model's only.
        every_steps: batches between checkpoints, beside those at the ends of epochs.
        every: epochs between checkpoints.
        keep: how many of the newest are kept.

    Attributes:
        epoch: epochs that were done when training began or resumed.

    Raises:
        ValueError: when training begins or a checkpoint is written: a folder that the servers do not share or may not
            write to, a full disk, a checkpoint that is damaged or of another model, optimizer or arguments.
        ClusterError: a server that is lost meanwhile.

    Example:
        >>> model.fit(stream, epochs=20, callbacks=[cluster.Checkpoint("checkpoints", every_steps=1000)])

    """

    def __init__(self, folder, every_steps=None, every=1, keep=3):
        super().__init__()
        for name, value in (("every_steps", every_steps), ("every", every), ("keep", keep)):
            if value is not None and value < 1 or value is None and name != "every_steps":
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder, self.every_steps, self.every, self.keep = pathlib.Path(folder), every_steps, every, keep
        self.epoch = 0

    def on_train_begin(self, logs=None):
        self.epoch, self._written = 0, None
        path = storage.newest(self.folder)
        if path is None:
            return
        state = storage.state(path)
        found, own = state["identity"], json.loads(json.dumps(self.model.identity()))
        for name in sorted({*found, *own}):
            if found.get(name) != own.get(name):
                raise ValueError(
                    f"{path} was written with {name} {found.get(name)}, the model has {own.get(name)}: take "
                    "that of the checkpoint, or another folder"
                )
        storage.read(path, self.model.sharded(), self.model.dense_variables())
        self.model.restore_progress(state["progress"])
        self.epoch = state["progress"]["epoch"]

    def on_epoch_begin(self, epoch, logs=None):
        self._step = self.model.step

    def on_train_batch_end(self, batch, logs=None):
        if self.every_steps is None:
            return
        # Counted from the start of the epoch, so that a run that was resumed saves where the other one did.
        before, self._step = self._step, self.model.step
        if self._step // self.every_steps > before // self.every_steps:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self._save()

    def _save(self):
        progress = self.model.progress()
        within = f"-{progress['step']:012d}" if progress["step"] else ""
        name = f"epoch-{progress['epoch']:08d}{within}"
        if within and name == self._written:  # nothing was trained on since
            return
        self._written = name
        state = {"identity": self.model.identity(), "progress": progress}
        storage.write(self.folder, name, self.model.sharded(), self.model.dense_variables(), state)
        storage.keep(self.folder, self.keep)
