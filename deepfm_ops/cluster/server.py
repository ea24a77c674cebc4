"""What a process of a cluster does: servers and workers serve until the chief is done, the chief goes on."""

import importlib
import os
import sys
import threading
import time

from deepfm_ops.cluster.config import ClusterError, answers, listening, read

REMOTE = ("handshake", "exports", "feeding", "storage")  # the modules whose functions other processes may run here
GONE = 8.0  # seconds without an answer after which a chief that was there is taken for dead
WAIT = 600.0

failed = threading.Event()  # an exception ends this process
_before = []  # the hook that was there
_chief = None
_said = set()


def serve_or_continue(wait=WAIT):
    """Stands at the top of a training script, which every process of a cluster runs.

    What a process is, the environment variable TF_CONFIG says; `python -m deepfm_ops.cluster launch` sets it on one
    machine, other launchers elsewhere. A parameter server or worker stays in this call and ends with it: with exit code
    0 when the chief has ended, with 1 and one line when the chief is lost. The chief waits until the others are there,
    and goes on with the script; whatever is made of TensorFlow's comes after this call. Without TF_CONFIG the script
    goes on as a process by itself.

    Where a ClusterError ends the script, it is one line from here on, without a traceback.

    Args:
        wait: seconds that the processes wait for each other at the start.

    Raises:
        ClusterError: TF_CONFIG does not describe a cluster, the port is in use, or the native library is missing; in
            the chief, what `coordinator.connect` says.

    """
    _hook()
    config = read()
    if config is None:
        return
    if config.role != "chief":
        _serve(config, wait)
    from deepfm_ops.cluster import coordinator

    coordinator.connect(wait)


def _hook():
    """Makes ClusterErrors that nothing catches one line, and notes that this process failed."""
    if not _before:
        _before.append(sys.excepthook)
        sys.excepthook = _hooked


def watched_by(chief):
    """Has a lost server said in the place of what TensorFlow says of it, where that ends the script."""
    global _chief
    _chief = chief


def say(text):
    """Writes a line about the cluster, once."""
    if text not in _said:
        _said.add(text)
        print(f"deepfm_ops.cluster: {text}", file=sys.stderr, flush=True)


def _hooked(kind, error, traceback):
    failed.set()
    try:
        if isinstance(error, ClusterError):
            raise error
        if _chief is not None and isinstance(error, Exception):
            _chief.check(error)
    except ClusterError as cause:
        say(str(cause))
    else:
        _before[0](kind, error, traceback)


def _serve(config, wait):
    """A parameter server's or worker's life; does not return."""
    listening(config).close()  # said before TensorFlow takes its seconds
    import tensorflow as tf

    from deepfm_ops import native_info

    reason = native_info()["reason"]
    if reason is not None:
        raise ClusterError(f"{config.name} lacks the native library, which every process of a cluster needs: {reason}")
    for module in REMOTE:
        importlib.import_module(f"deepfm_ops.cluster.{module}")
    from deepfm_ops.cluster import handshake

    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")  # a lost process is an error at once
    options = tf.compat.v1.ConfigProto(device_count={"GPU": 0} if config.role == "ps" else {})
    listening(config).close()  # TensorFlow's server would share a port with another one
    spec = tf.train.ClusterSpec(config.cluster)
    server = tf.distribute.Server(spec, config.role, config.index, protocol="grpc", config=options, start=False)
    server.start()
    print(f"{config.name} serves at {config.cluster[config.role][config.index]}, process {os.getpid()}", flush=True)
    try:
        reason = stay(config.address("chief"), wait, handshake.met, handshake.finished)
    except KeyboardInterrupt:
        _end(130)
    if reason is not None:
        say(f"{config.name} ends: {reason}")
        _end(1)
    time.sleep(0.5)  # the answer to the chief is on its way
    _end(handshake.code)


def stay(chief, wait, met, finished):
    """Returns when the chief has ended: None if it has said so, else why one has to believe it.

    Args:
        chief: its (host, port).
        wait: seconds that it has to appear.
        met: a threading.Event, set when it has asked something.
        finished: another, set when it says that it has ended.

    """
    seen, deadline = False, time.monotonic() + wait
    while not finished.wait(1.0):
        address = answers(chief, GONE / 2)
        if address is not None or (met.is_set() and not seen):
            seen, chief, deadline = True, address or chief, time.monotonic() + GONE
        elif time.monotonic() > deadline:
            where = f"{chief[0]}:{chief[1]}"
            if seen:
                return f"the chief at {where} is lost; start the job again, it goes on from its last checkpoint"
            return f"no chief came to {where} within {wait:g} seconds; start one, with the same TF_CONFIG cluster"
    return None


def _end(code):
    """Ends the process at once: TensorFlow's servers know no other end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
