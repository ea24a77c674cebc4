"""The ways to be wrong: what each kind of content is answered, in each place it can come to.

Places: `fit` and `transform` of a dictionary, a column `model`, the `scorer` of a dictionary's model and of a column
model's, and the example `server` (422, with the same text).
"""

import datetime
import decimal
import importlib.util
import pathlib
from typing import Any, NamedTuple

import fastapi
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat
from deepfm_ops.scorer import Scorer

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
GOOD = {"city": ["Rome", "Oslo", "Rome"], "age": [0.5, 1.0, 2.0], "tags": [["a"], ["b", "a"], []], "shop": [1, 2, 3]}
FIELDS = {"categorical": ["city", "shop"], "numeric": ["age"], "multivalued": ["tags"]}
COLUMNS = [
    SparseFeat("city", 30, use_hash=True, dtype="string"),
    SparseFeat("shop", 9),
    DenseFeat("age"),
    VarLenSparseFeat(SparseFeat("tags", 9, use_hash=True, dtype="string"), 2),
]
DATE, STAMP = datetime.date(2020, 1, 1), pd.Timestamp("2020")

UNUSABLE = r"'age', row 1: .* is no number to train on or to score"
NOTHING = r"'age', row 1: nan is no number to train on or to score"  # a column model knows of nothing missing
NO_NUMBER = "'age' must hold numbers, got .* in row 1"
NO_CATEGORY = "column 'city': a category must be a string or a number, got .*; convert it first"
NO_TEXT = "input 'city' must hold text, got .* in row 1"
NO_TAG = "input 'tags' must hold text, got .* in row 1"
NO_LIST = "column 'tags': an entry must be a list or a string, got .* in row 1"
NO_INDEX = "input 'shop' must hold (numbers|integers).* in row 1"
NOT_ALIKE = "input '.*' must hold equally long lists"
FINE, UNSEEN = "fine", "unseen"


class Case(NamedTuple):
    """What is answered to a value of a column: FINE, UNSEEN (as if nothing were there), or an error's text.

    `dictionary` is the answer of transform, and of the scorer and the server of a dictionary's model; `model` that of a
    column model, and of its scorer and server. The servers may refuse the type before: `served`, and `served_columns`.
    JSON: whether the value can come to a server at all.
    """

    column: str
    value: Any
    fit: str
    dictionary: str
    model: str
    json: bool = True
    served: str | None = None
    served_columns: str | None = None


TYPE = "must not hold "
TABLE = {
    "infinity": Case("age", np.inf, UNUSABLE, UNUSABLE, UNUSABLE, json=False),
    "minus infinity": Case("age", -np.inf, UNUSABLE, UNUSABLE, UNUSABLE, json=False),
    "1e300": Case("age", 1e300, UNUSABLE, UNUSABLE, UNUSABLE),
    "beyond 2^32": Case("age", -5e9, UNUSABLE, UNUSABLE, UNUSABLE),
    "huge integer": Case("age", 10**400, UNUSABLE, UNUSABLE, UNUSABLE, json=False),
    "NaT as number": Case("age", pd.NaT, UNUSABLE, UNUSABLE, UNUSABLE, json=False),
    "NaN": Case("age", float("nan"), FINE, UNSEEN, NOTHING, json=False),
    "None as number": Case("age", None, FINE, UNSEEN, NOTHING, served_columns=TYPE + "null"),
    "text as number": Case("age", "old", NO_NUMBER, NO_NUMBER, NO_NUMBER, True, TYPE + "text", TYPE + "text"),
    "digits as number": Case("age", "1.5", FINE, FINE, FINE, True, TYPE + "text", TYPE + "text"),
    "list as number": Case("age", [1, 2], NO_NUMBER, NO_NUMBER, NOT_ALIKE, True, TYPE + "lists"),
    "date as number": Case("age", DATE, NO_NUMBER, NO_NUMBER, NO_NUMBER, json=False),
    "timestamp as number": Case("age", STAMP, NO_NUMBER, NO_NUMBER, NO_NUMBER, json=False),
    "decimal": Case("age", decimal.Decimal("1.5"), FINE, FINE, FINE, json=False),
    "object as number": Case("age", {}, NO_NUMBER, NO_NUMBER, NO_NUMBER, True, TYPE + "objects", TYPE + "objects"),
    "None as category": Case("city", None, FINE, UNSEEN, FINE),
    "NaT as category": Case("city", pd.NaT, FINE, UNSEEN, FINE, json=False),
    "NA as category": Case("city", pd.NA, FINE, UNSEEN, FINE, json=False),
    "number among texts": Case("city", 7.0, FINE, UNSEEN, FINE),
    "bytes": Case("city", b"Rome", FINE, FINE, FINE, json=False),
    "bytes that are no UTF-8": Case("city", b"\xff", "column 'city': .* is not UTF-8", UNSEEN, NO_TEXT, json=False),
    "date as category": Case("city", DATE, NO_CATEGORY, UNSEEN, NO_TEXT, json=False),
    "list as category": Case("city", ["a"], NO_CATEGORY, UNSEEN, NOT_ALIKE, True, TYPE + "lists"),
    "object as category": Case("city", {}, NO_CATEGORY, UNSEEN, NO_TEXT, True, TYPE + "objects", TYPE + "objects"),
    "number as list": Case("tags", 3, NO_LIST, NO_LIST, NOT_ALIKE),
    "None as list": Case("tags", None, FINE, UNSEEN, UNSEEN),
    "object as list": Case("tags", {}, NO_LIST, NO_LIST, NOT_ALIKE, True, TYPE + "objects", TYPE + "objects"),
    "too long a list": Case("tags", list("abc"), FINE, FINE, "'tags' must have shape .*: row 1 has 3 values"),
    "date in a list": Case("tags", [DATE], "column 'tags': a category must be", UNSEEN, NO_TAG, json=False),
    "text as index": Case("shop", "x", FINE, UNSEEN, NO_INDEX),
    "digits as index": Case("shop", "2", FINE, FINE, FINE),
    "fraction as index": Case("shop", 2.5, FINE, UNSEEN, NO_INDEX),
    "whole fraction as index": Case("shop", 2.0, FINE, FINE, FINE),
    "None as index": Case("shop", None, FINE, UNSEEN, NO_INDEX),
    "index too large": Case("shop", 9, FINE, UNSEEN, r"index in row 1 = 9 is not in \[0, 9\)"),
    "negative index": Case("shop", -1, FINE, UNSEEN, r"index in row 1 = -1 is not in \[0, 9\)"),
    "64 bits": Case("shop", 2**63, FINE, UNSEEN, "'shop' must hold integers of at most 64 bits"),
}
SCORED = [f"{kind} of {name}" for kind in ("scorer", "server") for name in ("features", "columns")]
PLACES = ["fit", "transform", "model", *SCORED]
ERRORS = (ValueError, TypeError, KeyError, IndexError, tf.errors.InvalidArgumentError)


@pytest.fixture(scope="module", name="places")
def _places(tmp_path_factory):
    """{place: function of a table that gives a number per row}."""
    folder = tmp_path_factory.mktemp("bad")
    features = FeatureDictionary().fit(GOOD, **FIELDS)
    by_features = DeepFM.from_features(features, use_deep=False, use_fm=False, task="regression")
    by_columns = DeepFM.from_columns(COLUMNS, COLUMNS, use_deep=False, use_fm=False, task="regression")
    for model in (by_features, by_columns):
        for weight in model.weights:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    deepfm_ops.export_scorer(by_features, folder / "features")
    deepfm_ops.export_scorer(by_columns, folder / "columns")
    scorers = {name: Scorer.load(folder / name) for name in ("features", "columns")}
    path = pathlib.Path(__file__).parents[2] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)

    def served(name):
        def answer(table):
            try:
                body = serve._scores(serve._Served(scorers[name], None), {"inputs": table}, 100)
            except fastapi.HTTPException as error:
                assert error.status_code == 422
                raise ValueError(error.detail) from None
            return serve.orjson.loads(body)["scores"]

        return answer

    return {
        "fit": lambda table: FeatureDictionary().fit(table, **FIELDS) and np.zeros(3),
        "transform": lambda table: by_features(features.transform(table)).numpy()[:, 0],
        "model": lambda table: by_columns.predict(table, verbose=0)[:, 0],
        **{f"scorer of {name}": scorer.score for name, scorer in scorers.items()},
        **{f"server of {name}": served(name) for name in scorers},
    }


def with_value(column, value):
    """The good table with the value in the second row."""
    return {**GOOD, column: [GOOD[column][0], value, GOOD[column][2]]}


def answer_of(place, case):
    """What is expected there; None where the value cannot come."""
    if place.startswith("server") and not case.json:
        return None
    if place == "fit":
        return case.fit
    served = {"server of features": case.served, "server of columns": case.served_columns}.get(place)
    return served or (case.model if place == "model" or "columns" in place else case.dictionary)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", TABLE)
@pytest.mark.filterwarnings("ignore:column")
def test_each_way_has_its_answer_in_each_place(what, place, places):
    column, value, *_ = TABLE[what]
    expected = answer_of(place, TABLE[what])
    if expected is None:
        return
    table = with_value(column, value)
    if expected not in (FINE, UNSEEN):
        with pytest.raises(ERRORS, match=expected):
            places[place](table)
        return
    got = np.asarray(places[place](table))
    good = np.asarray(places[place](GOOD))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[[0, 2]], good[[0, 2]], rtol=0, atol=1e-6)  # the rows beside it are what they were
    if expected == UNSEEN:
        nothing = np.asarray(places[place](with_value(column, None if column != "tags" else [])))
        np.testing.assert_allclose(got, nothing, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300, 5e9, 10**400, pd.NaT, np.datetime64("NaT"), None, np.nan])
def test_missing_where_the_dictionary_says_so(value, tmp_path):
    features = FeatureDictionary(nonfinite="missing").fit(with_value("age", value), **FIELDS)
    features.save(tmp_path / "f.json")
    for each in (features, FeatureDictionary.load(tmp_path / "f.json")):
        indices, values = each.transform(with_value("age", value))
        assert indices[1, 2] == 0 and values[1, 2] == 0 and indices[0, 2] == each.index("age")
    with pytest.raises(ValueError, match="nonfinite must be one of error, missing, got 'ignore'"):
        FeatureDictionary(nonfinite="ignore")


def test_a_saved_model_says_so_too(tmp_path):
    table, given = {"age": [1.0, 2.0]}, tf.constant([1.0, np.inf, np.nan])
    for nonfinite in ("error", "missing"):
        features = FeatureDictionary(nonfinite=nonfinite).fit(table, numeric="age")
        model = DeepFM.from_features(features, use_deep=False, use_fm=False)
        model.get_layer("first_order").w.assign([[0.0], [1.0]])
        deepfm_ops.export(model, tmp_path / nonfinite)
        serve = tf.saved_model.load(tmp_path / nonfinite).signatures["serving_default"]
        if nonfinite == "error":
            with pytest.raises(tf.errors.InvalidArgumentError, match="column age, row 1: inf is no number"):
                serve(age=given)
        else:
            assert serve(age=given)["score"].numpy()[1:].tolist() == [[0.5], [0.5]]
    model = DeepFM.from_columns([DenseFeat("age")], [], task="regression")
    deepfm_ops.export(model, tmp_path / "columns")
    serve = tf.saved_model.load(tmp_path / "columns").signatures["serving_default"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="column age, row 1: inf is no number"):
        serve(age=given[:, tf.newaxis])


def test_a_transformation_may_take_anything():
    """What it gives is what counts."""
    column = DenseFeat("age", transform_fn=lambda x: tf.where(tf.math.is_finite(x), x, 0.0))
    model = DeepFM.from_columns([column], [], task="regression")
    scores = model.predict({"age": [1.0, np.inf, np.nan]}, verbose=0)
    assert np.isfinite(scores).all() and scores[1] == scores[2] == 0


MATRIX = np.arange(6).reshape(3, 2)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300, -5e9])
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict", "train_on_batch", "validation"])
def test_values_of_a_matrix(value, method):
    values = np.ones((3, 2))
    values[2, 1] = value
    model = DeepFM(6, 2, 2, (2,))
    model.compile("adam", "binary_crossentropy")
    good, labels = (MATRIX, np.ones((3, 2))), np.ones(3)
    with pytest.raises(ValueError, match=r"values\[2,1\] = .* is no number to train on or to score"):
        if method == "predict":
            model.predict((MATRIX, values), verbose=0)
        elif method == "validation":
            model.fit(good, labels, validation_data=((MATRIX, values), labels), verbose=0)
        else:
            getattr(model, method)((MATRIX, values), labels)


LABELS = {
    "minus one": ([1, -1, 1], "labels.1. = -1 is not in .0, 1., as task 'binary' needs it: map -1 and \\+1 by"),
    "stars": ([1, 5, 3], "labels.1. = 5 is not in"),
    "just above": ([0, 1.001, 1], "labels.1. = 1.001 is not in"),
    "NaN": ([1, np.nan, 0], "labels.1. = nan is not in"),
    "text": (["yes", "no", "yes"], "labels must be numbers, got dtype"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("form", ["list", "array", "column", "pandas", "validation", "evaluate", "batch", "columns"])
def test_labels_that_a_binary_task_cannot_have(kind, form):
    labels, message = LABELS[kind]
    model = DeepFM(6, 2, 2, (2,)) if form != "columns" else DeepFM.from_columns(COLUMNS, COLUMNS)
    model.compile("adam", "binary_crossentropy")
    inputs = (MATRIX, np.ones((3, 2))) if form != "columns" else GOOD
    with pytest.raises((ValueError, TypeError), match=message):
        if form == "validation":
            model.fit(inputs, np.ones(3), validation_data=(inputs, labels), verbose=0)
        elif form == "evaluate":
            model.evaluate(inputs, labels, verbose=0)
        elif form == "batch":
            model.train_on_batch(inputs, labels)
        else:
            given = {"array": np.array, "column": lambda x: np.array(x)[:, None], "pandas": pd.Series}.get(form, list)
            model.fit(inputs, given(labels), verbose=0)


def test_labels_in_a_dataset():
    inputs = (MATRIX, np.ones((3, 2), "f"))
    tensors = tuple(map(tf.constant, inputs))
    for task, label, message in [
        ("binary", -1, r"labels\[1\] = -1 is not in \[0, 1\]"),
        ("regression", np.inf, r"labels\[1\] = inf is not finite"),
    ]:
        model = DeepFM(6, 2, 2, (2,), task=task)
        model.compile("adam", "binary_crossentropy" if task == "binary" else "mse")
        data = tf.data.Dataset.from_tensor_slices((tensors, [0.0, label, 1])).batch(3)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.fit(data, verbose=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.evaluate(data, verbose=0)
    with pytest.raises(ValueError, match=r"labels\[1\] = inf is not finite, or too large to be squared"):
        model.fit(inputs, [0, np.inf, 1], verbose=0)
    model.fit(inputs, [0, -7.5, 1e6], verbose=0)
    soft = DeepFM(6, 2, 2, (2,))
    soft.compile("adam", "binary_crossentropy")
    for labels in ([0, 0.5, 1], [True, False, True], np.array([[1], [0], [1]], np.int8)):
        soft.fit(inputs, labels, verbose=0)


# Values that no array was made of, and other ways around a check.


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("form", ["dataset", "tensors", "dict", "generator", "validation", "call"])
def test_values_of_a_matrix_in_other_forms(form, value):
    model, labels = DeepFM(6, 2, 2, (2,)), np.ones((3, 1))
    model.compile("adam", "binary_crossentropy")
    values = np.ones((3, 2), "f")
    values[1, 1] = value
    tensors = tf.constant(MATRIX), tf.constant(values)
    before = model.get_weights()
    with pytest.raises(ERRORS, match="is no number to train on or to score"):
        if form == "dataset":
            model.fit(tf.data.Dataset.from_tensor_slices((tensors, labels)).batch(2), verbose=0)
        elif form == "tensors":
            model.fit(tensors, labels, verbose=0)
        elif form == "dict":
            model.fit({"indices": MATRIX, "values": values}, labels, verbose=0)
        elif form == "generator":
            model.fit((((MATRIX, values), labels) for _ in range(1)), verbose=0)
        elif form == "validation":
            data = tf.data.Dataset.from_tensor_slices((tensors, labels)).batch(3)
            model.evaluate(data, verbose=0)
        else:
            model(tensors)
    for got, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got[: len(expected)], expected) if form != "dataset" else None
        assert np.isfinite(got).all()


def test_values_of_the_scorer(tmp_path):
    deepfm_ops.export_scorer(DeepFM(6, 2, 2, (2,)), tmp_path / "m")
    scorer = Scorer.load(tmp_path / "m")
    for value in (np.nan, np.inf, -1e30):
        values = np.ones((3, 2))
        values[2, 1] = value
        with pytest.raises(ValueError, match=r"values\[2,1\] = .* is no number to train on or to score"):
            scorer.score(MATRIX, values)
        with pytest.raises(ValueError, match=r"values\[5\] = .* is no number to train on or to score"):
            scorer.score(MATRIX.ravel(), values.ravel(), bag_splits=np.arange(7))
    assert np.isfinite(scorer.score(MATRIX, np.full((3, 2), 4e9))).all()


def test_numbers_that_a_narrow_input_makes_infinite(tmp_path):
    columns = [DenseFeat("k", dtype="float16")]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(2,))
    deepfm_ops.export_scorer(model, tmp_path / "m")
    for score in (Scorer.load(tmp_path / "m").score, lambda table: model.predict(table, verbose=0)):
        with pytest.raises(ValueError, match="input 'k', row 1: 70000.* is no number"):
            score({"k": [1, 70000, 3]})


def test_sample_weights_and_weights_of_values():
    model = DeepFM(6, 2, 2, (2,))
    model.compile("adam", "binary_crossentropy")
    with pytest.raises(tf.errors.InvalidArgumentError, match="argument sample_weight, row .: nan is no number"):
        model.fit((MATRIX, np.ones((3, 2))), np.ones(3), sample_weight=np.array([1, np.nan, 1]), verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    column = VarLenSparseFeat(SparseFeat("t", 9), 2, weight_name="w")
    model = DeepFM.from_columns([column], [column], dnn_hidden_units=(2,))
    inputs = {"t": np.ones((2, 2), int), "w": np.array([[1, np.inf], [1, 1]], "f")}
    with pytest.raises(ValueError, match="input 'w', row 0: inf is no number"):
        model.predict(inputs, verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="column w, row 0: inf is no number"):
        model.predict(tf.data.Dataset.from_tensor_slices(inputs).batch(2), verbose=0)


def test_labels_whose_squares_are_infinite():
    model = DeepFM(6, 2, 2, (2,), task="regression")
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"labels\[0\] = 1e\+30 is not finite, or too large to be squared"):
        model.fit((MATRIX, np.ones((3, 2))), [1e30, 1, 2], verbose=0)
    for labels in (["1", "0", "1"], pd.Categorical([1, 0, 1]), pd.array([1, 0, 1], dtype="Int64")):
        model.fit((MATRIX, np.ones((3, 2))), labels, verbose=0)
    with pytest.raises(TypeError, match="labels must be numbers, got dtype datetime64"):
        model.fit((MATRIX, np.ones((3, 2))), pd.to_datetime(["2020"] * 3).to_numpy(), verbose=0)


@pytest.mark.parametrize("place", PLACES[:5])
def test_what_pandas_makes_of_a_table(place, places):
    """A dict of dicts has the rows' numbers for keys, a list of records the columns' names for items."""
    frame = pd.DataFrame(GOOD)
    with pytest.raises(ValueError, match=r"must be a list or an array .* got dict \(of a DataFrame, pass itself"):
        places[place](frame.to_dict())
    with pytest.raises((TypeError, ValueError), match="pass pandas.DataFrame\\(records\\)"):
        places[place](frame.to_dict("records"))
    with pytest.raises((TypeError, ValueError), match="pass pandas.DataFrame\\(records\\)"):
        places[place](frame.to_dict("records") + frame.to_dict("records")[:1])  # as many as inputs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"separator": ""}, ValueError, "separator must be text, or None for blanks, got ''"),
        ({"separator": 3}, ValueError, "separator must be text, or None for blanks, got 3"),
        ({"categorical": 0}, KeyError, "column 0 is missing"),
        ({"categorical": None}, TypeError, "categorical must be a name or a list of names, got None"),
    ],
)
def test_arguments_of_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureDictionary().fit(GOOD, **{"categorical": "city", **arguments})


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({7: 1, "7": 2}, "key '7' occurs twice in the vocabulary"),
        ({"x": 1.7}, "vocabulary\\['x'\\] must be an integer, got 1.7"),
        ({"x": 9}, "vocabulary\\['x'\\] = 9 is not in \\[0, 5\\)"),
        (["x"], "vocabulary must be {key: index}, got list"),
    ],
)
def test_vocabularies(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        SparseFeat("a", 5, dtype="string", vocabulary=vocabulary)
