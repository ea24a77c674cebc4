"""Python functions that other processes of a cluster run, as ops of a graph.

TensorFlow's PyFunc op asks the process that runs it for the function of a token. All processes of a cluster run the
same package, so a token that is the function's name means the same in each of them.
"""

import contextlib
import functools

import tensorflow as tf
from tensorflow.python.eager import context, executor
from tensorflow.python.ops import script_ops

_functions = {}  # TensorFlow keeps weak references


def function(*dtypes):
    """A decorator: calls make an op that runs the function where the op is placed, by `tf.device`.

    The function takes NumPy arrays (text as bytes) and returns as many values as there are dtypes; it runs again where
    an op is run again. A ValueError in it is an InvalidArgumentError of the op, StopIteration an OutOfRangeError, and
    other errors are UnknownError; the text is the function's.

    Args:
        *dtypes: of what it returns.

    """

    def decorate(python):
        token = f"{python.__module__}.{python.__name__}"
        _functions[token] = python
        script_ops._py_funcs._funcs[token] = python

        @functools.wraps(python)
        def op(*inputs):
            return tf.raw_ops.PyFunc(input=[tf.convert_to_tensor(x) for x in inputs], token=token, Tout=list(dtypes))

        return op

    return decorate


@contextlib.contextmanager
def on(device):
    """Ops in this block and thread run on a device, and their errors are their own.

    Threads that share TensorFlow's executor, as they do else, may get the error of another one's op.
    """
    own = executor.new_executor(enable_async=False)
    try:
        with tf.device(device), context.executor_scope(own):
            yield
    finally:
        own.clear_error()
