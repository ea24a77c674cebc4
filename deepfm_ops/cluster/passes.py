"""One pass over data: steps that run on workers, and their results in the order in which they come."""

import contextlib
import json
import queue
import re
import time

import tensorflow as tf
from tensorflow.python.distribute.coordinator import coordinator_context

from deepfm_ops.cluster import feeding
from deepfm_ops.cluster.server import WAIT

CHIEF = "/job:chief/replica:0/task:0/device:CPU:0"
POLL = 1.0  # seconds between two looks at whether the servers are there
IDLE = 0.002  # seconds that a worker waits that finds nothing to take
# What TensorFlow says of a worker that is not the one it was: its process was started anew.
_STRANGER = ("unknown device", "remote_handle", "context_id", "context id")


class Pass:
    """Takes batches from a feed to workers.

    Args:
        cluster: `coordinator.Chief`.
        feed: `feeding.Arrays` or `feeding.StreamParts`.
        in_flight: steps at a time.
        get, run, both: concrete functions, see `steps`: of a batch to what a step needs; of that to the results,
            float32 [n]; of one batch's and the next one to both, or None, if a worker gets one batch after the other.

    """

    def __init__(self, cluster, feed, in_flight, get, run, both=None):
        self._cluster, self._feed, self._in_flight = cluster, feed, in_flight
        self._first, self._only, self._both = get, run, both
        self._results, self._held, self._outstanding = queue.Queue(), {}, 0  # held: what a worker has got ahead
        self._last = time.monotonic()  # that a step was done
        self._chief = cluster.servers[0] if cluster.coordinator is None else CHIEF

    def __iter__(self):
        """(Batch, results) of every step; the batch was counted when it was done.

        Who closes it before its end, or interrupts it, has no step in flight then.

        Raises:
            InvalidArgumentError: of a batch, which the text names.
            ClusterError, OpError: a server was lost.

        """
        try:
            yield from self._steps()
        except (GeneratorExit, KeyboardInterrupt):
            self.drain()
            raise

    def _steps(self):
        error = None
        while error is None and not self._feed.is_finished or self._outstanding:
            while error is None and self._outstanding < self._in_flight and not self._feed.is_finished:
                self._schedule()
                self._outstanding += 1
            found = self._next()
            self._outstanding -= 1
            if found is None:  # a worker found nothing to take: what another one has may be waited for
                self._look()
                continue
            batch, results = found
            if isinstance(results, BaseException):
                error = error or results
            elif error is None:
                yield batch, results
                self._last = time.monotonic()  # what callbacks took is nobody's fault
        if isinstance(error, BatchError):
            raise tf.errors.InvalidArgumentError(None, None, str(error))
        if error is not None:
            raise error

    def drain(self):
        """Waits until no step is in flight; their results stay to be iterated over."""
        self._last = time.monotonic()
        while not self._look():
            time.sleep(IDLE)

    def _schedule(self):
        if self._cluster.coordinator is None:
            self._work(0)
            return
        # Not by its public name, which takes functions of a graph alone: this one says first what there is to do.
        self._cluster.coordinator._cluster.schedule(self._on_worker, (), {})

    def _next(self):
        while True:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=POLL)
            self._look()

    def _look(self):
        """Whether no step is in flight; raises what one could not be saved from."""
        self._cluster.check()
        if self._cluster.coordinator is None:
            return True
        if time.monotonic() - self._last > WAIT:
            self._cluster.check_workers()
            self._last = time.monotonic()
        return self._cluster.coordinator.done()

    def _on_worker(self):
        """What the coordinator runs, in the thread of a worker; an error of TensorFlow's is that worker's loss."""
        self._work(coordinator_context.get_current_dispatch_context().worker_index)

    def _work(self, worker):
        try:
            batch, inputs = self._held.pop(worker, None) or self._get(worker)
            if batch is None:
                time.sleep(IDLE)
                self._results.put(None)
                return
            following = self._feed.take(worker) if self._both is not None else None
            results = self._run(worker, batch, inputs, following)
            self._last = time.monotonic()
            self._results.put((batch, results) if self._feed.done(batch) else None)
        except tf.errors.OpError:
            self._held.pop(worker, None)
            self._feed.release(worker)
            raise
        except BaseException as error:
            self._results.put((None, error))

    def _run(self, worker, batch, inputs, following):
        """The results of a batch; what comes next is got meanwhile, and held."""
        device = self._cluster.workers[worker]
        if self._both is not None and following is not None:
            try:
                with _naming(batch), tf.device(device):
                    results, got = self._both(*inputs, *self._asked(following))
                self._keep(worker, following, got)
                return self._here(results)
            except BatchError:  # of one of the two
                self._feed.release(worker)
        with _naming(batch), tf.device(device):
            return self._here(self._only(*inputs))

    def _asked(self, batch):
        """What is asked of a worker to get a batch."""
        if batch.inputs is not None:
            return [tf.constant(x) for x in batch.inputs]
        return [tf.constant(self._feed.job), tf.constant(json.dumps(batch.state))]

    def _keep(self, worker, batch, got):
        if batch.inputs is None:
            after, got = self._here(got[0]), got[1]
            if after == feeding.UNKNOWN:  # a worker that was not there before
                with tf.device(self._cluster.workers[worker]):
                    feeding.install(self._feed.job, self._feed.content)
                return
            if after == feeding.OVER:
                self._feed.is_over(batch)
                return
            self._feed.read(worker, batch, json.loads(after))
        self._held[worker] = batch, got

    def _get(self, worker):
        """(Batch, what a step needs of it, on the worker), or (None, None)."""
        while (batch := self._feed.take(worker)) is not None:
            with _naming(batch), tf.device(self._cluster.workers[worker]):
                got = self._first(*self._asked(batch))
            self._keep(worker, batch, got)
            if worker in self._held:
                return self._held.pop(worker)
        return None, None

    def _here(self, tensor):
        with tf.device(self._chief):
            return tf.identity(tensor).numpy()


def plain(text):
    """TensorFlow's text of an error, without what it says of its graph."""
    if found := re.search(r"ValueError: ([^\n]+)", text):  # of a function in Python; its traceback may be cut off
        return found[1]
    found = re.search(r"([^\n]+)\n\s*\[\[\{\{node", text)
    line = found[1] if found else text.strip().split("\n")[0]
    line = line.split("}} ")[-1].split(" [Op:")[0].strip()
    line = re.sub(r"^\(\d+\) [A-Z_]+:\s*", "", line)  # of several that were found
    return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", line)


class BatchError(Exception):
    """What is wrong with a batch, whichever worker has it."""


@contextlib.contextmanager
def _naming(batch):
    """Inside, TensorFlow's errors are those of a worker that was lost; what is wrong with the batch comes out by its
    name.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if any(strange in str(error) for strange in _STRANGER):
            raise
        raise BatchError(f"{batch.name}: {plain(str(error))}") from None
