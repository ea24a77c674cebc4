"""What the steps of a pass are fed with, and who has had what.

The chief says which batch a worker takes next and counts what was done; a step that fails with its worker is given
back, and another worker takes it. So every batch is trained on at least once, and counted exactly once.
"""

import json
import pickle
import threading
import uuid

import numpy as np
import tensorflow as tf

from deepfm_ops.cluster import remote
from deepfm_ops.data.stream import FIXED

POSITION = ("batch", "rows", "piece", "chunk", "row")  # of a stream in its pass


class Batch:
    """One batch that a worker has taken.

    Attributes:
        number: of the batch in its part of the pass, from 0 on.
        part: number of the part.
        inputs: arrays (indices [B, P], values [B, P], labels [B, heads], weights [B] or [0]); None of a stream,
            which the worker reads itself.
        state: of a stream, where the part is read from.

    """

    def __init__(self, number, part=0, inputs=None, state=None):
        self.number, self.part, self.inputs, self.state = number, part, inputs, state

    @property
    def name(self):
        return f"batch {self.number}" + (f" of part {self.part}" if self.part else "")


class Arrays:
    """Batches of arrays on the chief; they travel with each step.

    Args:
        batch: function (row) of the arrays of a batch, see `Batch`.
        starts: range of the rows that batches start at.

    """

    kind, job = "arrays", None

    def __init__(self, batch, starts):
        self._batch, self._starts, self._lock = batch, starts, threading.Lock()
        self._all = [len(starts), starts.step]
        self.begin(0)

    def begin(self, epoch):
        """Starts a pass."""
        self._next, self._back, self._taken, self._done = 0, [], {}, 0

    @property
    def num_done(self):
        """Batches of the pass that were done."""
        return self._done

    @property
    def is_finished(self):
        return self._done == len(self._starts)

    def take(self, worker):
        """The next Batch for a worker, or None if there is none for it now."""
        with self._lock:
            if self._back:
                number = self._back.pop(0)
            elif self._next < len(self._starts):
                number, self._next = self._next, self._next + 1
            else:
                return None
            self._taken[number] = worker
            return Batch(number, inputs=self._batch(self._starts[number]))

    def done(self, batch):
        """The batch was trained on; False: another worker has done it meanwhile."""
        with self._lock:
            if self._taken.pop(batch.number, None) is None:
                return False
            self._done += 1
            return True

    def release(self, worker):
        """What a worker has taken and not done, others may take."""
        with self._lock:
            lost = [number for number, owner in self._taken.items() if owner == worker]
            for number in lost:
                del self._taken[number]
            self._back = sorted([*self._back, *lost])

    def state(self):
        """A small dict for JSON: what was done of the pass."""
        with self._lock:
            back = sorted([*self._back, *self._taken])
            return {"kind": self.kind, "starts": self._all, "next": self._next, "back": back}

    def restore(self, state):
        if state["starts"] != self._all:
            then, now = (f"{count} batches of {size} samples" for count, size in (state["starts"], self._all))
            raise ValueError(f"the checkpoint is of a pass of {then}, got {now}: take the x and batch_size that it had")
        self._next, self._back, self._taken = state["next"], list(state["back"]), {}
        self._done = self._next - len(self._back)


class StreamParts:
    """Batches of a stream, which the workers read themselves, each a part of it.

    Args:
        stream: `data.Stream`. It stays where it is: the position is here, one for each part.
        parts: how many.
        task: of the model, see `heads`; what `Stream.check_labels` takes.
        whole: whether the first pass is over all of it too, wherever the stream is.

    """

    kind = "stream"

    def __init__(self, stream, parts, task, whole=False):
        make, (features, source, options, _) = stream.__reduce__()
        self._start, self._parts, self._whole = stream.state(), parts, whole
        try:
            self.job, self.content = uuid.uuid4().hex, pickle.dumps((make, features, source, options, task))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(
                f"a {type(source).__name__} cannot be sent to workers ({error}): give the stream files, a table, or a "
                "list of tables"
            ) from None
        self._lock = threading.Lock()
        self.begin(0)

    def begin(self, epoch):
        """Starts a pass."""
        start, (index, count) = self._start, self._start["shard"]
        in_the_middle = epoch == 0 and not self._whole and any(start[name] for name in POSITION)
        parts = 1 if in_the_middle else self._parts
        fresh = dict(start) if in_the_middle else start | dict.fromkeys(POSITION, 0)
        fresh["epoch"] = self._pass = start["epoch"] + epoch
        self._states = [{**fresh, "shard": [index + count * part, count * parts]} for part in range(parts)]
        self._done = 0
        self._restart()

    def _restart(self):
        self._read = list(self._states)  # where each part is read from next; _states: up to where it was trained on
        self._owners = {}

    @property
    def num_done(self):
        return self._done

    @property
    def is_finished(self):
        return all(state["epoch"] > self._pass for state in self._states)

    def take(self, worker):
        with self._lock:
            for part in sorted(range(len(self._states)), key=lambda part: self._owners.get(part) != worker):
                if self._owners.get(part, worker) == worker and self._read[part]["epoch"] == self._pass:
                    self._owners[part] = worker
                    return Batch(self._read[part]["batch"], part, state=self._read[part])
        return None

    def read(self, worker, batch, state):
        """A worker has read the batch, and stands at a state."""
        with self._lock:
            batch.state = state
            if self._owners.get(batch.part) == worker:
                self._read[batch.part] = state

    def is_over(self, batch):
        """There was none: the part was at its end."""
        with self._lock:
            self._states[batch.part] = self._read[batch.part] = {**self._read[batch.part], "epoch": self._pass + 1}

    def done(self, batch):
        with self._lock:
            before = self._states[batch.part]
            if before["epoch"] > self._pass or before["batch"] > batch.number:
                return False
            self._states[batch.part] = batch.state
            self._done += 1
            return True

    def release(self, worker):
        with self._lock:
            for part in [part for part, owner in self._owners.items() if owner == worker]:
                del self._owners[part]
                self._read[part] = self._states[part]

    def state(self):
        with self._lock:
            return {"kind": self.kind, "pass": self._pass, "done": self._done, "parts": list(self._states)}

    def restore(self, state):
        for name in FIXED:
            found, own = state["parts"][0][name], self._start[name]
            if found != own and name != "shard":
                raise ValueError(f"the checkpoint is of a stream with {name} {found!r}, got {own!r}")
        self._pass, self._done, self._states = state["pass"], state["done"], list(state["parts"])
        self._restart()


# What runs in the workers' processes.

_jobs = {}  # job: what makes its stream
_reading = {}  # (job, part, parts): (state, stream, iterator)
UNKNOWN, OVER = b"unknown", b"over"


@remote.function(tf.bool)
def install(job, content):
    """Tells a worker what the stream of a job is."""
    _jobs[job.decode()] = pickle.loads(content)
    for old in list(_jobs)[:-2]:  # the last used are that which is trained on, and one for tests meanwhile
        del _jobs[old]
    for place in [place for place in _reading if place[0] not in _jobs]:
        del _reading[place]
    return np.True_


@remote.function(tf.string, tf.int64, tf.float32, tf.float32)
def next_batch(job, state):
    """The batch of a stream from a position on.

    Args:
        job: its name.
        state: a stream's state, JSON.

    Returns:
        the state after it, or UNKNOWN or OVER if there is none; indices [B, P], values [B, P], labels [B], of a dict of
        tasks [B, heads] (none: [0]).

    Raises:
        ValueError: a record that cannot be read, or a file that this worker does not have.

    """
    nothing = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    job, state = job.decode(), json.loads(state)
    if job not in _jobs:
        return UNKNOWN, *nothing
    _jobs[job] = _jobs.pop(job)
    place = (job, *state["shard"])
    at, stream, batches = _reading.get(place, (None, None, None))
    _reading.pop(place, None)
    try:
        if at != state:
            make, features, source, options, task = _jobs[job]
            stream = make(features, source, {**options, "shard": tuple(state["shard"])}, state)
            stream.check_labels(task)
            batches = iter(stream)
        batch, after = next(batches, None), stream.state()
    except Exception as error:  # of the batch, and not of the worker
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(kind + " ".join(str(error).split())) from error
    if batch is None:
        return OVER, *nothing
    if after["epoch"] == state["epoch"]:
        _reading[place] = after, stream, batches
    (indices, values), *labels = batch
    if labels and isinstance(labels[0], dict):
        labels = [np.stack([labels[0][name] for name in _jobs[job][-1]], axis=1)]
    return json.dumps(after).encode(), indices, values, labels[0] if labels else nothing[2]
