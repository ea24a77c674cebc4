"""The chief's side of a cluster: it waits for the others, asks who they are, and sees when a server is lost."""

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from functools import partial

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context, executor

from deepfm_ops import native_info
from deepfm_ops.cluster import handshake, server
from deepfm_ops.cluster.config import FOLLOWED, ClusterError, answers, device, listening, name, read

CONNECT = 180.0  # seconds that TensorFlow has to connect to processes that listen, and they to say who they are
TRIES, TRY = 3, 2.5  # connections that fail in a row, and seconds for each, until a server is lost
PING = 600.0  # seconds without an answer of a server that takes connections; one that writes its shards is busy
END = 12.0  # seconds after a loss at which the process ends, whatever holds it up

_LOGGER = logging.getLogger("deepfm_ops")
_NOWHERE = open(os.devnull, "w")
_current = None


def current():
    """The Chief of this process, or None before `connect`."""
    return _current


def connect(wait=None):
    """Connects the chief to its servers and workers, the first time: what TensorFlow made before is of no use then.

    Args:
        wait: seconds that they have to appear; None: as long as `serve_or_continue` waits by itself.

    Returns:
        A Chief, the same in every call. Without TF_CONFIG, one of this process alone.

    Raises:
        ClusterError: TF_CONFIG is not a chief's, the port is in use, a process does not come, is another than TF_CONFIG
            says, has another version of this package or of TensorFlow, or no native library.

    """
    global _current
    if _current is None:
        config = read()
        _current = Chief() if config is None else _connect(config, server.WAIT if wait is None else wait)
    return _current


def _connect(config, wait):
    if config.role != "chief":
        raise ClusterError(f"{config.name} is no chief: call cluster.serve_or_continue() at the top of the script")
    reason = native_info()["reason"]
    if reason is not None:
        raise ClusterError(f"the chief lacks the native library, which every process of a cluster needs: {reason}")
    listening(config).close()
    _wait(config, wait)
    listening(config).close()  # TensorFlow's server would share a port with another one
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")
    chief = _ClusterChief(config)
    atexit.register(chief.at_exit)
    chief.start()
    return chief


def _wait(config, wait):
    """Returns when all other processes listen."""
    missing, deadline = config.tasks("ps", "worker"), time.monotonic() + wait
    while True:
        missing = [task for task in missing if answers(config.address(*task), 1.0) is None]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"after {wait:g} seconds nothing listens at {_places(config, missing)}: start what is missing, with "
                "cluster.serve_or_continue() at the top of its script, or see there why it ended"
            )
        time.sleep(0.5)


def _places(config, tasks):
    return ", ".join(f"{name(*task)} ({config.cluster[task[0]][task[1]]})" for task in tasks)


def in_parallel(calls, seconds):
    """What each call returns or raises, or TimeoutError; each in a thread of its own, which holds nothing up."""
    results = [TimeoutError(f"no answer within {seconds:g} seconds") for _ in calls]

    def run(number, call):
        try:
            results[number] = call()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(results)


def at(place, function, *arguments):
    """The NumPy values of what a function returns whose ops run on a device, in any thread.

    Without an executor of its own, a thread would get the errors of other threads' ops on other devices.
    """
    tensors = [tf.convert_to_tensor(x) for x in arguments]  # here: on its way to a device it would hold Python up
    own = executor.new_executor(enable_async=False)
    context.context().executor = own  # until it is deleted
    try:
        with tf.device(place):
            return [value.numpy() for value in function(*tensors)]
    finally:
        with contextlib.suppress(tf.errors.OpError):
            own.wait()  # its end would write the error once more
        own.clear_error()


class Chief:
    """What a model asks of its cluster; this one is of a process by itself, where nothing is lost.

    Attributes:
        servers: the devices that hold tables, for `tf.device`.
        workers: the devices that run steps.
        coordinator: tf.distribute's ClusterCoordinator, or None: steps then run where they are called.

    """

    def __init__(self):
        self.servers = [device("localhost", 0)]
        self.workers = [device("localhost", 0)]
        self.coordinator = None

    def check(self, error=None):
        """Raises ClusterError if a server is lost.

        Args:
            error: an error that may come from such a loss: if it is TensorFlow's, the servers are looked at now.

        """

    def check_workers(self):
        """Raises ClusterError if one does not answer; it is called when nothing was done for a long time."""

    def finish(self):
        """Ends the servers and workers, with exit code 0; at the normal end of the process this is done by itself."""


class _ClusterChief(Chief):
    def __init__(self, config):
        self.config = config
        self.servers = [device(*task) for task in config.tasks("ps")]
        self.workers = [device(*task) for task in config.tasks("worker")]
        self._others = config.tasks("ps", "worker")
        self._lock = threading.Lock()
        self._lost = None  # the line that says which server is
        self._done = threading.Event()
        self._connected = False

    def start(self):
        """Connects, checks who is there, and watches the servers from then on."""
        (found,) = in_parallel([self._strategy], CONNECT)
        if isinstance(found, Exception):
            self._lost = f"TensorFlow cannot connect to the cluster: {_line(found)}; see the logs of its processes"
            raise ClusterError(self._lost)
        tf.get_logger().addFilter(_of_interest)
        self.coordinator = tf.distribute.coordinator.ClusterCoordinator(found)
        self._connected = True
        answered = in_parallel([partial(at, device(*task), handshake.hello) for task in self._others], CONNECT)
        wrong = [self._what_is_wrong(*each) for each in zip(self._others, answered, strict=True)]
        if any(wrong):
            raise ClusterError("; ".join(filter(None, wrong)))
        server.watched_by(self)
        for watch in (self._watch_addresses, self._watch_answers):
            threading.Thread(target=watch, daemon=True).start()

    def _strategy(self):
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self.config.cluster), task_type="chief", task_id=0, rpc_layer="grpc"
        )
        return tf.distribute.ParameterServerStrategy(resolver)

    def _what_is_wrong(self, task, answer):
        """What to do about a process that gave this answer to `hello`, or None."""
        who = _places(self.config, [task])
        if isinstance(answer, Exception):
            if "Could not find callback" in str(answer):
                return f"{who} serves without deepfm_ops: call cluster.serve_or_continue() at the top of its script"
            return f"{who} does not say who it is: {_line(answer)}"
        found = json.loads(answer[0])
        for package, version in handshake.here().items():
            if found.get(package) != version:
                return (
                    f"{who} has {package} {found.get(package)}, the chief has {version}: install one version everywhere"
                )
        own = found["role"], found["index"]
        if own != task:
            return f"{who} takes itself for {name(*own)}: start every process with one TF_CONFIG cluster"
        if found["native"] is not None:
            return f"{who} lacks the native library: {found['native']}"
        return None

    def check(self, error=None):
        if isinstance(error, tf.errors.OpError) and self._lost is None:
            start = time.monotonic()
            for task in self.config.tasks("ps"):
                if not self._listens(self.config.address(*task)):
                    self._lose(task, start)
            if self._lost is None:
                self._ask(15.0)
        if self._lost is not None:
            raise ClusterError(self._lost) from error

    def check_workers(self):
        tasks = self.config.tasks("worker")
        answered = in_parallel([partial(at, device(*task), handshake.hello) for task in tasks], 15.0)
        missing = [task for task, answer in zip(tasks, answered, strict=True) if isinstance(answer, Exception)]
        if missing:
            raise ClusterError(
                f"no step was done for {server.WAIT:g} seconds, and {_places(self.config, missing)} does not answer: "
                "end what is left of it, and start the job again; it goes on from its last checkpoint"
            )

    def _listens(self, address):
        for _ in range(TRIES):
            if answers(address, TRY) is not None:
                return True
            self._done.wait(0.5)
        return False

    def _ask(self, seconds):
        """Notes a server that has an error for an answer, as one has that was started again; returns the slow ones."""
        start, asked, slow = time.monotonic(), self.config.tasks("ps"), []
        for _ in range(TRIES):
            answered = in_parallel([partial(at, device(*task), handshake.hello) for task in asked], seconds)
            failed = [task for task, answer in zip(asked, answered, strict=True) if isinstance(answer, Exception)]
            slow += [task for task, answer in zip(asked, answered, strict=True) if isinstance(answer, TimeoutError)]
            asked = [task for task in failed if task not in slow]
            if not asked:
                return slow
            self._done.wait(0.5)
        self._lose(asked[0], start)
        return slow

    def _watch_addresses(self):
        """Tries a connection to each server every second."""
        servers = self.config.tasks("ps")
        addresses = {task: answers(self.config.address(*task), TRY) or self.config.address(*task) for task in servers}
        while not self._done.wait(1.0) and self._lost is None:
            for task, address in addresses.items():
                start = time.monotonic()
                if not self._listens(address):
                    self._lose(task, start)

    def _watch_answers(self):
        """Has each server answer every other second."""
        while not self._done.wait(2.0) and self._lost is None:
            start = time.monotonic()
            for task in self._ask(PING):
                self._lose(task, start + PING)

    def _lose(self, task, since):
        """Says that a server is lost, the first; `since` when, the process ends some seconds later whatever it does."""
        with self._lock:
            if self._lost is not None or self._done.is_set():
                return
            self._lost = (
                f"{_places(self.config, [task])} is lost, and its rows with it; start the job again, it goes on from "
                "its last checkpoint"
            )
        server.say(self._lost)
        deadline = since + END - time.monotonic()
        _end_within(max(0.0, deadline) + 3.0)
        threading.Thread(target=self._end_after, args=(deadline,), daemon=True).start()

    def _end_after(self, seconds):
        """Ends the process after so long, unless it does by itself: what it does waits for the server."""
        if not self._done.wait(max(0.0, seconds)):
            self._end()

    def _end(self):
        sys.stdout.flush()
        sys.stderr.flush()
        _end_within(4.0)
        self._done.set()
        self._tell(FOLLOWED, 2.0)
        os._exit(1)  # TensorFlow's threads still wait for the server

    def _tell(self, code, seconds):
        """Has the other processes end with an exit code."""
        if self._connected:
            in_parallel(
                [partial(at, device(*task), handshake.finish, np.int32(code)) for task in self._others], seconds
            )

    def finish(self):
        self._finish(0, 5.0)

    def _finish(self, code, seconds):
        if not self._done.is_set():
            self._done.set()
            self._tell(code, seconds)

    def at_exit(self):
        _end_within(60.0)
        if self._lost is not None:
            self._end()
        self._finish(FOLLOWED if server.failed.is_set() else 0, 5.0)
        sys.stderr.flush()
        os.dup2(_NOWHERE.fileno(), 2)  # TensorFlow tells servers that have ended of each function that is freed


def _end_within(seconds):
    """Ends the process then, with exit code 1, though TensorFlow kept Python from running, as for a stopped server."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_NOWHERE)


def _of_interest(record):
    """Of ClusterCoordinator's pages on each failed step, one line for a lost worker; `check` tells of servers."""
    if record.filename != "cluster_coordinator.py":
        return True
    if str(record.msg).startswith("Worker %s failed"):
        index = record.args[0].rpartition(":")[2]
        _LOGGER.warning("%s is lost; until it is back its steps run on other workers", name("worker", index))
    return False


def _line(error):
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
