"""SavedModels: the model's scores, also where this package was never installed, from raw features too."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from test_scorer import COLUMNS, KINDS, matrices, raw, shuffled
from testing import LIGHT, REFERENCE_MODE, run_with_tensorflow

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, FMInteraction, datasets, optimizers
from deepfm_ops.features import cells
from deepfm_ops.scorer import Scorer

ROOT = pathlib.Path(__file__).parents[2]
SERVE = """
import sys
import numpy as np, tensorflow as tf
assert not any("deepfm" in name for name in sys.modules), "the package is here"
try:
    import deepfm_ops
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported")
path, inputs, outputs = sys.argv[1:]
signature = tf.saved_model.load(path).signatures["serving_default"]
wanted = signature.structured_input_signature[1]
arrays = np.load(inputs, allow_pickle=True)
given = {name: tf.constant(arrays[name].tolist() if spec.dtype == tf.string else arrays[name], spec.dtype)
         for name, spec in wanted.items()}
np.save(outputs, signature(**given)["score"].numpy())
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A Python environment with everything but this package; returns its interpreter."""
    home = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for item in pathlib.Path(folder).iterdir():
            if "deepfm" not in item.name.lower() and not (site / item.name).exists():
                (site / item.name).symlink_to(item)
    return home / "bin" / "python"


def scored_elsewhere(python, path, inputs, folder):
    """The scores that a process without this package gets from a SavedModel."""
    np.savez(folder / "inputs.npz", **inputs)
    command = [str(python), "-c", SERVE, str(path), str(folder / "inputs.npz"), str(folder / "scores.npy")]
    env = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": LIGHT["PYTHONPATH"].split(os.pathsep)[0]}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "scores.npy")


def signature_of(path):
    return tf.saved_model.load(str(path)).signatures["serving_default"]


def operations(path):
    """The types of the operations in a SavedModel."""
    model = saved_model_pb2.SavedModel.FromString((pathlib.Path(path) / "saved_model.pb").read_bytes())
    graph = model.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return {node.op for node in nodes}


@pytest.mark.parametrize("kind", KINDS)
def test_portable(kind, rng, tmp_path):
    model = shuffled(DeepFM(60, 3, 7, (9, 4), field_sizes=[1, 3, 1], backend="auto", **KINDS[kind]), rng)
    model.compile(optimizers.LazyAdam(), "mse")
    deepfm_ops.export(model, tmp_path / "m")
    assert not [name for name in operations(tmp_path / "m") if "eepfm" in name.lower()]
    serve = signature_of(tmp_path / "m")
    assert {name: (spec.shape.as_list(), spec.dtype) for name, spec in serve.structured_input_signature[1].items()} == {
        "indices": ([None, 5], tf.int64),
        "values": ([None, 5], tf.float32),
    }
    for batch in (0, 1, 33):
        indices, values = matrices(rng, 60, 5, batch)
        score = serve(indices=tf.constant(indices), values=tf.constant(values))["score"]
        assert score.shape == (batch, 1) and score.dtype == tf.float32
        np.testing.assert_allclose(score, model((indices, values)), rtol=0, atol=1e-6)
    before = model((indices, values)).numpy()
    model.fit((indices, values), np.zeros((33, 1)), verbose=0)  # the export left the model as it was: it trains
    assert np.abs(model((indices, values)).numpy() - before).max() > 0


def test_portable_where_the_package_is_not(elsewhere, rng, tmp_path):
    model = shuffled(DeepFM(60, 5, 7, (9, 4)), rng)
    deepfm_ops.export(model, tmp_path / "m")
    indices, values = matrices(rng, 60, 5)
    got = scored_elsewhere(elsewhere, tmp_path / "m", {"indices": indices, "values": values}, tmp_path)
    np.testing.assert_allclose(got, model((indices, values)), rtol=0, atol=1e-6)


def test_portable_checks_its_indices(rng, tmp_path):
    deepfm_ops.export(DeepFM(60, 3, 4, (5,)), tmp_path / "m")
    indices, values = matrices(rng, 60, 3)
    indices[3, 1] = 60
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[3,1\] = 60 is not in \[0, 60\)"):
        signature_of(tmp_path / "m")(indices=tf.constant(indices), values=tf.constant(values))


def test_native(elsewhere, rng, tmp_path):
    model = shuffled(DeepFM(60, 5, 7, (9, 4)), rng)
    if REFERENCE_MODE:
        with pytest.raises(RuntimeError, match="portable=False needs the native op: "):
            deepfm_ops.export(model, tmp_path / "m", portable=False)
        return
    deepfm_ops.export(model, tmp_path / "m", portable=False)
    assert "DeepfmOpsResourceFmInteraction" in operations(tmp_path / "m")
    indices, values = matrices(rng, 60, 5)
    score = signature_of(tmp_path / "m")(indices=tf.constant(indices), values=tf.constant(values))["score"]
    np.testing.assert_allclose(score, model((indices, values)), rtol=0, atol=1e-6)
    with pytest.raises(AssertionError, match="Import_deepfm_ops_dot_ops_before_loading_this_model"):
        scored_elsewhere(elsewhere, tmp_path / "m", {"indices": indices, "values": values}, tmp_path)
    code = f"import deepfm_ops.ops, tensorflow as tf; tf.saved_model.load({str(tmp_path / 'm')!r}); print('loaded')"
    assert run_with_tensorflow(code).strip() == "loaded"


def test_a_backend_that_is_forced_is_portable_too(rng, tmp_path):
    if REFERENCE_MODE:
        return
    deepfm_ops.export(DeepFM(60, 3, 4, (5,), backend="native"), tmp_path / "m")
    assert not [name for name in operations(tmp_path / "m") if "eepfm" in name.lower()]


def test_any_functional_model(rng, tmp_path):
    indices, values = keras.Input((4,), dtype="int64", name="ids"), keras.Input((4,), name="xs")
    fm = FMInteraction(50, 6, output="vector", l2=0.1)((indices, values))
    model = keras.Model({"a": indices, "b": values}, keras.layers.Dense(1)(fm))
    deepfm_ops.export(model, tmp_path / "m")
    i, x = matrices(rng, 50, 4)
    score = signature_of(tmp_path / "m")(ids=tf.constant(i), xs=tf.constant(x))["score"]
    np.testing.assert_allclose(score, model({"a": i, "b": x}), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="model must have one output, got 2"):
        deepfm_ops.export(keras.Model([indices, values], [fm, fm + 1]), tmp_path / "n")
    with pytest.raises(TypeError, match="model must be a functional Keras model, got FMInteraction"):
        deepfm_ops.export(FMInteraction(3, 2), tmp_path / "n")
    with pytest.raises(TypeError, match="model must be a functional Keras model, got Sequential"):
        deepfm_ops.export(keras.Sequential([keras.layers.Dense(1)]), tmp_path / "n")


@pytest.mark.parametrize("kind", COLUMNS)
def test_column_models(kind, elsewhere, rng, tmp_path):
    columns, inputs = COLUMNS[kind], raw(rng)
    model = shuffled(DeepFM.from_columns(columns, columns, dnn_hidden_units=(6,)), rng)
    deepfm_ops.export(model, tmp_path / "m")
    specs = signature_of(tmp_path / "m").structured_input_signature[1]
    assert set(specs) == set(model.plan.inputs)
    given = {name: np.reshape(inputs[name], (-1, *spec.shape[1:])) for name, spec in specs.items()}
    tensors = {
        name: tf.constant(x.tolist() if specs[name].dtype == tf.string else x, specs[name].dtype)
        for name, x in given.items()
    }
    expected = model(inputs)
    np.testing.assert_allclose(signature_of(tmp_path / "m")(**tensors)["score"], expected, rtol=0, atol=1e-6)
    if kind in ("hashed", "vocabulary"):
        got = scored_elsewhere(elsewhere, tmp_path / "m", given, tmp_path)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


# The dictionary inside.


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "city": ["Rome", "Ölo", None, "Bern", "Rome"],
            "shop": [3, 70_000_000_000, -2, 5, 3],
            "rate": [0.25, -0.0, 2, 1e300, 0.25],
            "new": [True, False, False, True, True],
            "age": [0.3, np.nan, -2, 0.5, 1e3],
            "tags": ["a|b", "b", "", "c|a||b", "d"],
            "years": [[1990, 2001], [], [1990], [7, 7], [2001]],
        }
    )


def fitted(table, **more):
    return FeatureDictionary().fit(
        table, categorical=["city", "shop", "rate", "new"], numeric=["age"], multivalued=["tags", "years"], **more
    )


def as_inputs(table, separator="|"):
    """The columns as the inputs of an exported dictionary."""
    return {
        "city": table["city"].fillna("").to_numpy(object),
        "shop": table["shop"].to_numpy(np.int64),
        "rate": table["rate"].to_numpy(np.float64),
        "new": table["new"].to_numpy(np.int64),
        "age": table["age"].to_numpy(np.float32),
        "tags": np.array([x.replace("|", separator) for x in table["tags"]], object),
        "years": np.array([separator.join(map(str, x)) for x in table["years"]], object),
    }


def test_a_dictionary_inside(elsewhere, table, rng, tmp_path):
    features = fitted(table)
    model = DeepFM(features.num_features, features.num_fields, 4, (5,), field_sizes=features.field_sizes)
    deepfm_ops.export(shuffled(model, rng), tmp_path / "m", features=features)
    unseen = table.assign(
        city=["Paris", "Rome", "rome", " Rome", "Ölo"],
        shop=[0, 3, 4, -2, 9],
        rate=[0.1, 0.0, 1.0, np.nan, 2],
        age=[np.nan, 0, 1, 2, 3],
        tags=["z|a|b|c|d", "a|a|a|a|a", "||", "z", "a|z|b"],
        years=[[1, 2], [1990, 1990, 7, 7], [], [2001], [5]],
    )
    serve = signature_of(tmp_path / "m")
    for rows in (table, unseen):
        tensors = {name: tf.constant(x.tolist() if x.dtype == object else x) for name, x in as_inputs(rows).items()}
        expected = model(features.transform(rows)).numpy()
        np.testing.assert_allclose(serve(**tensors)["score"], expected, rtol=0, atol=1e-6, equal_nan=True)
    assert type(features.fields) is list  # Keras and TensorFlow like to wrap
    got = scored_elsewhere(elsewhere, tmp_path / "m", as_inputs(unseen), tmp_path)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_a_dictionary_with_another_separator(table, rng, tmp_path):
    features = fitted(table.assign(tags=table["tags"].str.replace("|", ", ")), separator=", ")
    model = DeepFM(features.num_features, features.num_fields, 4, (5,), field_sizes=features.field_sizes)
    deepfm_ops.export(shuffled(model, rng), tmp_path / "m", features=features)
    inputs = {n: tf.constant(x.tolist() if x.dtype == object else x) for n, x in as_inputs(table, ", ").items()}
    expected = model(features.transform(table.assign(tags=table["tags"].str.replace("|", ", "))))
    np.testing.assert_allclose(signature_of(tmp_path / "m")(**inputs)["score"], expected, atol=1e-6, equal_nan=True)


def test_dictionaries_that_are_refused(tmp_path):
    mixed = FeatureDictionary().fit({"a": ["x", 3]}, categorical=["a"])
    for values, message in [
        ([["a|b"], ["c"]], r"column 'a' has the value 'a\|b', which text separated by '\|' cannot hold"),
        ([["a", ""], ["c"]], "column 'a' has the value '', which text"),
    ]:
        odd = FeatureDictionary().fit({"a": values}, multivalued=["a"])
        with pytest.raises(ValueError, match=message):
            sizes = odd.field_sizes
            deepfm_ops.export(DeepFM(odd.num_features, 1, 4, (5,), field_sizes=sizes), tmp_path / "m", features=odd)
    with pytest.raises(ValueError, match="features have 1 columns, but the inputs of the model have shapes"):
        deepfm_ops.export(DeepFM(3, 2, 4, (5,)), tmp_path / "m", features=mixed)
    two = FeatureDictionary().fit({"a": ["x|y"], "b": ["z"]}, multivalued=["a"], categorical=["b"])
    with pytest.raises(ValueError, match=r"features have field_sizes \[1, 2\], but the model has \[1, 1, 1\]"):
        deepfm_ops.export(DeepFM(4, 3, 4, (5,)), tmp_path / "m", features=two)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (["x", 3], "string"),
        ([3, 7.0], "int64"),
        ([True, False], "int64"),
        ([True, 3], "string"),
        ([0.5, 3], "float64"),
        ([2**70, 3], "string"),
        ([1.5, 10**400], "string"),
        ([0.5, 2**53, 2**53 + 1], "string"),
    ],
    ids=str,
)
def test_the_dtype_of_a_categorical_input_is_what_fit_saw(values, dtype, rng, tmp_path):
    """Where one number type of TensorFlow cannot tell them apart it is text."""
    features = FeatureDictionary().fit({"a": values}, categorical="a")
    model = shuffled(DeepFM(features.num_features, 1, 4, (5,)), rng)
    deepfm_ops.export(model, tmp_path / "m", features=features)
    serve = signature_of(tmp_path / "m")
    assert serve.structured_input_signature[1]["a"].dtype.name == dtype
    given = [cells.text(value) for value in values] if dtype == "string" else [float(value) for value in values]
    expected = model(features.transform({"a": values}))
    score = serve(a=tf.cast(given, dtype) if dtype != "string" else tf.constant(given))["score"]
    np.testing.assert_allclose(score, expected, rtol=0, atol=1e-6)


def test_columns_in_which_nothing_was_seen(rng, tmp_path):
    table = {"c": [None, None], "x": [1.0, 2], "m": ["", ""]}
    features = FeatureDictionary().fit(table, categorical=["c"], numeric=["x"], multivalued=["m"])
    model = shuffled(DeepFM(features.num_features, 3, 4, (5,)), rng)
    deepfm_ops.export(model, tmp_path / "m", features=features)
    given = {"c": tf.constant(["a", ""]), "x": tf.constant([3.0, 4]), "m": tf.constant(["b|c", ""])}
    score = signature_of(tmp_path / "m")(**given)["score"]
    expected = model(features.transform({"c": ["a", ""], "x": [3.0, 4], "m": ["b|c", ""]}))
    np.testing.assert_allclose(score, expected, rtol=0, atol=1e-6)


def test_text_separated_by_blanks(rng, tmp_path):
    features = FeatureDictionary().fit({"m": ["a  b", "b c\td"]}, multivalued=["m"], separator=None)
    model = shuffled(DeepFM(features.num_features, 1, 4, (5,), field_sizes=features.field_sizes), rng)
    deepfm_ops.export(model, tmp_path / "m", features=features)
    deepfm_ops.export_scorer(model, tmp_path / "s", features=features)
    texts = ["a b", " d   z a", ""]
    expected = model(features.transform({"m": texts}))
    score = signature_of(tmp_path / "m")(m=tf.constant(texts))["score"]
    np.testing.assert_allclose(score, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(Scorer.load(tmp_path / "s").score({"m": texts}), expected[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [["user.id"], ["a/b"], ["1a"], ["é"], ["self"], ["A", "a"], [""]])
def test_names_that_a_saved_model_cannot_have(names, tmp_path):
    features = FeatureDictionary().fit({name: ["x"] for name in names}, categorical=names)
    model = DeepFM(features.num_features, len(names), 4, (5,))
    with pytest.raises(ValueError, match="in a SavedModel a name is|differ in case alone"):
        deepfm_ops.export(model, tmp_path / "m", features=features)


def test_models_in_models(rng, tmp_path):
    inner = DeepFM.from_columns([], COLUMNS["vocabulary"], dnn_hidden_units=(6,))
    inputs = {
        "city": keras.Input((1,), dtype="string", name="city"),
        "user": keras.Input((1,), dtype="int64", name="user"),
    }
    model = shuffled(keras.Model(inputs, keras.layers.Dense(1)(inner(inputs))), rng)
    deepfm_ops.export(model, tmp_path / "m")
    given = {"city": tf.constant([["Rome"], ["x"]]), "user": tf.constant([[3], [4]], tf.int64)}
    np.testing.assert_allclose(signature_of(tmp_path / "m")(**given)["score"], model(given), rtol=0, atol=1e-6)
    ragged = keras.Input((None,), dtype="int64", name="ids", ragged=True)
    with pytest.raises(ValueError, match=r"inputs \['ids'\] are ragged or sparse"):
        deepfm_ops.export(keras.Model(ragged, FMInteraction(9, 3)(ragged)), tmp_path / "n")


def test_parity_on_the_demo(tmp_path):
    """The demo's DeepFM, every sample of its test set, from raw features: SavedModel and scorer give its scores."""
    try:
        whole = datasets.movielens_100k()
    except RuntimeError as error:
        pytest.skip(f"needs a network once: {error}")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    features, parts = demo.prepare(None)
    _, test = datasets.hold_out(whole, per_user=10, seed=0)
    (indices, values), labels = parts["test"]
    choices = type("Choices", (), {"l2": None, "l2_scope": "batch", "optimizer": "LazyAdam"})
    model = demo.build(features, "DeepFM", 0, choices)
    model.fit(*parts["train"], batch_size=1024, epochs=3, verbose=0)
    expected = model.predict((indices, values), batch_size=8192, verbose=0).ravel()
    assert demo.auc(labels, expected) > 0.74

    deepfm_ops.export(model, tmp_path / "m", features=features)
    serve = signature_of(tmp_path / "m")
    inputs = {
        name: tf.constant(test[name].tolist(), spec.dtype) for name, spec in serve.structured_input_signature[1].items()
    }
    np.testing.assert_allclose(serve(**inputs)["score"].numpy().ravel(), expected, rtol=0, atol=1e-6)

    for table, bound in (("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.02)):
        deepfm_ops.export_scorer(model, tmp_path / "s", table, features=features)
        scorer = Scorer.load(tmp_path / "s")
        got = scorer.score(test)
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
        np.testing.assert_allclose(scorer.score(indices, values), got, rtol=0, atol=1e-6)
        assert abs(demo.auc(labels, got) - demo.auc(labels, expected)) < 1e-3


EVERYTHING = {
    "city": ["Rome", "Oslo", "Rome", "Bern", "Rome", "Oslo", None, "Rome"],
    "user": [7, 8, 7, 7, 9, 8, 7, 8],
    "share": [0.5, 1.0, 0.5, 0.25, 0.5, 1.0, 0.5, 1.0],
    "flag": [True, False, True, True, False, True, True, False],
    "device": ["a", "b", "c", "d", "e", "f", "g", None],
    "price": [0.0, 10.0, 100.0, -5.0, 3.0, np.nan, 8.0, 1e6],
    "age": [20.0, 30.0, 40.0, np.nan, 25.0, 35.0, 50.0, 60.0],
    "hour": [0.0, 1.0, 2.0, 3.0, np.nan, 5.0, 6.0, 7.0],
    "tags": ["x|y", "y", "", "x|y|z|w", "z", "x", "y|x", "x"],
    "genres": ["drama:0.7|war:0.3", "war", "", "drama:2", "war:0.5|new:0.5", "drama", "war", "drama"],
    "words": ["p|q", "q", "", "r|s|t", "p", "p", "q", "r"],
}
UNSEEN = {
    "city": ["Paris", None, "Rome"],
    "user": [7, 1000, 8],
    "share": [0.75, 0.5, np.nan],
    "flag": [True, False, True],
    "device": ["zz", "a", None],
    "price": [np.nan, 7.5, -1e3],
    "age": [33.0, np.nan, 1.0],
    "hour": [-5.0, 2.5, 100.0],
    "tags": ["x|unseen", "unseen", "w|z|y|x"],
    "genres": ["new:3|drama:0.25", "unseen:1", "war:1|drama:1"],
    "words": ["new|p", "", "a|b|c|d"],
}


@pytest.mark.parametrize("min_count", [1, 2], ids=["", "with a row for the unseen"])
def test_every_encoding_of_a_dictionary(min_count, tmp_path):
    """Transforms, buckets, weights, rows for what is rare: the same in training, SavedModel and scorer."""
    features = FeatureDictionary(min_count).fit(
        EVERYTHING,
        categorical=["city", "user", "share", "flag"],
        numeric={"price": "log1p", "age": "standardize", "hour": "quantiles"},
        multivalued=["tags", "genres", "words"],
        hash_buckets={"device": 5, "words": 7},
        max_length={"tags": 2, "words": 3},
        weighted="genres",
    )
    model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=1)
    for weight in model.trainable_weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape) / 3)
    deepfm_ops.export(model, tmp_path / "saved")
    deepfm_ops.export_scorer(model, tmp_path / "m.scorer")
    model.save(tmp_path / "m.keras")
    serve = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"]
    for table in (EVERYTHING, UNSEEN):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = features.transform(table)
            expected = model.predict(inputs, verbose=0)
            np.testing.assert_allclose(
                Scorer.load(tmp_path / "m.scorer").score(table), expected[:, 0], rtol=1e-5, atol=1e-6
            )
            loaded = keras.models.load_model(tmp_path / "m.keras")
            for a, b in zip(loaded.features.transform(table), inputs, strict=True):
                np.testing.assert_array_equal(a, b)
        types = {"user": tf.int64, "flag": tf.int64, "share": tf.float64, "price": tf.float32, "age": tf.float64}
        types["hour"] = tf.float64
        given = {
            name: tf.constant(
                ["" if x is None else x for x in column] if name not in types else column, types.get(name)
            )
            for name, column in table.items()
            if name != "flag"
        }
        given["flag"] = tf.constant([int(x) for x in table["flag"]], tf.int64)
        np.testing.assert_allclose(serve(**given)["score"], expected, rtol=1e-4, atol=1e-5)
