"""Exponential averages of weights: sparse as dense, shown where weights are read, trained on from the raw ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import Checkpoint, DeepFM, FMInteraction, export, export_scorer, optimizers, scorer
from deepfm_ops.averages import Fingerprint

MAKERS = {
    "SGD": optimizers.SGD,
    "momentum": lambda **options: optimizers.SGD(momentum=0.9, **options),
    "Adagrad": optimizers.Adagrad,
    "RowWiseAdagrad": optimizers.RowWiseAdagrad,
    "LazyAdam": optimizers.LazyAdam,
    "decay": lambda **options: optimizers.LazyAdam(weight_decay=0.1, **options),
    "accumulated": lambda **options: optimizers.LazyAdam(gradient_accumulation_steps=3, **options),
    "Ftrl": optimizers.Ftrl,
}


class Dense:
    """Averages of whole arrays, every element at every step, in the arithmetic that the package documents."""

    def __init__(self, arrays, momentum):
        self.weights, self.momentum, self.step, self.decay = [a.copy() for a in arrays], momentum, 0, 1.0
        self.lags = [np.zeros_like(a) for a in arrays]
        self.textbook = [a.astype(np.float64) for a in arrays]

    def update(self, weights):
        self.step += 1
        d = min(self.momentum, (1 + self.step) / (10 + self.step))
        for i, new in enumerate(weights):
            self.lags[i] = self.lags[i] - (new - self.weights[i]) * new.dtype.type(1 / self.decay)
            self.textbook[i] = d * self.textbook[i] + (1 - d) * new.astype(np.float64)
        self.decay *= d
        if self.decay < 2.0**-80:  # exact: a power of two
            self.decay, self.lags = self.decay / 2.0**-80, [lag * lag.dtype.type(2.0**-80) for lag in self.lags]
        self.weights = weights

    def averages(self):
        return [w + lag * w.dtype.type(self.decay) for w, lag in zip(self.weights, self.lags, strict=True)]

    def was_read(self):
        self.lags, self.decay = [a - w for a, w in zip(self.averages(), self.weights, strict=True)], 1.0


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("columns", "momentum", "dtype"), [(16, 0.99, "float32"), (1, 0.5, "float32"), (5, 0.9, "float64")]
)
def test_sparse_averages_are_dense_ones_bit_for_bit(name, columns, momentum, dtype, rng):
    rows = 300
    table = keras.Variable(rng.normal(size=(rows, columns)).astype(dtype))
    kernel = keras.Variable(rng.normal(size=(7, 5)).astype(dtype))
    variables = [table, kernel]
    optimizer = MAKERS[name](use_ema=True, ema_momentum=momentum)
    optimizer.build(variables)

    @tf.function
    def step(indices, slices, dense):
        optimizer.apply([tf.IndexedSlices(slices, indices, (rows, columns)), dense], variables)

    oracle = Dense([v.numpy() for v in variables], momentum)
    for number in range(200):
        indices = rng.integers(0, 1 + int(rows * rng.random() ** 2), 50)  # some rows often, some hardly ever
        slices, dense = rng.normal(size=(50, columns)).astype(dtype), rng.normal(size=(7, 5)).astype(dtype)
        step(tf.constant(indices), tf.constant(slices), tf.constant(dense))
        oracle.update([v.numpy() for v in variables])
        if number == 99:  # the state moves to another optimizer
            copy = MAKERS[name](use_ema=True, ema_momentum=momentum)
            copy.build(variables)
            copy.set_weights([v.numpy() for v in optimizer.variables])
            optimizer = copy
            step = tf.function(step.python_function)
        if number in (119, 199):
            raw = [v.numpy() for v in variables]
            optimizer.show_averages()
            for variable, want, textbook in zip(variables, oracle.averages(), oracle.textbook, strict=True):
                np.testing.assert_array_equal(variable, want)
                np.testing.assert_allclose(variable, textbook, rtol=0, atol=1e-6 if dtype == "float32" else 1e-13)
            oracle.was_read()
            optimizer.hide_averages()
            for variable, want in zip(variables, raw, strict=True):
                np.testing.assert_array_equal(variable, want)


def test_a_large_table_is_exchanged_in_chunks(rng, monkeypatch):
    monkeypatch.setattr("deepfm_ops.averages.CHUNK", 16)
    table = keras.Variable(rng.normal(size=(50, 3)).astype("f"))
    optimizer = optimizers.SGD(0.1, use_ema=True)
    optimizer.build([table])
    for _ in range(3):
        optimizer.apply([tf.IndexedSlices(tf.ones((2, 3)), [3, 40], (50, 3))], [table])
    raw = table.numpy()
    optimizer.show_averages()
    moved = np.flatnonzero((table.numpy() != raw).any(1))
    assert moved.tolist() == [3, 40]
    optimizer.show_averages()  # once is enough
    optimizer.hide_averages()
    np.testing.assert_array_equal(table, raw)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (8, 2)])
def test_a_fingerprint_tells_other_contents(shape, dtype, rng):
    def of(*parts):
        mark = Fingerprint()
        for part in parts:
            mark.add(tf.constant(part))
        return mark.total

    a, b = rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    marks = [of(a, b), of(b, a), of(a, a), of(b, b), of(a), of(a * 0, a), of(a, a * 0), of(-a, b), of(-a, -b)]
    for i in range(a.size):  # the last bit of each element, and each two that are exchanged
        near = a.copy().reshape(-1)
        near[i] = np.nextafter(near[i], np.inf)
        marks.append(of(near.reshape(shape), b))
        for j in range(i):
            turned = a.copy().reshape(-1)
            turned[[i, j]] = turned[[j, i]]
            marks.append(of(turned.reshape(shape), b))
            turned = a.copy().reshape(-1)
            turned[[i, j]] *= -1
            marks.append(of(turned.reshape(shape), b))
    assert len(set(marks)) == len(marks)
    assert of(a, b) == marks[0]


def make(**options):
    model = DeepFM(60, 3, embedding_dim=4, hidden_units=(8,), seed=1, **options)
    model.compile()
    return model


def data(rows=200):
    r = np.random.default_rng(0)
    return (r.integers(0, 60, (rows, 3)), np.ones((rows, 3), "f")), r.integers(0, 2, (rows, 1)).astype("f")


def states(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def test_fit_goes_on_from_the_raw_weights_and_shows_the_averages():
    x, y = data()
    options = {"batch_size": 50, "epochs": 3, "verbose": 0, "shuffle": False}
    watched, alone = make(), make()
    watched.fit(x, y, validation_data=(x, y), callbacks=[keras.callbacks.LambdaCallback()], **options)
    for _ in range(3):
        alone.fit(x, y, **{**options, "epochs": 1})
    assert watched.optimizer.averages_are_shown and alone.optimizer.averages_are_shown
    for a, b in zip(watched.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    shown = watched.get_weights()
    watched.optimizer.hide_averages()
    raw = [v.numpy() for v in watched.trainable_variables]
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(raw, shown, strict=False))
    plain = DeepFM(60, 3, embedding_dim=4, hidden_units=(8,), seed=1)  # without averages: the same raw weights
    plain.compile(optimizers.CombinedOptimizer(optimizers.LazyAdam(3e-3), optimizers.LazyAdam(5e-4)))
    plain.fit(x, y, **options)
    for a, b in zip(raw, plain.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_early_stopping_stops_on_averages_and_restores_them():
    x, y = data()
    model = make()
    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    seen = []
    predict = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            (logs["val_loss"], keras.losses.binary_crossentropy(y.T, model.predict(x, verbose=0).T)[0])
        )
    )
    history = model.fit(x, y, epochs=30, validation_data=(x, y), verbose=0, callbacks=[stop, predict]).history
    np.testing.assert_allclose(*zip(*seen, strict=True), rtol=1e-5)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_what_is_read_between_batches_is_the_average(tmp_path):
    x, y = data()
    model = make()
    for _ in range(5):
        model.train_on_batch(x, y)
    assert not model.optimizer.averages_are_shown
    raw = [v.numpy() for v in model.trainable_variables]
    reads = {
        "predict": lambda: model.predict(x, verbose=0),
        "evaluate": lambda: model.evaluate(x, y, verbose=0),
        "predict_on_batch": lambda: model.predict_on_batch(x),
        "test_on_batch": lambda: model.test_on_batch(x, y),
        "get_weights": model.get_weights,
        "save": lambda: model.save(tmp_path / "a.keras"),
        "save_weights": lambda: model.save_weights(tmp_path / "a.weights.h5"),
        "export": lambda: export(model, tmp_path / "exported"),
        "Keras's export": lambda: model.export(tmp_path / "by keras", verbose=False),
        "export_scorer": lambda: export_scorer(model, tmp_path / "a.scorer"),
    }
    for name, read in reads.items():
        read()
        assert model.optimizer.averages_are_shown, name
        model._hide_averages()
        for a, b in zip(raw, model.trainable_variables, strict=True):
            np.testing.assert_array_equal(a, b)
    want = model.predict(x, verbose=0)
    scored = scorer.Scorer.load(tmp_path / "a.scorer").score(*x)
    np.testing.assert_allclose(np.reshape(scored, want.shape), want, rtol=1e-4)
    served = tf.saved_model.load(str(tmp_path / "exported")).signatures["serving_default"]
    got = served(indices=tf.constant(x[0]), values=tf.constant(x[1]))["score"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_saved_models_hold_both(tmp_path):
    x, y = data()
    options = {"batch_size": 50, "epochs": 2, "verbose": 0, "shuffle": False}
    model = make()
    model.fit(x, y, **options)
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for one in (model, loaded):
        one.fit(x, y, **options)
    for a, b in zip(states(model), states(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_resume_averages_bit_for_bit(tmp_path):
    x, y = data()
    options = {"batch_size": 50, "verbose": 0, "shuffle": False, "validation_data": (x, y)}
    straight, first, second = make(), make(), make()
    straight.fit(x, y, epochs=4, **options)
    first.fit(x, y, epochs=2, callbacks=[Checkpoint(tmp_path)], **options)
    second.fit(x, y, epochs=4, callbacks=[Checkpoint(tmp_path)], **options)
    for a, b in zip(states(straight), states(second), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = DeepFM(60, 3, embedding_dim=4, hidden_units=(8,), seed=1)
    plain.compile(optimizers.CombinedOptimizer(optimizers.LazyAdam(), optimizers.LazyAdam()))
    with pytest.raises(ValueError, match="LazyAdam LazyAdam with averages, not CombinedOptimizer LazyAdam LazyAdam"):
        plain.fit(x, y, epochs=6, callbacks=[Checkpoint(tmp_path)], **options)


def test_weights_that_were_set_are_where_training_goes_on():
    x, y = data()
    model = make()
    model.fit(x, y, epochs=3, verbose=0)
    model.set_weights([w + 1 for w in model.get_weights()])
    model.get_layer("fm").embeddings.assign(np.full((60, 4), 0.5))
    want = model.get_weights()
    model._hide_averages()
    for a, b in zip(want, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)  # and the average starts there
    assert np.abs(model.get_weights()[0] - want[0]).max() < 0.02


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_with_and_without_averages_load_into_each_other(tmp_path):
    x, y = data()
    averaged, plain = make(), DeepFM(60, 3, embedding_dim=4, hidden_units=(8,), seed=2)
    plain.compile(optimizers.LazyAdam(), "binary_crossentropy")
    for model, name in ((averaged, "averaged"), (plain, "plain")):
        model.fit(x, y, epochs=2, verbose=0)
        model.save_weights(tmp_path / f"{name}.weights.h5")
    scores = averaged.predict(x, verbose=0), plain.predict(x, verbose=0)
    averaged.load_weights(tmp_path / "plain.weights.h5")
    plain.load_weights(tmp_path / "averaged.weights.h5")
    np.testing.assert_array_equal(plain.predict(x, verbose=0), scores[0])
    np.testing.assert_array_equal(averaged.predict(x, verbose=0), scores[1])
    table = averaged.get_layer("fm").embeddings.numpy()
    averaged._hide_averages()  # training goes on from what was loaded
    np.testing.assert_array_equal(averaged.get_layer("fm").embeddings, table)
    averaged.fit(x, y, epochs=1, verbose=0)


def test_a_plain_keras_model_ends_with_its_averages():
    x, y = data()
    inputs = keras.Input((3,), dtype="int64")
    model = keras.Model(inputs, FMInteraction(60, 4, use_linear=True)(inputs))
    model.compile(optimizers.LazyAdam(0.05, use_ema=True), "mse")
    finals = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: finals.append(model.trainable_variables[0].numpy())
    )
    model.fit(x[0], y, epochs=2, verbose=0, callbacks=[keep])
    assert np.abs(model.trainable_variables[0].numpy() - finals[-1]).max() > 1e-3
    assert not model.optimizer.averages_are_shown
    model.fit(x[0], y, epochs=1, verbose=0)
    with pytest.raises(RuntimeError, match="without SwapEMAWeights"):
        model.fit(x[0], y, verbose=0, validation_data=(x[0], y), callbacks=[keras.callbacks.SwapEMAWeights()])


def test_overwriting_as_keras_names_it(rng):
    table = keras.Variable(rng.normal(size=(6, 4)).astype("f"))
    optimizer = optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    raw, average = table.numpy(), table.numpy()
    for step in range(1, 7):
        optimizer.apply([tf.IndexedSlices(tf.ones((2, 4)), [1, 4], (6, 4))], [table])
        raw[[1, 4]] -= 0.1
        d = min(0.5, (1 + step) / (10 + step))
        average = d * average + (1 - d) * raw
        if step % 2 == 0:
            raw = average.copy()
        np.testing.assert_allclose(table, raw, rtol=1e-6)


def test_a_step_of_ones_own_on_averages_is_refused():
    x, y = data()
    model = make()
    model.fit(x, y, verbose=0)
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"call optimizer.hide_averages\(\)"):
        model.optimizer.apply(gradients, model.trainable_variables)
    model.optimizer.hide_averages()
    model.optimizer.apply(gradients, model.trainable_variables)


def test_under_loss_scaling():
    x, y = data()
    model = make()
    model.compile(keras.optimizers.LossScaleOptimizer(optimizers.LazyAdam(0.01, use_ema=True)), "binary_crossentropy")
    model.fit(x, y, epochs=2, verbose=0)
    assert model.optimizer.inner_optimizer.averages_are_shown
    model.fit(x, y, epochs=2, verbose=0)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_that_averages_nothing(momentum):
    with pytest.raises(ValueError, match="ema_momentum must be above 0 and below 1"):
        optimizers.LazyAdam(use_ema=True, ema_momentum=momentum)


def test_averages_that_cannot_be():
    with pytest.raises(ValueError, match="averages .use_ema. need weights of float32 or float64, got bfloat16"):
        optimizers.LazyAdam(use_ema=True).build([keras.Variable(np.ones((3, 2)), dtype="bfloat16")])
    with pytest.raises(ValueError, match="Adam of Keras cannot show averages"):
        optimizers.CombinedOptimizer(optimizers.LazyAdam(use_ema=True), keras.optimizers.Adam(use_ema=True))
    with pytest.raises(ValueError, match="use_ema must be the same of both"):
        optimizers.CombinedOptimizer(optimizers.LazyAdam(use_ema=True), keras.optimizers.Adam())


@pytest.mark.parametrize("how", ["set_weights", "load_weights"])
def test_weights_that_are_set_between_batches(how, tmp_path):
    x, y = data()
    model = make()
    model.fit(x, y, epochs=2, verbose=0)
    plain = DeepFM(60, 3, embedding_dim=4, hidden_units=(8,), seed=1)
    plain.set_weights(model.get_weights())
    plain.save_weights(tmp_path / "a.weights.h5")
    for _ in range(5):
        model.train_on_batch(x, y)
    if how == "set_weights":
        model.set_weights(plain.get_weights())
    else:
        model.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model._hide_averages()
    for a, b in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(a, b)
