"""Streams: their order, their position, and what Keras makes of them."""

import itertools
import json
import os
import pathlib
import pickle
import random

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE, Process

from deepfm_ops import Checkpoint, DeepFM, FeatureDictionary, FMInteraction
from deepfm_ops.data import parquet_files, text_files

KILLS = int(os.environ.get("DEEPFM_OPS_KILLS", "4"))
TRAINING = pathlib.Path(__file__).parent / "streamed_training.py"
ROWS = 1000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Files of some kilobytes have many pieces, then."""
    monkeypatch.setattr(text_files, "PIECE", 500)
    monkeypatch.setattr(parquet_files, "ROWS", 70)


@pytest.fixture(scope="module", name="frame")
def _frame():
    r = np.random.default_rng(0)
    user, city = r.integers(0, 60, ROWS), r.choice(["Rome", "Oslo", "Bern", ""], ROWS)
    chance = 1 / (1 + np.exp(-((user % 7) - 3 + (city == "Rome"))))
    return pd.DataFrame(
        {
            "row": np.arange(ROWS),
            "user": user,
            "city": pd.Series(city).replace("", None),
            "tags": [("|".join(r.choice(list("abcd"), r.integers(0, 4)))) for _ in range(ROWS)],
            "label": (r.random(ROWS) < chance).astype(int),
        }
    )


@pytest.fixture(scope="module", name="folder")
def _folder(frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    for number, (start, stop) in enumerate([(0, 400), (400, 410), (410, ROWS)]):
        part = frame.iloc[start:stop]
        part.to_csv(folder / f"{number}.csv", index=False)
        part.to_csv(folder / f"{number}.csv.gz", index=False)
        part.to_parquet(folder / f"{number}.parquet", row_group_size=130)
    return folder


@pytest.fixture(scope="module", name="features")
def _features(folder):
    """With the number of the row as the number of the field "row"."""
    return FeatureDictionary().fit(
        str(folder / "*.csv"), categorical=["user", "city"], numeric="row", multivalued="tags", label="label"
    )


@pytest.fixture(scope="module", name="learnable")
def _learnable(frame):
    """Without the row's number, under which a training is anything but stable."""
    return FeatureDictionary().fit(frame, categorical=["user", "city"], multivalued="tags", label="label")


KINDS = pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "frames"])


def source(folder, kind, frame):
    return [frame.iloc[i : i + 90] for i in range(0, ROWS, 90)] if kind == "frames" else str(folder / f"*.{kind}")


def rows_of(batches):
    """The rows' numbers, in order."""
    return [row for (_, values), *_ in batches for row in values[:, 2].astype(int).tolist()]


def same(a, b):
    """Whether two lists of batches are, bit for bit."""
    flat = [[x.tobytes() for x in keras.tree.flatten(batch)] for batch in a]
    return flat == [[x.tobytes() for x in keras.tree.flatten(batch)] for batch in b]


@KINDS
def test_the_batches(kind, folder, frame, features):
    stream = features.stream(source(folder, kind, frame), 64)
    batches = list(stream)
    indices, values = features.transform(frame)
    np.testing.assert_array_equal(np.concatenate([x[0] for x, _ in batches]), indices)
    np.testing.assert_array_equal(np.concatenate([x[1] for x, _ in batches]), values)
    labels = np.concatenate([y for _, y in batches])
    np.testing.assert_array_equal(labels, frame["label"])
    assert labels.dtype == np.float32 and indices.dtype == np.int64 and values.dtype == np.float32
    assert [len(y) for _, y in batches] == [64] * 15 + [40]
    assert same(batches, stream), "the next pass is the same"
    assert [len(y) for _, y in features.stream(source(folder, kind, frame), 64, drop_remainder=True)] == [64] * 15
    only_inputs = features.stream(source(folder, kind, frame), 64, labels=False)
    assert rows_of(only_inputs) == list(range(ROWS)) and len(next(iter(only_inputs))) == 1


@KINDS
def test_shuffled(kind, folder, frame, features):
    options = {"shuffle": True, "seed": 7, "shuffle_rows": 200}
    stream = features.stream(source(folder, kind, frame), 64, **options)
    first, second = rows_of(stream), rows_of(stream)
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first != second
    assert rows_of(features.stream(source(folder, kind, frame), 64, **options)) == first
    assert rows_of(features.stream(source(folder, kind, frame), 50, **options)) == first, "of the batch size it is free"
    assert rows_of(features.stream(source(folder, kind, frame), 64, **{**options, "seed": 8})) != first
    assert rows_of(features.stream(source(folder, kind, frame), 64, **options, threads=3)) == first
    near = rows_of(features.stream(source(folder, kind, frame), 64, **{**options, "shuffle": "rows"}))
    assert sorted(near) == list(range(ROWS)) != near and np.abs(np.array(near) - np.arange(ROWS)).max() < 500
    if kind != "csv.gz":  # a compressed file is read from its start
        assert np.corrcoef(first, np.arange(ROWS))[0, 1] < 0.5


@KINDS
@pytest.mark.parametrize("shuffle", [False, True])
def test_goes_on_from_any_position(kind, shuffle, folder, frame, features):
    options = {"shuffle": shuffle, "seed": 3, "shuffle_rows": 170}
    stream, states = features.stream(source(folder, kind, frame), 48, **options), []
    batches = []
    for batch in itertools.chain(stream, stream):  # two passes
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.state())))
    assert len(batches) == 42 and [states[20]["epoch"], states[20]["batch"], states[20]["row"]] == [1, 0, 0]
    for place in (0, 3, 10, 19, 20, 21, 33, 40):
        again = features.stream(source(folder, kind, frame), 48, **options)
        again.restore(states[place])
        assert again.state() == states[place]
        rest = list(again) + (list(again) if place < 20 else [])
        assert same(rest, batches[place + 1 :]), place


@KINDS
@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_share_the_rows_out(kind, count, folder, frame, features):
    for options in ({}, {"shuffle": True, "shuffle_rows": 100}):
        parts = [
            rows_of(features.stream(source(folder, kind, frame), 10, shard=(i, count), **options)) for i in range(count)
        ]
        assert sorted(itertools.chain(*parts)) == list(range(ROWS))
        assert min(map(len, parts)) > ROWS / count / 2


def test_states_of_others_are_refused(folder, features):
    stream = features.stream(str(folder / "*.csv"), 64, seed=1)
    state = stream.state()
    for message, other in [
        ("files '0.csv .*', this one has '1.csv", features.stream(str(folder / "1.csv"), 64, seed=1)),
        ("batch_size 64, this one has 32", features.stream(str(folder / "*.csv"), 32, seed=1)),
        ("seed 1, this one has 2", features.stream(str(folder / "*.csv"), 64, seed=2)),
        ("shuffle False", features.stream(str(folder / "*.csv"), 64, seed=1, shuffle=True)),
        ("shard", features.stream(str(folder / "*.csv"), 64, seed=1, shard=(0, 2))),
    ]:
        with pytest.raises(ValueError, match=f"the state is of a stream with {message}"):
            other.restore(state)
    for wrong in ({}, {"epoch": 1}, None, 3):
        with pytest.raises(ValueError, match="this is no state of a stream"):
            stream.restore(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a number from 1 on, got 0"),
        ({"shard": (2, 2)}, r"shard must be \(i, n\) with 0 <= i < n"),
        ({"shuffle": "pieces"}, "shuffle must be True, False or 'rows', got 'pieces'"),
        ({"shuffle_rows": 0}, "shuffle_rows must be a number from 1 on, got 0"),
        ({"on_bad": "ignore"}, "on_bad must be 'error' or 'skip'"),
        ({"labels": True}, "labels=True needs a FeatureDictionary whose fit was told the column"),
    ],
)
def test_arguments(arguments, message, frame):
    features = FeatureDictionary().fit(frame, categorical="user")
    with pytest.raises(ValueError, match=message):
        features.stream(frame, **{"batch_size": 3, **arguments})
    with pytest.raises(ValueError, match="fit or load"):
        FeatureDictionary().stream(frame, 3)


def test_an_iterator_has_one_pass(frame, features):
    stream = features.stream((frame.iloc[i : i + 90] for i in range(0, ROWS, 90)), 64)
    assert rows_of(stream) == list(range(ROWS))
    with pytest.raises(ValueError, match="the source is an iterator, which can be passed over once"):
        list(stream)


def make(features, **arguments):
    keras.utils.set_random_seed(1)
    model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=1, **arguments)
    model.compile(metrics=["AUC"])
    return model


def test_keras_takes_it(folder, frame, learnable):
    """As it takes the matrices: the same losses and scores; and rows and rows per second are in its bar."""
    indices, values = learnable.transform(frame)
    labels = frame["label"].to_numpy()
    streamed, ready = make(learnable), make(learnable)
    shown = []
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: shown.append(dict(logs)))
    stream, valid = learnable.stream(str(folder / "*.csv"), 64), learnable.stream(str(folder / "*.parquet"), 100)
    history = streamed.fit(stream, epochs=3, verbose=0, validation_data=valid, callbacks=[look])
    expected = ready.fit(
        (indices, values), labels, 64, 3, 0, validation_data=((indices, values), labels), shuffle=False
    )
    for name in ("loss", "val_loss", "val_AUC"):
        np.testing.assert_allclose(history.history[name], expected.history[name], rtol=1e-5)
    assert int(streamed.optimizer.iterations) == 48  # and no step on nothing at the end of a pass
    assert [logs["rows"] for logs in shown[:17]] == [*range(64, ROWS, 64), ROWS, 64]
    assert all(logs["rows_per_second"] > 0 for logs in shown)
    assert stream.epoch == 3 and valid.epoch == 0
    for _ in range(2):
        np.testing.assert_allclose(
            streamed.evaluate(valid, verbose=0), ready.evaluate((indices, values), labels, verbose=0), rtol=1e-5
        )
        scores = streamed.predict(learnable.stream(str(folder / "*.csv"), 77, labels=False), verbose=0)
        np.testing.assert_allclose(scores, ready.predict((indices, values), verbose=0), rtol=1e-4, atol=1e-6)


def test_steps_per_epoch(folder, learnable):
    """Epochs that end where passes do not: one pass follows the other."""
    model, stream = make(learnable), learnable.stream(str(folder / "*.csv"), 64)
    history = model.fit(stream, epochs=5, steps_per_epoch=8, verbose=0)
    assert len(history.epoch) == 5 and int(model.optimizer.iterations) == 40
    assert (stream.state()["epoch"], stream.state()["batch"]) == (2, 8)
    with pytest.raises(ValueError, match="every_steps and steps_per_epoch exclude each other"):
        callbacks = [Checkpoint(folder / "none", every_steps=2)]
        model.fit(stream, epochs=5, steps_per_epoch=8, verbose=0, callbacks=callbacks)


def test_the_bar(folder, learnable, capfd):
    make(learnable).fit(learnable.stream(str(folder / "*.csv"), 64), epochs=2)
    printed = capfd.readouterr()
    assert "rows: 1000" in printed.out and "rows_per_second" in printed.out
    assert "ran out of data" not in printed.err


def test_other_keras_models_take_it(folder, frame, learnable):
    inputs = keras.Input((learnable.num_columns,), dtype="int64"), keras.Input((learnable.num_columns,))
    output = FMInteraction(learnable.num_features, 4, use_linear=True)(inputs)
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(output))
    model.compile("adam", "binary_crossentropy")
    stream = learnable.stream(str(folder / "*.csv"), 64, shuffle=True)
    history = model.fit(stream, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert model.predict(learnable.stream(str(folder / "*.csv"), 64, labels=False), verbose=0).shape == (ROWS, 1)


def test_a_pipeline_is_made_of_it(folder, features):
    stream = features.stream(str(folder / "*.csv"), 64, shuffle=True, seed=4)
    dataset = stream.dataset()
    assert isinstance(dataset, tf.data.Dataset)
    got = rows_of(dataset.map(lambda x, y: (x, y)).as_numpy_iterator())
    assert got == rows_of(stream)


def test_errors_come_out_as_they_are(tmp_path, features):
    (tmp_path / "bad.csv").write_text("row,user,city,tags,label\n1,2,Rome,a,1\n2,3,Oslo,a|b,maybe\n")
    model = make(features)
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"bad.csv, line 3, column 'label': 'maybe' is no label"):
            call(features.stream(str(tmp_path / "bad.csv"), 64), verbose=0)


def weights_of(model):
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


class Stop(keras.callbacks.Callback):
    """Ends a training as a crash would."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [1, 2])
def test_resumes_in_the_middle(steps, folder, learnable, tmp_path):
    def run(name, *callbacks):
        model, stream = make(learnable), learnable.stream(str(folder / "*.csv"), 64, shuffle=True, shuffle_rows=200)
        model.compile(steps_per_execution=steps)
        model.fit(stream, epochs=3, verbose=0, callbacks=[Checkpoint(tmp_path / name, every_steps=5), *callbacks])
        return weights_of(model)

    straight = run("straight")
    for after in (7, 4, 9) if steps == 1 else (7,):
        with pytest.raises(KeyboardInterrupt):
            run("stopped", Stop(after))
    for a, b in zip(straight, run("stopped"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_of_other_models(folder, learnable, tmp_path):
    """A plain Keras model's stream has to be named."""
    inputs = keras.Input((learnable.num_columns,), dtype="int64"), keras.Input((learnable.num_columns,))

    def run(callbacks):
        keras.utils.set_random_seed(3)
        output = FMInteraction(learnable.num_features, 4, use_linear=True)(inputs)
        model = keras.Model(inputs, keras.layers.Activation("sigmoid")(output))
        model.compile("adam", "binary_crossentropy")
        stream = learnable.stream(str(folder / "*.csv"), 64, shuffle=True)
        model.fit(stream, epochs=2, verbose=0, callbacks=callbacks(stream))
        return weights_of(model)

    straight = run(lambda stream: [Checkpoint(tmp_path / "straight", every_steps=4, stream=stream)])
    with pytest.raises(KeyboardInterrupt):
        run(lambda stream: [Checkpoint(tmp_path / "stopped", every_steps=4, stream=stream), Stop(11)])
    again = run(lambda stream: [Checkpoint(tmp_path / "stopped", every_steps=4, stream=stream)])
    for a, b in zip(straight, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="every_steps needs a stream"):
        run(lambda stream: [Checkpoint(tmp_path / "other", every_steps=4)])
    with pytest.raises(ValueError, match="was written while a stream was trained on, and now there is none"):
        run(lambda stream: [Checkpoint(tmp_path / "stopped")])


def test_killed_at_random_moments(folder, learnable, tmp_path):
    """A run that is killed again and again ends with the bits of one that was not."""
    if REFERENCE_MODE:
        return

    def start(to):
        to.mkdir(exist_ok=True)
        for path in folder.glob("*.csv"):
            if not (to / path.name).exists():
                (to / path.name).symlink_to(path)
        if not (to / "features").exists():
            learnable.save(to / "features")
        return Process(TRAINING.read_text(), to, "7")

    def end_of(process):
        code, out, error = process.wait()
        assert code == 0, error[-3000:]
        return out.splitlines()[-1]

    straight = end_of(start(tmp_path / "straight"))
    random.seed(17)
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        for _ in range(random.randrange(1, 60)):
            if process.stdout.readline().startswith("ended"):
                break
        process.kill()
        process.wait()
    assert end_of(start(tmp_path / "killed")) == straight


def test_whatever_was_done_with_a_stream_it_trains_on(learnable, frame):
    """Evaluating and predicting are whole passes, which move nothing; a fit that ended early is gone on with."""
    model, stream = make(learnable), learnable.stream(frame, 100)
    state = stream.state()
    assert len(model.predict(stream, verbose=0)) == ROWS and stream.state() == state
    before = model.evaluate(stream, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(stream, verbose=0, callbacks=[Stop(9)])
    assert stream.batch == 9 and len(model.predict(stream, verbose=0)) == ROWS
    model.fit(stream, verbose=0)
    assert (stream.epoch, stream.batch) == (1, 0)
    model.fit(stream, verbose=0, epochs=3)
    stream.restore(state)
    model.fit(stream, verbose=0)
    model.fit(stream, verbose=0, steps_per_epoch=9)
    model.fit(stream, verbose=0, steps_per_epoch=9)
    assert (stream.epoch, stream.batch) == (2, 8) and len(before) == 2
    again = pickle.loads(pickle.dumps(stream))
    assert again.state() == stream.state() and same(again, stream)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.fit(s, y=np.ones(3)), "y must be left out"),
        (lambda m, s: m.fit(s, batch_size=3), "batch_size must be left out"),
        (lambda m, s: m.fit(s, class_weight={0: 1, 1: 2}), "class_weight must be left out"),
        (lambda m, s: m.fit(s, validation_split=0.5), "validation_split must be left out"),
        (lambda m, s: m.fit(s, validation_data=s), "validation_data must be a stream of its own"),
        (lambda m, s: m.evaluate(s, sample_weight=np.ones(3)), "sample_weight must be left out"),
        (lambda m, s: m.fit(m.features.stream(s._source, 9, labels=False)), "the stream has no labels"),
        (lambda m, s: m.fit(m.features.stream(s._source, 2000, drop_remainder=True)), "there is no record for a batch"),
        (
            lambda m, s: m.fit(m.features.stream(s._source, 2000, drop_remainder=True), steps_per_epoch=2),
            "there is no record for a batch",
        ),
    ],
)
def test_what_a_stream_has_not_beside_it(call, message, learnable, frame):
    with pytest.raises(ValueError, match=message):
        call(make(learnable), learnable.stream(frame, 100))
