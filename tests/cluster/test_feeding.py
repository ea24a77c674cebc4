"""What steps are fed with: streams, what is counted, and what is left when a pass ends before its end."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_model import INDICES, VALUES, B, Y, assert_equal, everything, pair

from deepfm_ops import DeepFM, FeatureDictionary, cluster, optimizers
from deepfm_ops.cluster import coordinator, feeding, passes

ROWS = 300
RNG = np.random.default_rng(5)
LINES = [f"{RNG.integers(2)},{RNG.integers(20)},{RNG.integers(7)}" for _ in range(ROWS)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["label,a,b", *LINES]) + "\n")
    return path


def of_log(log, parts, number=2, workers=1, label="label", make=lambda: optimizers.LazyAdam(1e-2)):
    """(features, a model in parts, one of this process), compiled."""
    parts(number, workers)
    features = FeatureDictionary().fit(log, categorical=["a", "b"], label=label)
    arguments = {"embedding_dim": 4, "hidden_units": (8,), "seed": 3}
    sharded = cluster.ShardedDeepFM.from_features(features, **arguments)
    single = DeepFM.from_features(features, **arguments, embeddings_initializer=cluster.RowNormal(0.01, 3))
    for model in (sharded, single):
        model.compile(make(), metrics=["AUC"])
    return features, sharded, single


class Raise(keras.callbacks.Callback):
    """Raises an error after a number of batches."""

    def __init__(self, batch, error=None):
        super().__init__()
        self.batch, self.error, self.seen = batch, error, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.batch:
            if self.error is None:
                self.model.stop_training = True
            else:
                raise self.error


@pytest.mark.parametrize("as_function", [False, True])
def test_a_stream_gives_the_bits_of_one_process(log, parts, as_function):
    features, sharded, single = of_log(log, parts, 3, workers=2)
    histories = []
    for model, more in ((sharded, {"in_flight": 1}), (single, {})):
        make = lambda: features.stream(log, 32, shuffle=True)  # noqa: E731
        stream = make if as_function and model is sharded else make()
        validation = features.stream(log, 50)
        history = model.fit(stream, epochs=2, verbose=0, validation_data=validation, **more)
        histories.append(history.history)
    assert_equal(sharded, single)
    for name in ("loss", "val_loss", "AUC", "val_AUC"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-5)
    found = sharded.predict(features.stream(log, 32))
    np.testing.assert_array_equal(found, single.predict(features.stream(log, 32), verbose=0))
    again = sharded.evaluate(features.stream(log, 32)), single.evaluate(features.stream(log, 32), verbose=0)
    np.testing.assert_allclose(*again, rtol=1e-5)


def test_a_stream_in_the_middle_is_trained_on_from_there_and_tested_as_a_whole(log, parts):
    features, sharded, single = of_log(log, parts)
    streams = [features.stream(log, 32) for _ in range(2)]
    for model, stream in zip((sharded, single), streams, strict=True):
        batches = iter(stream)
        next(batches)
        next(batches)
        assert len(model.predict(stream, verbose=0)) == ROWS
        counter = Raise(0)
        model.fit(stream, epochs=2, verbose=0, callbacks=[counter])
        assert counter.seen == 8 + 10
    assert_equal(sharded, single)


@pytest.mark.parametrize("prefetch", [False, True])
def test_every_row_is_trained_on_once(log, parts, prefetch):
    features, sharded, _ = of_log(log, parts, workers=3)
    sharded.prefetch, counter = prefetch, Raise(0)
    sharded.fit(features.stream(log, 32), epochs=2, verbose=0, callbacks=[counter], in_flight=3)
    assert int(sharded._steps.samples.numpy()[0]) == 2 * ROWS
    assert counter.seen == int(sharded.optimizer.iterations.numpy())


def test_streams_that_cannot_be_used(log, parts, tmp_path):
    features, sharded, _ = of_log(log, parts)
    stream = features.stream(log, 32)
    unlabeled = features.stream(log, 32, labels=False)
    empty = tmp_path / "empty.csv"
    empty.write_text("label,a,b\n")
    empty = features.stream(empty, 32)
    others = FeatureDictionary().fit({"a": [1, 2], "b": [1, 2], "label": [0, 1]}, categorical=["a", "b"], label="label")
    for arguments, text in (
        ({"x": unlabeled}, "the stream has no labels"),
        ({"x": stream, "validation_data": unlabeled}, "the stream has no labels"),
        ({"x": empty}, "no record for a batch"),
        ({"x": stream, "validation_data": empty}, "no record for a batch"),
        ({"x": others.stream(log, 32)}, "features number 5 features, but the model has"),
        ({"x": stream, "y": Y}, "y must be left out"),
        ({"x": stream, "batch_size": 3}, "batch_size must be left out"),
        (
            {"x": features.stream(({"a": [1], "b": [1], "label": [1]} for _ in range(2)), 1)},
            "cannot be sent to workers",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            sharded.fit(**arguments, verbose=0)
    for call in (sharded.evaluate, sharded.predict):
        with pytest.raises(ValueError, match="no record for a batch"):
            call(empty)
        with pytest.raises(ValueError, match="features number 5 features, but the model has"):
            call(others.stream(log, 32))
    with pytest.raises(ValueError, match="the stream has no labels"):
        sharded.evaluate(unlabeled)
    assert len(sharded.predict(unlabeled)) == ROWS


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("x,1,1", r"log\.csv, line 102, column 'label'"),
        ("5,1,1", r"log\.csv, line 102.*not in \[0, 1\]"),
        ("1,1", "log.csv, line 102"),
    ],
)
def test_a_bad_record_is_named_once(log, parts, line, text):
    features, sharded, _ = of_log(log, parts, workers=2)
    log.write_text("\n".join(["label,a,b", *LINES[:100], line, *LINES[100:]]) + "\n")
    with pytest.raises(tf.errors.InvalidArgumentError, match=text) as caught:
        sharded.fit(features.stream(log, 32), verbose=0)
    assert "\n" not in caught.value.message and caught.value.message.count("log.csv") == 1
    log.write_text("\n".join(["label,a,b", *LINES]) + "\n")
    sharded.fit(features.stream(log, 32), verbose=0)


def test_a_file_that_a_worker_does_not_have(log, parts):
    features, sharded, _ = of_log(log, parts)
    stream = features.stream(log, 32)
    log.rename(log.with_name("other.csv"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="batch 0: .*log.csv"):
        sharded.fit(stream, verbose=0)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_stream_goes_on_over_other_workers(log, parts, tmp_path, workers):
    """From the middle of its second epoch, where a callback ended the first run."""

    def run(workers, callbacks):
        features, sharded, _ = of_log(log, parts, workers=workers)
        checkpoint = cluster.Checkpoint(tmp_path / "checkpoints", every_steps=5)
        sharded.fit(
            features.stream(log, 16, shuffle=True),
            epochs=3,
            verbose=0,
            callbacks=[checkpoint, *callbacks],
            in_flight=workers,
        )
        return sharded

    with pytest.raises(RuntimeError, match="ended"):
        run(3, [Raise(33, RuntimeError("ended"))])
    assert int(run(workers, [])._steps.samples.numpy()[0]) == 3 * ROWS


def test_a_checkpoint_is_not_gone_on_with_in_other_data(log, parts, tmp_path):
    features, sharded, _ = of_log(log, parts)
    checkpoint = cluster.Checkpoint(tmp_path / "stream", every_steps=2)
    with pytest.raises(RuntimeError):
        sharded.fit(features.stream(log, 16), verbose=0, callbacks=[checkpoint, Raise(3, RuntimeError("ended"))])
    for options in ({"batch_size": 8}, {"batch_size": 16, "drop_remainder": True}):
        with pytest.raises(ValueError, match=f"the checkpoint is of a stream with {list(options)[-1]}"):
            sharded.fit(features.stream(log, **options), verbose=0, callbacks=[checkpoint])
    inputs, labels = features.transform(log), np.zeros(ROWS)
    with pytest.raises(ValueError, match="while stream were trained on"):
        sharded.fit(inputs, labels, 16, verbose=0, callbacks=[checkpoint])
    checkpoint = cluster.Checkpoint(tmp_path / "arrays", every_steps=2)
    with pytest.raises(RuntimeError):
        sharded.fit(inputs, labels, 16, verbose=0, callbacks=[checkpoint, Raise(3, RuntimeError("ended"))])
    with pytest.raises(ValueError, match="19 batches of 16 samples, got 10 batches of 32 samples"):
        sharded.fit(inputs, labels, 32, verbose=0, callbacks=[checkpoint])


def test_a_checkpoint_after_the_last_batch(parts, tmp_path):
    """The epoch is over: callbacks are told of none of which no step is left."""
    for resumed in (False, True):
        sharded, _ = pair(lambda: optimizers.LazyAdam(1e-2), parts, 2)
        checkpoint = cluster.Checkpoint(tmp_path / "checkpoints", every_steps=7, every=9)
        callbacks = [
            checkpoint,
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.ReduceLROnPlateau("loss"),
        ]
        callbacks += [] if resumed else [Raise(7, RuntimeError("ended"))]
        if resumed:
            history = sharded.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, callbacks=callbacks)
            assert history.epoch == [1]
        else:
            with pytest.raises(RuntimeError):
                sharded.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, callbacks=callbacks)


def test_a_test_within_an_epoch_leaves_checkpoints_alone(parts, tmp_path, monkeypatch):
    sharded, _ = pair(lambda: optimizers.LazyAdam(1e-2), parts, 2)
    drained = []
    monkeypatch.setattr("deepfm_ops.cluster.passes.Pass.drain", lambda self: drained.append(self._feed))
    test = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: sharded.evaluate((INDICES, VALUES), Y))
    checkpoint = cluster.Checkpoint(tmp_path, every_steps=3)
    sharded.fit((INDICES, VALUES), Y, B, verbose=0, callbacks=[test, checkpoint], in_flight=3)
    assert len(drained) == 2 and drained[0] is drained[1] and drained[0].num_done == 7


def test_what_ends_a_pass_leaves_the_model_usable(parts, monkeypatch):
    """An error in a callback, an interrupt, a stop: no step is done afterwards, and another fit is one of its own."""
    sharded, _ = pair(lambda: optimizers.LazyAdam(1e-2), parts, 2)
    for error in (RuntimeError("ended"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            sharded.fit((INDICES, VALUES), Y, B, verbose=0, callbacks=[Raise(2, error)])
    stop = Raise(2)
    history = sharded.fit((INDICES, VALUES), Y, B, epochs=3, verbose=0, callbacks=[stop])
    assert stop.seen == 2 and history.epoch == [0]
    assert int(sharded.optimizer.iterations.numpy()) == 6
    with monkeypatch.context() as patch:
        patch.setattr("deepfm_ops.cluster.passes.Pass._run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sharded.fit((INDICES, VALUES), Y, B, verbose=0)
    counter = Raise(0)
    sharded.fit((INDICES, VALUES), Y, B, verbose=0, callbacks=[counter])
    assert counter.seen == 7 and int(sharded.optimizer.iterations.numpy()) == 13


def test_a_worker_that_does_not_answer_ends_the_wait(monkeypatch):
    """Others find nothing to take meanwhile, as it has the last batch."""

    class Waiting(coordinator.Chief):
        def check_workers(self):
            raise cluster.ClusterError("worker 1 does not answer")

        def done(self):
            return False

        def schedule(self, function, *_):
            steps._results.put(None)

    chief = Waiting()
    chief.coordinator = chief._cluster = chief
    feed = feeding.Arrays(lambda start: [], range(0, 2, 1))
    steps = passes.Pass(chief, feed, 2, None, None)
    monkeypatch.setattr(passes, "WAIT", 0.0)
    with pytest.raises(cluster.ClusterError, match="worker 1 does not answer"):
        list(steps)


def test_the_text_of_an_error_of_a_worker():
    line = "/a.csv, line 3: it has 2 columns, not 3"
    cut_off = (
        f'Graph execution error:\n\nValueError: {line}\nTraceback (most recent call last):\n\n  File "/b.py", line'
    )
    several = f"2 root error(s) found.\n  (0) INVALID_ARGUMENT:  ValueError: {line}\nTraceback"
    for text in (cut_off, several):
        assert passes.plain(text) == line
    assert passes.plain("assertion failed: [row 0: nan]\n\t [[{{node Assert}}]] [Op:f]") == "row 0: nan"


def test_the_last_streams_are_kept(log):
    features = FeatureDictionary().fit(log, categorical=["a", "b"], label="label")
    training, *tests = (feeding.StreamParts(features.stream(log, 32), 1, "binary") for _ in range(4))

    def read(feed):
        state = feed.take(0).state
        found = feeding.next_batch(feed.job, feeding.json.dumps(state))
        if found[0] == feeding.UNKNOWN:
            feeding.install(feed.job, feed.content)
        return found[0].numpy()

    read(training)
    for feed in tests:
        assert read(training) not in (feeding.UNKNOWN, feeding.OVER)
        assert read(feed) == feeding.UNKNOWN
        assert read(feed) not in (feeding.UNKNOWN, feeding.OVER)
    assert len(feeding._jobs) == 2


def test_averages_of_steps_side_by_side(parts):
    """They are settled before a step would scale them down, to which others go on adding."""
    sharded, _ = pair(lambda: optimizers.LazyAdam(1e-3, use_ema=True, ema_momentum=0.5), parts, 2, workers=2)
    decays = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: decays.append(sharded._steps.decay))
    sharded.fit((INDICES, VALUES), Y, 4, epochs=2, verbose=0, callbacks=[note], in_flight=2)
    assert 2.0**-80 < min(decays) < 2.0**-40 and decays[-1] < 1
    averages = everything(sharded.to_single())
    assert all(np.isfinite(x).all() for x in averages.values())
