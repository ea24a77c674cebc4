"""Priors that count, counted features, the recommended recipe, two optimizers in one compile."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from deepfm_ops import Checkpoint, DeepFM, FeatureDictionary, FMInteraction, optimizers
from deepfm_ops.features.columns import DenseFeat, SparseFeat, VarLenSparseFeat
from deepfm_ops.layers import FirstOrder
from deepfm_ops.models import recipe


def data(rows=200, features=60, seed=0):
    r = np.random.default_rng(seed)
    indices = (features * r.random((rows, 3)) ** 2).astype(np.int64)  # some features often, some hardly ever
    return (indices, r.normal(size=(rows, 3)).astype("f")), r.integers(0, 2, (rows, 1)).astype("f")


def counts_of(indices, values, features=60):
    return np.bincount(indices[values != 0], minlength=features)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch", [200, 32])
def test_a_pass_over_the_data_is_maximum_a_posteriori(backend, batch):
    """The gradients of all batches add up to the likelihood's and the prior's, of rare rows and frequent ones."""
    (indices, values), labels = data()
    values[:20, 0] = 0.0  # no occurrences
    layer = FMInteraction(
        60,
        4,
        use_linear=True,
        feature_counts=counts_of(indices, values),
        embedding_prior=0.25,
        linear_prior=0.5,
        embeddings_initializer=keras.initializers.RandomNormal(seed=1),
        linear_initializer=keras.initializers.RandomNormal(seed=2),
        backend=backend,
        dtype="float64",
    )
    layer.build()
    tables = [layer.embeddings.value, layer.w.value]

    def gradients(loss_of):
        with tf.GradientTape() as tape:
            loss = loss_of()
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, tables)]

    total = [np.zeros(t.shape) for t in tables]
    for start in range(0, len(indices), batch):
        here = slice(start, start + batch)

        def mean_loss(here=here):
            logits = layer((indices[here], values[here]), training=True)
            return tf.reduce_mean(tf.keras.losses.binary_crossentropy(labels[here], logits, True)) + sum(layer.losses)

        size = len(indices[here])
        total = [t + size * g for t, g in zip(total, gradients(mean_loss), strict=True)]

    def posterior():
        rows, weights = (tf.gather(t, indices) for t in tables)
        x = tf.constant(values, tf.float64)[..., None]
        s = tf.reduce_sum(x * rows, 1)
        logits = tf.reduce_sum(x * weights, [1, 2]) + 0.5 * tf.reduce_sum(s**2 - tf.reduce_sum((x * rows) ** 2, 1), 1)
        likelihood = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels[:, 0].astype("d"), logits))
        used = counts_of(indices, values)[:, None] > 0
        priors = zip(tables, (0.25, 0.5), strict=True)
        return likelihood + sum(tf.reduce_sum(tf.where(used, t, 0) ** 2) / (2 * sd**2) for t, sd in priors)

    for got, want in zip(total, gradients(posterior), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # labels and priors are float32


@pytest.mark.parametrize(
    "optimizer",
    [keras.optimizers.Adam(), keras.optimizers.SGD(0.1), optimizers.Adagrad(0.1), optimizers.RowWiseAdagrad(0.1)],
)
@pytest.mark.parametrize("parts", [{}, {"use_fm": False, "use_deep": False}, {"use_linear": False}])
def test_priors_work_with_every_optimizer_and_part(optimizer, parts):
    x, y = data()
    norms = []
    for deviation in (1e3, 0.05):
        optimizer = type(optimizer).from_config(optimizer.get_config())
        priors = {"feature_counts": counts_of(*x), "embedding_prior": deviation, "linear_prior": deviation}
        model = DeepFM(60, 3, 4, (8,), seed=1, **priors, **parts)
        model.compile(optimizer, "binary_crossentropy")
        model.fit(x, y, epochs=20, verbose=0, shuffle=False)
        tables = [v for v in model.trainable_variables if v.shape[0] == 60]
        norms.append(sum(float(np.square(v).sum()) for v in tables))
    assert norms[1] < norms[0]


def test_the_prior_is_soft_in_the_first_pass(tmp_path):
    x, y = data()

    def weights(**options):
        model = DeepFM(60, 3, 4, (8,), seed=1, **options)
        model.compile(optimizers.CombinedOptimizer(optimizers.SGD(0.1), optimizers.SGD(0.0)))
        seen = []
        keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(model.get_layer("fm").w.numpy()))
        model.fit(x, y, epochs=2, batch_size=10, verbose=0, shuffle=False, callbacks=[keep])
        return model, seen

    counts = {"feature_counts": counts_of(*x), "linear_prior": 0.1}
    _, without = weights()
    model, later = weights(num_samples=200, **counts)
    _, at_once = weights(**counts)
    frequent = counts_of(*x) > 10
    size = [[np.abs(w[frequent]).sum() for w in seen] for seen in (at_once, later, without)]
    assert size[0][0] < 0.9 * size[1][0] and size[1][0] > 0.8 * size[2][0]
    assert size[1][1] < 0.9 * size[2][1]
    assert model.get_layer("fm").samples.numpy().tolist() == [400, 200]
    model.predict(x, verbose=0)
    assert model.get_layer("fm").samples.numpy().tolist() == [400, 200]
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert loaded.get_layer("fm").samples.numpy().tolist() == [400, 200]
    np.testing.assert_array_equal(loaded.get_layer("fm").feature_counts, counts_of(*x))
    clone = keras.models.clone_model(model)
    assert clone.get_layer("fm").samples.numpy().tolist() == [0, 200]
    np.testing.assert_array_equal(clone.get_layer("fm").feature_counts, counts_of(*x))


def test_counts_can_be_brought_up_to_date():
    (indices, values), _ = data()
    layer = FMInteraction(60, 4, feature_counts=np.zeros(60, int), embedding_prior=0.1)
    layer.build()
    layer.set_feature_counts(counts_of(indices, values), 200)
    np.testing.assert_array_equal(layer.feature_counts, counts_of(indices, values))
    assert layer.samples.numpy().tolist() == [0, 200]
    with pytest.raises(ValueError, match="was made without feature_counts"):
        FMInteraction(60, 4).set_feature_counts(counts_of(indices, values))


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (np.ones(59, int), ValueError, r"must have shape \(60,\), one per feature, got \(59,\)"),
        (np.ones((60, 1), int), ValueError, r"must have shape \(60,\)"),
        ([1] * 59 + [-3], ValueError, r"feature_counts\[59\] = -3 is negative"),
        ([0.5] * 60, TypeError, "must be whole numbers"),
        (["1"] * 60, TypeError, "must be whole numbers"),
        ([np.nan] * 60, TypeError, "must be whole numbers"),
    ],
)
def test_counts_that_are_none(counts, error, message):
    for make in (lambda c: DeepFM(60, 3, feature_counts=c), lambda c: FirstOrder(60, feature_counts=c, prior=1.0)):
        with pytest.raises(error, match=message):
            make(counts)


@pytest.mark.parametrize("deviation", [0, -0.1, np.nan, np.inf, "wide"])
def test_deviations_that_are_none(deviation):
    for name in ("embedding_prior", "linear_prior"):
        for make in (
            lambda **prior: DeepFM(60, 3, **prior),
            lambda **prior: FMInteraction(60, 4, use_linear=True, **prior),
            lambda **prior: DeepFM.from_columns([SparseFeat("a", 4)], [SparseFeat("a", 4)], **prior),
        ):
            with pytest.raises(ValueError, match=f"{name} must be a number above 0, or None"):
                make(**{name: deviation})
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        DeepFM(60, 3, feature_counts=np.ones(60, int), num_samples=0)


def test_a_feature_that_occurs_though_none_was_counted():
    """It counts as one; said once."""
    x, y = data()
    counts = counts_of(*x)
    counts[x[0][0, 0]] = 0
    model = DeepFM(60, 3, 4, (8,), feature_counts=counts)
    model.compile()
    with pytest.warns(UserWarning, match=f"say 0 of 1 features that occur, such as {x[0][0, 0]}") as said:
        model.fit(x, y, verbose=0)
        model.fit(x, y, verbose=0)
    assert len([w for w in said if "feature_counts" in str(w.message)]) == 1


FRAME = pd.DataFrame(
    {
        "city": ["Rome", "Oslo", None, "Rome"] * 5,
        "age": [0.5, 0.0, None, 2.0] * 5,
        "tags": ["a|b|b", "", "b", None] * 5,
    }
)


def test_a_dictionary_counts(tmp_path):
    features = FeatureDictionary().fit(FRAME, categorical="city", numeric="age", multivalued="tags")
    indices, values = features.transform(FRAME)
    assert features.counts.dtype == np.int64 and features.num_samples == 20
    np.testing.assert_array_equal(features.counts, counts_of(indices, values, features.num_features))
    assert features.counts.tolist() == [0, 5, 10, 10, 5, 15]
    features.save(tmp_path / "f.json")
    loaded = FeatureDictionary.load(tmp_path / "f.json")
    np.testing.assert_array_equal(loaded.counts, features.counts)
    assert loaded.num_samples == 20
    features.fit({"city": ["Rome"]}, categorical="city")
    assert features.counts.tolist() == [0, 1] and features.num_samples == 1


def test_a_dictionary_without_counts_makes_a_model_without_priors():
    features = FeatureDictionary().fit(FRAME, categorical="city")
    config = features.to_config()
    del config["counts"], config["num_samples"]  # as an older version wrote it
    old = FeatureDictionary.from_config(config)
    assert old.counts is None and old.num_samples is None
    assert DeepFM.from_features(old).get_layer("fm").feature_counts is None


def test_two_lines():
    features = FeatureDictionary().fit(FRAME, categorical="city", numeric="age", multivalued="tags")
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
    x, y = data(3000)
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


COLUMNS = [
    SparseFeat("city", 10, embedding_dim=4, vocabulary={"Rome": 1, "Oslo": 2}, dtype="string"),
    VarLenSparseFeat(SparseFeat("tags", 20, embedding_dim=4, vocabulary={"a": 1, "b": 2}, dtype="string"), maxlen=3),
    VarLenSparseFeat(
        SparseFeat("best", 20, embedding_dim=4, vocabulary={"a": 1, "b": 2}, dtype="string"), maxlen=2, combiner="max"
    ),
    DenseFeat("age", 1),
]


def test_columns_are_counted_by_the_first_fit(tmp_path):
    x = {
        "city": np.array(["Rome", "Oslo", "?", "Rome"] * 5, object),
        "tags": np.array([["a", "b", "b"], ["", "", ""], ["b", "", ""], ["?", "", ""]] * 5, object),
        "best": np.array([["a", "b"], ["", ""], ["b", ""], ["a", ""]] * 5, object),
        "age": np.arange(20.0).astype("f"),
    }
    y = np.tile([0, 1, 1, 0], 5)
    model = DeepFM.from_columns(COLUMNS, COLUMNS, dnn_hidden_units=(8,), count_features=True)
    model.compile()
    parts = [*model.plan.lookups, *model.plan.first_orders]
    assert all(part.source.feature_counts.numpy().sum() == 0 for part in parts)
    model.fit(x, y, epochs=2, verbose=0)
    assert parts
    for part in parts:
        layer = part.source
        rows = {"city": (1, [10, 5])} if layer.num_features >= 10 else {}
        assert layer.samples.numpy().tolist() == [40, 20]
        for start, expected in rows.values():
            assert layer.feature_counts.numpy()[start : start + 2].tolist() == expected
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    for before, after in zip(parts, [*loaded.plan.lookups, *loaded.plan.first_orders], strict=True):
        np.testing.assert_array_equal(before.source.feature_counts, after.source.feature_counts)
    loaded.fit(x, y, verbose=0)  # and does not count again
    assert loaded.plan.lookups[0].source.samples.numpy().tolist() == [60, 20]
    with pytest.raises(ValueError, match="count_features needs fit on arrays"):
        fresh = DeepFM.from_columns(COLUMNS, COLUMNS, dnn_hidden_units=(8,), count_features=True)
        fresh.compile()
        fresh.fit(tf.data.Dataset.from_tensors((x, y)), verbose=0)


def combined():
    decay = keras.optimizers.schedules.CosineDecay(0.1, 100)
    return optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(decay), keras.optimizers.Adam(0.01))


def test_two_optimizers_in_one_compile(tmp_path):
    """Each does what it does alone, schedule included, saved and resumed."""
    x, y = data()
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
    x, y = data()
    model = DeepFM(60, 3, 4, (8,))
    model.compile()
    model.fit(x, y, verbose=0, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-4)
    assert float(model.optimizer.tables.learning_rate) == pytest.approx(1.5e-3)
    model.compile(optimizers.CombinedOptimizer("sgd", "adam"))
    with pytest.raises(TypeError, match="set a schedule in `tables` and `dense`"):
        model.optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(0.1, 100)


def test_an_embedding_of_keras_is_a_table():
    inputs = keras.Input((3,), dtype="int64")
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(keras.layers.Embedding(60, 4)(inputs))))
    model.compile(optimizers.CombinedOptimizer(optimizers.SGD(0.0), optimizers.SGD(0.1)), "mse")
    before = model.get_weights()
    (indices, _), y = data()
    model.fit(indices, y, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert np.abs(model.get_weights()[1] - before[1]).max() > 0


def orders(fit, epochs=3):
    """The rows of the batches of each epoch, as the model's steps saw them."""
    seen = []

    class Watched(DeepFM):
        def train_step(self, batch):
            tf.py_function(lambda i: seen.append(i.numpy()), [batch[0][0][:, 0]], [])
            return super().train_step(batch)

    model = Watched(1000, 1, 4, (8,))
    model.compile("sgd", "binary_crossentropy")
    fit(model, epochs)
    flat = np.concatenate(seen)
    return flat.reshape(-1, 1000)


ROWS = (np.arange(1000)[:, None], np.ones((1000, 1), "f")), np.zeros(1000)


@pytest.mark.parametrize("set_seed", [keras.utils.set_random_seed, tf.random.set_seed])
def test_every_epoch_has_an_order_of_its_own_that_follows_from_the_seed(set_seed):
    def fit(model, epochs):
        model.fit(*ROWS, epochs=epochs, batch_size=64, verbose=0)

    runs = []
    for seed in (0, 0, 1):
        set_seed(seed)
        runs.append(orders(fit))
    first, again, other = runs
    assert all(sorted(epoch) == list(range(1000)) for epoch in first)
    assert not any((first[a] == first[b]).all() for a, b in [(0, 1), (0, 2), (1, 2)])
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()
    unshuffled = orders(lambda model, epochs: model.fit(*ROWS, epochs=epochs, batch_size=64, verbose=0, shuffle=False))
    assert (unshuffled == np.arange(1000)).all()


def test_the_order_of_an_epoch_is_resumed(tmp_path):
    keras.utils.set_random_seed(3)
    straight = orders(
        lambda model, epochs: model.fit(*ROWS, epochs=4, verbose=0, callbacks=[Checkpoint(tmp_path / "a")])
    )
    keras.utils.set_random_seed(3)
    begun = orders(lambda model, epochs: model.fit(*ROWS, epochs=2, verbose=0, callbacks=[Checkpoint(tmp_path / "b")]))
    resumed = orders(
        lambda model, epochs: model.fit(*ROWS, epochs=4, verbose=0, callbacks=[Checkpoint(tmp_path / "b")])
    )
    np.testing.assert_array_equal(np.concatenate([begun, resumed]), straight)


def test_keras_options_of_fit_on_arrays():
    """What Keras's `fit` does with arrays, though it is given a stream of them."""
    x, y = data(400)
    weights, classes = np.linspace(0, 1, 400), {0: 1.0, 1: 3.0}
    frames = {}
    for shuffle in (False, "batch", True):
        losses = []
        for options in (
            {"sample_weight": weights},
            {"class_weight": classes},
            {"validation_split": 0.25},
            {"steps_per_epoch": 4},
            {"validation_data": (x, y, weights), "validation_freq": 2, "epochs": 2},
        ):
            model = DeepFM(60, 3, 4, (8,), seed=1)
            model.compile(optimizers.SGD(0.0), metrics=["accuracy"], weighted_metrics=["mse"])
            history = model.fit(x, y, verbose=0, **options).history
            losses.append({name: values for name, values in history.items()})
            if "steps_per_epoch" in options:
                assert int(model.optimizer.iterations) == 4
        frames[shuffle] = losses
    for losses in (frames["batch"], frames[True]):
        for got, want in zip(losses, frames[False], strict=True):
            assert got.keys() == want.keys()
            for name in got:  # nothing moves at a rate of zero, so that the order changes the rounding alone
                np.testing.assert_allclose(got[name], want[name], rtol=0.02)
    model.fit(x, tf.constant(y), verbose=0, callbacks=keras.callbacks.CallbackList([], model=model))
    with pytest.raises(ValueError, match="leaves one of the two parts of 1 samples empty"):
        model.fit((x[0][:1], x[1][:1]), y[:1], validation_split=0.5, verbose=0)
    with pytest.raises(ValueError, match="cardinality|same number"):
        model.fit(x, y[:100], verbose=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("seen", [None, 0, 250, 1000, 5000])
def test_rows_of_rare_features_move_farther(backend, seen, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr("deepfm_ops.ops.native_for", lambda *_: None)
    counts = np.array([0, 1, 100, 900])
    moves = []
    for rates in ({}, {"rare_rate": 4.0}):
        layer = FMInteraction(4, 3, use_linear=True, feature_counts=counts, num_samples=None if seen is None else 1000)
        layer.build()
        share = 1 if seen is None else min(1, seen / 1000)
        layer.samples.assign([seen or 0, layer.num_samples or 0])
        optimizer = optimizers.LazyAdam(0.01, **rates)
        optimizer = optimizers.LazyAdam.from_config(optimizer.get_config())
        before = [v.numpy() for v in layer.trainable_variables]
        slices = [tf.IndexedSlices(tf.ones((4, v.shape[1])), np.arange(4), v.shape) for v in layer.trainable_variables]
        optimizer.apply(slices, layer.trainable_variables)
        moves.append([v.numpy() - b for v, b in zip(layer.trainable_variables, before, strict=True)])
    for plain, farther in zip(*moves, strict=True):
        np.testing.assert_allclose(farther, plain * (1 + 4 * 20 / (20 + share * counts))[:, None], rtol=1e-4)
    for wrong in (-1, np.nan, "much"):
        with pytest.raises(ValueError, match="rare_rate must be a number of at least 0"):
            optimizers.LazyAdam(rare_rate=wrong)


@pytest.mark.parametrize("form", [list, tuple, lambda x: dict(zip(("indices", "values"), x, strict=True))])
@pytest.mark.parametrize("labels", ["float32", "bool", "int64"])
def test_forms_of_inputs_and_labels(form, labels):
    x, y = data()
    losses = []
    for shuffle in (True, False):
        model = DeepFM(60, 3, 4, (8,), seed=1)
        model.compile(optimizers.SGD(0.0))
        options = {"class_weight": {0: 1.0, 1: 2.0}, "validation_split": 0.25, "shuffle": shuffle, "verbose": 0}
        losses.append(model.fit(form(x), y.astype(labels), batch_size=150, **options).history)
    for name in losses[0]:
        np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=1e-5)


def test_columns_that_were_not_counted_have_no_prior():
    columns = [SparseFeat("u", 20, embedding_dim=4)]
    x, y = {"u": np.arange(200) % 20}, np.arange(200) % 2
    means = []
    for count in (False, True):
        model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(8,), count_features=count)
        model.compile(optimizers.CombinedOptimizer(optimizers.LazyAdam(0.01, rare_rate=4.0), optimizers.SGD(0.0)))
        layer = model.get_layer("fm_0")
        layer.w.assign(tf.ones_like(layer.w))
        for _ in range(5):
            model.train_on_batch(x, y)
        means.append(layer.w.numpy())
    np.testing.assert_allclose(*means, rtol=1e-5)
    model.fit(x, y, verbose=0, validation_split=0.2)  # the 160 rows that it trains on are counted
    assert layer.samples.numpy().tolist() == [160, 160] and layer.feature_counts.numpy().sum() == 160


def test_the_batch_under_loss_scaling():
    x, y = data(300)
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


def test_rates_keep_their_ratio_over_a_rate_of_zero():
    optimizer = recipe.optimizer()
    optimizer.learning_rate = 0.0
    optimizer.learning_rate = 1e-3
    assert float(optimizer.tables.learning_rate) == pytest.approx(6e-3)


def test_parts_of_a_combined_optimizer_that_do_nothing():
    x, y = data()
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
    with pytest.raises(NotImplementedError, match="without SwapEMAWeights"):
        print(recipe.optimizer()._model_variables_moving_average)
