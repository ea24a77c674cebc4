"""Order three and field weights as options of the layer and of DeepFM."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE, dense_samples, oracle, skewed

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, FMInteraction, SparseFeat, VarLenSparseFeat, fusion, optimizers

OPTIONS = {"order 3": {"order": 3}, "field weights": {"field_weights": True}}
# "b" and "c" are a whole table; "a" spans two; "t" is pooled by maximum.
COLUMNS = [
    SparseFeat("b", 7, embedding_dim=3, group_name="b"),
    SparseFeat("c", 5, embedding_dim=3, group_name="b"),
    SparseFeat("d", 9, embedding_dim=3, group_name="b"),
    *(SparseFeat(name, 6, embedding_dim=4, group_name="a") for name in "efg"),
    VarLenSparseFeat(SparseFeat("t", 8, embedding_dim=4, group_name="a", trainable=False), 3, "max"),
]
SIZES = {"num_features": 60, "num_fields": 3, "embedding_dim": 4, "hidden_units": (5,), "seed": 1}


def filled(layer, rng):
    for weight in layer.weights:
        if "float" in weight.dtype:
            weight.assign(rng.normal(size=weight.shape))
    return layer


def weights_of(layer):
    return None if layer.field_weights is None else layer.field_weights.numpy()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_layer(options, backend, rng):
    indices, values = rng.integers(0, 50, (6, 4)), rng.normal(size=(6, 4)).astype("f")
    layer = FMInteraction(50, 3, use_linear=True, backend=backend, **options)
    layer((indices, values))
    filled(layer, rng)
    table, w = layer.embeddings.numpy(), layer.w.numpy()
    want = oracle(table, dense_samples(indices, values), order=layer.order, field_weights=weights_of(layer))
    want += (w[indices, 0] * values).sum(1, keepdims=True)
    np.testing.assert_allclose(layer((indices, values)), want, rtol=1e-4, atol=1e-4)
    assert layer.compute_output_shape(((None, 4), (None, 4))) == (None, 1)
    again = FMInteraction.from_config(layer.get_config())
    assert again.order == layer.order and again.has_field_weights == layer.has_field_weights


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fields_of_several_columns(options, rng):
    layer = FMInteraction(50, 3, field_sizes=[1, 2, 1], output="vector", return_embeddings=True, **options)
    layer.build()
    filled(layer, rng)
    indices = rng.integers(0, 50, (6, 4))
    samples = [[[(i[0], 1)], [(i[1], 1), (i[2], 1)], [(i[3], 1)]] for i in indices]
    want = oracle(layer.embeddings.numpy(), samples, "vector", layer.order, weights_of(layer))
    np.testing.assert_allclose(layer(indices)[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dtypes(options, policy, rng):
    indices = rng.integers(0, 50, (6, 4))
    layer = FMInteraction(50, 8, dtype=policy, **options)
    layer(indices)
    filled(layer, rng)
    with tf.GradientTape() as tape:
        y = layer(indices)
    assert y.dtype == layer.compute_dtype
    table = tf.cast(layer.embeddings.value, tf.float64)
    want = oracle(table, dense_samples(indices), order=layer.order, field_weights=weights_of(layer))
    np.testing.assert_allclose(tf.cast(y, tf.float64), want, rtol=2e-2, atol=2e-2 * np.abs(want).max())
    gradients = tape.gradient(y, [v.value for v in layer.trainable_variables])
    assert all(g.dtype == v.dtype for g, v in zip(gradients, layer.trainable_variables, strict=True))
    if layer.field_weights is not None:
        assert layer.field_weights.dtype == ("float64" if policy == "float64" else "float32")


def test_field_weights_of_one_are_the_plain_interaction(rng):
    indices = rng.integers(0, 50, (6, 4))
    plain, weighted = FMInteraction(50, 3), FMInteraction(50, 3, field_weights=True)
    want = plain(indices)
    weighted(indices)
    weighted.embeddings.assign(plain.embeddings)
    np.testing.assert_allclose(weighted(indices), want, rtol=1e-4, atol=1e-9)


def test_ragged_samples(rng):
    indices = tf.ragged.constant([[1, 2, 3], [], [4], [5, 6, 7, 8]], dtype=tf.int64)
    layer = FMInteraction(50, 3, order=3)
    layer(indices)
    filled(layer, rng)
    samples = [[[(i, 1)] for i in row] for row in indices.to_list()]
    want = oracle(layer.embeddings.numpy(), samples, order=3)
    np.testing.assert_allclose(layer(indices), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_field_weights_refuse(backend):
    with pytest.raises(ValueError, match="field_weights need a fixed number of fields"):
        FMInteraction(50, 3, field_weights=True, backend=backend).build()
    with pytest.raises(ValueError, match="field_weights need a fixed number of fields"):
        FMInteraction(50, 3, field_weights=True, backend=backend).build((None, None))
    layer = FMInteraction(50, 3, field_weights=True, backend=backend)
    layer(np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"indices must have 3 columns, got shape \(1, 2\)"):
        layer(np.array([[1, 2]]))
    with pytest.raises(ValueError, match=r"field_weights need dense indices \[B, F\], got a RaggedTensor"):
        layer(tf.ragged.constant([[1, 2, 3]], dtype=tf.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be 2 or 3, got 4"),
        ({"order": True}, "order must be 2 or 3, got True"),
        ({"order": 3.0}, "order must be 2 or 3, got 3.0"),  # its scorer could not be read
        ({"field_weights": 1}, "field_weights must be True or False, got 1"),
        ({"order": 3, "field_weights": True}, "field_weights weight pairs of fields: they need order=2, got order=3"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        FMInteraction(50, 3, **options)
    with pytest.raises(ValueError, match=message):
        DeepFM(**SIZES, **options)
    with pytest.raises(ValueError, match=message):
        DeepFM.from_columns(COLUMNS, COLUMNS, **options)
    with pytest.raises(ValueError, match="they need use_fm"):
        DeepFM(**SIZES, use_fm=False, order=3)
    with pytest.raises(ValueError, match="they need use_fm"):
        DeepFM.from_columns(COLUMNS, COLUMNS, use_fm=False, field_weights=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("optimizer", ["LazyAdam", "recommended"])
def test_training_by_either_backend_is_the_same(options, optimizer):
    x, y = skewed()
    counts = {"feature_counts": np.bincount(x[0].ravel(), minlength=60), "num_samples": len(y)}
    models = []
    for backend in ("auto", "reference"):
        model = DeepFM(**SIZES, **counts, backend=backend, **options)
        if optimizer == "recommended":
            model.compile()
        else:
            model.compile(optimizers.LazyAdam(0.05), "binary_crossentropy")
        model.fit(x, y, batch_size=50, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    fm = models[0].get_layer("fm")
    assert fm.field_weights is None or (fm.field_weights.numpy() != 1).all()


def test_fusion(monkeypatch):
    """An order of three is fused with the update, to the same bits; what field weights need is another gradient."""
    if REFERENCE_MODE:
        return
    emitted = []
    together = fusion.Updates._together
    monkeypatch.setattr(fusion.Updates, "_together", lambda *a: emitted.append(1) or together(*a))

    def train(**options):
        keras.utils.set_random_seed(1)
        (indices, values), _ = skewed()
        layer = FMInteraction(60, 4, embeddings_initializer="normal", **options)
        layer.build((None, 3))
        optimizer = optimizers.LazyAdam(0.1)
        optimizer.build(layer.trainable_variables)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(layer((tf.constant(indices), tf.constant(values))) ** 2)
            optimizer.apply(tape.gradient(loss, [v.value for v in layer.trainable_variables]))

        for _ in range(3):
            step()
        return [v.numpy() for v in layer.trainable_variables]

    train(field_weights=True)
    assert not emitted
    fused = train(order=3)
    assert emitted
    monkeypatch.setattr(fusion.Updates, "_is_all_of", lambda *args: False)
    for a, b in zip(fused, train(order=3), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_exported_and_cloned(options, tmp_path):
    x, y = skewed()
    model = DeepFM(**SIZES, **options)
    model.compile()
    model.fit(x, y, verbose=0)
    want = model.predict(x, verbose=0)
    for form in ("keras", "h5"):
        model.save(tmp_path / f"model.{form}")
        loaded = keras.models.load_model(tmp_path / f"model.{form}")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), want)
        assert {name: loaded.get_config()[name] for name in options} == options
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone.predict(x, verbose=0), want)
    assert not clone.plan.is_plain
    model.export(str(tmp_path / "exported"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(served.serve((tf.constant(x[0]), tf.constant(x[1]))), want, rtol=1e-5, atol=1e-6)
    deepfm_ops.export(model, str(tmp_path / "portable"), portable=True)
    served = tf.saved_model.load(str(tmp_path / "portable")).signatures["serving_default"]
    found = served(indices=tf.constant(x[0]), values=tf.constant(x[1]))
    np.testing.assert_allclose(next(iter(found.values())), want, rtol=1e-5, atol=1e-6)


def test_from_features_with_a_multivalued_field(tmp_path):
    table = {"a": ["x", "y", "x"], "b": ["u", "u", "v"], "t": ["p|q", "", "q"]}
    features = FeatureDictionary().fit(table, ["a", "b"], (), "t")
    for options in OPTIONS.values():
        model = DeepFM.from_features(features, embedding_dim=4, use_deep=False, **options)
        x = features.transform(table)
        filled(model.get_layer("fm"), np.random.default_rng(0))
        fm = model.get_layer("fm")
        ends = np.cumsum(features.field_sizes)
        columns = [range(end - size, end) for end, size in zip(ends, features.field_sizes, strict=True)]
        samples = [[[(i[p], v[p]) for p in field] for field in columns] for i, v in zip(*x, strict=True)]
        second = oracle(fm.embeddings.numpy(), samples, order=fm.order, field_weights=weights_of(fm))
        first = (fm.w.numpy()[x[0], 0] * x[1]).sum(1, keepdims=True)
        want = 1 / (1 + np.exp(-(first + second)))
        np.testing.assert_allclose(model.predict(x, verbose=0), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_columns(options, rng, tmp_path):
    model = DeepFM.from_columns(COLUMNS, COLUMNS, ["a", "b"], use_linear=False, use_deep=False, **options)
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(rng.normal(size=weight.shape))
    x = {column.name: rng.integers(0, column.vocabulary_size, 6) for column in COLUMNS if column.name != "t"}
    x["t"] = rng.integers(1, 8, (6, 3))
    e = {name: model.embedding(name)[x[name]] for name in x}
    e["t"] = e["t"].max(axis=1)
    weights = [layer.field_weights.numpy() for layer in model.plan.field_weights] or [None, None]
    assert len(weights) == len(model.plan.second_order) == 2
    logits = model.plan.head.bias.numpy()
    for names, of_pairs in zip(("tefg", "bcd"), weights, strict=True):  # tables that are not trained come first
        samples = [np.stack([e[name][row] for name in names]) for row in range(6)]
        picks = [[[(place, 1)] for place in range(len(names))]]
        kind = {"order": model.plan.order, "field_weights": of_pairs}
        logits = logits + np.array([oracle(table, picks, **kind)[0] for table in samples])
    want = model.predict(x, verbose=0)
    np.testing.assert_allclose(want, 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-5)
    y = rng.integers(0, 2, 6)
    model.compile()
    before = [np.array(w) for w in weights if w is not None]
    model.fit(x, y, verbose=0)
    for layer, was in zip(model.plan.field_weights, before, strict=True):
        assert (layer.field_weights.numpy() != was).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert {name: loaded.get_config()[name] for name in options} == options
