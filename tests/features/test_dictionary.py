"""FeatureDictionary: numbering, missing and unseen values, files, bad input."""

import datetime
import decimal
import json

import numpy as np
import pandas as pd
import pytest

from deepfm_ops import FeatureDictionary
from deepfm_ops.features import counts


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "city": ["Rome", "Oslo", None, "Rome"],
            "user": [7, 7, 9, 8],
            "age": [0.5, np.nan, 2.0, -1.0],
            "tags": ["a|b", "", None, "b|c|a"],
        }
    )


COLUMNS = {"categorical": ["city", "user"], "numeric": ["age"], "multivalued": ["tags"]}


def test_numbering(frame):
    features = FeatureDictionary()
    indices, values = features.fit_transform(frame, **COLUMNS)
    # By counts: of 3 the age, of 2 Rome, user 7, tags a and b, of 1 Oslo, users 8 and 9, tag c.
    assert (features.num_features, features.num_fields, features.num_columns) == (10, 4, 6)
    assert features.field_sizes == [1, 1, 1, 3]
    assert indices.dtype == np.int64 and values.dtype == np.float32
    np.testing.assert_array_equal(
        indices, [[2, 3, 1, 4, 5, 0], [6, 3, 0, 0, 0, 0], [0, 8, 1, 0, 0, 0], [2, 7, 1, 5, 9, 4]]
    )
    third = np.float32(1 / 3)
    np.testing.assert_array_equal(
        values,
        [[1, 1, 0.5, 0.5, 0.5, 0], [1, 1, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0], [1, 1, -1, third, third, third]],
    )


def test_unseen_and_missing_values_become_zero(frame):
    features = FeatureDictionary().fit(frame, **COLUMNS)
    new = pd.DataFrame(
        {
            "city": ["Paris", pd.NA, "Oslo"],
            "user": [100, np.nan, 8.0],  # pandas made floats of the integers
            "age": [np.nan, 1.0, 2.0],
            "tags": ["x|y", ["a", "x"], ("c", None, "b", "a", "a", "a")],
        }
    )
    indices, values = features.transform(new)
    np.testing.assert_array_equal(indices, [[0, 0, 0, 0, 0, 0], [0, 0, 1, 4, 0, 0], [6, 7, 1, 9, 5, 4]])
    assert values[0].tolist() == [0] * 6 and values[1].tolist() == [0, 0, 1, 1, 0, 0]
    assert indices.max() < features.num_features


def test_other_kinds_of_columns(frame):
    """A dict of arrays, categoricals, nullable and boolean columns, lists."""
    arrays = {
        "c": np.array(["x", "y", "x"]),
        "k": pd.Categorical([3, 1, 3]),
        "i": pd.array([1, None, 2], dtype="Int64"),
        "b": [True, False, True],
        "n": [1, 2, 3],
        "m": [np.array([1, 2]), [2], {1}],
    }
    features = FeatureDictionary()
    indices, values = features.fit_transform(arrays, categorical=["c", "k", "i", "b"], numeric=["n"], multivalued=["m"])
    np.testing.assert_array_equal(indices, [[2, 3, 9, 4, 1, 5, 6], [7, 8, 0, 11, 1, 6, 0], [2, 3, 10, 4, 1, 5, 0]])
    np.testing.assert_array_equal(values[:, 4], [1, 2, 3])


def test_empty_and_single_rows(frame):
    features = FeatureDictionary().fit(frame, **COLUMNS)
    indices, values = features.transform(frame.iloc[:0])
    assert indices.shape == values.shape == (0, 6)
    np.testing.assert_array_equal(features.transform(frame.iloc[[3]])[0], features.transform(frame)[0][[3]])


def test_saved_and_loaded(frame, tmp_path):
    features = FeatureDictionary().fit(frame, **COLUMNS, label="label")
    path = tmp_path / "features.dictionary"
    features.save(path)
    for again in (
        FeatureDictionary.load(path),
        FeatureDictionary.from_config(json.loads(json.dumps(features.to_config()))),
    ):
        assert again.num_features == features.num_features and again.field_sizes == features.field_sizes
        assert again.fields == features.fields and again.label == "label" and again.num_samples == 4
        for a, b in zip(again.transform(frame), features.transform(frame), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(again.counts, features.counts)
        assert [again.name(i) for i in range(10)] == [features.name(i) for i in range(10)]
    assert list(tmp_path.iterdir()) == [path]


OLD = {
    "format": 2,
    "separator": "|",
    "nonfinite": "missing",
    "fields": [
        {"name": "city", "kind": "categorical", "size": 1, "start": 1, "values": ["Oslo", "Rome"], "dtype": "text"},
        {"name": "user", "kind": "categorical", "size": 1, "start": 3, "values": ["7", "8", "9"], "dtype": "integer"},
        {"name": "age", "kind": "numeric", "size": 1, "start": 6, "values": ["age"], "dtype": None},
        {"name": "tags", "kind": "multivalued", "size": 3, "start": 7, "values": ["a", "b", "c"], "dtype": "text"},
    ],
    "counts": None,
    "num_samples": None,
}


@pytest.mark.parametrize("counted", [False, True])
def test_a_dictionary_of_an_older_version(frame, tmp_path, counted):
    """Its numbers stay: values by number and text, column by column."""
    old = OLD | ({"counts": counts.packed(np.arange(10)), "num_samples": 4} if counted else {})
    (tmp_path / "features.json").write_text(json.dumps(old))
    features = FeatureDictionary.load(tmp_path / "features.json")
    np.testing.assert_array_equal(
        features.transform(frame)[0], [[2, 3, 6, 7, 8, 0], [1, 3, 0, 0, 0, 0], [0, 5, 6, 0, 0, 0], [2, 4, 6, 8, 9, 7]]
    )
    assert features.nonfinite == "missing" and features.name(2) == ("city", "Rome") and features.index("age") == 6
    assert features.values("user") == ["7", "8", "9"] and features.indices("tags").tolist() == [7, 8, 9]
    new = frame.assign(city=["Bonn", "Bonn", "Bern", "Rome"])
    if not counted:
        assert features.counts is None
        with pytest.raises(ValueError, match="saved by an older version, without counts"):
            features.update(new)
        return
    assert features.counts.tolist() == list(range(10))
    features.update(new)
    assert features.index("city", "Bonn") == 10 and features.index("city", "Bern") == 11 and features.num_samples == 8


def test_equal_data_give_equal_numbers(frame):
    a = FeatureDictionary().fit(frame, **COLUMNS)
    b = FeatureDictionary().fit(frame.iloc[::-1], **COLUMNS)
    np.testing.assert_array_equal(a.transform(frame)[0], b.transform(frame)[0])


def field(**changes):
    """A saved dictionary of one field, with something changed in it."""
    good = {"name": "a", "kind": "categorical", "size": 1, "start": 1, "values": ["x", "y"]}
    return json.dumps({"format": 1, "separator": "|", "fields": [{**good, **changes}]})


DAMAGED = [
    "",
    "{}",
    "[1]",
    "x" * 99,
    '{"format": 2, "separator": "|", "fields": []}',
    '{"format": 1, "fields": 3}',
    field(start=5),
    field(kind="multivalued", size=-3),
    field(size=2),
    field(size="1"),
    field(values="ab"),
    field(values=[2, 2]),
    field(kind="other"),
    field()[:-9],
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_file(content, tmp_path):
    path = tmp_path / "features.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="features.json is not a readable FeatureDictionary"):
        FeatureDictionary.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureDictionary.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "columns", "error", "message"),
    [
        (lambda f: f.iloc[:0], COLUMNS, ValueError, "cannot fit on a table without rows"),
        (lambda f: f, {}, ValueError, "fit needs at least one column name"),
        (lambda f: f, {"categorical": ["town"]}, KeyError, "column 'town' is missing; the table has"),
        (
            lambda f: f,
            {"categorical": ["city"], "multivalued": ["city"]},
            ValueError,
            r"named more than once: \['city'\]",
        ),
        (lambda f: f, {"numeric": ["city"]}, TypeError, "column 'city' must hold numbers"),
        (lambda f: {"a": [1, 2], "b": [1]}, {"numeric": ["a", "b"]}, ValueError, "columns must be equally long"),
        (lambda f: {"a": ["x"]}, {"numeric": ["a"]}, TypeError, "column 'a' must hold numbers"),
        (
            lambda f: {"a": [3]},
            {"multivalued": ["a"]},
            TypeError,
            "column 'a': an entry must be a list or a string, got 3",
        ),
        (
            lambda f: {"a": [datetime.date(2020, 1, 1)]},
            {"categorical": ["a"]},
            TypeError,
            "column 'a': a category must be a string or a number",
        ),
    ],
)
def test_bad_tables(frame, change, columns, error, message):
    with pytest.raises(error, match=message):
        FeatureDictionary().fit(change(frame), **columns)


def test_a_fit_that_fails_changes_nothing(frame):
    features = FeatureDictionary().fit(frame, **COLUMNS)
    before = features.transform(frame)[0]
    with pytest.raises(TypeError, match="column 'age' must hold numbers|a category must be"):
        features.fit({"city": ["x"], "user": [datetime.date(2020, 1, 1)]}, categorical=["city", "user"])
    np.testing.assert_array_equal(features.transform(frame)[0], before)


def test_unseen_kinds_of_values_become_zero():
    features = FeatureDictionary().fit({"a": ["x", "y"], "m": ["p", "q"]}, categorical=["a"], multivalued=["m"])
    odd = [b"\xff", decimal.Decimal(1), pd.Timestamp("2020"), (1, 2), pd.NaT, 5]
    column = np.empty(len(odd), object)
    column[:] = odd
    with pytest.warns(UserWarning, match="column '[am]'"):
        indices, values = features.transform({"a": column, "m": [[value] for value in odd]})
    assert not indices.any() and not values.any()


def test_a_name_of_several_columns(frame):
    doubled = pd.concat([frame, frame[["city", "age"]]], axis=1)
    for kind, name in (("categorical", "city"), ("numeric", "age")):
        with pytest.raises(ValueError, match=f"column '{name}' must be one column of values, got shape"):
            FeatureDictionary().fit(doubled, **{kind: [name]})


def test_text_that_is_not_utf8_is_no_category():
    for odd in ("\ud800", b"\xff"):
        with pytest.raises(ValueError, match="column 'a'.*UTF-8"):
            FeatureDictionary().fit({"a": ["é", odd]}, categorical=["a"])
    with pytest.raises(ValueError, match="column 'a', row 1: 65536 bytes is no category"):
        FeatureDictionary().fit({"a": ["é", "x" * 65536]}, categorical=["a"])


def test_saving_that_fails_leaves_no_file_behind(tmp_path):
    features = FeatureDictionary().fit({"a": ["é"]}, categorical=["a"])
    features.save(tmp_path / "features.json")
    with pytest.raises(OSError):
        features.save(tmp_path)  # a folder
    assert [p.name for p in tmp_path.iterdir()] == ["features.json"]


def test_transform_needs_its_columns(frame):
    features = FeatureDictionary().fit(frame, **COLUMNS)
    with pytest.raises(KeyError, match="column 'age' is missing"):
        features.transform(frame.drop(columns="age"))
    with pytest.raises(ValueError, match="fit or load the FeatureDictionary first"):
        FeatureDictionary().transform(frame)
    with pytest.raises(ValueError, match="fit the FeatureDictionary before saving it"):
        FeatureDictionary().save("nowhere.json")
