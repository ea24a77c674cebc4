"""A stream of made-up batches, each of them made where it is read."""

import functools
import types

import numpy as np

from deepfm_ops.data.stream import FIXED, Stream

DIFFERENT = 8  # batches, made once in each process: making one takes longer than a step


class ZipfStream(Stream):
    """Indices by Zipf's law, all values one, labels at random.

    Args:
        num_features, num_fields, batch_size: of a batch.
        batches: of a pass.

    """

    def __init__(self, num_features, num_fields, batch_size, batches, shard=(0, 1)):
        sizes = {"num_features": num_features, "num_fields": num_fields, "num_columns": num_fields}
        self.features = types.SimpleNamespace(**sizes, fields=[True], field_sizes=[1] * num_fields)
        self.has_labels = True
        self.size, self.batches_of_all, self.shard = batch_size, batches, tuple(shard)
        self.epoch = self.at = 0

    def __reduce__(self):
        sizes = self.features.num_features, self.features.num_fields, self.size, self.batches_of_all
        return make, (sizes, None, {}, self.state())

    def check_labels(self, task):
        pass

    def state(self):
        fixed = dict.fromkeys(FIXED) | {"files": "", "features": "", "batch_size": self.size}
        return (
            {"epoch": self.epoch, "batch": self.at, "rows": 0, "piece": 0, "chunk": 0, "row": 0}
            | fixed
            | {"shard": list(self.shard)}
        )

    def restore(self, state):
        self.epoch, self.at = state["epoch"], state["batch"]

    def __iter__(self):
        part, parts = self.shard
        mine = range(part, self.batches_of_all, parts)
        epoch = self.epoch
        while self.at < len(mine) and self.epoch == epoch:
            number = mine[self.at]
            self.at += 1
            if self.at == len(mine):
                self.epoch, self.at = epoch + 1, 0
            yield made(self.features.num_features, self.features.num_fields, self.size, number % DIFFERENT)


@functools.cache
def made(num_features, num_fields, size, number):
    rng, shape = np.random.default_rng(number), (size, num_fields)
    ids = np.minimum(rng.zipf(1.05, shape), 10**12) * 2654435761 % num_features
    labels = (rng.random(size) < 0.3).astype(np.float32)
    return (ids, np.ones(shape, np.float32)), labels


def make(sizes, _, options, state):
    stream = ZipfStream(*sizes, shard=options["shard"])
    stream.restore(state)
    return stream
