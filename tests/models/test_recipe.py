"""What `compile()` without arguments and `from_features` choose; two optimizers in one compile."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import skewed

from deepfm_ops import DeepFM, FeatureDictionary, optimizers
from deepfm_ops.models import recipe


def test_two_lines():
    table = {"city": ["Rome", "Oslo", None, "Rome"] * 5, "age": [0.5, 0.0, None, 2.0] * 5}
    features = FeatureDictionary().fit(table, categorical="city", numeric="age")
    model = DeepFM.from_features(features)
    model.compile()
    fm = model.get_layer("fm")
    np.testing.assert_array_equal(fm.feature_counts, features.counts)
    assert (fm.embedding_prior, fm.linear_prior, fm.num_samples) == (0.05, 0.3, 20)
    assert model.loss == "binary_crossentropy"
    assert [float(o.learning_rate) for o in (model.optimizer.tables, model.optimizer.dense)] == [
        pytest.approx(3e-3),
        pytest.approx(5e-4),
    ]
    assert model.optimizer.use_ema
    regression = DeepFM.from_features(features, task="regression")
    regression.compile()
    assert regression.loss == "mean_squared_error"
    regression.compile(loss="mae", metrics=["mse"])
    assert regression.loss == "mae" and regression.optimizer.use_ema
    regression.compile("sgd")
    assert type(regression.optimizer) is keras.optimizers.SGD and regression.loss == "mean_squared_error"


def test_the_batch_follows_from_the_number_of_samples():
    sizes = [recipe.batch_size(recipe.optimizer(), n) for n in (1, 9_000, 23_594, 35_000, 100_000, 10**8)]
    assert sizes == [64, 64, 512, 1024, 1024, 1024]


@pytest.mark.parametrize(("compiled", "size"), [((), 64), (("adam", "binary_crossentropy"), 32)])
def test_the_batch_that_is_recommended(compiled, size, tmp_path):
    x, y = skewed(3000)
    model = DeepFM(60, 3, 4, (8,))
    model.compile(*compiled)
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == -(-3000 // size)
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    loaded.fit(x, y, verbose=0)
    assert int(loaded.optimizer.iterations) == 2 * -(-3000 // size)
    model.fit(x, y, batch_size=500, verbose=0)
    assert int(model.optimizer.iterations) == -(-3000 // size) + 6


def test_the_batch_under_loss_scaling():
    x, y = skewed(300)
    with_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = DeepFM(60, 3, 4, (8,))
        model.compile()
        model.fit(x, y, verbose=0)
        assert int(model.optimizer.inner_optimizer.iterations) == 5
    finally:
        keras.config.set_dtype_policy(with_policy)
    narrow = DeepFM(60, 3, 4, (8,), dtype="bfloat16")
    narrow.compile()
    assert not narrow.optimizer.use_ema


def combined():
    decay = keras.optimizers.schedules.CosineDecay(0.1, 100)
    return optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(decay), keras.optimizers.Adam(0.01))


def test_two_optimizers_in_one_compile(tmp_path):
    """Each does what it does alone, schedule included, saved and resumed."""
    x, y = skewed()
    models = []
    for _ in range(2):
        models.append(DeepFM(60, 3, 4, (8,), seed=1))
        models[-1].compile(combined())
    one, two = models
    parts = combined()
    tables = [v for v in two.trainable_variables if v.shape[0] == 60]
    dense = [v for v in two.trainable_variables if v.shape[0] != 60]
    loss = keras.losses.BinaryCrossentropy()
    for step in range(6):
        if step == 3:
            one.save(tmp_path / "a.keras")
            one = keras.models.load_model(tmp_path / "a.keras")
        one.train_on_batch(x, y)
        with tf.GradientTape() as tape:
            value = loss(y, two(x, training=True))
        gradients = tape.gradient(value, [*tables, *dense])
        parts.tables.apply(gradients[: len(tables)], tables)
        parts.dense.apply(gradients[len(tables) :], dense)
    for a, b in zip(one.trainable_variables, two.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(one.optimizer.tables.learning_rate) == pytest.approx(0.05 * (1 + np.cos(np.pi * 6 / 100)))


def test_keras_callbacks_change_both_rates():
    x, y = skewed()
    model = DeepFM(60, 3, 4, (8,))
    model.compile()
    model.fit(x, y, verbose=0, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-4)
    assert float(model.optimizer.tables.learning_rate) == pytest.approx(1.5e-3)
    model.compile(optimizers.CombinedOptimizer("sgd", "adam"))
    with pytest.raises(TypeError, match="set a schedule in `tables` and `dense`"):
        model.optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(0.1, 100)


def test_rates_keep_their_ratio_over_a_rate_of_zero():
    optimizer = recipe.optimizer()
    optimizer.learning_rate = 0.0
    optimizer.learning_rate = 1e-3
    assert float(optimizer.tables.learning_rate) == pytest.approx(6e-3)


def test_parts_of_a_combined_optimizer_that_do_nothing():
    x, y = skewed()
    model = DeepFM(60, 3, 4, (8,))
    for layer in model.layers:
        layer.trainable = layer.name == "fm"
    model.compile()
    model.fit(x, y, verbose=0, batch_size=100)
    assert int(model.optimizer.iterations) == 2
    variables = [keras.Variable(np.ones((3, 2)), name="embeddings"), keras.Variable(np.ones(2))]
    optimizer = optimizers.CombinedOptimizer("sgd", "sgd")
    optimizer.apply([None, tf.ones(2)], variables)
    np.testing.assert_array_equal(variables[0], np.ones((3, 2)))
    with pytest.raises(ValueError, match="must be two optimizers"):
        optimizers.CombinedOptimizer(optimizer, optimizer)
    with pytest.raises(RuntimeError, match="without SwapEMAWeights"):
        print(recipe.optimizer()._model_variables_moving_average)


def test_an_embedding_of_keras_is_a_table():
    inputs = keras.Input((3,), dtype="int64")
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(keras.layers.Embedding(60, 4)(inputs))))
    model.compile(optimizers.CombinedOptimizer(optimizers.SGD(0.0), optimizers.SGD(0.1)), "mse")
    before = model.get_weights()
    (indices, _), y = skewed()
    model.fit(indices, y, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert np.abs(model.get_weights()[1] - before[1]).max() > 0
