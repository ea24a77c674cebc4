"""What was learned: terms add up to the model's own logit, in the features' names, of samples and over data sets."""

import itertools
import pathlib
import re
import sys

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import run_python

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat, explain
from deepfm_ops.explanations import drawing
from deepfm_ops.explanations.strongest import Strongest

try:
    from deepfm_ops import kernels
except ImportError:  # a pure-Python install does not score
    kernels = None
with_kernels = pytest.mark.skipif(kernels is None, reason="a pure-Python install has no kernels")

ROWS = 21
KINDS = {
    "LR": {"use_fm": False, "use_deep": False},
    "FM": {"use_deep": False},
    "DNN": {"use_linear": False, "use_fm": False},
    "DeepFM": {},
    "second order alone": {"use_linear": False, "use_deep": False},
    "batch norm and dropout": {"batch_norm": True, "dropout": 0.5, "activation": "tanh"},
    "regression": {"task": "regression"},
    "reference": {"backend": "reference"},
}


def shuffled(model, rng, scale=0.2):
    """The model with weights that are nowhere zero."""
    for weight in model.weights:
        if weight.dtype in ("float64", "float32", "bfloat16", "float16"):
            noise = rng.normal(size=weight.shape) * scale
            weight.assign(np.abs(noise) + 0.5 if "variance" in weight.path else noise)
    return model


def matrices(rng, columns=6, rows=60):
    return rng.integers(0, rows, (ROWS, columns)), rng.normal(size=(ROWS, columns)).astype("f")


def logits(task, scores):
    scores = np.asarray(scores, np.float64)
    if task == "multiclass":  # a softmax does not see a shift
        return np.log(scores) - np.log(scores).mean(axis=-1, keepdims=True)
    return scores if task == "regression" else np.log(scores) - np.log1p(-scores)


def predicted(model, inputs):
    if not isinstance(model, deepfm_ops.scorer.Scorer):
        return model.predict(inputs, verbose=0)
    return model.score(*inputs) if isinstance(inputs, tuple) else model.score(inputs)


def check(model, inputs, **options):
    """The explanation of a model of one number, whose terms add up to what the model itself gives."""
    (found,) = checks(model, inputs, [None], **options)
    return found


def checks(model, inputs, keys, **options):
    """The explanation of each number; `keys` are all numbers, in order, and None that of one without a name."""
    scores, found = predicted(model, inputs), [explain(model, inputs, head=key, **options) for key in keys]
    scores = list(scores.values()) if isinstance(scores, dict) else [scores]
    scores = np.concatenate([np.reshape(x, (len(x), -1)) for x in scores], axis=1)
    is_class = np.array([one.task == "multiclass" for one in found])
    for number, (key, one) in enumerate(zip(keys, found, strict=True)):
        assert one.head == key
        np.testing.assert_allclose(one.score, scores[:, number], rtol=0, atol=1e-5)
        if not is_class[number]:
            np.testing.assert_allclose(one.logit, logits(one.task, scores[:, number]), rtol=0, atol=1e-5)
        parts = (one.first_order.sum(axis=1), one.pairs.sum(axis=1), one.triples, one.deep)
        np.testing.assert_allclose(one.bias + sum(parts), one.logit, rtol=0, atol=1e-6)
        assert one.first_order.shape == (len(one), len(one.first_order_fields))
        assert one.pairs.shape == (len(one), len(one.pair_fields))
    if is_class.any():
        of_classes = np.stack([one.logit for one in found], axis=1)[:, is_class]
        shifted = of_classes - of_classes.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(shifted, logits("multiclass", scores[:, is_class]), rtol=0, atol=1e-5)
    return found


def exported(model, path, table="float32", **options):
    deepfm_ops.export_scorer(model, path, table, **options)
    return deepfm_ops.scorer.Scorer.load(path)


def tables(model):
    """(embeddings, w) of the model's one table, float64, or None."""
    source = model.plan.tables[0].source
    found = [getattr(source, name, None) for name in ("embeddings", "w")]
    return [None if x is None else x.numpy().astype(np.float64) for x in found]


# Of matrices.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field_sizes", [None, [1, 3, 2]], ids=["fields", "multi-valued"])
def test_a_matrix_model(kind, field_sizes, rng):
    """The terms are those of the formula, by loops in float64; two values of one field have none."""
    fields = 6 if field_sizes is None else 3
    model = shuffled(DeepFM(60, fields, 5, (9, 4), field_sizes=field_sizes, **KINDS[kind]), rng)
    inputs = indices, values = matrices(rng)
    found = check(model, inputs)
    embeddings, w = tables(model)
    options = model.get_config()
    if options["use_linear"]:
        np.testing.assert_allclose(found.first_order, w[indices, 0] * values, rtol=1e-5, atol=1e-7)
    else:
        assert found.first_order.shape == (ROWS, 0)
    assert (found.deep != 0).any() == options["use_deep"]
    if not options["use_fm"]:
        assert found.pairs.shape == (ROWS, 0)
        return
    owner = np.repeat(np.arange(fields), field_sizes or [1] * 6)
    expected = np.zeros((ROWS, fields, fields))
    for p, q in itertools.combinations(range(6), 2):
        if owner[p] != owner[q]:
            dots = (embeddings[indices[:, p]] * embeddings[indices[:, q]]).sum(axis=1)
            expected[:, owner[p], owner[q]] += dots * values[:, p] * values[:, q]
    for number, (first, second) in enumerate(found.pair_fields):
        np.testing.assert_allclose(found.pairs[:, number], expected[:, first, second], rtol=1e-4, atol=1e-6)
    assert len(found.pair_fields) == fields * (fields - 1) // 2
    np.testing.assert_array_equal(found.matrix(3), found.matrix(3).T)
    np.testing.assert_allclose(found.matrix(3), expected[3] + expected[3].T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("table", "shards"), [("float32", None), ("float32", 3), ("bfloat16", None), ("int8", None)])
@pytest.mark.parametrize("field_sizes", [None, [1, 3, 2]], ids=["fields", "multi-valued"])
@with_kernels
def test_a_scorer_of_matrices(kind, table, shards, field_sizes, rng, tmp_path):
    """The scorer's own logit, of the rows as the file has them."""
    fields = 6 if field_sizes is None else 3
    model = shuffled(DeepFM(60, fields, 5, (9, 4), field_sizes=field_sizes, **KINDS[kind]), rng)
    inputs = matrices(rng)
    scorer = exported(model, tmp_path / "m", table, shards=shards)
    found, of_model = check(scorer, inputs), explain(model, inputs)
    bound = {"float32": 1e-6, "bfloat16": 0.05, "int8": 0.05}[table]
    if table != "int8":
        assert found.first_order_fields == of_model.first_order_fields
    assert found.fields == of_model.fields
    np.testing.assert_array_equal(found.pair_fields, of_model.pair_fields)
    np.testing.assert_allclose(found.pairs, of_model.pairs, rtol=0, atol=bound)
    np.testing.assert_allclose(
        check(scorer, (inputs[0], np.ones((ROWS, 6), "f"))).logit, explain(scorer, inputs[0]).logit
    )
    np.testing.assert_allclose(explain(scorer, {"indices": inputs[0], "values": inputs[1]}).logit, found.logit)


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "bfloat16"])
def test_other_precisions(policy, rng):
    model = shuffled(DeepFM(60, 6, 5, (9,), dtype=policy), rng)
    inputs = matrices(rng)
    bound = 1e-5 if policy == "float64" else 0.1  # the model itself computes in fewer bits
    found = explain(model, inputs)
    np.testing.assert_allclose(
        found.logit, logits("binary", model.predict(inputs, verbose=0).ravel()), rtol=0, atol=bound
    )
    assert found.pairs.dtype == (np.float64 if policy == "float64" else np.float32)


def test_averages_and_what_keras_changes(rng):
    """What `predict` has: averaged weights after training, quantized kernels, and those of LoRA."""
    model = DeepFM(60, 6, 5, (9,), seed=1)
    model.compile()
    inputs = matrices(rng)
    model.fit(inputs, rng.integers(0, 2, ROWS), epochs=3, verbose=0)
    model.train_on_batch(inputs, np.ones(ROWS))  # raw weights are in
    found = explain(model, inputs)
    raw = found.logit.copy()
    np.testing.assert_allclose(logits("binary", model.predict(inputs, verbose=0).ravel()), raw, rtol=0, atol=1e-5)
    lora = shuffled(DeepFM(60, 6, 5, (9,)), rng)
    lora.get_layer("hidden_0").enable_lora(2)
    check(shuffled(lora, rng), inputs)
    quantized = shuffled(DeepFM(60, 6, 5, (9,)), rng)
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        quantized.quantize("int8")
    check(quantized, inputs)
    check(keras.models.clone_model(lora), inputs)


# Of feature columns.

USER, CITY = SparseFeat("user", 10), SparseFeat("city", 20, use_hash=True, dtype="string")
BOOK = SparseFeat("book", 4, vocabulary={"a": 1, "b": 2, "c": 3}, dtype="string")
AGE, PAIR, TAG = DenseFeat("age"), DenseFeat("pair", 2, embedding_dim=4), SparseFeat("tags", 6)
COLUMNS = {
    "sparse": [USER, CITY, BOOK],
    "dense": [AGE, DenseFeat("pair", 2)],
    "dense in fm": [USER, PAIR, AGE],
    "shared": [USER, VarLenSparseFeat(SparseFeat("tags", 10, embedding_name="user"), 4)],
    "widths": [
        SparseFeat("user", 10, 3, group_name="a"),
        SparseFeat("book", 4, 5, group_name="b", vocabulary=BOOK.vocabulary, dtype="string"),
    ],
    "groups": [
        SparseFeat("user", 10, group_name="a"),
        SparseFeat("city", 9, use_hash=True, dtype="string", group_name="b"),
        SparseFeat("book", 4, vocabulary=BOOK.vocabulary, dtype="string", group_name="a"),
        VarLenSparseFeat(SparseFeat("tags", 6, group_name="b"), 4),
    ],
    "not trainable": [USER, SparseFeat("tags_length", 5, trainable=False)],
    **{f"list {c}": [USER, VarLenSparseFeat(TAG, 4, c), AGE] for c in ("mean", "sum", "max")},
    "list weight": [USER, VarLenSparseFeat(TAG, 4, "sum", weight_name="tags_weight")],
    "list max weight": [USER, VarLenSparseFeat(TAG, 4, "max", "tags_length", "tags_weight", False), PAIR],
    "everything": [USER, CITY, AGE, PAIR, VarLenSparseFeat(TAG, 4, "mean", "tags_length", "tags_weight")],
}


@pytest.fixture
def raw(rng):
    return {
        "user": rng.integers(0, 10, ROWS),
        "city": rng.choice(["Rome", "Oslo", "Lima"], ROWS).tolist(),
        "book": rng.choice(["a", "b", "c"], ROWS).tolist(),
        "age": rng.normal(size=ROWS).astype("f"),
        "pair": rng.normal(size=(ROWS, 2)).astype("f"),
        "tags": rng.integers(0, 6, (ROWS, 4)),
        "tags_length": rng.integers(0, 5, ROWS),
        "tags_weight": rng.random((ROWS, 4, 1)).astype("f"),
    }


def of_columns(columns, **options):
    groups = sorted({column.group_name for column in columns if hasattr(column, "group_name")})
    return DeepFM.from_columns(columns, columns, **{"dnn_hidden_units": (8,), "fm_group": groups, **options})


OPTIONS = {
    "all parts": {},
    "regression": {"task": "regression", "dnn_use_bn": True, "dnn_dropout": 0.5},
    "no deep part": {"use_deep": False},
    "no second order": {"use_fm": False},
    "no first order": {"use_linear": False},
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_column_model(kind, options, raw, rng, tmp_path):
    if kind == "dense" and options == "no deep part":
        raw = {name: raw[name] for name in ("age", "pair")}
    model = shuffled(of_columns(COLUMNS[kind], **OPTIONS[options]), rng)
    found = check(model, raw)
    summary = explain(model, raw, summary=True, top=100_000)
    np.testing.assert_allclose(summary.pairs, found.pairs.mean(axis=0), rtol=0, atol=1e-6)
    assert sum(pair.mean for pair in summary.feature_pairs) == pytest.approx(found.pairs.sum() / ROWS, abs=1e-5)
    str(found), str(summary)
    if kernels is None:
        return
    of_scorer = check(exported(model, tmp_path / "m"), raw)
    assert of_scorer.fields == found.fields and of_scorer.first_order_fields == found.first_order_fields
    np.testing.assert_allclose(of_scorer.pairs, found.pairs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(of_scorer.first_order, found.first_order, rtol=0, atol=1e-6)
    assert of_scorer.labels(2) == found.labels(2)
    check(exported(model, tmp_path / "m", "int8"), raw)


def test_other_columns_in_the_first_order(raw, rng):
    """Tables of their own for the first order, and one that two parts share."""
    linear = [USER, AGE, VarLenSparseFeat(TAG, 4, "max")]
    for dnn in ([CITY], [USER, CITY], [AGE]):
        model = shuffled(DeepFM.from_columns(linear, dnn, dnn_hidden_units=(8,)), rng)
        found = check(model, raw)
        assert {"user", "tags", "age"} <= set(found.first_order_fields)


@keras.saving.register_keras_serializable("deepfm_ops_explain_tests")
def halved(x):
    return x / 2


def test_a_transformed_column(raw, rng):
    columns = [USER, DenseFeat("pair", 2, transform_fn=halved, embedding_dim=4)]
    found = check(shuffled(of_columns(columns), rng), raw)
    assert f"pair[1]={raw['pair'][3, 1] / 2:g}" in found.labels(3)[1]


# Of several numbers, of order three, and with field weights.

MOOD = [("mood", 0), ("mood", 1), ("mood", 2)]
TASKS = {
    "one": ("regression", [None]),
    "named": ({"click": "binary"}, ["click"]),
    "classes": (("multiclass", 3), [0, 1, 2]),
    "heads": ({"mood": ("multiclass", 3), "dwell": "regression", "click": "binary"}, ["click", "dwell", *MOOD]),
}
INTERACTIONS = {"plain": {}, "order 3": {"order": 3}, "field weights": {"field_weights": True}}
TABLES = [  # two groups, each of two tables
    *(SparseFeat(name, 10, group_name="a", trainable=name == "user") for name in ("user", "tags_length")),
    SparseFeat("book", 4, vocabulary=BOOK.vocabulary, dtype="string", group_name="a"),
    DenseFeat("pair", 2, embedding_dim=4, group_name="b"),
    VarLenSparseFeat(SparseFeat("tags", 6, group_name="b", trainable=False), 4, "max"),
]
COMBINED = [(task, kind) for kind in INTERACTIONS for task in TASKS if (task, kind) != ("one", "plain")]


def oracle(model, groups, place):
    """The terms of the pairs [n, M] and of all triples [n], of the embeddings [n, F, K] of each group, by loops."""
    pairs, triples, plan = [], 0.0, model.plan
    for number, embeddings in enumerate(groups):
        kernel = plan.projections[number].kernel.numpy()[:, place] if plan.projections else 1.0
        weights = plan.field_weights[number].field_weights.numpy() if plan.field_weights else np.ones(99)
        e = np.moveaxis(embeddings.astype(np.float64), 1, 0)
        for f, h in itertools.combinations(range(len(e)), 2):
            pairs.append((e[f] * e[h] * kernel).sum(axis=1) * weights[h * (h - 1) // 2 + f])
        for f, h, i in itertools.combinations(range(len(e)), 3):
            triples += (e[f] * e[h] * e[i] * kernel).sum(axis=1)
    return np.stack(pairs, axis=1), triples * (plan.order == 3)


@pytest.mark.parametrize(("task", "kind"), COMBINED)
@pytest.mark.parametrize("use_deep", [True, False], ids=["DeepFM", "FM"])
def test_numbers_of_a_matrix_model(task, kind, use_deep, rng, tmp_path):
    """Each has its bias, its weights and its sums of the crossings, in the model and in its scorers."""
    task, keys = TASKS[task]
    sizes = [1, 1, 3, 1]
    options = {"use_deep": use_deep, "field_sizes": sizes, "task": task, **INTERACTIONS[kind]}
    model = shuffled(DeepFM(60, 4, 5, (9, 4), **options), rng)
    inputs = indices, values = matrices(rng)
    table, w = tables(model)
    embeddings = np.add.reduceat(table[indices] * values[..., np.newaxis], np.cumsum([0, *sizes[:-1]]), axis=1)
    of_model = checks(model, inputs, keys)
    for place, found in enumerate(of_model):
        pairs, triples = oracle(model, [embeddings], place)
        np.testing.assert_array_equal(found.pair_fields, list(itertools.combinations(range(4), 2)))
        np.testing.assert_allclose(found.pairs, pairs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.triples, triples, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.first_order, w[indices, place] * values, rtol=1e-5, atol=1e-7)
        assert found.bias == model.plan.head.bias.numpy()[place]
    if kernels is None:
        return
    for form, shards in (("float32", None), ("bfloat16", 3), ("int8", None)):
        scorer = exported(model, tmp_path / form, form, shards=shards)
        for found, expected in zip(checks(scorer, inputs, keys), of_model, strict=True):
            bound = 1e-6 if form == "float32" else 0.05
            np.testing.assert_allclose(found.pairs, expected.pairs, rtol=0, atol=bound)
            np.testing.assert_allclose(found.triples, expected.triples, rtol=0, atol=bound)
            np.testing.assert_allclose(found.first_order, expected.first_order, rtol=0, atol=bound)


@pytest.mark.parametrize(("task", "kind"), COMBINED)
def test_numbers_of_a_column_model(task, kind, raw, rng, tmp_path):
    """Groups across tables, and fields that are pooled by maximum."""
    task, keys = TASKS[task]
    model = shuffled(of_columns(TABLES, task=task, **INTERACTIONS[kind]), rng)
    groups = [["tags_length", "user", "book"], ["tags", "pair[0]", "pair[1]"]]
    index = raw | {"book": np.array([" abc".index(x) for x in raw["book"]])}
    e = {name: model.embedding(name)[index[name]] for name in ("tags_length", "user", "book", "tags")}
    of_tags = np.where(raw["tags"][..., np.newaxis] > 0, e["tags"], -np.inf).max(axis=1)
    e["tags"] = np.where(np.isfinite(of_tags), of_tags, 0)  # 0 is padding
    e |= {f"pair[{i}]": model.embedding("pair")[i] * raw["pair"][:, i, np.newaxis] for i in range(2)}
    embeddings = [np.stack([e[name] for name in names], axis=1) for names in groups]
    of_model = checks(model, raw, keys)
    for place, found in enumerate(of_model):
        pairs, triples = oracle(model, embeddings, place)
        named = [(found.fields[a], found.fields[b]) for a, b in found.pair_fields]
        assert named == [pair for names in groups for pair in itertools.combinations(names, 2)]
        np.testing.assert_allclose(found.pairs, pairs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.triples, triples, rtol=1e-4, atol=1e-6)
    summary = explain(model, raw, head=keys[-1], summary=True, top=100_000)
    assert summary.head == keys[-1]
    np.testing.assert_allclose(summary.pairs, of_model[-1].pairs.mean(axis=0), rtol=0, atol=1e-6)
    assert summary.triples == pytest.approx(of_model[-1].triples.mean(), abs=1e-6)
    assert summary.triples_strength == pytest.approx(np.abs(of_model[-1].triples).mean(), abs=1e-6)
    assert summary.logit == pytest.approx(of_model[-1].logit.mean(), abs=1e-6)
    assert sum(pair.mean for pair in summary.feature_pairs) == pytest.approx(summary.pairs.sum(), abs=1e-5)
    if kernels is None:
        return
    for found, expected in zip(checks(exported(model, tmp_path / "m"), raw, keys), of_model, strict=True):
        for name in ("pairs", "triples", "first_order", "deep", "logit", "score"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6, err_msg=name)
        assert found.labels(2) == expected.labels(2)


@pytest.mark.parametrize("kind", ["model", pytest.param("scorer", marks=with_kernels)])
def test_texts_of_numbers(kind, rng, tmp_path):
    """They say which number it is, and speak of triples only where there are any."""
    features, _ = named(rng)

    def texts(head=None, **options):
        model = shuffled(DeepFM.from_features(features, embedding_dim=4, hidden_units=(5,), **options), rng)
        model = exported(model, tmp_path / "m") if kind == "scorer" else model
        found, summary = explain(model, TABLE, head=head), explain(model, TABLE, head=head, summary=True)
        sums = pd.DataFrame(found.table(0))["value"].sum(), pd.DataFrame(summary.table())["mean"].sum() + summary.bias
        assert sums == pytest.approx((found.logit[0], summary.logit), abs=1e-6)
        assert found[2:].score == pytest.approx(found.score[2:]) and str(found[2:3]) == str(found[2])
        return str(found[0]), str(summary)

    one, of_many = texts(task=TASKS["classes"][0], head=1, order=3)
    assert re.match(r"class 1: logit [-+.0-9]+, probability [.0-9]+\n", one) and of_many.startswith(
        "class 1: 6 samples, "
    )
    assert re.search(r"^ +[-+.0-9]+  triples of fields$", one, re.MULTILINE) and "triples of fields" in of_many
    one, of_many = texts(task=TASKS["heads"][0], head=("mood", 2))
    assert one.startswith("mood, class 2: logit ") and of_many.startswith("mood, class 2: 6 samples, ")
    assert "triples" not in one and "triples" not in of_many
    one, _ = texts(task=TASKS["heads"][0], head="dwell")
    assert re.match(r"dwell: logit [-+.0-9]+, prediction ", one)


@pytest.mark.parametrize("kind", ["model", pytest.param("scorer", marks=with_kernels)])
@pytest.mark.parametrize(
    ("task", "head", "error", "message"),
    [
        ("heads", None, ValueError, r"head must be 'click', 'dwell', \('mood', 0\) to \('mood', 2\), got None"),
        ("heads", "like", KeyError, "head must be 'click', .*, got 'like'"),
        ("heads", ("like", 0), KeyError, r"head must be 'click', .*, got \('like', 0\)"),
        ("heads", "mood", ValueError, r"head must be .*\('mood', 0\) to \('mood', 2\), got 'mood'"),
        ("heads", ("mood", 3), ValueError, r"\('mood', 0\) to \('mood', 2\), got \('mood', 3\)"),
        ("heads", ("mood", True), ValueError, "got .*True"),
        ("heads", ("click", 0), ValueError, r"head must be 'click', .* got \('click', 0\)"),
        ("heads", 1, ValueError, "head must be 'click', .*, got 1"),
        ("classes", None, ValueError, "head must be 0 to 2, got None"),
        ("classes", -1, ValueError, "head must be 0 to 2, got -1"),
        ("classes", 1.0, ValueError, "head must be 0 to 2, got 1.0"),
        ("classes", "click", ValueError, "head must be 0 to 2, got 'click'"),
        ("named", "like", KeyError, "head must be 'click', got 'like'"),
        ("one", "click", ValueError, "head must be None, got 'click'"),
        ("one", 0, ValueError, "head must be None, got 0"),
    ],
)
def test_heads_that_are_refused(kind, task, head, error, message, tmp_path):
    model = DeepFM(20, 3, 4, use_deep=False, task=TASKS[task][0])
    model = exported(model, tmp_path / "m") if kind == "scorer" else model
    with pytest.raises(error, match=message):
        explain(model, (np.array([[0, 1, 2]]), np.ones((1, 3))), head=head)


def test_the_only_number_needs_no_key(rng):
    model, inputs = shuffled(DeepFM(60, 6, 5, (9,), task={"click": "binary"}), rng), matrices(rng)
    found = explain(model, inputs)
    assert found.head == "click" and str(found) == str(explain(model, inputs, head="click"))


# Names.

TABLE = {
    "user": ["ann", "bob", "ann", "cid", None, "dan"],
    "age": [0.3, 0.5, 0.0, None, 2.0, 1.0],
    "genres": ["drama|war", "war", "comedy", "drama", "", "comedy|war"],
    "liked": [1, 0, 0, 1, 1, 0],
}


def named(rng, **options):
    columns = {"categorical": "user", "numeric": "age", "multivalued": "genres", "label": "liked"}
    features = FeatureDictionary(**options).fit(TABLE, **columns)
    return features, shuffled(DeepFM.from_features(features, embedding_dim=4, hidden_units=(5,)), rng)


def test_terms_that_are_nan_come_first(rng):
    """They are what is to be seen, and to a sort they are neither larger nor smaller."""
    model = matrix_model()
    weights = shuffled(model, rng).get_layer("fm").embeddings
    weights.assign(np.where(np.arange(20)[:, np.newaxis] == 7, np.nan, weights.numpy()))
    inputs = np.array([[1, 7, 2], [3, 4, 5]])
    for table, column in (
        (explain(model, inputs).table(0), "value"),
        (explain(model, inputs, summary=True).table(), "strength"),
    ):
        values = np.array(table[column])
        some = np.isnan(values).sum()
        assert some >= 3 and np.isnan(values[:some]).all() and (np.diff(np.abs(values[some:])) <= 0).all()


def test_names_of_features(rng):
    features, model = named(rng)
    found = explain(model, TABLE)
    assert found.fields == ["user", "age", "genres"] and found.first_order_fields == ["user", "age", "genres", "genres"]
    assert found.labels(0) == (
        ["user=ann", "age=0.3", "genres=drama", "genres=war"],
        ["user=ann", "age=0.3", "genres=drama+war"],
    )
    assert found.labels(4) == (
        ["user missing", "age=2", "genres missing", "genres missing"],
        ["user missing", "age=2", "genres missing"],
    )
    text = str(found[0])
    assert text.startswith(f"logit {found.logit[0]:+.4f}, probability {found.score[0]:.4f}")
    for term in ("bias", "deep part", "user=ann", "user=ann x genres=drama+war", "age=0.3 x genres=drama+war"):
        assert re.search(rf"^ +[-+]\d+\.\d{{4}}  {re.escape(term)}$", text, re.MULTILINE), term
    table = pd.DataFrame(found.table(0))
    assert table["value"].sum() == pytest.approx(found.logit[0], abs=1e-6)
    assert (table["value"].abs().diff()[1:] <= 0).all() and set(table["part"]) == {
        "bias",
        "deep",
        "first order",
        "pair",
    }
    assert "and 3 more samples" in str(found) and len(str(found).splitlines()) < 60
    assert str(found[4:]).count("probability") == 2 and str(found[-1]) == str(found[5])
    np.testing.assert_allclose(explain(model, features.transform(TABLE)).logit, found.logit)
    assert model.predict(features.transform(TABLE), verbose=0).ravel() == pytest.approx(found.score, abs=1e-6)


def test_names_without_a_dictionary(rng):
    model = shuffled(DeepFM(60, 2, 4, use_deep=False, field_sizes=[1, 2]), rng)
    found = explain(model, (np.array([[7, 8, 9]]), np.array([[1, 0.5, 0]])))
    assert found.labels() == (["field 0=#7", "field 1=#8 x 0.5", "field 1 missing"], ["field 0=#7", "field 1=#8 x 0.5"])
    summary = explain(model, (np.array([[7, 8, 9]]), np.array([[1, 0.5, 0]])), summary=True)
    assert [pair[:2] for pair in summary.feature_pairs] == [("feature 7", "feature 8")]
    features = FeatureDictionary().fit({"a": [f"v{i}" for i in range(20)], "b": ["w"] * 20}, categorical=["a", "b"])
    plain = DeepFM(features.num_features, 2, 4, use_deep=False)
    named = explain(plain, {"a": ["v3"], "b": ["w"]}, features=features)
    assert named.labels() == (["a=v3", "b=w"], ["a=v3", "b=w"])


@with_kernels
def test_names_of_a_scorer(rng, tmp_path):
    """Its file has no texts: values are called as they were given, or as a dictionary says."""
    features, model = named(rng)
    scorer = exported(model, tmp_path / "m")
    found = check(scorer, TABLE)
    for row in (0, 3, 4, 5):
        assert found.labels(row) == explain(model, TABLE).labels(row)
    record = {"user": "bob", "age": 0.5, "genres": ["war", "drama"]}
    assert explain(scorer, record).labels()[1] == ["user=bob", "age=0.5", "genres=war+drama"]
    assert explain(scorer, {**record, "user": "eve"}).labels()[1][0] == "user missing"  # unknown
    numbers = {"user": [7.0, 8.0], "tags": ["a:2|b:0.5", "b"]}
    weighted = FeatureDictionary().fit(numbers, "user", multivalued="tags", weighted="tags")
    of_numbers = exported(DeepFM.from_features(weighted), tmp_path / "n")
    assert explain(of_numbers, numbers).labels()[1] == ["user=7", "tags=a+b"]
    user = features.index("user", "bob")
    assert explain(scorer, features.transform(record)).labels()[1][0] == f"user=#{user}"
    assert explain(scorer, features.transform(record), features=features).labels()[1][0] == "user=bob"
    pairs = explain(scorer, TABLE, summary=True, features=features).feature_pairs
    assert [p[:2] for p in pairs] == [p[:2] for p in explain(model, TABLE, summary=True).feature_pairs]


def test_unseen_quantiles_and_buckets(rng):
    table = {"user": ["ann", "bob"] * 3 + ["eve"], "age": range(7), "zip": ["1", "2", "3", "4", "5", "6", "7"]}
    features = FeatureDictionary(min_count=2, unseen=True).fit(
        table, categorical=["user", "zip"], numeric={"age": "quantiles"}, hash_buckets={"zip": 5}
    )
    model = shuffled(DeepFM.from_features(features, use_deep=False, embedding_dim=3), rng)
    labels = explain(model, {"user": ["ann", "x"], "age": [3, None], "zip": ["1", "2"]}).labels
    zips = [f"zip=#{features.index('zip', zip)}" for zip in ("1", "2")]
    age = features.name(features.index("age", 3))[1]
    assert sorted(labels(0)[1]) == sorted(["user=ann", f"age={age}", zips[0]])
    assert sorted(labels(1)[1]) == sorted(["user=(unseen)", "age missing", zips[1]])
    str(explain(model, table, summary=True))


def test_names_of_columns(raw, rng):
    model = shuffled(of_columns(COLUMNS["everything"] + [BOOK], use_deep=False), rng)
    raw["tags"][0], raw["tags_length"][0] = [3, 2, 5, 1], 2
    labels = explain(model, raw).labels(0)[1]
    cells = {name: raw[name][0] for name in raw}
    expected = {f"user={cells['user']}", f"city={cells['city']}", f"book={cells['book']}", "tags=3+2"}
    assert set(labels) == expected | {f"pair[{i}]={cells['pair'][i]:g}" for i in range(2)}
    pairs = explain(model, raw, summary=True, top=500).feature_pairs
    names = {name for pair in pairs for name in pair[:2]}
    assert {"pair[0]", "pair[1]", "book=a"} <= names and any(name.startswith("city=#") for name in names)


def test_rows_that_columns_share_are_features_of_each(rng):
    columns = [USER, VarLenSparseFeat(SparseFeat("tags", 10, embedding_name="user"), 2)]
    model = shuffled(of_columns(columns, use_deep=False), rng)
    (pair,) = explain(model, {"user": [3], "tags": [[5, 0]]}, summary=True).feature_pairs
    assert pair[:2] == ("user=3", "tags=5")


# Over data sets.


def data_sets(features, table):
    """{name: a data set of the table's rows}, each in other batches."""
    indices, values = features.transform(table)
    labels = np.asarray(table["liked"], np.float32)
    frame = pd.DataFrame(table)

    class Batches(keras.utils.PyDataset):
        num_batches = 3

        def __getitem__(self, number):
            here = slice(2 * number, 2 * number + 2)
            return (indices[here], values[here]), labels[here]

    return {
        "stream": features.stream(table, 4),
        "without labels": features.stream(table, 5, labels=False),
        "tf.data": tf.data.Dataset.from_tensor_slices(((indices, values), labels)).batch(4),
        "PyDataset": Batches(),
        "generator": (
            ((indices[i : i + 1], values[i : i + 1]), labels[i : i + 1], labels[i : i + 1]) for i in range(6)
        ),
        "pairs": iter([(indices[:2], values[:2]), (indices[2:], values[2:])]),
        "tables": [frame[:1], frame[1:]],
        "dicts": iter([{"indices": indices, "values": values}]),
    }


def test_data_sets_are_whole_arrays(rng):
    features, model = named(rng)
    found, whole = explain(model, TABLE), explain(model, TABLE, summary=True)
    assert whole.num_samples == 6 and whole.missed == 0
    np.testing.assert_allclose(whole.pairs, found.pairs.mean(axis=0), rtol=0, atol=1e-7)
    np.testing.assert_allclose(whole.pairs_strength, np.abs(found.pairs).mean(axis=0), rtol=0, atol=1e-7)
    by_field = np.stack([found.first_order[:, 0], found.first_order[:, 1], found.first_order[:, 2:].sum(axis=1)], 1)
    assert whole.linear_fields == ["user", "age", "genres"]
    np.testing.assert_allclose(whole.first_order, by_field.mean(axis=0), rtol=0, atol=1e-7)
    np.testing.assert_allclose(whole.first_order_strength, np.abs(by_field).mean(axis=0), rtol=0, atol=1e-7)
    assert whole.deep == pytest.approx(found.deep.mean()) and whole.deep_strength >= abs(whole.deep)
    assert whole.logit == pytest.approx(found.logit.mean())
    for name, data in data_sets(features, TABLE).items():
        streamed = explain(model, data)
        assert streamed.num_samples == 6, name
        np.testing.assert_allclose(streamed.pairs_strength, whole.pairs_strength, rtol=0, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(streamed.matrix(False), whole.matrix(False), rtol=0, atol=1e-7, err_msg=name)
        assert [p[:2] for p in streamed.feature_pairs] == [p[:2] for p in whole.feature_pairs], name
    samples = explain(model, features.stream(TABLE, 4), summary=False)
    np.testing.assert_allclose(samples.logit, found.logit)
    assert [samples.labels(row) for row in range(6)] == [found.labels(row) for row in range(6)]
    stream = features.stream(TABLE, 4)
    explain(model, stream)
    assert stream.state()["batch"] == 0  # it was looked at, not moved


@with_kernels
def test_data_sets_of_a_scorer_and_of_columns(raw, rng, tmp_path):
    features, model = named(rng)
    scorer, whole = exported(model, tmp_path / "m"), explain(model, TABLE, summary=True)
    for name, data in data_sets(features, TABLE).items():
        np.testing.assert_allclose(explain(scorer, data).pairs, whole.pairs, rtol=0, atol=1e-6, err_msg=name)
    model = shuffled(of_columns(COLUMNS["everything"]), rng)
    batches = [{name: x[rows] for name, x in raw.items()} for rows in (slice(0, 9), slice(9, ROWS))]
    labels = np.zeros(9)
    whole = explain(model, raw, summary=True)
    for data in (batches, iter([(batches[0], labels), (batches[1], labels)])):
        np.testing.assert_allclose(explain(model, data).pairs, whole.pairs, rtol=0, atol=1e-6)
    dataset = tf.data.Dataset.from_tensor_slices({n: tf.constant(x) for n, x in raw.items()}).batch(8)
    np.testing.assert_allclose(explain(model, dataset).pairs, whole.pairs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("options", "head"), [({}, None), ({"task": ("multiclass", 3), "field_weights": True}, 2)])
def test_pairs_of_features_are_those_of_a_loop(options, head, rng, monkeypatch):
    """In parts that do not hold all samples, multi-valued fields and repeated features included."""
    model = shuffled(DeepFM(8, 3, 4, use_deep=False, field_sizes=[1, 3, 2], **options), rng)
    kernel = model.plan.projections[0].kernel.numpy()[:, head] if options else 1.0
    weights = model.plan.field_weights[0].field_weights.numpy() if options else np.ones(3)
    indices, values = matrices(rng, rows=8)
    values[rng.random(values.shape) < 0.3] = 0
    embeddings, _ = tables(model)
    expected, owner = {}, [0, 1, 1, 1, 2, 2]
    for row in range(ROWS):
        for p, q in itertools.combinations(range(6), 2):
            f, h = owner[q], owner[p]
            term = (
                embeddings[indices[row, p]] @ (kernel * embeddings[indices[row, q]]) * values[row, p] * values[row, q]
            )
            term *= weights[f * (f - 1) // 2 + h] if f > h else 0
            if owner[p] != owner[q] and term:
                key = tuple(sorted((int(indices[row, p]), int(indices[row, q]))))
                strength, mean, count = expected.get(key, (0, 0, 0))
                expected[key] = strength + abs(term) / ROWS, mean + term / ROWS, count + 1
    monkeypatch.setattr("deepfm_ops.explanations.explaining.NUMBERS", 60)
    found = explain(model, (indices, values), head=head, summary=True, top=1000).feature_pairs
    assert len(found) == len(expected) and [p.strength for p in found] == sorted(p.strength for p in found)[::-1]
    for pair in found:
        key = tuple(int(name.removeprefix("feature ")) for name in pair[:2])
        assert (pair.strength, pair.mean) == pytest.approx(expected[tuple(sorted(key))][:2], rel=1e-4, abs=1e-7)
        assert pair.occurrences == expected[tuple(sorted(key))][2] and pair.missed == 0
    assert explain(model, (indices, values), head=head, summary=True, top=0).feature_pairs == []
    assert len(explain(model, (indices, values), head=head, summary=True, top=3).feature_pairs) == 3


def test_the_strongest_of_many_pairs_in_little_memory(rng):
    """No pair's sum is further off than it says, and none that is left out has more than what was dropped."""
    counted, truth = Strongest(5000, capacity=200), {}
    for _ in range(40):
        first, second = (np.minimum(rng.zipf(1.3, (50, 20)), 4999) for _ in range(2))
        terms = rng.normal(size=first.shape).astype("f")
        counted.add(first, second, terms)
        keys = zip(np.minimum(first, second).ravel(), np.maximum(first, second).ravel(), terms.ravel(), strict=True)
        for a, b, term in keys:
            truth[int(a), int(b)] = truth.get((int(a), int(b)), 0.0) + abs(float(term))
        assert len(counted._keys) <= 400
    top = counted.top(10_000)
    total, kept = sum(truth.values()), {pair[:2] for pair in top}
    assert len(truth) > 2000 and 0 < counted.dropped <= total / 200
    for first, second, absolute, signed, number, missed in top:
        assert absolute - 1e-6 <= truth[first, second] <= absolute + missed + 1e-6
        assert abs(signed) <= absolute + 1e-9 and number >= 1
    assert max(strength for pair, strength in truth.items() if pair not in kept) <= counted.dropped + 1e-6
    largest = sorted(truth, key=truth.get)[-5:]
    assert {pair[:2] for pair in top[:5]} == set(largest)


def test_pairs_of_too_many_features():
    with pytest.raises(ValueError, match="pairs of 4,000,000,000 features cannot be numbered.*top=0"):
        Strongest(4_000_000_000)


# Pictures.


@pytest.mark.parametrize("fields", [1, 3, 40])
def test_pictures(fields, rng, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    model = shuffled(DeepFM(100, fields, 4, (6,)), rng)
    inputs = matrices(rng, columns=fields)
    explain(model, inputs).plot(tmp_path / "sample.png", sample=2)
    explain(model, inputs, summary=True).plot(tmp_path / "all.png")
    for name in ("sample.png", "all.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture[..., :3].std() > 0.01
        # Of many fields each has 19 hundredths of an inch, 110 dots each: letters of 8 points fit.
        assert picture.shape[0] > 19 * fields and picture.shape[1] > picture.shape[0]


@pytest.mark.filterwarnings("error")
def test_a_picture_without_fields_has_no_heat_map(rng, tmp_path):
    pytest.importorskip("matplotlib")
    model = shuffled(DeepFM(100, 3, 4, **KINDS["LR"]), rng)
    explain(model, matrices(rng, columns=3)).plot(tmp_path / "sample.png")
    explain(model, matrices(rng, columns=3), summary=True).plot(tmp_path / "all.png")


def test_long_names_and_line_breaks(rng):
    """Both features of a pair are seen in a picture, and a line of a text is one."""
    first, second = drawing._text("a" * 99 + "=b x " + "c" * 99 + "=d"), drawing._text("a" * 30 + "x" * 30)
    assert first.startswith("aaa") and first.endswith("c=d") and len(first) == 60 == len(second)
    table = {"a": ["u\nv", "w"], "b": ["x", "y\r\nz"]}
    features = FeatureDictionary().fit(table, categorical=["a", "b"])
    model = shuffled(DeepFM.from_features(features, use_deep=False, embedding_dim=3), rng)
    for found in (explain(model, table), explain(model, table, summary=True)):
        assert all(line.startswith(("logit", "2 samples", "  ")) for line in str(found).splitlines())
        assert "u v x x" in str(found).replace("b=", "")


def test_names_that_matplotlib_would_read_as_formulas(rng, tmp_path):
    pytest.importorskip("matplotlib")
    table = {"a": ["$x", "y$^", "z\n" * 60], "$b_": ["1", "2", "3"]}
    features = FeatureDictionary().fit(table, categorical=["a", "$b_"])
    model = shuffled(DeepFM.from_features(features, use_deep=False, embedding_dim=3), rng)
    explain(model, table).plot(tmp_path / "sample.png", sample=2)
    explain(model, table, summary=True).plot(str(tmp_path / "all.png"))


def test_without_matplotlib(rng, monkeypatch, tmp_path):
    found = explain(shuffled(DeepFM(9, 2, 2, (2,)), rng), (np.ones((1, 2), int), np.ones((1, 2))))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install matplotlib, or deepfm_ops\[plot\]"):
        found.plot(tmp_path / "m.png")


# Wrong inputs.


def matrix_model():
    return DeepFM(20, 3, 4, (6,))


GOOD = [[0, 1, 2]]


@pytest.mark.parametrize("kind", ["model", pytest.param("scorer", marks=with_kernels)])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((np.array([[0, 1]]), np.ones((1, 2))), ValueError, r"indices must have shape \[B, 3\], got \(1, 2\)"),
        ((np.array([0, 1, 2]), np.ones(3)), ValueError, r"indices must have shape \[B, 3\], got \(3,\)"),
        ((np.array([[0.0, 1, 2]]), np.ones((1, 3))), TypeError, "indices must be int"),
        (
            (np.array(GOOD), np.ones((1, 2))),
            ValueError,
            r"values must have the shape of indices, \(1, 3\), got \(1, 2\)",
        ),
        ((np.array([[0, 1, 2], [0, 20, 1]]), np.ones((2, 3))), IndexError, r"indices\[1,1\] = 20 is not in \[0, 20\)"),
        ((np.array([[0, 1, -1]]), np.ones((1, 3))), IndexError, r"indices\[0,2\] = -1 is not in \[0, 20\)"),
        ((np.array(GOOD), np.array([[1, np.nan, 1]])), ValueError, r"values\[0,1\] = nan"),
        ({"a": [1]}, ValueError, "this model (does not know its features|was exported without its FeatureDictionary)"),
        (3, TypeError, "inputs must be arrays, a table, or batches of them, got int"),
        ("logs/*.tsv", TypeError, r"of files, pass a stream: features.stream\(path, 1024\)"),
        (pathlib.Path("log.tsv"), TypeError, r"of files, pass a stream: features.stream\(path, 1024\)"),
        ((np.array(GOOD), np.array([["1", "1", "1"]])), TypeError, "values must be numbers, got dtype <U1"),
        ((np.array(GOOD), np.ones((1, 3), complex)), TypeError, "values must be numbers, got dtype complex128"),
        ([(np.array([[0, 1]]), np.ones((1, 2)))], ValueError, r"indices must have shape \[B, 3\], got \(1, 2\)"),
        (iter([]), ValueError, "there is no sample to summarize"),
    ],
)
def test_inputs_that_are_refused(kind, inputs, error, message, tmp_path):
    model = matrix_model() if kind == "model" else exported(matrix_model(), tmp_path / "m")
    with pytest.raises(error, match=message):
        explain(model, inputs)


def test_raw_inputs_that_are_refused(raw, rng, tmp_path):
    features, model = named(rng)
    other = FeatureDictionary().fit({"a": ["x"]}, categorical="a")
    columns = of_columns(COLUMNS["sparse"])
    for of in (model, *([exported(model, tmp_path / "m")] if kernels else [])):
        with pytest.raises(KeyError, match="column 'age' is missing"):
            explain(of, {"user": ["ann"], "genres": ["war"]})
        with pytest.raises(ValueError, match="features"):
            explain(of, TABLE, features=other)
    with pytest.raises(ValueError, match="the inputs of the model have shapes"):
        explain(model, other.stream({"a": ["x"]}, 1), features=other)
    renamed = FeatureDictionary().fit({**TABLE, "user": list("abcdef")}, "user", "age", "genres")  # more users
    for of in (model, *([exported(model, tmp_path / "m")] if kernels else [])):
        with pytest.raises(ValueError, match="features have|features number"):
            explain(of, other.stream({"a": ["x"]}, 1))
        with pytest.raises(ValueError, match="features have|features number"):
            explain(of, renamed.stream(TABLE, 2))
    for of in (columns, *([exported(columns, tmp_path / "c")] if kernels else [])):
        with pytest.raises(KeyError, match=r"inputs are missing \['city', 'book'\]"):
            explain(of, {"user": [1]})
        with pytest.raises(TypeError, match="inputs must be a table or a dict"):
            explain(of, np.ones((2, 3)))
        with pytest.raises(ValueError, match="takes the inputs of its columns, and not the matrices of a dictionary"):
            explain(of, raw, features=features)
        with pytest.raises(ValueError, match="takes the inputs of its columns, and not the matrices of a dictionary"):
            explain(of, features.stream(TABLE, 2))
        with pytest.raises(
            (IndexError, tf.errors.InvalidArgumentError), match=r"index in row 0 = 10 is not in \[0, 10\)"
        ):
            explain(of, {**raw, "user": np.full(ROWS, 10)})


@pytest.mark.parametrize("kind", ["model", pytest.param("scorer", marks=with_kernels)])
def test_arguments_of_explain_and_positions_that_are_refused(kind, tmp_path):
    of = matrix_model() if kind == "model" else exported(matrix_model(), tmp_path / "m")
    with pytest.raises(TypeError, match="features must be a FeatureDictionary, got int"):
        explain(of, np.array(GOOD), features=3)
    explanation = explain(of, np.array(GOOD))
    reads = (explanation.__getitem__, explanation.table, explanation.matrix, explanation.labels)
    for read in (*reads, lambda sample: explanation.plot(tmp_path / "a.png", sample)):
        with pytest.raises(IndexError, match="sample 1 is not one of the 1 that were explained"):
            read(1)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int32", "uint64"])
def test_indices_of_any_integers(dtype, rng):
    model, indices = shuffled(matrix_model(), rng), np.array([[0, 1, 2], [3, 4, 5]])
    found = explain(model, (indices.astype(dtype), np.ones((2, 3))))
    np.testing.assert_array_equal(found.logit, explain(model, indices).logit)


def test_data_sets_without_an_end():
    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, number):
            return np.array(GOOD), np.ones((1, 3))

    inputs = (np.array(GOOD), np.ones((1, 3)))
    for endless in (Endless(), tf.data.Dataset.from_tensors(inputs).repeat()):
        with pytest.raises(ValueError, match="inputs have no end: take as many batches"):
            explain(matrix_model(), endless)
    assert explain(matrix_model(), tf.data.Dataset.from_tensors(inputs).repeat(3)).num_samples == 3


def test_models_that_are_refused():
    inputs = (np.array(GOOD), np.ones((1, 3)))
    with pytest.raises(TypeError, match="model must be a deepfm_ops.DeepFM or .*Scorer, got Sequential"):
        explain(keras.Sequential([keras.layers.Dense(1)]), inputs)
    with pytest.raises(TypeError, match="got the class DeepFM: make one"):
        explain(DeepFM, inputs)
    with pytest.raises(TypeError, match="got dict"):
        explain({}, inputs)
    with pytest.raises(TypeError, match="got ShardedDeepFM; its tables are elsewhere: export_scorer it"):
        explain(deepfm_ops.cluster.ShardedDeepFM.__new__(deepfm_ops.cluster.ShardedDeepFM), inputs)
    for top in (-1, 2.5, True):
        with pytest.raises(ValueError, match="top must be an integer of at least 0"):
            explain(matrix_model(), inputs, summary=True, top=top)


def test_no_samples(raw, rng, tmp_path):
    model = matrix_model()
    inputs = (np.zeros((0, 3), int), np.zeros((0, 3)))
    for of in (model, *([exported(model, tmp_path / "m")] if kernels else [])):
        found = explain(of, inputs)
        assert len(found) == 0 and found.pairs.shape == (0, 3) and str(found) == "no samples"
        with pytest.raises(IndexError):
            found[0]
        with pytest.raises(ValueError, match="there is no sample to summarize"):
            explain(of, inputs, summary=True)
    no_rows = {name: x[:0] for name, x in raw.items()}
    assert len(explain(of_columns(COLUMNS["everything"]), no_rows)) == 0
    assert explain(of_columns(COLUMNS["everything"], task=("multiclass", 3)), no_rows, head=1).score.shape == (0,)


@with_kernels
def test_a_scorer_is_explained_without_tensorflow(rng, tmp_path):
    _, model = named(rng)
    exported(model, tmp_path / "m")
    code = f"""
import sys, deepfm_ops
scorer = deepfm_ops.scorer.Scorer.load({str(tmp_path / "m")!r})
found = deepfm_ops.explain(scorer, {{"user": "ann", "age": 0.3, "genres": ["war"]}})
print(found.labels()[1][0], "tensorflow" in sys.modules, "keras" in sys.modules, "matplotlib" in sys.modules)
"""
    assert run_python(code).split()[-4:] == ["user=ann", "False", "False", "False"]


@with_kernels
def test_a_reloaded_scorer_is_explained_anew(rng, tmp_path):
    inputs = matrices(rng)
    scorer = exported(shuffled(DeepFM(60, 6, 5, (9,)), rng), tmp_path / "m")
    before = check(scorer, inputs)
    deepfm_ops.export_scorer(shuffled(DeepFM(60, 6, 5, (9,)), rng), tmp_path / "m")
    assert scorer.reload() and np.abs(check(scorer, inputs).logit - before.logit).max() > 1e-3


# Values that are alike.


def test_similar_values(rng):
    features, model = named(rng)
    rows = {name: model.embedding("user", name) for name in ("ann", "bob", "cid", "dan")}
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    expected = sorted(((cosine(rows["ann"], rows[name]), name) for name in ("bob", "cid", "dan")), reverse=True)
    found = model.similar("user", "ann")
    assert [value for value, _ in found] == [name for _, name in expected]
    np.testing.assert_allclose([x for _, x in found], [x for x, _ in expected], rtol=1e-5)
    assert model.similar("user", "ann", 2) == found[:2] and model.similar("user", "ann", 99) == found
    assert {value for value, _ in model.similar("genres", "war")} == {"drama", "comedy"}
    model.get_layer("fm").embeddings.assign(np.zeros((features.num_features, 4)))
    assert [x for _, x in model.similar("user", "ann")] == [0, 0, 0]
    broken = np.ones((features.num_features, 4))
    broken[features.index("user", found[0][0])] = np.nan
    model.get_layer("fm").embeddings.assign(broken)
    name, cosine = model.similar("user", "ann")[-1]
    assert name == found[0][0] and np.isnan(cosine)
    with pytest.raises(KeyError, match="value 'eve' of column 'user' was not seen by fit"):
        model.similar("user", "eve")
    with pytest.raises(KeyError, match="column 'who' is not in the dictionary"):
        model.similar("who", "ann")
    with pytest.raises(KeyError, match="column 'user' has no value None|value None of column 'user'"):
        model.similar("user", None)
    with pytest.raises(ValueError, match="the values of column 'age' have no names"):
        model.similar("age", 0.3)
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match="k must be an integer of at least 1"):
            model.similar("user", "ann", k)
    with pytest.raises(ValueError, match="this model does not know its features"):
        matrix_model().similar("user", "ann")
    lr = DeepFM.from_features(features, use_fm=False, use_deep=False)
    with pytest.raises(ValueError, match="column 'user' has no embedding in this model"):
        lr.similar("user", "ann")


def test_similar_values_that_have_no_names(rng):
    features, model = named(rng, unseen=True, min_count=1)
    assert {value for value, _ in model.similar("user", "ann")} == {"bob", "cid", "dan"}
    with pytest.raises(KeyError, match="column 'user' has no value 'eve'"):
        model.similar("user", "eve")
    hashed = FeatureDictionary().fit({"a": ["x", "y"]}, categorical="a", hash_buckets={"a": 3})
    with pytest.raises(ValueError, match="the values of column 'a' have no names"):
        DeepFM.from_features(hashed).similar("a", "x")
    buckets = FeatureDictionary().fit({"a": range(99)}, numeric={"a": "quantiles"})
    assert all(value.startswith("from ") for value, _ in DeepFM.from_features(buckets).similar("a", 5))


def test_similar_values_of_columns(rng):
    columns = [USER, BOOK, CITY, PAIR, VarLenSparseFeat(TAG, 4)]
    model = shuffled(of_columns(columns), rng)
    assert sorted(value for value, _ in model.similar("user", 3, 99)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert sorted(value for value, _ in model.similar("book", "a")) == ["b", "c"]
    assert sorted(value for value, _ in model.similar("tags", 3)) == [1, 2, 4, 5]  # 0 is padding
    table = model.embedding("user")
    ((best, cosine),) = model.similar("user", "3", 1)
    cosines = table @ table[3] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[3])
    assert best == np.argsort(cosines)[-2] and cosine == pytest.approx(cosines[best], abs=1e-6)
    for column, value in (("user", 10), ("book", "z"), ("who", 1), ("tags", 0)):
        with pytest.raises(KeyError):
            model.similar(column, value)
    for column in ("city", "pair"):
        with pytest.raises(ValueError, match=f"the values of column '{column}' have no names"):
            model.similar(column, "Rome")
