"""Saved is loadable: by whoever imported the package, whatever Keras did to the model before."""

import copy
import functools
import inspect
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import LIGHT, run_python, run_with_tensorflow

import deepfm_ops
from deepfm_ops import (
    DeepFM,
    DenseFeat,
    FeatureDictionary,
    FMInteraction,
    SparseFeat,
    VarLenSparseFeat,
    optimizers,
    saving,
)
from deepfm_ops.deepctr.layers import custom_objects
from deepfm_ops.layers import FirstOrder

MATRICES = np.array([[1, 2, 3], [4, 5, 19], [0, 0, 7]]), np.array([[1, 1, 0.5], [1, 0, 2], [1, 1, 1]], "f")
LABELS = np.array([[1.0], [0], [1]])
COLUMNS = [
    SparseFeat("user", 20, embeddings_initializer="ones"),
    SparseFeat("city", 9, use_hash=True, dtype="string"),
    DenseFeat("age"),
    VarLenSparseFeat(SparseFeat("tags", 9, group_name="g"), 2, "max"),
    SparseFeat("shop", 9, group_name="g"),
]
RAW = {
    "user": [1, 2, 3],
    "city": ["Rome", "Oslo", ""],
    "age": [0.5, 1, 2],
    "tags": [[1, 2], [3], []],
    "shop": [1, 2, 3],
}
NAMES = ("SGD", "Adagrad", "RowWiseAdagrad", "LazyAdam", "Ftrl")


def trained(model, inputs, optimizer=None):
    model.compile(optimizer or optimizers.LazyAdam(1e-2), "binary_crossentropy")
    model.fit(inputs, LABELS, epochs=2, verbose=0)
    return model


def matrix_model(**arguments):
    return DeepFM(20, 3, 4, (6,), **arguments)


def functional(*layers):
    inputs = [keras.Input((3,), dtype="int64"), keras.Input((3,))]
    return keras.Model(
        inputs,
        keras.layers.Dense(1, activation="sigmoid")(keras.layers.Concatenate()([layer(inputs) for layer in layers])),
    )


def column_model():
    return DeepFM.from_columns(COLUMNS, COLUMNS, fm_group=["default_group", "g"], dnn_hidden_units=(4,), seed=1)


def feature_model():
    features = FeatureDictionary().fit({"a": ["x", "y"], "n": [1, 2], "t": ["p|q", ""]}, "a", "n", "t")
    return DeepFM.from_features(features, embedding_dim=4, hidden_units=(4,), seed=1)


KINDS = {
    "matrices": lambda: trained(matrix_model(batch_norm=True, dropout=0.2), MATRICES),
    "columns": lambda: trained(column_model(), RAW),
    "features": lambda: trained(feature_model(), (np.array([[1, 3, 4, 5]] * 3), np.ones((3, 4), "f"))),
    "layers": lambda: trained(
        functional(FMInteraction(20, 4, use_linear=True, l2=0.1), FirstOrder(20)), list(MATRICES)
    ),
    "nested": lambda: trained(functional(matrix_model()), list(MATRICES)),
    **{name: lambda name=name: trained(matrix_model(), MATRICES, getattr(optimizers, name)(0.01)) for name in NAMES},
}
INPUTS = {"columns": RAW, "features": (np.array([[1, 3, 4, 5]] * 3), np.ones((3, 4), "f"))}


def inputs_of(kind, model):
    return INPUTS.get(kind, list(MATRICES) if isinstance(model.input, list) else MATRICES)


ENTRANCES = {
    "package, then keras": "import deepfm_ops, keras",
    "keras, then package": "import keras, deepfm_ops",
    "tensorflow's keras": "import deepfm_ops; import tensorflow as tf; keras = tf.keras",
    "a name": "from deepfm_ops import FeatureDictionary; import keras",
    "the scorer": "import deepfm_ops.scorer, keras",
    "an op": "from deepfm_ops import fm_interaction; import keras",
    "asked for keras before": "import importlib.util as u; import deepfm_ops; u.find_spec('keras'); import keras",
}


@pytest.fixture(scope="module", name="original")
def _original():
    """The model of a kind, for tests that leave it as it is."""
    return functools.cache(lambda kind: KINDS[kind]())


@pytest.fixture(scope="module", name="saved")
def _saved(original, tmp_path_factory):
    """A folder with every kind of model in both formats, and with what it scored."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        model = original(kind)
        np.save(folder / f"{kind}.npy", model.predict(inputs_of(kind, model), verbose=0))
        for form in ("keras", "h5"):
            model.save(folder / f"{kind}.{form}")
    return folder


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_loads_in_a_fresh_process(entrance, saved):
    """What Keras saved, however the package came in: all of it in one process, and trained on; some in the others."""
    first = entrance == next(iter(ENTRANCES))
    kinds = list(KINDS) if first else ["columns", "layers", "Ftrl"]
    code = f"""
{ENTRANCES[entrance]}
import pathlib, numpy as np
matrices = [np.array({MATRICES[0].tolist()}), np.array({MATRICES[1].tolist()}, "f")]
special = {{"columns": {RAW!r}, "features": (np.array([[1, 3, 4, 5]] * 3), np.ones((3, 4), "f"))}}
for path in sorted(pathlib.Path({str(saved)!r}).glob("*.*")):
    if path.suffix == ".npy" or path.stem not in {kinds!r}:
        continue
    model = keras.models.load_model(path)
    inputs = special.get(path.stem, matrices if isinstance(model.input, list) else tuple(matrices))
    error = np.abs(model.predict(inputs, verbose=0) - np.load(path.with_suffix(".npy"))).max()
    assert error < 1e-6, (path, error)
    assert type(model.optimizer).__module__ == "deepfm_ops.optimizers", path
    assert path.suffix == ".h5" or int(model.optimizer.iterations) == 2, path
    if {first} and (path.suffix == ".keras" or path.stem in ("columns", "layers")):
        model.fit(inputs, np.ones((3, 1)), verbose=0)
    print("loaded", path.name)
"""
    assert run_python(code, **LIGHT).count("loaded") == 2 * len(kinds)


def test_importing_the_package_imports_neither_keras_nor_tensorflow():
    code = "import sys, deepfm_ops, deepfm_ops.scorer; print({'keras', 'tensorflow'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_every_registered_class_has_an_entry():
    for name in deepfm_ops.__all__:
        getattr(deepfm_ops, name)
    ours = {name for name in keras.saving.get_custom_objects() if name.startswith("deepfm_ops>")}
    assert ours == {f"deepfm_ops>{name}" for name in saving.HOME}
    for name in saving.HOME:
        assert inspect.isclass(keras.saving.get_registered_object(f"deepfm_ops>{name}"))


# What Keras offers between training and saving.


@pytest.mark.parametrize("kind", ["matrices", "columns", "features"])
@pytest.mark.parametrize("way", ["clone", "deepcopy", "pickle", "json", "config"])
def test_a_copy_is_a_deepfm(kind, way, original, tmp_path):
    model = original(kind)
    inputs = inputs_of(kind, model)
    copied = {
        "clone": keras.models.clone_model,
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "json": lambda model: keras.models.model_from_json(model.to_json()),
        "config": lambda model: type(model).from_config(model.get_config()),
    }[way](model)
    assert type(copied) is type(model)
    assert {**copied.get_config(), "name": ""} == {**model.get_config(), "name": ""}
    copied.set_weights(model.get_weights())
    np.testing.assert_allclose(copied(inputs), model(inputs), rtol=0, atol=1e-6)
    trained(copied, inputs)
    copied.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(inputs), copied(inputs))
    deepfm_ops.export_scorer(copied, tmp_path / "m.scorer")
    if kind == "matrices":
        with pytest.raises(TypeError, match="indices must be int32 or int64, got float"):
            copied.predict((MATRICES[0] + 0.9, MATRICES[1]), verbose=0)
    if kind == "features":
        np.testing.assert_array_equal(copied.embedding("a", "y").shape, (4,))


def test_clones_that_would_be_something_else_are_refused():
    model = matrix_model()

    def wider(layer):
        config = layer.get_config()
        return type(layer).from_config({**config, **({"units": 9} if layer.name == "hidden_0" else {})})

    with pytest.raises(ValueError, match=r"clone_function changed \['hidden_0'\], and DeepFM would not be what its"):
        keras.models.clone_model(model, clone_function=wider)
    with pytest.raises(ValueError, match="call_function changed the model, and DeepFM would not be"):
        keras.models.clone_model(model, call_function=lambda layer, *a, **k: layer(*a, **k))
    plain = keras.models.clone_model(keras.Model(model.inputs, model.outputs), clone_function=wider)
    assert plain.get_layer("hidden_0").units == 9
    shared = keras.models.clone_model(model, clone_function=lambda layer: layer)
    assert shared.get_layer("fm") is model.get_layer("fm") and type(shared) is DeepFM


def test_a_frozen_clone_is_frozen():
    model = matrix_model()
    model.get_layer("fm").trainable = False
    clone = keras.models.clone_model(model)
    assert not clone.get_layer("fm").trainable and clone.get_layer("hidden_0").trainable
    assert clone.get_config()["frozen"] == ["fm"]


def test_help_shows_the_arguments():
    """Though Keras is told that the constructor takes any."""
    names = list(inspect.signature(DeepFM).parameters)
    assert names[:3] == ["num_features", "num_fields", "embedding_dim"] and "l2_scope" in names
    assert "dnn_hidden_units" in inspect.signature(DeepFM.from_columns).parameters


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize("kind", ["matrices", "columns"])
def test_quantized_by_keras(kind, form, tmp_path):
    model = KINDS[kind]()
    inputs = inputs_of(kind, model)
    before = model.predict(inputs, verbose=0)
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        model.quantize("int8")
    expected = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(expected, before, atol=0.05)
    model.save(tmp_path / f"m.{form}")
    again = keras.models.load_model(tmp_path / f"m.{form}")
    assert again.get_layer("hidden_0").dtype_policy.name == "int8_from_float32"
    np.testing.assert_allclose(again.predict(inputs, verbose=0), expected, rtol=0, atol=1e-6)
    assert keras.models.clone_model(model).get_layer("hidden_0").quantization_mode == "int8"


def test_lora(tmp_path):
    model = matrix_model()
    model.get_layer("hidden_0").enable_lora(2)
    trained(model, MATRICES)
    expected = model.predict(MATRICES, verbose=0)
    for copied in (keras.models.clone_model(model), copy.deepcopy(model)):
        assert copied.get_layer("hidden_0").lora_rank == 2
        assert [w.shape for w in copied.trainable_weights] == [w.shape for w in model.trainable_weights]
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(again.predict(MATRICES, verbose=0), expected, rtol=0, atol=1e-6)
    again.fit(MATRICES, LABELS, verbose=0)
    deepfm_ops.export_scorer(model, tmp_path / "m.scorer")
    pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
    scores = deepfm_ops.scorer.Scorer.load(tmp_path / "m.scorer").score(*MATRICES)
    np.testing.assert_allclose(scores, expected[:, 0], rtol=0, atol=1e-6)


def test_weights_by_file(tmp_path):
    for kind in ("matrices", "columns", "features"):
        model = KINDS[kind]()
        model.save_weights(tmp_path / f"{kind}.weights.h5")
        fresh = type(model).from_config(model.get_config())
        fresh.load_weights(tmp_path / f"{kind}.weights.h5")
        inputs = inputs_of(kind, model)
        np.testing.assert_array_equal(fresh.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


def test_deepctr_faq(tmp_path):
    """Its answers to how to save a model, and its weights, with the import lines changed."""
    from deepfm_ops.deepctr import custom_objects as by_the_package
    from deepfm_ops.deepctr.feature_column import SparseFeat as DeepCTRSparseFeat
    from deepfm_ops.deepctr.models import DeepFM as DeepCTRDeepFM

    assert by_the_package is custom_objects and DeepCTRSparseFeat is SparseFeat
    model = DeepCTRDeepFM(COLUMNS, COLUMNS, dnn_hidden_units=(4,))
    expected = model.predict(RAW, verbose=0)
    path = str(tmp_path / "DeepFM.h5")
    keras.models.save_model(model, path)
    np.testing.assert_array_equal(keras.models.load_model(path, custom_objects).predict(RAW, verbose=0), expected)
    model.save_weights(str(tmp_path / "DeepFM_w.weights.h5"))
    model.load_weights(str(tmp_path / "DeepFM_w.weights.h5"))


def test_parts_of_a_model(tmp_path):
    model = KINDS["matrices"]()
    part = keras.Model(model.inputs, model.get_layer("fm").output)
    part.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    for got, expected in zip(again.predict(MATRICES, verbose=0), part.predict(MATRICES, verbose=0), strict=True):
        np.testing.assert_array_equal(got, expected)
    layer = copy.deepcopy(model.get_layer("fm"))
    np.testing.assert_array_equal(layer.embeddings.numpy(), model.get_layer("fm").embeddings.numpy())


@pytest.mark.parametrize("kind", ["matrices", "columns", "layers", "nested"])
def test_keras_own_export_loads_elsewhere(kind, tmp_path):
    model = KINDS[kind]()
    expected = model.predict(inputs_of(kind, model), verbose=0)
    model.export(tmp_path / "m", verbose=False)
    assert b"DeepfmOps" not in (tmp_path / "m" / "saved_model.pb").read_bytes()
    if kind != "matrices":
        return
    np.savez(tmp_path / "data.npz", indices=MATRICES[0], values=MATRICES[1])
    code = f"""
import sys
sys.modules["deepfm_ops"] = None  # an import of it fails
import numpy as np, tensorflow as tf
data = np.load({str(tmp_path / "data.npz")!r})
model = tf.saved_model.load({str(tmp_path / "m")!r})
print(model.serve((data["indices"], data["values"])).numpy().ravel().tolist())
"""
    np.testing.assert_allclose(eval(run_with_tensorflow(code, tmp_path)), expected[:, 0], rtol=0, atol=1e-6)


# Rows by name.


def test_rows_of_a_dictionary(tmp_path):
    model = feature_model()
    for weight in model.weights:
        weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    model.save(tmp_path / "m.keras")
    for loaded in (model, keras.models.load_model(tmp_path / "m.keras")):
        table, w = loaded.get_layer("fm").embeddings.numpy(), loaded.get_layer("fm").w.numpy()[:, 0]
        for column, values in (("a", ["x", "y"]), ("t", ["p", "q"])):
            indices = [loaded.features.index(column, value) for value in values]
            assert loaded.features.indices(column).tolist() == indices
            np.testing.assert_array_equal(loaded.embedding(column), table[indices])
            np.testing.assert_array_equal(loaded.weight(column), w[indices])
            np.testing.assert_array_equal(loaded.embedding(column, values[1].encode()), table[indices[1]])
            assert loaded.weight(column, values[1]) == w[indices[1]]
        number = loaded.features.index("n")
        np.testing.assert_array_equal(loaded.embedding("n"), table[[number]])
        np.testing.assert_array_equal(loaded.embedding("n", 12.5), table[number])
    with pytest.raises(KeyError, match="value 'z' of column 'a' was not seen by fit"):
        model.embedding("a", "z")
    with pytest.raises(KeyError, match="column 'b' is not in the dictionary"):
        model.embedding("b")
    plain = matrix_model()
    with pytest.raises(ValueError, match="this model does not know its features: make it by DeepFM.from_features"):
        plain.embedding("a")
    with pytest.raises(ValueError, match="features have 4 columns, but the inputs of the model have shapes"):
        plain.features = model.features
    no_weights = DeepFM.from_features(model.features, use_linear=False, hidden_units=(2,))
    with pytest.raises(ValueError, match="column 'a' has no first-order weight in this model"):
        no_weights.weight("a")


def test_a_model_that_knows_its_features_exports_them(tmp_path):
    model = feature_model()
    deepfm_ops.export(model, tmp_path / "m")
    signature = tf.saved_model.load(tmp_path / "m").signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == {"a", "n", "t"}
    later = DeepFM(model.features.num_features, 3, 4, (4,), field_sizes=model.features.field_sizes)
    later.features = model.features
    assert later.embedding("a", "x").shape == (4,)


def test_rows_of_columns(tmp_path):
    columns = [
        SparseFeat("city", 30, 4, use_hash=True, dtype="string"),
        SparseFeat("shop", 5, 4, vocabulary={"x": 1, 7: 2}, dtype="string"),
        SparseFeat("user", 6, 4),
        SparseFeat("friend", 6, 4, embedding_name="user"),
        DenseFeat("age", 2),
        DenseFeat("height", embedding_dim=4),
        VarLenSparseFeat(SparseFeat("tags", 9, 4, use_hash=True, dtype="string"), 3, "max"),
    ]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(4,))
    for weight in model.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    table = loaded.get_layer("fm_0").embeddings.numpy()
    np.testing.assert_array_equal(loaded.embedding("city"), table[:30])
    bucket = int(tf.strings.to_hash_bucket_fast("Rome", 30))
    for value in ("Rome", b"Rome", np.str_("Rome")):
        np.testing.assert_array_equal(loaded.embedding("city", value), table[bucket])
    np.testing.assert_array_equal(loaded.embedding("shop", 7.0), table[30 + 2])
    np.testing.assert_array_equal(loaded.embedding("shop", "unheard of"), table[30])
    np.testing.assert_array_equal(loaded.embedding("user", "3"), table[35 + 3])
    np.testing.assert_array_equal(loaded.embedding("friend"), loaded.embedding("user"))
    tag = 1 + int(tf.strings.to_hash_bucket_fast("jazz", 8))
    np.testing.assert_array_equal(loaded.embedding("tags", "jazz"), loaded.embedding("tags")[tag])
    assert loaded.embedding("height").shape == (1, 4)
    np.testing.assert_array_equal(loaded.weight("age"), loaded.get_layer("linear_kernel").kernel.numpy()[:2, 0])
    # The weight of a value is what the score gains by it.
    linear = DeepFM.from_columns(columns[:3], columns[:3], use_deep=False, use_fm=False, task="regression")
    for weight in linear.weights:
        weight.assign(np.random.default_rng(2).normal(size=weight.shape))
    given = {"city": ["Rome", "Oslo"], "shop": ["x", "x"], "user": [1, 1]}
    a, b = linear.predict(given, verbose=0)[:, 0]
    assert b - a == pytest.approx(linear.weight("city", "Oslo") - linear.weight("city", "Rome"), abs=1e-6)
    for column, value, error, message in [
        ("user", 6, KeyError, "column 'user' has no value 6; it has 0 to 5"),
        ("nothing", None, KeyError, "column 'nothing' is not in the model; it has .'city'"),
        ("age", None, ValueError, "column 'age' has no embedding in this model"),
    ]:
        with pytest.raises(error, match=message):
            loaded.embedding(column, value)


def test_an_embedding_of_one_number_is_no_weight():
    columns = [SparseFeat("u", 5, 1)]
    with pytest.raises(ValueError, match="column 'u' has no first-order weight in this model"):
        DeepFM.from_columns([], columns, dnn_hidden_units=(3,)).weight("u")
    pooled = [VarLenSparseFeat(SparseFeat("u", 5, 2), 2, "max")]
    model = DeepFM.from_columns(pooled, [], task="regression")
    model.get_layer("first_order_0").embeddings.assign([[0.0], [1], [2], [3], [4]])
    assert model.weight("u", 3) == 3


def test_a_model_keeps_its_dictionary():
    features = FeatureDictionary().fit({"a": ["x", "y"]}, categorical="a")
    model = DeepFM.from_features(features, hidden_units=(2,))
    features.fit({"a": ["p", "q", "r"]}, categorical="a")
    assert model.features.index("a", "x") == 1 and model.features.index("a", "p") == 0
    assert keras.models.clone_model(model).features.num_features == 3


def test_a_subclass_is_cloned_or_refused():
    class Same(DeepFM):
        pass

    class More(DeepFM):
        def __init__(self, *args, extra=3, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    assert type(keras.models.clone_model(Same(20, 3, 4, (6,)))) is Same
    with pytest.raises(ValueError, match="More has a constructor of its own, whose arguments a clone would lose"):
        keras.models.clone_model(More(20, 3, 4, (6,), extra=5))


def test_imported_twice():
    code = """
import sys, importlib, deepfm_ops
importlib.reload(deepfm_ops)
for name in [name for name in sys.modules if name.startswith("deepfm_ops")]:
    del sys.modules[name]
import deepfm_ops, keras
print("deepfm_ops>DeepFM" in keras.saving.get_custom_objects())
"""
    assert run_python(code).strip() == "True"


def test_validation_data_by_position():
    model = matrix_model()
    model.compile("adam", "binary_crossentropy")
    history = model.fit(MATRICES, LABELS, 2, 1, 0, None, 0.0, (MATRICES, LABELS))
    assert "val_loss" in history.history


@pytest.mark.parametrize("form", ["keras", "h5"])
def test_parts_of_a_column_model(form, tmp_path):
    model = column_model()
    part = keras.Model(model.inputs, model.plan.head.input)
    part.save(tmp_path / f"m.{form}")
    assert keras.models.load_model(tmp_path / f"m.{form}").count_params() == part.count_params()
    whole = keras.Model(model.inputs, model.outputs)
    whole.save(tmp_path / f"w.{form}")
    assert keras.models.load_model(tmp_path / f"w.{form}").count_params() == model.count_params()
