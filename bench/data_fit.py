"""Training from files beside the step alone, for bench/data_worker.py: all kinds take turns in one process.

Ready batches are in memory, as tensors or as NumPy arrays. A pass over a file is one epoch of `fit`.
"""

import functools
import time

import keras
import tensorflow as tf
from data_ours import BATCH

from deepfm_ops import DeepFM, FeatureDictionary, optimizers

SHAPES = {"FM": (), "DeepFM 256-128": (256, 128), "DeepFM 3x400": (400, 400, 400)}


def measure(clock, model, paths, dictionary, rounds):
    """Of each kind rows per second, on the wall and of the CPU, of each round, after a round that is not timed."""
    features, hidden = FeatureDictionary.load(dictionary), SHAPES[model]
    keras.utils.set_random_seed(1)
    made = DeepFM(features.num_features, features.num_fields, 16, hidden, use_deep=bool(hidden), seed=1)
    made.compile(optimizers.LazyAdam(1e-3) if hidden else optimizers.RowWiseAdagrad(0.02), "binary_crossentropy")
    arrays = list(features.stream(paths["tsv"], BATCH))
    tensors = [tf.nest.map_structure(tf.constant, batch) for batch in arrays]
    rows = sum(len(labels) for _, labels in arrays)

    def steps(batches):
        for inputs, labels in batches:
            made.train_on_batch(inputs, labels)

    def alone(form):
        for _ in features.stream(paths[form], BATCH).dataset():
            pass

    def fit(form, shuffle=False):
        made.fit(features.stream(paths[form], BATCH, shuffle=shuffle), epochs=1, verbose=0)

    kinds = {
        "train_on_batch, tensors": functools.partial(steps, tensors),
        "fit, TSV": functools.partial(fit, "tsv"),
        "fit, Parquet": functools.partial(fit, "parquet"),
        "fit, TSV shuffled": functools.partial(fit, "tsv", shuffle=True),
        "train_on_batch, arrays": functools.partial(steps, arrays),
        "dataset alone, TSV": functools.partial(alone, "tsv"),
        "dataset alone, Parquet": functools.partial(alone, "parquet"),
    }
    walls, cpus = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, run in kinds.items():
            begin, cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                walls[kind].append(rows / (time.perf_counter() - begin))
                cpus[kind].append(rows / (time.process_time() - cpu))
    return {"rows": rows, "features": features.num_features, "rates": walls, "CPU rates": cpus}
