"""libsvm and libffm files of any size as the source of a model: their indices are numbers already."""

import os

import numpy as np

from deepfm_ops.data import libsvm, paths
from deepfm_ops.data.records import Bad


class PairFeatures:
    r"""What a model has to know of libsvm or libffm files: sizes, fields, how often each index occurs.

    It is to these files what FeatureDictionary is to tables, and `DeepFM.from_features` takes it likewise. libsvm has
    no fields: what the k-th pair of a row is differs from row to row, so that there is nothing for a deep part to
    learn, and the model is a factorization machine.

    Attributes:
        has_fields: whether the files are libffm.
        field_sizes: list of int, columns of the matrices per field: the most pairs of the field in a row; of libsvm 1
            for each pair of the longest row.
        num_features: the largest index + 1.
        num_fields, num_columns: how many field_sizes there are, and their sum.
        counts: int64 [num_features], how often each index occurs with a value other than zero.
        num_samples: rows.
        num_skipped: lines that `fit` left out.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "clicks.ffm")
        >>> _ = file.write_text("1 0:3:1 1:7:.5 1:8:.5\n0 0:4:1\n")
        >>> features = PairFeatures().fit(file)
        >>> features.num_features, features.field_sizes
        (9, [1, 2])
        >>> [labels.tolist() for _, labels in features.stream(file, 10)]
        [[1.0, 0.0]]

    """

    label = "label"  # what a stream asks for

    def __init__(self):
        self.has_fields, self.field_sizes = False, []
        self.counts, self.num_samples, self.num_skipped, self._is_signed = np.zeros(1, np.int64), 0, 0, False

    @property
    def fields(self):
        return self.field_sizes

    @property
    def num_features(self):
        return len(self.counts)

    @property
    def num_fields(self):
        return len(self.field_sizes)

    @property
    def num_columns(self):
        return sum(self.field_sizes)

    def fit(self, source, *, on_bad="error"):
        """Reads the files once, in bounded memory.

        A model for files of which one is to be predicted only is made of all of them: it has the columns of the
        longest rows.

        Args:
            source: path, glob or list of paths: plain, .gz or .zst. They are libffm if the first row's pairs are
                field:index:value.
            on_bad: "error", or "skip": lines that cannot be read are left out, and counted in `num_skipped`.

        Returns:
            self.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `data.read_libsvm`.

        """
        has_fields = _has_fields(source)
        sizes, counts = np.zeros(0, np.int64), np.zeros(1, np.int64)
        rows, skipped, signs = 0, 0, set()
        for chunk in _chunks(source, has_fields, on_bad):
            samples = _samples(chunk)
            found = np.array(samples.field_sizes)
            sizes = _longer(sizes, len(found))
            sizes[: len(found)] = np.maximum(sizes[: len(found)], found)
            occurring = np.bincount(samples.flat_indices[samples.flat_values != 0], minlength=samples.num_features)
            counts = _longer(counts, len(occurring))
            counts[: len(occurring)] += occurring
            rows, skipped = rows + len(samples), skipped + samples.skipped
            signs |= set(np.unique(samples.labels)[:3].tolist())
        self.has_fields, self.field_sizes, self.counts = has_fields, np.maximum(sizes, 1).tolist(), counts
        self.num_samples, self.num_skipped = rows, skipped
        self._is_signed = signs <= {-1.0, 1.0} and -1.0 in signs
        return self

    def transform(self, source, *, on_bad="error"):
        """(indices int64 [B, num_columns], values float32 [B, num_columns]) of files that fit in memory."""
        self._require_fit()
        read = libsvm.read_libffm if self.has_fields else libsvm.read_libsvm
        return read(source, on_bad=on_bad).padded(self.field_sizes)

    def stream(self, source, batch_size, **options):
        """Batches ((indices, values), labels) for Keras, see `data.stream.Stream`; a file is read from its start."""
        from deepfm_ops.data.stream import stream_class

        return stream_class()(self, source, batch_size, **options)

    def _require_fit(self):
        if not self.num_samples:
            raise ValueError("fit the PairFeatures first")

    # What a stream asks for.

    def fingerprint(self):
        return f"{self.num_features} of {len(self.field_sizes)} fields"

    def reading(self, source, labels, on_bad):
        return _Reading(self, source, on_bad)

    def arrays(self, chunk, labels):
        samples = _samples(chunk)
        arrays = list(samples.padded(self.field_sizes))
        if labels:
            arrays.append(np.maximum(samples.labels, 0) if self._is_signed else samples.labels)
        return arrays


class _Reading:
    def __init__(self, features, source, on_bad):
        self._features, self.bad = features, Bad(on_bad)
        self.paths = paths.expand(source)
        self.labels = {}  # those of other tasks are told by the model

    def fingerprint(self):
        return "; ".join(f"{os.path.basename(path)} {os.path.getsize(path)}" for path in self.paths)

    def pieces(self):
        return [_File(self, self._features.has_fields, path) for path in self.paths]


class _File:
    def __init__(self, reading, has_fields, path):
        self._reading, self._has_fields, self._path = reading, has_fields, path

    def chunks(self):
        bad = self._reading.bad
        for chunk in _chunks(self._path, self._has_fields, "skip" if bad.skips else "error"):
            bad.count += chunk.skipped
            yield lambda chunk=chunk: chunk


def _chunks(source, has_fields, on_bad):
    return (libsvm.iter_libffm if has_fields else libsvm.iter_libsvm)(source, on_bad=on_bad)


def _samples(chunk):
    return libsvm.Samples(
        chunk.labels, chunk.row_splits, chunk.fields, chunk.indices, chunk.values, skipped=chunk.skipped
    )


def _has_fields(source):
    """Whether the pairs of the first row have fields."""
    with paths.opened(paths.expand(source)[0]) as file:
        for line in file:
            tokens = line.split(b"#")[0].replace(b",", b" ").split()
            if len(tokens) > 1:
                return tokens[1].count(b":") == 2
    return False


def _longer(array, size):
    return array if len(array) >= size else np.concatenate([array, np.zeros(size - len(array), array.dtype)])
