"""What the chief asks of every other process: who it is, and to end."""

import json
import threading

import tensorflow as tf

from deepfm_ops import native_info
from deepfm_ops._version import __version__
from deepfm_ops.cluster import config, remote

met = threading.Event()  # a chief was here
finished = threading.Event()  # the chief has said so
code = 0  # to end with


def here():
    """What must be the same in the chief and in every process that it has, under the names that errors say."""
    return {"deepfm_ops": __version__, "TensorFlow": tf.__version__}


@remote.function(tf.string)
def hello():
    """JSON of `here` and "role", "index", and "native", which is why there is no native library or None."""
    met.set()
    own = config.read()
    return json.dumps({**here(), "role": own.role, "index": own.index, "native": native_info()["reason"]}).encode()


@remote.function(tf.int32)
def finish(status):
    """Ends the process, once this has been answered, with the exit code `status`."""
    global code
    code = int(status)
    finished.set()
    return status
