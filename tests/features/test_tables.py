"""Whatever holds columns is a table: the same features and scores from every library's."""

import datetime
import decimal
import itertools

import keras
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat, get_feature_names
from deepfm_ops.scorer import Scorer

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
PLAIN = {"city": ["Rome", "Oslo", "", "Rome"], "user": [7, 7, 9, 8], "age": [0.5, 1.0, 2.0, -1.0]}
TAGS = [["a", "b"], [], ["b", "c", "a"], ["c"]]
DATA = {**PLAIN, "tags": TAGS}
RAGGED = tf.ragged.constant(TAGS, dtype=tf.string)
PADDED = np.array([["a", "b", ""], ["", "", ""], ["b", "c", "a"], ["c", "", ""]])
TABLES = {
    "pandas": pd.DataFrame(DATA),
    "pandas, nullable": pd.DataFrame(DATA).convert_dtypes(),
    "pandas, pyarrow": pd.DataFrame(PLAIN).convert_dtypes(dtype_backend="pyarrow").assign(tags=TAGS),
    "pandas, categories": pd.DataFrame(DATA).astype({"city": "category", "user": "category"}),
    "polars": pl.DataFrame(DATA),
    "pyarrow": pa.table(DATA),
    "pyarrow, dictionary": pa.table({**DATA, "city": pa.array(DATA["city"]).dictionary_encode()}),
    "pyarrow batch": pa.RecordBatch.from_pydict(DATA),
    "lists": DATA,
    "tuples": {name: tuple(values) for name, values in DATA.items()},
    "arrays": {**{name: np.array(values) for name, values in PLAIN.items()}, "tags": np.array(TAGS, object)},
    "bytes": {**PLAIN, "city": np.array(PLAIN["city"], "S"), "tags": [[x.encode() for x in row] for row in TAGS]},
    "[B, 1]": {**{name: np.array(values)[:, None] for name, values in PLAIN.items()}, "tags": TAGS},
    "tensors": {**{name: tf.constant(values) for name, values in PLAIN.items()}, "tags": RAGGED},
    "sparse": {**PLAIN, "tags": RAGGED.to_sparse()},
    "series": {name: pd.Series(values, index=[3, 1, 4, 1]) for name, values in DATA.items()},
    "polars series": {name: pl.Series(values) for name, values in DATA.items()},
    "arrow arrays": {name: pa.chunked_array([values[:1], values[1:]]) for name, values in DATA.items()},
}
FIELDS = {"categorical": ["city", "user"], "numeric": ["age"], "multivalued": ["tags"]}
COLUMNS = [
    SparseFeat("user", 10),
    SparseFeat("city", 50, use_hash=True, dtype="string"),
    DenseFeat("age"),
    VarLenSparseFeat(SparseFeat("tags", 20, use_hash=True, dtype="string"), 3),
]
LABELS = np.array([1, 0, 1, 0])
MAKERS = pytest.mark.parametrize(
    "make", [pd.DataFrame, pl.DataFrame, pa.table, dict], ids=["pandas", "polars", "pyarrow", "dict"]
)


@pytest.fixture(scope="module", name="fitted")
def _fitted():
    return FeatureDictionary().fit(DATA, **FIELDS)


@pytest.fixture(scope="module", name="model")
def _model():
    model = DeepFM.from_columns(COLUMNS, COLUMNS, dnn_hidden_units=(4,), seed=1)
    model.compile("adam", "binary_crossentropy")
    for weight in model.weights:
        weight.assign(np.random.default_rng(0).normal(size=weight.shape) / 3)
    return model


@pytest.fixture(scope="module", name="scorers")
def _scorers(model, fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    deepfm_ops.export_scorer(model, folder / "columns")
    deepfm_ops.export_scorer(DeepFM.from_features(fitted, hidden_units=(4,)), folder / "features")
    return [Scorer.load(folder / name) for name in ("columns", "features")]


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_gives_the_same(kind, fitted, model, scorers):
    table = TABLES[kind]
    again = FeatureDictionary().fit(table, **FIELDS)
    for name in ("city", "user", "tags"):
        assert again.values(name) == fitted.values(name)
        np.testing.assert_array_equal(again.indices(name), fitted.indices(name))
    for got, expected in zip(fitted.transform(table), fitted.transform(DATA), strict=True):
        np.testing.assert_array_equal(got, expected)
    expected = model.predict(DATA, verbose=0)
    np.testing.assert_allclose(model.predict(table, verbose=0), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model(table), expected, rtol=0, atol=1e-6)
    for scorer in scorers:
        np.testing.assert_array_equal(scorer.score(table), scorer.score(DATA))
    np.testing.assert_allclose(scorers[0].score(table), expected[:, 0], rtol=0, atol=1e-6)


def test_arrays_with_fields(fitted):
    table = np.rec.fromarrays(
        [np.array(PLAIN["city"]), PLAIN["user"], PLAIN["age"], np.array(["a|b", "", "b|c|a", "c"])],
        names="city,user,age,tags",
    )
    np.testing.assert_array_equal(fitted.transform(table)[0], fitted.transform(DATA)[0])


NUMBERS = {
    "integers": [1, 2, None, 4],
    "fractions": [0.5, None, 2.0, -1.5],
    "booleans": [True, None, False, True],
    "decimals": [decimal.Decimal("0.5"), None, decimal.Decimal(2), decimal.Decimal(-3)],
    "text": ["0.5", None, "2", "-1"],
    "nothing": [None, None, None, 1.0],
}


@MAKERS
@pytest.mark.parametrize("kind", NUMBERS)
def test_numeric_columns(kind, make):
    values = NUMBERS[kind]
    indices, numbers = FeatureDictionary().fit_transform(make({"x": values}), numeric="x")
    assert numbers[:, 0].tolist() == [0.0 if value is None else float(value) for value in values]
    assert indices[:, 0].tolist() == [int(value is not None) for value in values]


@MAKERS
def test_times_are_no_numbers(make):
    when = datetime.datetime(2020, 1, 1)
    with pytest.raises(TypeError, match=r"column 'x' must hold numbers, got .*2020.* in row 0"):
        FeatureDictionary().fit(make({"x": [when, when]}), numeric="x")
    with pytest.raises(TypeError, match=r"column 'x': a category must be a string or a number, got .*2020"):
        FeatureDictionary().fit(make({"x": [when, when]}), categorical="x")


def test_narrow_floats_keep_their_digits():
    expected = FeatureDictionary().fit({"x": [0.1, 0.7]}, categorical="x").fields
    narrow = np.float32([0.1, 0.7])
    for column in (narrow, pd.Series(narrow), pl.Series(narrow), pa.array(narrow), tf.constant(narrow)):
        assert FeatureDictionary().fit({"x": column}, categorical="x").fields == expected


@pytest.mark.parametrize("tags", [["a", "b"], ("b", "c"), "a|c", None, []], ids=str)
def test_one_record(tags, fitted, model, scorers):
    record = {"city": "Rome", "user": 7, "age": 0.5, "tags": tags}
    lists = {name: [value] for name, value in record.items()}
    np.testing.assert_array_equal(fitted.transform(record)[0], fitted.transform(lists)[0])
    assert scorers[1].score(record) == scorers[1].score(lists)
    if isinstance(tags, list | tuple):
        assert scorers[0].score(record) == scorers[0].score(lists)
        assert model.predict(record, verbose=0) == model.predict(lists, verbose=0)


def test_one_name_where_a_list_is_expected():
    one = FeatureDictionary().fit(DATA, categorical="city", numeric="age", multivalued="tags")
    lists = FeatureDictionary().fit(DATA, categorical=["city"], numeric=["age"], multivalued=["tags"])
    assert one.fields == lists.fields
    assert get_feature_names(COLUMNS[0]) == ["user"]
    model = DeepFM.from_columns(COLUMNS[0], COLUMNS[0], fm_group="default_group", dnn_hidden_units=(2,))
    assert model.predict({"user": [1]}, verbose=0).shape == (1, 1)


def batches(size=2):
    """What a generator yields: NumPy's own text arrays."""
    data = {name: np.array(DATA[name]) for name in PLAIN} | {"tags": PADDED}
    for start in range(0, 4, size):
        yield {name: column[start : start + size] for name, column in data.items()}, LABELS[start : start + size]


class Batches(keras.utils.PyDataset):
    def __init__(self, **options):
        super().__init__(**options)
        self.batches, self.epochs = list(batches()), 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.batches[index]

    def on_epoch_end(self):
        self.epochs += 1


def test_generators_and_py_datasets_of_numpy_text(model):
    data = Batches()
    model.fit(batches(), verbose=0, validation_data=Batches())
    model.fit(data, verbose=0, epochs=2)
    assert data.epochs >= 2  # Keras itself calls it once more
    loss = model.evaluate(batches(), verbose=0)
    np.testing.assert_allclose(model.evaluate(Batches(workers=2), verbose=0), loss, rtol=1e-5)
    np.testing.assert_allclose(model.evaluate(DATA, LABELS, batch_size=2, verbose=0), loss, rtol=1e-5)
    expected = model.predict(DATA, verbose=0)
    np.testing.assert_allclose(model.predict(Batches(), verbose=0), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict((x for x, _ in batches()), verbose=0), expected, atol=1e-6)


def dataset(rank, labels=True):
    data = {name: np.reshape(DATA[name], (4,) + (1,) * (rank - 1)) for name in PLAIN} | {"tags": PADDED}
    return tf.data.Dataset.from_tensor_slices((data, LABELS) if labels else data).batch(3)


FORMS = {
    "[B]": lambda: (dataset(1),),
    "[B, 1]": lambda: (dataset(2),),
    "arrays": lambda: (DATA, LABELS),
    "ragged": lambda: (tf.data.Dataset.from_tensor_slices(({**PLAIN, "tags": RAGGED}, LABELS)).batch(2),),
}


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)])
def test_any_order_of_forms(order):
    """Keras forgets shapes that change between calls; here they never do.

    Each form is the first of one order, and in one of them next to each other form.
    """
    model = DeepFM.from_columns(COLUMNS, COLUMNS, dnn_hidden_units=(4,), seed=1)
    model.compile("adam", "binary_crossentropy", metrics=[keras.metrics.AUC()])
    forms = [list(FORMS.values())[number]() for number in order]
    model.fit(*forms[0], verbose=0)
    for one, other in itertools.pairwise(forms):
        model.evaluate(*other, verbose=0)
        assert model.predict(one[0], verbose=0).shape == (4, 1)
        model.fit(*other, verbose=0)
        np.testing.assert_allclose(model.predict(other[0], verbose=0), model.predict(one[0], verbose=0), atol=1e-6)


def test_datasets_without_labels(model):
    expected = model.predict(DATA, verbose=0)
    for rank in (1, 2):
        np.testing.assert_allclose(model.predict(dataset(rank, labels=False), verbose=0), expected, atol=1e-6)


def test_other_multivalued_inputs(tmp_path):
    """Integers, and the weights of values, that are ragged too."""
    columns = [
        VarLenSparseFeat(SparseFeat("seen", 9), 3, "sum", weight_name="w", weight_norm=False),
        VarLenSparseFeat(SparseFeat("rated", 9), 2, "mean", length_name="n"),
    ]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(3,))
    full = {
        "seen": np.array([[1, 2, 0], [3, 0, 0]]),
        "w": np.array([[0.5, 2, 0], [1, 0, 0]]),
        "rated": np.array([[0, 1], [4, 0]]),
        "n": [2, 1],
    }
    expected = model.predict(full, verbose=0)
    short = {"seen": [[1, 2], [3]], "w": [[0.5, 2], [1]], "rated": [[0, 1], [4]], "n": [2, 1]}
    deepfm_ops.export_scorer(model, tmp_path / "m")
    for given in (
        short,
        {**short, "seen": tf.ragged.constant(short["seen"]), "w": tf.ragged.constant(short["w"])},
        {name: pl.Series(values, strict=False) for name, values in short.items()},
    ):
        np.testing.assert_allclose(model.predict(given, verbose=0), expected, atol=1e-6)
        np.testing.assert_allclose(Scorer.load(tmp_path / "m").score(given), expected[:, 0], atol=1e-6)
    for wrong in ([[1, 2, 3, 4], [3]], tf.ragged.constant([[1, 2, 3, 4], [3]])):
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="input '?seen'? .*4 values"):
            model.predict({**short, "seen": wrong}, verbose=0)
    with pytest.raises(ValueError, match="input 'n' must be dense"):
        model.predict({**short, "n": tf.ragged.constant([[2], [1]])}, verbose=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "a table must be a pandas or polars DataFrame, a pyarrow Table, or a dict of columns, got NoneType"),
        ([{"city": "Rome"}], "a table must be .*, got list"),
        (np.zeros((3, 2)), "a table must be .*, got ndarray"),
        (pl.DataFrame(DATA).lazy(), "a LazyFrame has no rows yet: pass .collect\\(\\) of it"),
    ],
    ids=["None", "records", "matrix", "lazy"],
)
def test_what_holds_no_columns(wrong, message, fitted):
    for call in (fitted.transform, lambda table: FeatureDictionary().fit(table, categorical="city")):
        with pytest.raises(TypeError, match=message):
            call(wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"city": "Rome"}, ValueError, "'city' must be a list or an array with an entry per row, as 'user' is"),
        ({"city": {"Rome", "Oslo", "Bern", "Lima"}}, ValueError, "'city' must be a list or an array"),
        ({"city": ["Rome"]}, ValueError, "must be equally long, got .*'city': 1"),
        ({"age": np.zeros((4, 2))}, ValueError, "'age' must (be one column of values|have shape)"),
    ],
    ids=["one value", "set", "short", "two columns"],
)
def test_columns_that_do_not_fit(change, error, message, fitted, model, scorers):
    for call in (fitted.transform, lambda x: model.predict(x, verbose=0), scorers[0].score, scorers[1].score):
        with pytest.raises(error, match=message):
            call({**DATA, **change})
