"""Batches of a source of any size, in bounded memory: read and encoded in other threads, ahead of the step.

The source is cut into *pools* of rows: one chunk each or, shuffled, as many chunks as hold `shuffle_rows` rows, of
pieces in an order that follows from (seed, epoch); a pool's rows are put in an order that follows from (seed, epoch,
its first chunk). Batches are cut from the pools one after the other, across their ends. So a position is three
numbers, the first chunk of a pool (a piece, and a place in it) and how many of the pool's rows were taken, and all
batches from there on follow from it.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import queue
import threading

import numpy as np

from deepfm_ops import heads
from deepfm_ops.features.vocabulary import native

SEVERAL = "tell the dictionary the columns of all heads, fit(..., label=[...])"
FIXED = ("files", "features", "batch_size", "shuffle", "seed", "shard", "drop_remainder", "shuffle_rows")


class Stream:
    """Batches ((indices, values), labels) of a source; `FeatureDictionary.stream` makes them.

    Labels are float32 [B]; of several columns, {column: [B]}, NaN where a cell is missing.

    Keras's `fit`, `evaluate` and `predict` take it as it is; `dataset()` is a tf.data.Dataset. Iterating goes on from
    the position that `state` tells, and every pass has an order of its own.

    Args:
        features: a fitted FeatureDictionary, or `data.PairFeatures`.
        source: as for `FeatureDictionary.fit`. An iterator can be passed over once.
        batch_size: rows of a batch.
        shuffle: True: the rows come in another order each pass: pieces of the files (ranges of 4 MB, row groups,
            compressed files as a whole) in a random order, and rows at random within `shuffle_rows`. "rows": pieces in
            their order, and rows at random within `shuffle_rows`: for logs that drift, whose last day counts most.
        seed: int; the order follows from it, and from the number of the pass, alone.
        shard: (i, n): the i-th of n parts of the rows, without overlap: whole pieces where there are many, else every
            n-th row.
        drop_remainder: whether a last batch of fewer rows is left out.
        labels: whether there are labels, in the columns that `fit` was told; None: if it was told one.
        on_bad: "error", or "skip", as for `FeatureDictionary.fit`; the log is told at the end of each pass.
        shuffle_rows: rows that are held in memory to be shuffled, 12 bytes a column.
        threads: that encode; None: half of the machine's cores, 4 at most.

    Attributes:
        num_skipped: records that were left out so far.

    Raises:
        ValueError: arguments that do not fit; while reading, a record that cannot be read, by file, line and column.
        KeyError, FileNotFoundError, ImportError: as `FeatureDictionary.fit`.

    """

    def __init__(
        self,
        features,
        source,
        batch_size,
        *,
        shuffle=False,
        seed=0,
        shard=(0, 1),
        drop_remainder=False,
        labels=None,
        on_bad="error",
        shuffle_rows=1 << 17,
        threads=None,
    ):
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size must be a number from 1 on, got {batch_size!r}")
        if shuffle not in (True, False, "rows"):
            raise ValueError(f"shuffle must be True, False or 'rows', got {shuffle!r}")
        if not isinstance(shuffle_rows, int | np.integer) or shuffle_rows < 1:
            raise ValueError(f"shuffle_rows must be a number from 1 on, got {shuffle_rows!r}")
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard!r}")
        if not features.fields:
            raise ValueError("fit or load the FeatureDictionary first")
        self.has_labels = features.label is not None if labels is None else bool(labels)
        if self.has_labels and features.label is None:
            raise ValueError("labels=True needs a FeatureDictionary whose fit was told the column: fit(..., label=...)")
        self.features = features
        self._source, self._on_bad = source, on_bad
        self.size, self.shuffle, self.seed, self.shard = (
            int(batch_size),
            shuffle if shuffle == "rows" else bool(shuffle),
            int(seed),
            (int(index), int(count)),
        )
        self.drop_remainder, self.shuffle_rows = bool(drop_remainder), int(shuffle_rows)
        self._threads = max(1, min(4, (os.cpu_count() or 1) // 2)) if threads is None else threads
        self._reading = features.reading(source, self.has_labels, on_bad)
        self._fingerprint = self._reading.fingerprint()
        self._pieces = None
        self.epoch, self._batch, self._rows, self._at = 0, 0, 0, (0, 0, 0)
        self._is_used_up, self.error = False, None
        # {(epoch, batch): the position after it}, of batches that were handed out and wait to be trained on.
        self._handed, self._endless, self.is_at_end = None, False, False
        self._lengths = {}  # batches of each pass that was read to its end

    def __reduce__(self):
        names = ("batch_size", "shuffle", "seed", "shard", "drop_remainder", "shuffle_rows")
        options = {name: value for name, value in self._fixed().items() if name in names}
        options |= {"labels": self.has_labels, "on_bad": self._on_bad, "threads": self._threads}
        return _opened, (self.features, self._source, options, self.state())

    @property
    def num_skipped(self):
        return self._reading.bad.count

    def check_labels(self, task):
        """From now on a label of a file that is none of the task (see `heads`) is a bad record.

        Raises:
            ValueError: a head that has no column among the labels.

        """
        if not self.has_labels:
            return
        rules, label = {head.name: rule for head, rule in heads.rules(task)}, self.features.label
        if not isinstance(label, list):
            if len(rules) > 1:
                raise ValueError(f"the stream has one column of labels, the model the heads {list(rules)}: {SEVERAL}")
            rules = dict(zip([label], rules.values(), strict=True))
        elif not isinstance(task, dict):
            raise ValueError(
                f"the stream has the labels {label}, and the model predicts one thing: make it with {{name: task}}"
            )
        elif unknown := [name for name in rules if name not in label]:
            raise ValueError(f"the stream has no labels of the head {unknown[0]!r}, but of {label}: {SEVERAL}")
        self._reading.labels |= rules

    # The position.

    def state(self):
        """A small dict for JSON: the batch after the last one that was trained on, or that an iteration gave."""
        piece, chunk, row = self._at
        position = {
            "epoch": self.epoch,
            "batch": self._batch,
            "rows": self._rows,
            "piece": piece,
            "chunk": chunk,
            "row": row,
        }
        return position | self._fixed()

    def _fixed(self):
        return {
            "files": self._fingerprint,
            "features": self.features.fingerprint(),
            "batch_size": self.size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "shard": list(self.shard),
            "drop_remainder": self.drop_remainder,
            "shuffle_rows": self.shuffle_rows,
        }

    def restore(self, state):
        """Goes on where another stream, of the same source and arguments, stood.

        Raises:
            ValueError: a state of other files or arguments, or no state.

        """
        try:
            position = {name: int(state[name]) for name in ("epoch", "batch", "rows", "piece", "chunk", "row")}
            if min(position.values()) < 0:
                raise ValueError(str(position))
            given = {name: state[name] for name in FIXED}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no state of a stream: {error!r}") from None
        for name, value in self._fixed().items():
            if given[name] != value:
                raise ValueError(f"the state is of a stream with {name} {given[name]!r}, this one has {value!r}")
        self.epoch, self._batch, self._rows = position["epoch"], position["batch"], position["rows"]
        self._at = (position["piece"], position["chunk"], position["row"])

    def track(self, endless=False):
        """From now on, batches count when `trained` says so, and not when they are handed out.

        Args:
            endless: whether one pass follows the other, so that who takes the batches has no end of one.

        """
        self._handed, self._endless, self.is_at_end = {}, endless, False

    def untrack(self):
        self._handed, self._endless, self.is_at_end = None, False, False

    @property
    def rows(self):
        """Rows of this pass that were trained on."""
        return self._rows

    @property
    def batch(self):
        """Batches of this pass that were trained on."""
        return self._batch

    def trained(self, batches):
        """Moves the position past so many more batches; returns how many rows they had."""
        total = 0
        for _ in range(batches):
            if self.is_at_end:  # Keras counts whole executions of several steps
                break
            key = (self.epoch, self._batch + 1)
            if self._handed is None or key not in self._handed:
                raise RuntimeError("more batches were trained on than this stream gave")
            at, rows = self._handed.pop(key)
            self._move(at, rows)
            total += rows
        return total

    def _move(self, at, rows):
        self._at, self._batch, self._rows = at, self._batch + 1, self._rows + rows
        if self._lengths.get(self.epoch) == self._batch:
            self.epoch, self._batch, self._rows, self._at = self.epoch + 1, 0, 0, (0, 0, 0)
            self.is_at_end = not self._endless

    @contextlib.contextmanager
    def raising(self):
        """Inside, an error while batches are read comes out as what it is, not as TensorFlow's."""
        self.error = None
        try:
            yield
        except Exception as error:
            if self.error is None or self.error is error:
                raise
            raise self.error from None

    # The batches.

    def __iter__(self):
        """The batches from the position on, to the end of the pass; each moves the position past it."""
        epoch = self.epoch
        for batch, at, rows in self._pass(epoch, self._batch, self._at):
            if self.epoch == epoch:
                self._move(at, rows)
            yield batch

    def batches(self, after=0):
        """The batches for Keras: of training from the position on, of everything else a whole pass.

        Args:
            after: passes that were taken before, where nobody tracks them.

        """
        is_training = self._handed is not None
        epoch, first, at = (self.epoch, self._batch, self._at) if is_training else (self.epoch + after, 0, (0, 0, 0))
        bad = self._reading.bad
        try:
            while True:
                number = first
                for number, (batch, position, rows) in enumerate(self._pass(epoch, first, at), first + 1):
                    if is_training and self._handed is not None:
                        self._handed[epoch, number] = position, rows
                    yield batch
                if number == 0:  # of which Keras says nothing, or waits for ever
                    raise ValueError(f"there is no record for a batch of {self.size}. {bad.summary(0)}".strip())
                if not self._endless:
                    return
                epoch, first, at = epoch + 1, 0, (0, 0, 0)
        except Exception as error:  # for `raising`: of TensorFlow's it is a text only
            self.error = error
            raise

    def _pass(self, epoch, first, at):
        """(batch, position after it, rows) from a position in a pass; the last one is known to be when it is given."""
        before, number, rows, bad = None, first, 0, self._reading.bad
        skipped = bad.count
        for batch in self._cut(epoch, at):
            rows += batch[2]
            if before is not None:
                number += 1
                yield before
            before = batch
        bad.report(rows, skipped)
        if before is not None:
            number += 1
            self._lengths[epoch] = number
            yield before

    def _cut(self, epoch, at):
        parts, have = [], 0
        for place, order, arrays, skip in self._pools(epoch, at):
            row, rows = skip, len(arrays[0])
            while row < rows:
                take = min(self.size - have, rows - row)
                parts.append((arrays, slice(row, row + take) if order is None else order[row : row + take]))
                row, have = row + take, have + take
                if have == self.size:
                    yield self._as_batch(parts), (*place, row), have
                    parts, have = [], 0
        if have and not self.drop_remainder:
            yield self._as_batch(parts), (*place, rows), have

    def _as_batch(self, parts):
        """The rows of a batch, of one pool or several, in memory that TensorFlow uses where it lies."""
        arrays, rows = parts[0]
        if len(parts) == 1 and isinstance(rows, slice):
            arrays = [array[rows] for array in arrays]
        else:
            whole = native.matrices(sum(_length(rows) for _, rows in parts), arrays[0].shape[1])
            start = 0
            for some, rows in parts:
                stop = start + _length(rows)
                for array, to in zip(some, whole, strict=False):
                    if isinstance(rows, slice):
                        to[start:stop] = array[rows]
                    else:
                        np.take(array, rows, axis=0, out=to[start:stop], mode="clip")  # others would be buffered
                start = stop
            arrays = [*whole, *([np.concatenate([some[2][rows] for some, rows in parts])] if self.has_labels else [])]
        return ((arrays[0], arrays[1]), self._labels(arrays[2])) if self.has_labels else ((arrays[0], arrays[1]),)

    def _labels(self, found):
        """What was read of labels, [B] or [B, columns], as a batch has it."""
        names = self.features.label
        return dict(zip(names, np.ascontiguousarray(found.T), strict=True)) if isinstance(names, list) else found

    def _pools(self, epoch, at):
        """((piece, chunk) of the first chunk, order or None, arrays, rows to skip) of each pool."""
        held, rows, place, skip = [], 0, at[:2], at[2]
        for here, arrays in self._chunks(epoch, *place):
            place = place if held else here
            held.append(arrays)
            rows += len(arrays[0])
            if not self.shuffle or rows >= self.shuffle_rows:
                yield self._pool(epoch, place, held, rows, skip)
                held, rows, skip = [], 0, 0
        if held:
            yield self._pool(epoch, place, held, rows, skip)

    def _pool(self, epoch, place, held, rows, skip):
        arrays = held[0] if len(held) == 1 else [np.concatenate(some) for some in zip(*held, strict=True)]
        order = np.random.default_rng((self.seed, epoch, *place)).permutation(rows) if self.shuffle else None
        return place, order, arrays, skip

    def _chunks(self, epoch, piece, chunk):
        """((piece, chunk), arrays) of the chunks from one on, read in a thread and encoded in others."""
        tasks = queue.Queue(self._threads + 2)
        stop = threading.Event()

        def put(item):
            while not stop.is_set():
                try:
                    tasks.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read():
            try:
                for place, task in self._tasks(epoch, piece, chunk):
                    if stop.is_set() or not put((place, pool.submit(self._encoded, task, place))):
                        return
                put(None)
            except BaseException as error:  # the reader's error is raised where its rows would have come
                put((None, error))

        pool = concurrent.futures.ThreadPoolExecutor(self._threads, "deepfm_ops-encode")
        reader = threading.Thread(target=read, name="deepfm_ops-read", daemon=True)
        reader.start()
        owner = os.getpid()
        try:
            while (item := tasks.get()) is not None:
                place, future = item
                if place is None:
                    raise future
                arrays = future.result()
                if arrays is not None:
                    yield place, arrays
                if os.getpid() != owner:
                    raise RuntimeError("a pass over a stream cannot go on in a forked process: begin another one there")
        finally:
            if os.getpid() == owner:  # a forked process has none of the threads
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                reader.join()
                pool.shutdown()

    def _tasks(self, epoch, first, chunk):
        pieces = self._all_pieces()
        if isinstance(pieces, list):
            order = np.arange(len(pieces))
            if self.shuffle is True:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(pieces))
            if self._by_piece:
                order = order[self.shard[0] :: self.shard[1]]
            if first > len(order):
                raise ValueError(f"the position is in piece {first}, and the source has {len(order)}")
            named = ((number, pieces[piece]) for number, piece in enumerate(order[first:], first))
        else:
            named = ((number, piece) for number, piece in enumerate(pieces) if number >= first)
        for number, piece in named:
            for place, task in enumerate(piece.chunks()):
                if number > first or place >= chunk:
                    yield (number, place), task

    @property
    def _by_piece(self):
        return self.shard[1] > 1 and isinstance(self._pieces, list) and len(self._pieces) >= 16 * self.shard[1]

    def _all_pieces(self):
        if self._pieces is None:
            pieces = self._reading.pieces()
            if isinstance(pieces, list):
                self._pieces = pieces
            elif isinstance(self._source, list | tuple):
                self._pieces = list(pieces)
            else:
                if isinstance(self._source, collections.abc.Iterator):
                    if self._is_used_up:
                        raise ValueError(
                            "the source is an iterator, which can be passed over once: give a list, or files"
                        )
                    self._is_used_up = True
                return pieces
        return self._pieces

    def _encoded(self, task, place):
        table = task()
        if table is None:
            return None
        arrays = self.features.arrays(table, self.has_labels)
        if self.shard[1] > 1 and not self._by_piece:
            arrays = [array[self.shard[0] :: self.shard[1]] for array in arrays]
        return arrays

    def dataset(self):
        """The stream as a tf.data.Dataset of ((indices, values), labels); every iteration over it is another pass."""
        import tensorflow as tf

        columns = self.features.num_columns
        inputs = (tf.TensorSpec((None, columns), tf.int64), tf.TensorSpec((None, columns), tf.float32))
        labels, names = tf.TensorSpec((None,), tf.float32), self.features.label
        labels = dict.fromkeys(names, labels) if isinstance(names, list) else labels
        signature = (inputs, labels) if self.has_labels else (inputs,)
        passes = itertools.count()
        batches = lambda: self.batches(next(passes))  # noqa: E731
        return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(2)

    # What Keras asks of a data adapter; see `stream_class`.

    def get_tf_dataset(self):
        return self.dataset()

    def get_numpy_iterator(self):
        return self.batches()

    @property
    def num_batches(self):
        """0: not known. Of None Keras would take the length of the first pass, which may be the rest of one."""
        return 0

    @property
    def batch_size(self):
        return self.size

    @property
    def has_partial_batch(self):
        return None

    @property
    def partial_batch_size(self):
        return None

    def on_epoch_begin(self):
        pass

    def on_epoch_end(self):
        pass


def _length(rows):
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _opened(features, source, options, state):
    """A stream that was pickled."""
    stream = stream_class()(features, source, **options)
    stream.restore(state)
    return stream


@functools.cache
def stream_class():
    """Stream, and where Keras is installed one of its data adapters too: what all of its models take as it is."""
    try:
        from keras.src.trainers.data_adapters.data_adapter import DataAdapter
    except ImportError:
        return Stream
    return type("Stream", (Stream, DataAdapter), {"__doc__": Stream.__doc__, "__module__": __name__})
