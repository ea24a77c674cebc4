"""The chief's side of a cluster: it waits for the others, asks who they are, and sees when a server is lost."""

import atexit
import json
import os
import sys
import threading
import time
from functools import partial

import numpy as np
import tensorflow as tf

from deepfm_ops import native_info
from deepfm_ops.cluster import handshake, server
from deepfm_ops.cluster.config import ClusterError, answers, device, name, read

CONNECT = 180.0  # seconds that TensorFlow has to connect to processes that listen, and they to say who they are
TRIES, TRY = 3, 2.5  # connections that fail in a row, and seconds for each, until a server is lost
PING = 600.0  # seconds without an answer of a server that takes connections; one that writes its shards is busy
END = 12.0  # seconds after a loss at which the process ends, whatever holds it up

_current = None


def current():
    """The Chief of this process, or None before `connect`."""
    return _current


def connect(wait=None):
    """Connects the chief to its servers and workers, the first time.

    Args:
        wait: seconds that they have to appear; None: what `serve_or_continue` was given, else 600.

    Returns:
        A Chief, the same in every call. Without TF_CONFIG, one of this process alone.

    Raises:
        ClusterError: TF_CONFIG is not a chief's, a process does not come, is another than TF_CONFIG says, has another
            version of this package or of TensorFlow, or no native library.

    """
    global _current
    if _current is None:
        config = read()
        door = server.door()
        if wait is None:
            wait = server.WAIT if door is None else door.wait
        _current = Chief() if config is None else _connect(config, wait)
    return _current


def _connect(config, wait):
    if config.role != "chief":
        raise ClusterError(f"{config.name} is no chief: call cluster.serve_or_continue() at the top of the script")
    reason = native_info()["reason"]
    if reason is not None:
        raise ClusterError(f"the chief lacks the native library, which every process of a cluster needs: {reason}")
    _wait(config, wait)
    if server.door() is not None:
        server.door().close()
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


def _all(calls, seconds):
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


def _at(task, function, *arguments):
    """The result of a remote function in the process of a task."""
    with tf.device(device(*task)):
        return function(*arguments)[0].numpy()


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
            error: an error of TensorFlow's that may come from such a loss: the servers are looked at now.

        """

    def finish(self):
        """Ends the servers and workers, with exit code 0; at the normal end of the process this is done by itself."""


class _ClusterChief(Chief):
    def __init__(self, config):
        self.config = config
        self.servers = [device(*task) for task in config.tasks("ps")]
        self.workers = [device(*task) for task in config.tasks("worker")]
        self._others = config.tasks("ps", "worker")
        self._lost = None  # the line that says which server is
        self._done = threading.Event()
        self._connected = False

    def start(self):
        """Connects, checks who is there, and watches the servers from then on."""
        (found,) = _all([self._strategy], CONNECT)
        if isinstance(found, Exception):
            self._lost = f"TensorFlow cannot connect to the cluster: {_line(found)}; see the logs of its processes"
            raise ClusterError(self._lost)
        self.coordinator = tf.distribute.coordinator.ClusterCoordinator(found)
        self._connected = True
        answered = _all([partial(_at, task, handshake.hello) for task in self._others], CONNECT)
        wrong = [self._what_is_wrong(*each) for each in zip(self._others, answered, strict=True)]
        if any(wrong):
            raise ClusterError("; ".join(filter(None, wrong)))
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
        found = json.loads(answer)
        for package, version in handshake.here().items():
            if found[package] != version:
                return f"{who} has {package} {found[package]}, the chief has {version}: install one version everywhere"
        own = found["role"], found["index"]
        if own != task:
            return f"{who} takes itself for {name(*own)}: start every process with one TF_CONFIG cluster"
        if found["native"] is not None:
            return f"{who} lacks the native library: {found['native']}"
        return None

    def check(self, error=None):
        if error is not None and self._lost is None:
            self._look(15.0)
        if self._lost is not None:
            raise ClusterError(self._lost) from error

    def _look(self, seconds):
        """Notes a server that does not take a connection, or that answers no longer as the one that it was."""
        servers = self.config.tasks("ps")
        for task in servers:
            if not self._listens(self.config.address(*task)):
                self._lose(task)
        answered = _all([partial(_at, task, handshake.hello) for task in servers], seconds)
        for task, answer in zip(servers, answered, strict=True):
            if isinstance(answer, Exception) and not isinstance(answer, TimeoutError):
                self._lose(task)

    def _listens(self, address):
        for _ in range(TRIES):
            if answers(address, TRY) is not None:
                return True
            self._done.wait(0.5)
        return False

    def _watch_addresses(self):
        """Tries a connection to each server every second."""
        servers = self.config.tasks("ps")
        addresses = {task: answers(self.config.address(*task), TRY) or self.config.address(*task) for task in servers}
        while not self._done.wait(1.0):
            for task, address in addresses.items():
                start = time.monotonic()
                if not self._listens(address) and not self._done.is_set():
                    self._lose(task)
                    return self._end_by(start + END)
        return None

    def _watch_answers(self):
        """Has each server answer now and then, which one that was started again, or stands still, does not."""
        servers, failures = self.config.tasks("ps"), {}
        while not self._done.wait(5.0):
            answered = _all([partial(_at, task, handshake.hello) for task in servers], PING)
            for task, answer in zip(servers, answered, strict=True):
                failures[task] = failures.get(task, 0) + 1 if isinstance(answer, Exception) else 0
                if (isinstance(answer, TimeoutError) or failures[task] == TRIES) and not self._done.is_set():
                    self._lose(task)
                    return self._end_by(time.monotonic() + END)
        return None

    def _lose(self, task):
        if self._lost is None:
            self._lost = (
                f"{_places(self.config, [task])} is lost, and its rows with it; start the job again, it goes on from "
                "its last checkpoint"
            )

    def _end_by(self, deadline):
        """Ends the process at the deadline, if what it waits for in TensorFlow has not let it end by itself."""
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            print(f"deepfm_ops.cluster: {self._lost}", file=sys.stderr, flush=True)
            self._tell(1, 1.0)
            os._exit(1)

    def _tell(self, code, seconds):
        """Has the other processes end with an exit code."""
        if self._connected:
            _all([partial(_at, task, handshake.finish, np.int32(code)) for task in self._others], seconds)

    def finish(self):
        self._finish(0, 5.0)

    def _finish(self, code, seconds):
        if not self._done.is_set():
            self._done.set()
            self._tell(code, seconds)

    def at_exit(self):
        if self._lost is None:
            return self._finish(int(server.failed.is_set()), 5.0)
        self._finish(1, 2.0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # TensorFlow's threads still wait for the server


def _line(error):
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
