"""Streams with several columns of labels."""

import json

import numpy as np
import pandas as pd
import pytest

from deepfm_ops import DeepFM, FeatureDictionary

TASK = {"dwell": "regression", "click": "binary", "genre": ("multiclass", 3)}
NAMES = ["click", "dwell", "genre"]


@pytest.fixture
def table(rng):
    return pd.DataFrame(
        {
            "city": rng.choice(["Rome", "Oslo", "Bonn"], 50),
            "click": np.where(np.arange(50) % 3, rng.integers(0, 2, 50), np.nan),
            "dwell": np.where(np.arange(50) % 4, rng.normal(size=50), np.nan),
            "genre": np.where(np.arange(50) % 5, rng.integers(0, 3, 50), -1),
        }
    )


def model_of(features, **arguments):
    return DeepFM.from_features(
        features, **{"embedding_dim": 4, "hidden_units": (8,), "task": TASK, "seed": 1} | arguments
    )


@pytest.mark.parametrize("kind", ["table", "csv", "parquet"])
def test_a_stream_gives_what_arrays_give(table, tmp_path, kind):
    """The same batches, missing labels too, and the same training."""
    source = table
    if kind != "table":
        source = tmp_path / f"data.{kind}"
        table.to_csv(source, index=False) if kind == "csv" else table.to_parquet(source)
    features = FeatureDictionary().fit(source, categorical=["city"], label=NAMES)
    batches = list(features.stream(source, 16))
    assert [list(labels) for _, labels in batches] == [NAMES] * 4
    for name in NAMES:
        found = np.concatenate([labels[name] for _, labels in batches])
        np.testing.assert_array_equal(found, table[name].to_numpy().astype("f"))
    if kind == "parquet":
        return  # the same batches
    scores = []
    arrays = features.transform(table)
    given = {"x": arrays, "y": table[NAMES], "batch_size": 16, "shuffle": False}
    for options in (given, {"x": features.stream(source, 16)}):
        model = model_of(features)
        model.compile()
        model.fit(**options, epochs=2, verbose=0)
        scores.append(model.predict(arrays, verbose=0))
        assert model.evaluate(features.stream(source, 16), verbose=0, return_dict=True)["click_loss"] > 0
    for name in NAMES:
        np.testing.assert_array_equal(scores[0][name], scores[1][name])


def test_losses_of_heads_are_means_of_batches_of_any_source(table):
    """Keras alone counts one batch too many for a head where data has no length."""
    features = FeatureDictionary().fit(table, categorical=["city"], label=NAMES)
    model, arrays = model_of(features), features.transform(table)
    model.compile()
    wanted = model.evaluate(arrays, table[NAMES], batch_size=10, verbose=0, return_dict=True)

    def generated():
        for start in range(0, 50, 10):
            rows = slice(start, start + 10)
            yield tuple(x[rows] for x in arrays), {name: table[name].to_numpy("f")[rows] for name in NAMES}

    for source in (features.stream(table, 10), generated()):
        assert model.evaluate(source, verbose=0, return_dict=True) == pytest.approx(wanted, rel=1e-5)
    for shuffle in (True, False):  # arrays to train on, a stream to validate on
        stream = features.stream(table, 10)
        logs = model.fit(arrays, table[NAMES], 7, shuffle=shuffle, validation_data=stream, verbose=0).history
        found = {name.removeprefix("val_"): x for name, [x] in logs.items() if name.startswith("val_")}
        wanted = model.evaluate(arrays, table[NAMES], batch_size=10, verbose=0, return_dict=True)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_what_is_kept_of_labels(table, tmp_path):
    """The dictionary's file, a stream's state and a saved model know the columns of labels."""
    features = FeatureDictionary().fit(table, categorical=["city"], label=NAMES)
    features.save(tmp_path / "features")
    again = FeatureDictionary.load(tmp_path / "features")
    assert again.label == NAMES
    stream = again.stream(table, 16)
    next(iter(stream))
    rest = again.stream(table, 16)
    rest.restore(json.loads(json.dumps(stream.state())))
    np.testing.assert_array_equal(next(iter(rest))[1]["genre"], table["genre"][16:32].astype("f"))
    model = model_of(features)
    assert type(model).from_config(model.get_config()).features.label == NAMES


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("click", "2", r"line 4, column 'click': '2' is no label: it is not in \[0, 1\], as task 'binary' needs it"),
        ("genre", "3", r"line 4, column 'genre': '3' is no label: it is no class of \('multiclass', 3\)"),
        ("genre", "0.5", "line 4, column 'genre': '0.5' is no label: it is no class of"),
        ("dwell", "long", "line 4, column 'dwell': 'long' is no label"),
    ],
)
def test_a_label_of_another_task_in_a_file(table, tmp_path, column, value, message):
    table = table.astype({column: object})
    table.loc[2, column] = value
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    features = FeatureDictionary().fit(path, categorical=["city"], label=NAMES)
    model = model_of(features)
    model.compile()
    with pytest.raises(ValueError, match=message):
        model.fit(features.stream(path, 16), verbose=0)
    stream = features.stream(path, 16, on_bad="skip")
    model.fit(stream, verbose=0)
    assert stream.num_skipped == 1


def test_some_heads_of_the_columns_and_columns_of_no_head(table):
    features = FeatureDictionary().fit(table, categorical=["city"], label=NAMES)
    model = model_of(features, task={"genre": ("multiclass", 3)})
    model.compile()
    logs = model.fit(features.stream(table, 16), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    for task, message in (
        (
            {"like": "binary"},
            r"the stream has no labels of the head 'like', but of \['click'.* fit\(..., label=\[...\]\)",
        ),
        ("binary", "the stream has the labels .*, and the model predicts one thing"),
    ):
        model = model_of(features, task=task)
        model.compile()
        with pytest.raises(ValueError, match=message):
            model.fit(features.stream(table, 16), verbose=0)
    single = FeatureDictionary().fit(table, categorical=["city"], label="click")
    model = model_of(single)
    model.compile()
    with pytest.raises(ValueError, match="the stream has one column of labels, the model the heads"):
        model.fit(single.stream(table, 16), verbose=0)
    model = model_of(single, task={"likes": "binary"})  # the only head, whatever the column is called
    model.compile()
    assert np.isfinite(model.fit(single.stream(table, 16), verbose=0).history["loss"]).all()


def test_bad_lists_of_labels(table):
    with pytest.raises(ValueError, match="label must be None, a name, or a list"):
        FeatureDictionary().fit(table, categorical=["city"], label=[])
    with pytest.raises(ValueError, match="columns named more than once"):
        FeatureDictionary().fit(table, categorical=["city"], label=["click", "click"])
