"""Reading a click log, its vocabularies and its ids, by others: `side(clock, path)`, for bench/data_worker.py.

Every side reads all 40 columns, numbers as numbers, and then makes one array of ids per categorical column. FuxiCTR
itself is not installed: `fuxictr` does what its FeatureProcessor and Tokenizer do with a categorical column.
"""

import collections
import pathlib

NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]
NAMES = ["label", *NUMERIC, *CATEGORICAL]


def is_parquet(path):
    return pathlib.Path(path).suffix == ".parquet"


def check(path, ids):
    """That there is one array of ids for each column, as long as the others."""
    assert len(ids) == len(CATEGORICAL) and len({len(column) for column in ids}) == 1, path
    return {"rows": len(ids[0])}


def pandas(clock, path):
    import pandas as pd

    with clock("read"):
        table = read_pandas(path)
    with clock("fit"):
        vocabularies = {name: pd.Index(table[name].dropna().unique()) for name in CATEGORICAL}
    with clock("transform"):
        ids = [vocabularies[name].get_indexer(table[name]) for name in CATEGORICAL]
    return check(path, ids)


def read_pandas(path):
    import pandas as pd

    if is_parquet(path):
        return pd.read_parquet(path, columns=NAMES)
    types = {name: "str" for name in CATEGORICAL} | {name: "float64" for name in NUMERIC}
    return pd.read_csv(path, sep="\t", names=NAMES, header=None, dtype=types)


def _schema():
    import polars as pl

    return {name: pl.String if name in CATEGORICAL else pl.Int32 for name in NAMES}


def read_polars(path):
    import polars as pl

    if is_parquet(path):
        return pl.read_parquet(path, columns=NAMES)
    return pl.read_csv(path, separator="\t", has_header=False, schema=_schema())


def polars(clock, path):
    import polars as pl

    with clock("read"):
        table = read_polars(path)
    with clock("fit"):
        enums = {name: pl.Enum(table[name].drop_nulls().unique()) for name in CATEGORICAL}
    with clock("transform"):
        ids = [table[name].cast(enums[name], strict=False).to_physical() for name in CATEGORICAL]
    return check(path, ids)


def polars_streaming(clock, path):
    """Its streaming engine: neither pass holds the file, so reading is in both."""
    import polars as pl

    if is_parquet(path):
        scan = pl.scan_parquet(path).select(NAMES)
    else:
        scan = pl.scan_csv(path, separator="\t", has_header=False, schema=_schema())
    with clock("vocabulary"):
        plans = [scan.select(pl.col(name).drop_nulls().unique()) for name in CATEGORICAL]
        found = pl.collect_all(plans, engine="streaming")
        enums = {name: pl.Enum(each[name]) for name, each in zip(CATEGORICAL, found, strict=True)}
    rows = 0
    with clock("ids"):
        ids = [pl.col(name).cast(enums[name], strict=False).to_physical() for name in CATEGORICAL]
        for batch in scan.with_columns(ids).collect_batches(engine="streaming"):
            rows += batch.height
    return {"rows": rows}


def read_pyarrow(path):
    import pyarrow as pa
    from pyarrow import csv, parquet

    if is_parquet(path):
        return parquet.read_table(path, columns=NAMES)
    types = {name: pa.string() if name in CATEGORICAL else pa.int32() for name in NAMES}
    return csv.read_csv(
        path,
        csv.ReadOptions(column_names=NAMES),
        csv.ParseOptions(delimiter="\t"),
        csv.ConvertOptions(column_types=types, strings_can_be_null=True),
    )


def pyarrow(clock, path):
    import pandas  # noqa: F401, which pyarrow looks for, so that the clock does not see it come
    import pyarrow.compute as pc
    from pyarrow import csv, dataset, parquet  # noqa: F401, likewise

    with clock("read"):
        table = read_pyarrow(path)
    with clock("fit"):
        vocabularies = {name: pc.unique(table[name]).drop_null() for name in CATEGORICAL}
    with clock("transform"):
        ids = [pc.index_in(table[name], value_set=vocabularies[name]) for name in CATEGORICAL]
    return check(path, ids)


def sklearn(clock, path):
    import numpy as np
    from sklearn.preprocessing import OrdinalEncoder

    with clock("read"):
        table = read_pandas(path)
    options = {"handle_unknown": "use_encoded_value", "unknown_value": -1, "encoded_missing_value": -1}
    with clock("fit"):
        encoder = OrdinalEncoder(dtype=np.int64, **options).fit(table[CATEGORICAL])
    with clock("transform"):
        ids = encoder.transform(table[CATEGORICAL])
    return check(path, ids.T)


def keras(clock, path):
    """Reading includes the tensors that StringLookup takes."""
    import keras
    import polars  # noqa: F401, so that the clock does not see it come
    import tensorflow as tf

    with clock("read"):
        table = read_polars(path)
        tensors = {name: tf.constant(table[name].fill_null("").to_numpy(), tf.string) for name in CATEGORICAL}
    with clock("fit"):
        layers = {name: keras.layers.StringLookup(mask_token="") for name in CATEGORICAL}
        for name, layer in layers.items():
            layer.adapt(tensors[name])
    with clock("transform"):
        ids = [layers[name](tensors[name]) for name in CATEGORICAL]
    return check(path, ids)


def fuxictr(clock, path):
    """Polars reads, pandas counts a column at a time, a dict and a function of Python look the values up."""
    import pandas  # noqa: F401, so that the clock does not see it come
    import polars as pl

    with clock("read"):
        table = read_polars(path)
        table = table.with_columns(pl.col(CATEGORICAL).fill_null(""))
    vocabularies, ids = {}, []
    with clock("fit"):
        for name in CATEGORICAL:
            counts = collections.Counter(dict(table[name].to_pandas().value_counts()))
            known = [text for text, _ in counts.most_common() if text]
            vocabularies[name] = {text: number for number, text in enumerate(known, 1)}
    with clock("transform"):
        for name in CATEGORICAL:
            known = vocabularies[name]
            unseen = len(known) + 1
            ids.append(table[name].to_pandas().map(lambda text, known=known, unseen=unseen: known.get(text, unseen)))
    return check(path, ids)


def libsvm(clock, path):
    from sklearn.datasets import load_svmlight_file

    with clock("read"):
        matrix, labels = load_svmlight_file(path, zero_based=True)
    return {"rows": len(labels), "pairs": matrix.nnz, "bytes": pathlib.Path(path).stat().st_size}
