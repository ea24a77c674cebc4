"""The ways that files and tables take into the package, and some of both."""

import copy

import numpy as np

from deepfm_ops import FeatureDictionary

FIELDS = {"categorical": "city", "numeric": "age", "multivalued": "tags", "label": "label"}
HEAD = "label,city,age,tags\n"
LINES = ["1,Rome,0.5,war|drama\n", "0,Oslo,,war\n", '1,"a ""b"", c",7,ü|drama\n', "0,007,-3.25,\n", "1,7.0,1e3,x\n"]
TEXT = HEAD + "".join(LINES)
TABLE = {
    "label": [1, 0, 1, 0, 1],
    "city": ["Rome", "Oslo", 'a "b", c', "007", "7.0"],
    "age": [0.5, None, 7.0, -3.25, 1000.0],
    "tags": ["war|drama", "war", "ü|drama", None, "x"],
}
LISTS = [["war", "drama"], ["war"], ["ü", "drama"], None, ["x"]]
ENDINGS = ["", ".gz", ".zst"]
ROADS = ["fit", "update", "transform", "stream"]
ALL_ROADS = [*ROADS, "model.fit", "model.evaluate", "model.predict"]


def take(road, features, source, model=None, fields=FIELDS, **options):
    """(rows, records that were skipped) of a source, on a road."""
    if road == "fit":
        fresh = FeatureDictionary().fit(source, **fields, **options)
        return fresh.num_samples, fresh.num_skipped
    fresh = copy.copy(features)
    if road == "update":
        fresh.update(source, **options)
        return fresh.num_samples - features.num_samples, fresh.num_skipped
    if road == "transform":
        return len(fresh.transform(source, **options)[0]), fresh.num_skipped
    stream = features.stream(source, 2, **options)
    if road == "stream":
        rows = sum(len(batch[1]) for batch in stream)
    elif road == "model.fit":
        model.fit(stream, verbose=0)
        rows = None
    elif road == "model.evaluate":
        model.evaluate(stream, verbose=0)
        rows = None
    else:
        rows = len(model.predict(stream, verbose=0))
    return rows, stream.num_skipped


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def state(features):
    """What a dictionary holds, to be compared."""
    content = features.to_config()
    del content["arrays"]
    arrays = features.vocabulary.arrays()
    names = [features.name(i) for i in range(features.num_features)]
    return content, names, {name: arrays[name].tolist() for name in ("columns", "counts", "changed")}
