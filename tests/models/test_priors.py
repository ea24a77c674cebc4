"""Priors that count, counted features, and rows of rare features."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import counts_of, skewed

from deepfm_ops import DeepFM, FeatureDictionary, FMInteraction, export, native_info, optimizers
from deepfm_ops.features.columns import DenseFeat, SparseFeat, VarLenSparseFeat
from deepfm_ops.layers import FirstOrder


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch", [200, 32])
def test_a_pass_over_the_data_is_maximum_a_posteriori(backend, batch):
    """The gradients of all batches add up to the likelihood's and the prior's, of rare rows and frequent ones."""
    (indices, values), labels = skewed()
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
    ("optimizer", "parts"),
    [
        (keras.optimizers.Adam(), {}),
        (keras.optimizers.SGD(0.1), {"use_linear": False}),
        (optimizers.Adagrad(0.1), {"use_fm": False, "use_deep": False}),
        (optimizers.Adagrad(0.1), {}),
        (optimizers.RowWiseAdagrad(0.1), {"use_linear": False}),
    ],
)
def test_priors_work_with_every_optimizer_and_part(optimizer, parts):
    x, y = skewed()
    norms = []
    for deviation in (1e3, 0.05):
        optimizer = type(optimizer).from_config(optimizer.get_config())
        priors = {"feature_counts": counts_of(*x), "embedding_prior": deviation, "linear_prior": deviation}
        model = DeepFM(60, 3, 4, (8,), seed=1, **priors, **parts)
        model.compile(optimizer, "binary_crossentropy")
        model.fit(x, y, epochs=10, verbose=0, shuffle=False)
        tables = [v for v in model.trainable_variables if v.shape[0] == 60]
        norms.append(sum(float(np.square(v).sum()) for v in tables))
    assert norms[1] < norms[0]


def test_the_prior_is_soft_in_the_first_pass(tmp_path):
    x, y = skewed()

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
    (indices, values), _ = skewed()
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
    x, y = skewed()
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
    assert features.counts.tolist() == [0, 15, 10, 10, 5, 5]
    features.save(tmp_path / "f.json")
    loaded = FeatureDictionary.load(tmp_path / "f.json")
    np.testing.assert_array_equal(loaded.counts, features.counts)
    assert loaded.num_samples == 20
    features.fit({"city": ["Rome"]}, categorical="city")
    assert features.counts.tolist() == [0, 1] and features.num_samples == 1


def test_a_dictionary_without_counts_makes_a_model_without_priors():
    fields = [
        {"name": "city", "kind": "categorical", "size": 1, "start": 1, "values": ["Oslo", "Rome"], "dtype": "text"}
    ]
    old = FeatureDictionary.from_config({"format": 2, "separator": "|", "nonfinite": "error", "fields": fields})
    assert old.counts is None and old.num_samples is None
    assert DeepFM.from_features(old).get_layer("fm").feature_counts is None


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


@pytest.mark.parametrize("portable", [True, False])
def test_what_is_served_knows_nothing_of_counts(portable, tmp_path):
    x, _ = skewed()
    if not portable and not native_info()["native"]:
        return
    variables, graphs = [], []
    for counts in (None, counts_of(*x)):
        model = DeepFM(60, 3, 4, (8,), seed=1, feature_counts=counts, num_samples=200)
        export(model, tmp_path / "a", portable=portable)
        loaded = tf.saved_model.load(str(tmp_path / "a"))
        variables.append(
            sorted(name for name, _ in tf.train.list_variables(str(tmp_path / "a" / "variables" / "variables")))
        )
        signature = loaded.signatures["serving_default"]
        graphs.append(len(signature.graph.as_graph_def().node))
        got = signature(indices=tf.constant(x[0]), values=tf.constant(x[1]))["score"]
        np.testing.assert_allclose(got, model.predict(x, verbose=0), rtol=1e-5)
    assert variables[0] == variables[1] and graphs[0] == graphs[1]
