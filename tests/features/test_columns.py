"""DeepFM over feature columns: what DeepCTR's users write."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import oracle, run_with_tensorflow

from deepfm_ops import DeepFM, DenseFeat, SparseFeat, VarLenSparseFeat, get_feature_names
from deepfm_ops import deepctr as deepctr_names
from deepfm_ops.features.columns import TablePlan
from deepfm_ops.features.columns_tensorflow import ColumnEncoder

ROWS = 48


@pytest.fixture
def inputs(rng):
    frame = pd.DataFrame(
        {
            "user": rng.integers(0, 10, ROWS),
            "city": rng.choice(["Rome", "Oslo", "Lima"], ROWS),
            "age": rng.normal(size=ROWS),
            "surplus": ["text"] * ROWS,
        }
    )
    return {
        **{name: frame[name] for name in frame},
        "pair": rng.normal(size=(ROWS, 2)),
        **{name: rng.integers(0, 6, (ROWS, 4)) for name in ("tags", "summed", "largest", "counted", "weighed")},
        "tags_length": rng.integers(0, 5, ROWS),
        "tags_weight": rng.random((ROWS, 4, 1)),
    }


USER, CITY = SparseFeat("user", 10), SparseFeat("city", 20, use_hash=True, dtype="string")
AGE, PAIR = DenseFeat("age"), DenseFeat("pair", 2)
TAG = SparseFeat("tags", 6)


def tags_of(name, *arguments, **options):
    return VarLenSparseFeat(SparseFeat(name, 6), 4, *arguments, **options)


@keras.saving.register_keras_serializable("deepfm_ops_tests")
def halved(x):
    return x / 2


COLUMNS = {
    "fixed": [USER, CITY, SparseFeat("tags_length", 9, use_hash=True), DenseFeat("pair", 2, transform_fn=halved)],
    "dense_alone": [AGE, PAIR],
    "dense_in_fm": [USER, SparseFeat("tags_length", 5, dtype="int64"), DenseFeat("pair", 2, embedding_dim=4)],
    "shared": [USER, VarLenSparseFeat(SparseFeat("tags", 10, embedding_name="user"), 4)],
    "auto_dim": [SparseFeat("user", 10, embedding_dim="auto"), SparseFeat("tags_length", 12, embedding_dim="auto")],
    "one_dim": [SparseFeat("user", 10, 1), SparseFeat("tags_length", 5, 1)],
    "initializers, not_trainable": [
        SparseFeat("user", 10, embeddings_initializer=keras.initializers.Ones()),
        SparseFeat("tags_length", 5, embeddings_initializer=keras.initializers.RandomUniform(seed=3), trainable=False),
    ],
    "groups": [
        SparseFeat("user", 10, group_name="a"),
        SparseFeat("tags_length", 5, group_name="a"),
        SparseFeat("city", 9, use_hash=True, dtype="string", group_name="b"),
        VarLenSparseFeat(SparseFeat("tags", 6, group_name="b"), 4),
    ],
    "varlen": [
        USER,
        tags_of("tags", "mean"),
        tags_of("summed", "sum"),
        tags_of("largest", "max"),
        tags_of("counted", "mean", length_name="tags_length"),
        tags_of("weighed", "sum", weight_name="tags_weight"),
    ],
    "varlen_max_weight": [USER, VarLenSparseFeat(TAG, 4, "max", "tags_length", "tags_weight", False)],
    "everything": [USER, CITY, AGE, PAIR, VarLenSparseFeat(TAG, 4, "mean", "tags_length", "tags_weight")],
}


def build(columns, **arguments):
    groups = sorted({getattr(column, "group_name", "default_group") for column in columns})
    return DeepFM.from_columns(columns, columns, **{"dnn_hidden_units": (8,), "fm_group": groups, **arguments})


@pytest.mark.parametrize("kind", COLUMNS)
def test_trains_saves_loads_and_exports(kind, inputs, rng, tmp_path):
    labels = rng.integers(0, 2, ROWS)
    model = build(COLUMNS[kind])
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["binary_crossentropy"])
    options = {"validation_split": 0.25} if kind == "everything" else {}
    history = model.fit(inputs, labels, batch_size=16, epochs=6, verbose=0, **options).history["loss"]
    assert history[-1] < history[0]
    scores = model.predict(inputs, batch_size=20, verbose=0)
    assert scores.shape == (ROWS, 1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(again(inputs), model(inputs))
    if kind not in ("everything", "fixed", "dense_alone", "varlen_max_weight"):
        return  # exporting takes a second, and these four have every kind of layer
    model.export(tmp_path / "exported", verbose=False)
    feed = {
        name: tf.constant(np.asarray(inputs[name]).reshape(ROWS, *spec.shape[1:]).tolist(), spec.dtype)
        for name, spec in model.input.items()
    }
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(feed), scores, rtol=1e-5)


def test_one_table_and_the_formula(inputs, rng):
    """All columns of one width are looked up by one op, in one table; the sum is the paper's."""
    columns = [USER, SparseFeat("tags_length", 5), VarLenSparseFeat(TAG, 4, "mean")]
    model = DeepFM.from_columns(columns, columns, dnn_hidden_units=(8,), use_deep=False)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    w = {weight.path: weight.numpy().astype(float) for weight in model.weights}
    tables = [value for path, value in w.items() if value.shape[-1] == 4]
    assert len(tables) == 1 and tables[0].shape == (10 + 5 + 6, 4)
    samples = []
    for user, length, tags in zip(inputs["user"], inputs["tags_length"], inputs["tags"], strict=True):
        known = tags[tags != 0]
        samples.append([[(user, 1)], [(10 + length, 1)], [(15 + t, 1 / len(known)) for t in known]])
    first = [
        w["fm_0/w"][:, 0] @ np.bincount([i for f in s for i, _ in f], [x for f in s for _, x in f], 21) for s in samples
    ]
    logits = w["head/bias"] + np.array(first)[:, None] + oracle(tables[0], samples)
    np.testing.assert_allclose(model.predict(inputs, verbose=0), 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("combiner", ["mean", "sum", "max"])
@pytest.mark.parametrize("weights", [None, "plain", "softmax"])
@pytest.mark.parametrize("by_length", [False, True])
def test_pooling(combiner, weights, by_length, rng):
    """Against a loop over the samples; the empty sample is zero."""
    tags = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5], [2, 0, 0, 0]])
    lengths = np.array([[2], [0], [4], [3]])  # the last one counts two zeros as values
    given = rng.random((4, 4, 1)).astype("f")
    column = VarLenSparseFeat(
        TAG, 4, combiner, "n" if by_length else None, "w" if weights else None, weights == "softmax"
    )
    model = DeepFM.from_columns([], [column], dnn_hidden_units=(), use_fm=False, task="regression")
    table = rng.normal(size=(6, 4)).astype("f")
    model.get_layer("fm_0").embeddings.assign(table)
    model.get_layer("deep").kernel.assign(np.ones((4, 1)))
    expected = []
    for row, length, weight in zip(tags, lengths[:, 0], given[..., 0], strict=True):
        chosen = np.arange(4) < length if by_length else row != 0
        x = np.exp(weight) / np.exp(weight[chosen]).sum() if weights == "softmax" and chosen.any() else weight
        e = table[row[chosen]] * (x[chosen, None] if weights else 1)
        pooled = {"mean": lambda e: e.mean(0), "sum": lambda e: e.sum(0), "max": lambda e: e.max(0)}[combiner]
        expected.append(pooled(e).sum() if len(e) else 0.0)
    scores = model.predict({"tags": tags, "n": lengths, "w": given}, verbose=0)[:, 0]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_groups_interact_within_themselves(inputs, rng):
    columns = COLUMNS["groups"]
    scores = {}
    for group in ("a", ["b"], ["a", "b"], ["default_group"]):
        model = DeepFM.from_columns(columns, columns, fm_group=group, use_deep=False, task="regression", seed=3)
        for weight in model.weights:  # the same numbers in each model, where it has the table at all
            if weight.path == "fm_0/embeddings":
                weight.assign(np.random.default_rng(0).normal(size=weight.shape))
        scores[tuple(group)] = model.predict(inputs, verbose=0)
    a, b, both, none = scores.values()
    assert not none.any() and np.abs(a).max() > 0.1 and np.abs(b).max() > 0.1
    np.testing.assert_allclose(both, a + b, rtol=1e-5, atol=1e-5)


def test_dense_columns_in_fm(inputs, rng):
    model = DeepFM.from_columns([], [USER, DenseFeat("pair", 2, embedding_dim=4)], use_deep=False, task="regression")
    table = rng.normal(size=(12, 4)).astype("f")
    model.get_layer("fm_0").embeddings.assign(table)
    dense_first = TablePlan([USER, DenseFeat("pair", 2, embedding_dim=4)]).offsets
    samples = [
        [[(dense_first["user"] + u, 1)], [(dense_first["pair"], p[0])], [(dense_first["pair"] + 1, p[1])]]
        for u, p in zip(inputs["user"], inputs["pair"], strict=True)
    ]
    np.testing.assert_allclose(model.predict(inputs, verbose=0), oracle(table, samples), rtol=1e-3, atol=1e-4)


def test_not_trainable_rows_stay(inputs, rng):
    model = build(COLUMNS["initializers, not_trainable"], seed=5)
    model.compile(keras.optimizers.Adam(0.1), "binary_crossentropy")
    before = {w.path: w.numpy() for w in model.weights}
    model.fit(inputs, rng.integers(0, 2, ROWS), verbose=0)
    changed = {w.path: not np.array_equal(w.numpy(), before[w.path]) for w in model.weights}
    fixed = {w.path for w in model.non_trainable_weights}
    assert len(fixed) == 2 and {path for path, change in changed.items() if not change} == fixed


def test_hashing_is_stable_and_padding_is_zero():
    """The buckets are TensorFlow's fast hash, which models saved by others used too."""
    encoder = ColumnEncoder([CITY, VarLenSparseFeat(SparseFeat("t", 8, use_hash=True, dtype="string"), 3)])
    indices, values, mask = encoder(
        {"city": tf.constant([["Rome"], ["Oslo"]]), "t": tf.constant([["a", "b", "0"], ["", "", ""]])}
    )
    cities = tf.strings.to_hash_bucket_fast(["Rome", "Oslo"], 20).numpy()
    tags = 1 + tf.strings.to_hash_bucket_fast(["a", "b"], 7).numpy()
    np.testing.assert_array_equal(indices, [[cities[0], 20 + tags[0], 20 + tags[1], 20], [cities[1], 20, 20, 20]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(values, [[1, 0.5, 0.5, 0], [1, 0, 0, 0]])


def test_vocabulary_travels_with_the_model(tmp_path, rng):
    path = tmp_path / "cities.csv"
    path.write_text("1,Rome\n2,Oslo\n2,Christiania\n")
    columns = [SparseFeat("city", 3, use_hash=True, vocabulary_path=str(path), dtype="string")]
    model = build(columns)
    model.get_layer("fm_0").w.assign([[0.0], [1.0], [2.0]])
    inputs = {"city": ["Rome", "Oslo", "Christiania", "Paris"]}
    scores = model.predict(inputs, verbose=0)
    assert scores[0] < scores[1] == scores[2] and scores[3] < scores[0]
    model.save(tmp_path / "model.keras")
    path.unlink()
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(inputs, verbose=0), scores)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,Rome\nOslo\n", r"line 2: must be 'index,key', got 'Oslo'"),
        ("x,Rome\n", r"line 1: must be 'index,key'"),
        ("3,Rome\n", r"line 1: index 3 is not in \[0, 3\)"),
        ("1,Rome\n2,Rome\n", r"line 2: key 'Rome' occurs twice"),
    ],
)
def test_damaged_vocabulary(content, message, tmp_path):
    path = tmp_path / "cities.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        SparseFeat("city", 3, use_hash=True, vocabulary_path=str(path), dtype="string")
    with pytest.raises(FileNotFoundError):
        SparseFeat("city", 3, use_hash=True, vocabulary_path=str(tmp_path / "none.csv"), dtype="string")


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (lambda: [SparseFeat("a", 0)], ValueError, "SparseFeat 'a': vocabulary_size must be a positive integer, got 0"),
        (lambda: [SparseFeat("a", 3, 0)], ValueError, "embedding_dim must be a positive integer"),
        (lambda: [SparseFeat("a", 3, dtype="string")], ValueError, "dtype 'string' needs use_hash or vocabulary_path"),
        (lambda: [DenseFeat("a", 0)], ValueError, "DenseFeat 'a': dimension must be a positive integer"),
        (lambda: [VarLenSparseFeat(TAG, 0)], ValueError, "VarLenSparseFeat 'tags': maxlen must be a positive integer"),
        (
            lambda: [VarLenSparseFeat(TAG, 3, "median")],
            ValueError,
            "combiner must be one of mean, sum, max, got 'median'",
        ),
        (lambda: ["user"], TypeError, "a feature column must be SparseFeat, DenseFeat or VarLenSparseFeat, got 'user'"),
        (lambda: [], ValueError, "needs at least one feature column"),
        (lambda: [SparseFeat("a", 3), DenseFeat("a")], ValueError, "input 'a' is needed as"),
        (lambda: [SparseFeat("deep", 3)], ValueError, "a column has the name of a layer of the model, so rename it"),
        (
            lambda: [SparseFeat("a", 3, 4), SparseFeat("b", 3, 8)],
            ValueError,
            r"must have one embedding_dim, got \[4, 8\]",
        ),
        (
            lambda: [SparseFeat("a", 3, embedding_name="e"), SparseFeat("b", 4, embedding_name="e")],
            ValueError,
            "columns 'a' and 'b' share embedding 'e', so their vocabulary_size must be one, got 3 and 4",
        ),
    ],
)
def test_bad_columns(columns, error, message):
    with pytest.raises(error, match=message):
        build(columns())


def test_linear_and_deep_columns_of_one_name_are_encoded_each_by_itself():
    """They may pool, hash and share differently."""
    table = np.arange(14.0).reshape(7, 2) / 10
    for linear, deep, expected in (
        ("sum", "mean", 0.3),
        ("mean", "sum", 0.6),
        ("mean", "max", 0.4),
        ("max", "mean", 0.3),
    ):
        columns = [[VarLenSparseFeat(SparseFeat("g", 7, 2), 3, c)] for c in (linear, deep)]
        model = DeepFM.from_columns(*columns, dnn_hidden_units=(), use_fm=False, task="regression")
        model.get_layer("fm_0").embeddings.assign(table)
        model.get_layer("deep").kernel.assign([[1.0], [0.0]])
        if linear == "max":
            model.get_layer("first_order_0").embeddings.assign(np.zeros((7, 1)))
        scores = model.predict({"g": np.array([[1, 0, 0], [1, 2, 0]])}, verbose=0)
        np.testing.assert_allclose(scores[1], expected, atol=1e-6)
    linear = [SparseFeat("a", 7), SparseFeat("b", 7, embedding_name="a")]
    model = DeepFM.from_columns(linear, [SparseFeat("a", 7), SparseFeat("b", 7)], dnn_hidden_units=(2,))
    assert model.get_layer("first_order_0").num_features == 7 and model.get_layer("fm_0").num_features == 14
    assert np.isfinite(model.predict({"a": np.array([6]), "b": np.array([6])}, verbose=0)).all()
    linear = [SparseFeat("a", 10, use_hash=True)]
    model = DeepFM.from_columns(linear, [SparseFeat("a", 1000, use_hash=True)], dnn_hidden_units=(2,))
    assert np.isfinite(model.predict({"a": np.arange(500)}, verbose=0)).all()


def test_embeddings_that_cannot_be_shared():
    base = SparseFeat("a", 9)
    for change in ({"trainable": False}, {"embedding_dim": 8}, {"embeddings_initializer": keras.initializers.Ones()}):
        other = SparseFeat("b", 9, embedding_name="a")._replace(**change)
        with pytest.raises(
            ValueError, match=f"columns 'a' and 'b' share embedding 'a', so their {next(iter(change))} must"
        ):
            build([base, other])


def test_indices_are_never_wrapped_or_rounded():
    model = build([SparseFeat("a", 10), VarLenSparseFeat(SparseFeat("g", 5), 2)])
    good = {"a": np.array([3.0]), "g": np.array([[1, 2]])}  # whole floats, as pandas makes them
    assert model.predict(good, verbose=0).shape == (1, 1)
    for bad in (2**32 + 3, -(2**32) + 3):
        message = rf"column a: index in row 0 = {bad} is not in \[0, 10\)"
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.predict({**good, "a": np.array([bad])}, verbose=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model({**good, "a": np.array([bad])})
    for bad in (1.7, np.nan):
        with pytest.raises(TypeError, match="input 'a' must hold integers, got float64 with fractions or NaN"):
            model.predict({**good, "a": np.array([bad])}, verbose=0)
    with pytest.raises(TypeError, match="input 'a' must be int32 or int64, got float32"):
        model({**good, "a": tf.constant([[1.7]])})
    encoder = ColumnEncoder([SparseFeat("a", 1000, use_hash=True)])
    indices = encoder({"a": tf.constant([[3], [2**32 + 3]], tf.int64)})[0]
    assert indices[0, 0] != indices[1, 0]


def test_columns_of_either_rank_and_wrong_widths(inputs):
    columns = [USER, PAIR, VarLenSparseFeat(TAG, 4, "sum", weight_name="tags_weight")]
    model = build(columns)
    expected = model.predict(inputs, verbose=0)
    other = {**inputs, "user": inputs["user"].to_numpy()[:, None], "tags_weight": inputs["tags_weight"][..., 0]}
    np.testing.assert_array_equal(model.predict(other, verbose=0), expected)
    np.testing.assert_array_equal(model.predict(inputs, verbose=0), expected)
    for name, bad in (
        ("user", np.zeros((ROWS, 2), int)),
        ("pair", np.zeros((ROWS, 1))),
        ("tags", np.zeros((ROWS, 3), int)),
    ):
        with pytest.raises(ValueError, match=rf"input '{name}' must have shape \('B', \d\), got \({ROWS}, \d\)"):
            model.predict({**inputs, name: bad}, verbose=0)


def test_missing_and_encoded_text():
    """A missing cell is the empty string, whatever stands for it; bytes are UTF-8."""
    model = build([CITY])
    texts = ["é", "", None, pd.NA, np.nan, "é".encode()]
    scores = model.predict({"city": np.array(texts, dtype=object)}, verbose=0)[:, 0]
    assert len(set(scores[1:5])) == 1 and scores[0] == scores[5] != scores[1]
    series = pd.Series(["é", None], dtype="string")
    np.testing.assert_array_equal(model.predict({"city": series}, verbose=0)[:, 0], scores[:2])


def test_no_rows(inputs):
    model = build([USER, CITY])
    empty = {"user": np.zeros(0, int), "city": np.zeros(0, object)}
    assert model.predict(empty, verbose=0).shape == (0, 1)


def test_bad_inputs(inputs):
    model = build([USER, CITY, AGE])
    with pytest.raises(ValueError, match=r"fm_group names \['nope'\], but the columns' groups are \['default_group'\]"):
        build([USER, CITY], fm_group=["nope"])
    with pytest.raises(KeyError, match=r"inputs are missing \['city', 'age'\]"):
        model.predict({"user": inputs["user"]}, verbose=0)
    with pytest.raises(ValueError, match="inputs must be equally long, got .*'user': 47"):
        model.predict({**inputs, "user": inputs["user"][1:]}, verbose=0)
    with pytest.raises(TypeError, match="input 'age' must hold numbers"):
        model.predict({**inputs, "age": inputs["city"]}, verbose=0)
    users = inputs["user"].to_numpy().copy()
    for bad in (10, -1):
        users[7] = bad
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=rf"column user: index in row 7 = {bad} is not in \[0, 10\)"
        ):
            model.predict({**inputs, "user": users}, verbose=0)


def test_inputs_as_a_list_in_the_order_of_the_names(inputs):
    columns = COLUMNS["everything"]
    model = build(columns)
    names = get_feature_names(columns)
    assert names == ["user", "city", "age", "pair", "tags", "tags_weight", "tags_length"]
    expected = model.predict(inputs, verbose=0)
    np.testing.assert_array_equal(model.predict([inputs[name] for name in names], verbose=0), expected)
    with pytest.raises(ValueError, match="or a list in this order: .'user', 'city'"):
        model.predict([inputs["user"]], verbose=0)


def test_a_tf_data_pipeline_with_surplus_keys(inputs):
    model = build([USER, AGE])
    expected = model.predict(inputs, verbose=0)
    data = tf.data.Dataset.from_tensor_slices({k: list(inputs[k]) for k in ("user", "age", "surplus")}).batch(16)
    np.testing.assert_allclose(model.predict(data, verbose=0), expected, rtol=1e-6)


def test_evaluation_and_batches(inputs, rng):
    labels = rng.integers(0, 2, ROWS)
    model = build([USER, CITY, AGE])
    model.compile("adam", "binary_crossentropy", metrics=[keras.metrics.AUC()])
    model.fit(inputs, labels, validation_data=(inputs, labels), verbose=0)
    assert len(model.evaluate(inputs, labels, verbose=0)) == 2
    assert (
        np.isfinite(model.train_on_batch(inputs, labels)).all()
        and np.isfinite(model.test_on_batch(inputs, labels)).all()
    )
    np.testing.assert_allclose(model.predict_on_batch(inputs), model.predict(inputs, verbose=0), rtol=1e-6)


def test_mixed_precision(inputs, rng, tmp_path):
    model = build(COLUMNS["everything"], dtype="mixed_bfloat16")
    model.compile("adam", "binary_crossentropy")
    model.fit(inputs, rng.integers(0, 2, ROWS), verbose=0)
    scores = model.predict(inputs, verbose=0)
    assert scores.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(inputs, verbose=0), scores)


def test_deepctr_script_runs_after_changing_its_imports():
    """The script is written for DeepCTR: its arguments by position and by name, its metrics, its inputs."""
    script = """
import numpy as np
import pandas as pd
from deepfm_ops.deepctr import SparseFeat, DenseFeat, VarLenSparseFeat, get_feature_names, build_input_features
from deepfm_ops.deepctr import DeepFM

rng = np.random.default_rng(0)
data = pd.DataFrame({f"C{i}": rng.integers(0, 50, 200) for i in range(3)})
data[["I1", "I2"]] = rng.random((200, 2))
data["label"] = rng.integers(0, 2, 200)
sparse_features, dense_features, target = ["C0", "C1", "C2"], ["I1", "I2"], ["label"]
fixlen_feature_columns = [SparseFeat(feat, vocabulary_size=data[feat].max() + 1, embedding_dim=4)
                          for feat in sparse_features] + [DenseFeat(feat, 1, ) for feat in dense_features]
varlen = [VarLenSparseFeat(SparseFeat("genres", vocabulary_size=10, embedding_dim=4), maxlen=5, combiner="mean")]
linear_feature_columns = fixlen_feature_columns + varlen
dnn_feature_columns = fixlen_feature_columns + varlen
feature_names = get_feature_names(linear_feature_columns + dnn_feature_columns)
train = data
model_input = {name: train[name] for name in feature_names if name != "genres"}
model_input["genres"] = rng.integers(0, 10, (200, 5))
model = DeepFM(linear_feature_columns, dnn_feature_columns, dnn_hidden_units=(16, 8), l2_reg_dnn=0.001,
               dnn_dropout=0.1, dnn_activation="relu", dnn_use_bn=True, task="binary")
model.compile("adam", "binary_crossentropy", metrics=["binary_crossentropy"], )
history = model.fit(model_input, train[target].values, batch_size=64, epochs=2, verbose=0, validation_split=0.2, )
pred_ans = model.predict(model_input, batch_size=64, verbose=0)
print(pred_ans.shape, list(build_input_features(dnn_feature_columns)) == feature_names)
"""
    assert run_with_tensorflow(script).split("\n")[-2] == "(200, 1) True"
    assert deepctr_names.SparseFeat is SparseFeat
