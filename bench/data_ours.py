"""What bench/data_worker.py runs of deepfm_ops, and what makes the files that all sides read."""

import pathlib
import statistics
import time

import numpy as np
import pyarrow as pa
from data_peers import CATEGORICAL, NUMERIC, read_pyarrow

from deepfm_ops import FeatureDictionary
from deepfm_ops.data import read_libffm, read_libsvm, text_files
from deepfm_ops.data.synthetic import ClickLog

COLUMNS = {"categorical": CATEGORICAL, "numeric": dict.fromkeys(NUMERIC, "log1p"), "label": "label"}
BATCH = 4096
text_files.pyarrow()  # loads the parts of it that are used, so that no clock sees them come


def write(clock, folder, rows):
    """The first rows of one and the same log, in both formats."""
    for form in ("tsv", "parquet"):
        ClickLog(seed=1).write(folder, range(1), rows, format=form)


def fit(clock, path, dictionary):
    features = FeatureDictionary()
    with clock("vocabulary"):
        features.fit(path, **COLUMNS)
    features.save(dictionary)
    return {"rows": features.num_samples, "features": features.num_features}


def fit_small(clock, path):
    """A vocabulary that does not grow any more: the columns of few values."""
    small = [name for name, count in ClickLog(seed=1).cardinalities.items() if count < 20_000]
    features = FeatureDictionary()
    with clock("vocabulary"):
        features.fit(path, **COLUMNS | {"categorical": small})
    return {"rows": features.num_samples, "features": features.num_features}


def stream(clock, path, dictionary):
    batches = FeatureDictionary.load(dictionary).stream(path, BATCH)
    rows = 0
    with clock("ids"):
        for _, labels in batches:
            rows += len(labels)
    return {"rows": rows}


def shuffled(clock, path, dictionary):
    batches = FeatureDictionary.load(dictionary).stream(path, BATCH, shuffle=True)
    rows = 0
    with clock("ids, shuffled"):
        for _, labels in batches:
            rows += len(labels)
    return {"rows": rows}


def table(clock, path):
    """The same on a table in memory, which pyarrow reads."""
    import pandas  # noqa: F401, which pyarrow's reader looks for, so that the clock does not see it come
    from pyarrow import dataset  # noqa: F401, likewise

    with clock("read"):
        found = read_pyarrow(path)
    with clock("fit"):
        features = FeatureDictionary().fit(found, **COLUMNS)
    with clock("transform"):
        indices, _ = features.transform(found)
    return {"rows": len(indices)}


def write_vocabulary(clock, folder, values):
    """A dictionary of 26 columns with so many values in all, and the scorer of an FM with it."""
    from deepfm_ops import DeepFM, export_scorer

    each, step = values // len(CATEGORICAL), 100_000

    def tables():
        for start in range(0, each, step):
            numbers = range(start, min(each, start + step))
            yield pa.table({name: [text(name, number) for number in numbers] for name in CATEGORICAL})

    features = FeatureDictionary()
    with clock("fit"):
        features.fit(tables(), categorical=CATEGORICAL)
    folder = pathlib.Path(folder)
    features.save(folder / "dictionary")
    model = DeepFM.from_features(features, embedding_dim=4, use_deep=False)
    export_scorer(model, folder / "scorer")
    size = [(folder / name).stat().st_size / 1e6 for name in ("dictionary", "scorer")]
    return {"features": features.num_features, "MB": size}


def text(column, number):
    """The number-th value of a column: 8 digits that all differ."""
    return f"{(number * 2654435761 + int(column[1:])) % 2**32:08x}"


def _requests(clock, start, respond, values, later):
    """Milliseconds to open, of the first request, and of the median later one, each of other values."""
    rng, each = np.random.default_rng(), values // len(CATEGORICAL)
    records = [{name: text(name, int(rng.integers(each))) for name in CATEGORICAL} for _ in range(later + 1)]
    begin = time.perf_counter()
    opened = start()
    seconds = [time.perf_counter() - begin]
    for record in records:
        begin = time.perf_counter()
        respond(opened, record)
        seconds.append(time.perf_counter() - begin)
    ms = [1e3 * each for each in seconds]
    return {"open": ms[0], "first": ms[1], "second": ms[2], "later": statistics.median(ms[2:]), "worst": max(ms[2:])}


def open_dictionary(clock, folder, values, later=200):
    path = pathlib.Path(folder) / "dictionary"
    return _requests(
        clock, lambda: FeatureDictionary.load(path), lambda opened, record: opened.transform(record), values, later
    )


def open_scorer(clock, folder, values, later=200):
    from deepfm_ops.scorer import Scorer

    path = pathlib.Path(folder) / "scorer"
    return _requests(clock, lambda: Scorer.load(path), lambda opened, record: opened.score(record), values, later)


def write_libsvm(clock, path, dictionary, folder):
    """A click log as pairs, without the missing ones: folder/clicks.svm, by index, as others want it, and .ffm."""
    features, folder = FeatureDictionary.load(dictionary), pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    with open(folder / "clicks.svm", "w") as svm, open(folder / "clicks.ffm", "w") as ffm:
        for (indices, values), labels in features.stream(path, BATCH):
            for label, row, numbers in zip(labels.tolist(), indices.tolist(), values.tolist(), strict=True):
                pairs = [(i, f"{i}:{x:.6g}") for i, x in zip(row, numbers, strict=True)]
                svm.write(f"{label:.0f} {' '.join(pair for i, pair in sorted(pairs) if i)}\n")
                fields = [f"{field}:{pair}" for field, (i, pair) in enumerate(pairs) if i]
                ffm.write(f"{label:.0f} {' '.join(fields)}\n")


def libsvm(clock, path):
    read = read_libffm if path.endswith(".ffm") else read_libsvm
    with clock("read"):
        samples = read(path)
    with clock("matrices"):
        indices, _, labels, _ = samples
    return {"rows": len(labels), "pairs": len(samples.flat_indices), "bytes": pathlib.Path(path).stat().st_size}
