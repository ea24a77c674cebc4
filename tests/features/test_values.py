"""One value, one id: one table of value types against dictionary, columns, SavedModel and scorer."""

import datetime
import decimal
import enum
import json

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, SparseFeat, VarLenSparseFeat
from deepfm_ops.features import cells
from deepfm_ops.scorer import Scorer

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")


class Color(str, enum.Enum):  # noqa: UP042
    RED = "red"


class Number(enum.IntEnum):
    SEVEN = 7


# (what a cell may hold, its canonical text)
VALUES = [
    (7, "7"),
    (7.0, "7"),
    ("7", "7"),
    (b"7", "7"),
    (np.int8(7), "7"),
    (np.int64(7), "7"),
    (np.uint64(7), "7"),
    (np.float16(7), "7"),
    (np.float32(7), "7"),
    (np.float64(7), "7"),
    (np.str_("7"), "7"),
    (np.bytes_(b"7"), "7"),
    (decimal.Decimal("7.00"), "7"),
    ("007", "007"),
    ("7.0", "7.0"),
    (" 7", " 7"),
    (-0.0, "0"),
    (0, "0"),
    (-3, "-3"),
    (0.1, "0.1"),
    (np.float32(0.1), "0.1"),
    (decimal.Decimal("0.10"), "0.1"),
    ("0.1", "0.1"),
    (True, "True"),
    (np.bool_(True), "True"),
    ("True", "True"),
    (False, "False"),
    (2**53 + 1, "9007199254740993"),
    (2**70, "1180591620717411303424"),
    (2.0**70, "1180591620717411303424"),
    ("Ölo", "Ölo"),
    ("Ölo".encode(), "Ölo"),
    ("", ""),
    (float("inf"), "inf"),
    (Color.RED, "red"),
    (Number.SEVEN, "7"),
    (3e25, "30000000000000000570425344"),
]
TEXTS = list(dict.fromkeys(text for _, text in VALUES))
MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), decimal.Decimal("nan")]
SIDES = ["dictionary", "columns, hashed", "columns, vocabulary"] + [
    f"{place}, {kind}" for place in ("SavedModel", "Scorer") for kind in ("dictionary", "hashed", "vocabulary")
]


def column(values):
    found = np.empty(len(values), object)
    found[:] = values
    return found


@pytest.fixture(scope="module", name="sides")
def _sides(tmp_path_factory):
    """{name: function of a list of values that gives a number for each}, which tells the values apart."""
    folder, rng = tmp_path_factory.mktemp("values"), np.random.default_rng(0)

    def spread(model, layer):
        model.get_layer(layer).w.assign(rng.normal(size=model.get_layer(layer).w.shape))
        return model

    def exported(model, name):
        deepfm_ops.export(model, folder / name)
        deepfm_ops.export_scorer(model, folder / f"{name}.scorer")
        serve = tf.saved_model.load(folder / name).signatures["serving_default"]
        width = serve.structured_input_signature[1]["a"].shape[1:]

        def served(values):  # a graph has one type for an input: text, as every value can be written
            texts = ["" if cells.is_missing(value) else cells.text(value) for value in values]
            return serve(a=tf.reshape(tf.constant(texts), (-1, *width)))["score"].numpy().ravel()

        return served, lambda values: Scorer.load(folder / f"{name}.scorer").score({"a": column(values)})

    features = FeatureDictionary().fit({"a": TEXTS}, categorical="a")
    dictionary = spread(DeepFM.from_features(features, use_deep=False, use_fm=False, task="regression"), "first_order")
    columns = [SparseFeat("a", 10**6, 1, use_hash=True, dtype="string")]
    hashed = spread(DeepFM.from_columns(columns, [], task="regression"), "first_order_0")
    columns = [SparseFeat("a", 99, 1, dtype="string", vocabulary={text: i + 1 for i, text in enumerate(TEXTS)})]
    known = spread(DeepFM.from_columns(columns, [], task="regression"), "first_order_0")
    sides = {"dictionary": lambda values: dictionary.predict(features.transform({"a": column(values)}), verbose=0)}
    sides["columns, hashed"] = lambda values: hashed.predict({"a": column(values)}, verbose=0)
    sides["columns, vocabulary"] = lambda values: known.predict({"a": column(values)}, verbose=0)
    for name, model in (("dictionary", dictionary), ("hashed", hashed), ("vocabulary", known)):
        sides[f"SavedModel, {name}"], sides[f"Scorer, {name}"] = exported(model, name)
    return sides


@pytest.mark.parametrize("side", SIDES)
def test_one_value_is_one_id(side, sides):
    by_text = dict(zip(TEXTS, np.ravel(sides[side](TEXTS)), strict=True))
    assert len(set(by_text.values())) == len(TEXTS)
    got = np.ravel(sides[side]([value for value, _ in VALUES]))
    np.testing.assert_allclose(got, [by_text[text] for _, text in VALUES], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_missing_is_one_value_too(side, sides):
    """Of columns it is the empty text; a dictionary tells the two apart, where the text can be told from nothing."""
    got = np.ravel(sides[side]([*MISSING, ""]))
    assert len(set(got[:-1])) == 1
    assert (got[0] == got[-1]) == ("dictionary" not in side or "SavedModel" in side)


def test_what_fit_saw_as_integers_may_come_as_text():
    features = FeatureDictionary().fit({"a": [3, 5, 10, 7]}, categorical="a")
    expected = [2, 3, 1, 4]  # of equal counts by their bytes
    for values in (["3", "5", "10", "7"], [3, 5, "10", 7.0], np.array([3, 5, 10, 7], "f"), [b"3", b"5", b"10", b"7"]):
        assert features.transform({"a": values})[0].ravel().tolist() == expected
    text = FeatureDictionary().fit({"a": ["3", "5", "10", "7"]}, categorical="a")
    assert text.transform({"a": [3, 5, 10, 7]})[0].ravel().tolist() == expected
    assert text.values("a") == features.values("a") == ["10", "3", "5", "7"]


def test_integer_columns_take_text_that_is_one():
    columns = [SparseFeat("a", 20), VarLenSparseFeat(SparseFeat("t", 9, use_hash=True), 2)]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(3,))
    expected = model.predict({"a": [3, 7], "t": [[4, 0], [5, 6]]}, verbose=0)
    for a, t in [(["3", "7"], [["4"], [5, "6"]]), ([b"3", 7.0], [[4.0, 0], [5, b"6"]]), (["3", 7], [["4", 0], [5, 6]])]:
        np.testing.assert_array_equal(model.predict({"a": a, "t": t}, verbose=0), expected)
    for wrong in ("007", "x", "7.0", None, 7.5):
        with pytest.raises(TypeError, match=r"input 'a' must hold (numbers|integers).* in row 1"):
            model.predict({"a": [3, wrong], "t": [[4], [5]]}, verbose=0)


def test_tensors_become_text_by_the_same_rule():
    columns = [SparseFeat("a", 10**6, 2, use_hash=True, dtype="string")]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(3,))
    expected = model.predict({"a": ["7", "12"]}, verbose=0)
    for values in (tf.constant([7, 12]), tf.constant([7.0, 12.0]), tf.constant(["7", "12"])):
        np.testing.assert_array_equal(model.predict({"a": values}, verbose=0), expected)
        data = tf.data.Dataset.from_tensor_slices({"a": values}).batch(1)
        np.testing.assert_allclose(model.predict(data, verbose=0), expected, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="input a must hold text or whole numbers, got 7.5"):
        model.predict({"a": tf.constant([7.0, 7.5])}, verbose=0)
    truth = model.predict({"a": [True, False]}, verbose=0)
    np.testing.assert_array_equal(model.predict({"a": tf.constant([True, False])}, verbose=0), truth)


def test_a_column_that_is_mostly_unknown_is_named_once():
    features = FeatureDictionary().fit(
        {"a": ["x", "y", "z"], "b": [1, 2, 3], "t": ["p|q", "r", ""], "none": [None] * 3},
        categorical=["a", "b", "none"],
        multivalued="t",
    )
    table = {
        "a": ["X", "Y", "X", "z", None],
        "b": [1, 2, 3, 9, 9],
        "t": ["p", "q", "s", "", "r"],
        "none": list("abcde"),
    }
    with pytest.warns(UserWarning) as found:
        features.transform(table)
    assert [str(warning.message) for warning in found] == [
        "column 'a': 3 of 4 values were not seen by fit and count as missing, such as 'X', 'Y'; fit saw 3, such as 'x'"
    ]
    with pytest.warns(UserWarning, match=r"column 't': 3 of 3 values .* such as 's', 'u', 'v'; fit saw 3, such as 'p'"):
        features.transform({"a": ["x"], "b": [1], "t": ["s|u|v"], "none": [1]})


def test_the_scorer_warns_once_per_column(tmp_path, recwarn):
    features = FeatureDictionary().fit({"a": [1, 2, 3]}, categorical="a")
    deepfm_ops.export_scorer(DeepFM.from_features(features, hidden_units=(2,)), tmp_path / "m")
    scorer = Scorer.load(tmp_path / "m")
    for _ in range(3):
        scorer.score({"a": ["x", "y", "z", 1]})
    assert [str(w.message)[:40] for w in recwarn] == ["column 'a': 3 of 4 values were not seen "]


@pytest.mark.parametrize("wrong", [datetime.date(2020, 1, 1), pd.Timestamp("2020"), (1, 2), {"x": 1}, 1 + 2j, b"\xff"])
def test_what_cannot_be_a_category(wrong):
    with pytest.raises((TypeError, ValueError), match="column 'a': .*(category must be|is not UTF-8 text)"):
        FeatureDictionary().fit({"a": column([wrong, "x"])}, categorical="a")
    features = FeatureDictionary().fit({"a": ["x", "y"]}, categorical="a")
    assert features.transform({"a": column([wrong, "x"])})[0].ravel().tolist() == [0, 1]


def test_an_old_dictionary_still_loads(tmp_path):
    """Format 1 kept values by type: 3 and "3" had two indices, of which the first is the value's now."""
    old = {
        "format": 1,
        "separator": "|",
        "fields": [
            {"name": "a", "kind": "categorical", "size": 1, "start": 1, "values": [3, 12, 0.5, "3", "x"]},
            {"name": "b", "kind": "categorical", "size": 1, "start": 6, "values": [False, True]},
            {"name": "n", "kind": "numeric", "size": 1, "start": 8, "values": ["n"]},
            {"name": "t", "kind": "multivalued", "size": 2, "start": 9, "values": [1, 2, "p"]},
        ],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    features = FeatureDictionary.load(tmp_path / "old.json")
    assert features.num_features == 12 and features.nonfinite == "error"
    table = {
        "a": [3, "3", "12", 0.5],
        "b": [True, False, "True", None],
        "n": [1, 2, 3, 4],
        "t": ["1", "2|p", "9", None],
    }
    indices, _ = features.transform(table)
    assert indices.tolist() == [[1, 7, 8, 9, 0], [1, 6, 8, 10, 11], [2, 7, 8, 0, 0], [3, 0, 8, 0, 0]]
    features.save(tmp_path / "new.json")
    again = FeatureDictionary.load(tmp_path / "new.json")
    assert again.fields == features.fields and again.name(4) == ("a", None)
    np.testing.assert_array_equal(again.transform(table)[0], indices)
    model = DeepFM.from_features(features, hidden_units=(2,))
    deepfm_ops.export(model, tmp_path / "m")
    serve = tf.saved_model.load(tmp_path / "m").signatures["serving_default"]
    given = {"a": tf.constant(["3", "x"]), "b": tf.constant([1, 0], tf.int64), "n": tf.constant([1.0, 2.0])}
    expected = model(features.transform({"a": ["3", "x"], "b": [True, False], "n": [1, 2], "t": ["1", "p"]}))
    np.testing.assert_allclose(serve(**given, t=tf.constant(["1", "p"]))["score"], expected, rtol=0, atol=1e-6)


def test_index_and_name_are_inverse():
    table = {"city": ["Rome", "Oslo"], "shop": [3, 70], "age": [0.3, 0.5], "tags": ["b|a", ""], "no": [None, None]}
    features = FeatureDictionary().fit(table, categorical=["city", "shop", "no"], numeric="age", multivalued="tags")
    assert features.index("shop", "70") == features.index("shop", 70.0) == 5
    assert features.name(5) == ("shop", "70")
    assert features.index("age") == features.index("age", 12.5) == 1 and features.name(1) == ("age", None)
    for index in range(1, features.num_features):
        name, value = features.name(index)
        assert features.index(name, value) == index
    assert features.index("city", "Paris") == features.index("city", None) == features.index("no", "x") == 0
    assert features.name(0) == (None, None)
    for wrong in (-1, features.num_features):
        with pytest.raises(IndexError, match=rf"index {wrong} is not in \[0, 8\)"):
            features.name(wrong)
    with pytest.raises(KeyError, match="column 'town' is not in the dictionary; it has .'city', 'shop'"):
        features.index("town", "Rome")


NARROW = np.float32([0.1, 0.7])
NARROW_COLUMNS = {
    "[B, 1]": NARROW[:, np.newaxis],
    "categories": pd.Series(NARROW).astype("category"),
    "nullable": pd.Series(NARROW, dtype="Float32"),
    "arrow dictionary": pa.array(NARROW).dictionary_encode(),
    "masked": np.ma.masked_array(NARROW, [False, False]),
    "bfloat16": tf.constant(NARROW, tf.bfloat16),
}
NARROW_LISTS = {
    "[B, n]": NARROW[:, np.newaxis],
    "arrays": [NARROW[:1], NARROW[1:]],
    "polars": pl.Series([[x] for x in NARROW], dtype=pl.List(pl.Float32)),
    "pyarrow": pa.array([[x] for x in NARROW], pa.list_(pa.float32())),
    "ragged": tf.RaggedTensor.from_row_lengths(NARROW, [1, 1]),
    "sparse": tf.RaggedTensor.from_row_lengths(NARROW, [1, 1]).to_sparse(),
}


@pytest.mark.parametrize("kind", NARROW_COLUMNS)
def test_narrow_floats_have_one_id(kind):
    given = NARROW_COLUMNS[kind]
    texts = ["0.1", "0.7"] if kind != "bfloat16" else ["0.100097656", "0.69921875"]
    features = FeatureDictionary().fit({"a": texts}, categorical="a")
    assert features.transform({"a": given})[0].ravel().tolist() == [1, 2]
    columns = [SparseFeat("a", 10**6, 2, use_hash=True, dtype="string")]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(3,), seed=1)
    if not tf.is_tensor(given):  # which a graph cannot write out; it says so
        np.testing.assert_array_equal(model.predict({"a": given}, verbose=0), model.predict({"a": texts}, verbose=0))


@pytest.mark.parametrize("kind", NARROW_LISTS)
def test_narrow_floats_in_lists_have_one_id(kind):
    features = FeatureDictionary().fit({"t": [["0.1"], ["0.7"]]}, multivalued="t")
    assert features.transform({"t": NARROW_LISTS[kind]})[0].ravel().tolist() == [1, 2]


def test_masked_cells_are_missing():
    masked = np.ma.masked_array([1.0, 99.0, 3.0], [False, True, False])
    features = FeatureDictionary().fit({"n": masked, "c": masked}, categorical="c", numeric="n")
    assert features.values("c") == ["1", "3"]
    assert features.transform({"n": masked, "c": masked})[1].tolist() == [[1, 1], [0, 0], [1, 3]]


def test_floats_that_no_integer_holds_are_told_apart_or_refused():
    columns = [SparseFeat("a", 10**6, 2, use_hash=True, dtype="string")]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(3,))
    for values in ([1e20, 3e25], [2.0**63, -(2.0**64)]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="input a must hold text or whole numbers"):
            model.predict({"a": tf.constant(values, tf.float64)}, verbose=0)
