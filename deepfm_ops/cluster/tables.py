"""Tables whose rows are spread over parameter servers: row r is row r // N of part r % N."""

import concurrent.futures
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import _library
from deepfm_ops.cluster import remote
from deepfm_ops.cluster.initializers import rows_of
from deepfm_ops.placement import beside

CHUNK = 1 << 16  # rows at a time


class Sharded(NamedTuple):
    """Something that has a value per row: a table, or what an optimizer keeps of one.

    Attributes:
        name: unique in the model.
        parts: tf.Variable [rows of the part, ...] each, on a server of its own.
        rows: of all parts.

    """

    name: str
    parts: list
    rows: int


def rows_of_part(part, parts, rows):
    return (rows - part + parts - 1) // parts


def is_wide(parts, rows):
    """Whether the rows of a part need int64 to be numbered."""
    return rows_of_part(0, parts, rows) > np.iinfo(np.int32).max


def on_each(function, *arguments):
    """[function(...)] of the arguments side by side, so that servers work at the same time."""

    def alone(*some):
        with remote.on(None):
            return function(*some)

    with concurrent.futures.ThreadPoolExecutor(min(64, max(1, len(arguments[0])))) as pool:
        return list(pool.map(alone, *arguments))


class Table:
    """One table, or the first-order weights.

    Args:
        variable: keras.Variable of the model that a worker computes, in whose place the rows of a batch stand.
        initializer: makes each row for itself.
        servers: devices.
        rows: of the table.
        row_counts: function (part) of what optimizers ask tables for, see `layers`.

    Attributes:
        parts: keras.Variable of each server.

    """

    def __init__(self, variable, initializer, servers, rows, row_counts):
        self.variable, self.initializer, self.rows = variable, initializer, rows
        self.name, self.dtype, self.columns = variable.path, variable.dtype, tuple(variable.shape[1:])
        self.parts: list[Any] = []
        for part, server in enumerate(servers):
            with tf.device(server):
                shape = (rows_of_part(part, len(servers), rows), *self.columns)
                made = keras.Variable("zeros", shape, self.dtype, name=f"{variable.name}_{part}")
            made.row_counts = lambda part=part: row_counts(part)
            self.parts.append(made)
        self._fill()

    def _fill(self):
        """Gives the rows their initial values, on their servers, some at a time."""
        count = len(self.parts)

        def fill(part):
            variable = self.parts[part].value

            def chunk(start, stop):
                with beside(variable):
                    local = tf.range(start, stop)
                    rows = rows_of(self.initializer, local * count + part, self.columns, self.dtype)
                    variable.scatter_update(tf.IndexedSlices(rows, local))

            number = tf.TensorSpec((), tf.int64)
            chunk = tf.function(chunk, autograph=False, input_signature=[number, number]).get_concrete_function()
            for begin in range(0, variable.shape[0], CHUNK):
                chunk(tf.constant(begin, tf.int64), tf.constant(min(begin + CHUNK, variable.shape[0]), tf.int64))

        on_each(fill, range(count))


def chunks(sharded, read=None):
    """The rows of the whole, in their order, as NumPy arrays [n, ...]: some of every part at a time.

    Args:
        sharded: `Sharded`.
        read: function (number of a part, local rows int64 [n]) to the values there; None: those of the variable.

    """
    parts = sharded.parts

    def piece(part, begin):
        with beside(parts[part]):
            local = tf.range(begin, max(begin, min(begin + CHUNK, parts[part].shape[0])), dtype=tf.int64)
            found = tf.gather(parts[part], local) if read is None else read(part, local)
        return found.numpy()

    for begin in range(0, parts[0].shape[0], CHUNK):
        pieces = on_each(lambda part, begin=begin: piece(part, begin), range(len(parts)))
        whole = np.empty((sum(map(len, pieces)), *pieces[0].shape[1:]), pieces[0].dtype)
        for part, some in enumerate(pieces):
            whole[part :: len(parts)] = some
        yield whole


def split(indices, parts, rows):
    """Which rows a batch needs of each part.

    Args:
        indices: int64 [B, P].
        parts: number of them.
        rows: of the table.

    Returns:
        positions: int64 [B, P], of each pair's row among all those that are needed, part after part.
        local: int32 [n] of each part (int64 where a part has 2^31 rows), ascending.

    Raises:
        InvalidArgumentError: an index outside [0, rows), as the op says it.

    """
    native = _library.native_ops("native")
    return native.deepfm_ops_split_rows(
        indices=indices, parts=parts, num_rows=rows, Tlocal=tf.int64 if is_wide(parts, rows) else tf.int32
    )
