"""Several heads, and classes: what they compute, how they learn, and labels that are missing."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import dense_samples, oracle

from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat

V, F, B = 40, 4, 48
TASK = {"dwell": "regression", "click": "binary", "genre": ("multiclass", 3)}
WIDTHS = {"click": 1, "dwell": 1, "genre": 3}  # in the order that the heads stand in
COLUMNS = [
    SparseFeat("user", 20, embedding_dim=4),
    SparseFeat("item", 30, embedding_dim=4, group_name="other"),
    SparseFeat("place", 7, embedding_dim=2, group_name="alone"),
    VarLenSparseFeat(SparseFeat("tags", 9, embedding_dim=4), maxlen=3, combiner="max"),
    DenseFeat("price", 2),
]


def matrices(**arguments):
    return DeepFM(V, F, **{"embedding_dim": 4, "hidden_units": (8,), "seed": 1, "task": TASK, **arguments})


def columns(**arguments):
    groups = ("default_group", "other", "alone")
    return DeepFM.from_columns(COLUMNS, COLUMNS, groups, **{**PLAIN, "task": TASK, **arguments})


PLAIN = {"dnn_hidden_units": (8,), "l2_reg_linear": 0, "l2_reg_embedding": 0}
KINDS = {"matrices": matrices, "columns": columns}


def inputs_of(kind, rng, rows=B):
    if kind == "matrices":
        return rng.integers(0, V, (rows, F)), rng.normal(size=(rows, F)).astype("f")
    sizes = {"user": 20, "item": 30, "place": 7}
    found = {name: rng.integers(0, size, rows) for name, size in sizes.items()}
    return found | {"tags": rng.integers(0, 9, (rows, 3)), "price": rng.normal(size=(rows, 2)).astype("f")}


def labels_of(rng, rows=B):
    return {
        "click": (rng.random(rows) < 0.4).astype("f"),
        "dwell": rng.normal(size=rows).astype("f"),
        "genre": rng.integers(0, 3, rows),
    }


def some(inputs, rows):
    return keras.tree.map_structure(lambda x: x[rows], inputs)


def randomized(model, rng):
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    return model


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def output(kind, logits):
    return {"binary": lambda x: 1 / (1 + np.exp(-x)), "regression": lambda x: x}.get(kind, softmax)(logits)


def loss_of(name, labels, scores):
    """A head's recommended loss, in NumPy."""
    labels, scores = np.asarray(labels, float).reshape(-1), np.asarray(scores, float)
    if name == "click":
        return -np.mean(labels * np.log(scores[:, 0]) + (1 - labels) * np.log(1 - scores[:, 0]))
    if name == "dwell":
        return np.mean((labels - scores[:, 0]) ** 2)
    return -np.mean(np.log(scores[np.arange(len(labels)), labels.astype(int)]))


def gradients(model, inputs, labels, weights=None):
    with tf.GradientTape() as tape:
        scores = model(inputs, training=True)
        labels = keras.tree.map_structure(lambda y: tf.constant(np.reshape(y, (-1, 1))), labels)
        loss = model.compute_loss(None, labels, scores, weights)
    found = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return float(loss), [None if g is None else tf.convert_to_tensor(g).numpy() for g in found]


@pytest.mark.parametrize("task", [TASK, ("multiclass", 5)], ids=["heads", "classes"])
def test_the_formula(rng, task):
    """Each number has its bias, first order, weighted second order and end of the deep part; float64 NumPy."""
    model = randomized(matrices(task=task), rng)
    indices, values = inputs_of("matrices", rng)
    w = {weight.path: weight.numpy().astype(float) for weight in model.weights}
    e = w["fm/embeddings"][indices] * values[..., None]
    deep = np.maximum(0, e.reshape(B, -1) @ w["hidden_0/kernel"] + w["hidden_0/bias"]) @ w["deep/kernel"]
    second = oracle(w["fm/embeddings"], dense_samples(indices, values), "vector") @ w["second_order_0/kernel"]
    logits = w["head/bias"] + (w["fm/w"][indices] * values[..., None]).sum(1) + second + deep
    scores = model.predict((indices, values), verbose=0)
    if task is not TASK:
        np.testing.assert_allclose(scores, softmax(logits), rtol=1e-4, atol=1e-6)
        return
    start = 0
    assert list(scores) == list(WIDTHS)
    for name, width in WIDTHS.items():
        np.testing.assert_allclose(
            scores[name], output(TASK[name], logits[:, start : start + width]), rtol=1e-4, atol=1e-5
        )
        start += width


@pytest.mark.parametrize("parts", [{"use_fm": False, "use_deep": False}, {"use_deep": False}, {"use_linear": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_any_parts(rng, kind, parts):
    """Whatever parts there are, every head has its shape, and every weight but a bias behind nothing a gradient."""
    model, inputs = randomized(KINDS[kind](**parts), rng), inputs_of(kind, rng)
    scores = model.predict(inputs, verbose=0)
    assert {name: found.shape for name, found in scores.items()} == {n: (B, width) for n, width in WIDTHS.items()}
    np.testing.assert_allclose(scores["genre"].sum(axis=1), 1, rtol=1e-6)
    model.compile()
    _, found = gradients(model, inputs, labels_of(rng))
    # The column with an embedding of two numbers has none to interact with; its embedding is in the deep part, if any.
    alone = (
        {"second_order_1/kernel", *(["fm_0/embeddings"] if "use_deep" in parts else [])} if kind == "columns" else ()
    )
    for variable, g in zip(model.trainable_variables, found, strict=True):
        assert g is not None and (np.abs(g).max() > 0 or variable.path in alone), variable.path


@pytest.mark.parametrize(
    ("kind", "task"),
    [("matrices", "binary"), ("columns", "regression"), *((kind, ("multiclass", 3)) for kind in KINDS)],
    ids=str,
)
def test_one_head_of_a_dict_is_the_plain_model(rng, kind, task):
    """Bit for bit: its scores, losses and weights after training; of one number without projections too."""
    name = "genre" if isinstance(task, tuple) else {"binary": "click", "regression": "dwell"}[task]
    inputs, labels = inputs_of(kind, rng), labels_of(rng)[name]
    found = []
    forms = [(task, labels), ({name: task}, {name: labels}), ({name: task}, labels)]
    for some_task, y in forms if kind == "matrices" else forms[:2]:
        keras.utils.set_random_seed(3)
        model = KINDS[kind](task=some_task)
        model.compile()
        history = model.fit(inputs, y, epochs=2, batch_size=16, verbose=0).history["loss"]
        scores = model.predict(inputs, verbose=0)
        found.append((history, scores[name] if isinstance(scores, dict) else scores, model.get_weights()))
    assert any(layer.name.startswith("second_order") for layer in model.layers) == isinstance(task, tuple)
    for history, scores, weights in found[1:]:
        assert history == found[0][0]
        np.testing.assert_array_equal(scores, found[0][1])
        for a, b in zip(weights, found[0][2], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_head_starts_as_the_plain_machine(rng):
    """Of one number, whatever other heads there are."""
    inputs = inputs_of("matrices", rng)
    arguments = {
        "use_deep": False,
        "use_linear": False,
        "embeddings_initializer": keras.initializers.RandomNormal(seed=2),
    }
    plain = matrices(task="regression", **arguments).predict(inputs, verbose=0)
    np.testing.assert_allclose(matrices(**arguments).predict(inputs, verbose=0)["dwell"], plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients(rng, kind):
    """The loss is the weighted sum of the heads' losses in NumPy; its gradient that of a numeric difference."""
    smooth = {"activation" if kind == "matrices" else "dnn_activation": "tanh"}
    model, inputs, labels = randomized(KINDS[kind](**smooth), rng), inputs_of(kind, rng), labels_of(rng)
    model.compile(loss_weights={"dwell": 0.25, "genre": 3.0})
    loss, found = gradients(model, inputs, labels)
    scores = model.predict(inputs, verbose=0)
    losses = {name: loss_of(name, labels[name], scores[name]) for name in WIDTHS}
    assert loss == pytest.approx(losses["click"] + 0.25 * losses["dwell"] + 3 * losses["genre"], rel=1e-5)
    logs = model.evaluate(inputs, labels, batch_size=B, verbose=0, return_dict=True)
    assert {name: logs[f"{name}_loss"] for name in WIDTHS} == pytest.approx(losses, rel=1e-5)
    for weight, gradient in zip(model.trainable_variables, found, strict=True):
        place = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        before, ends = weight.numpy(), []
        for step in (1e-2, -1e-2):
            moved = before.copy()
            moved[place] += step
            weight.assign(moved)
            scores = model.predict(inputs, verbose=0)
            of = {name: loss_of(name, labels[name], scores[name]) for name in WIDTHS}
            ends.append(of["click"] + 0.25 * of["dwell"] + 3 * of["genre"])
        weight.assign(before)
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gradient[place], rel=0.03, abs=1e-3), weight.path


@pytest.mark.parametrize("kind", KINDS)
def test_missing_labels_are_as_if_the_sample_were_not_there(rng, kind):
    """A head's loss, gradient and metrics are those of the samples that have its label."""
    model, inputs, labels = randomized(KINDS[kind](), rng), inputs_of(kind, rng), labels_of(rng)
    metrics = {"click": ["AUC"], "dwell": ["mae"], "genre": ["accuracy"]}
    model.compile(metrics=metrics, weighted_metrics={"dwell": [keras.metrics.MeanAbsoluteError(name="weighted")]})
    there = {name: rng.random(B) < share for name, share in zip(WIDTHS, (0.5, 0.2, 0.8), strict=True)}
    missing = {"click": np.nan, "dwell": np.nan, "genre": -1}
    masked = {name: np.where(there[name], labels[name], missing[name]) for name in labels}
    weights = rng.random(B).astype("f")
    scores = model.predict(inputs, verbose=0)
    for sample_weight in (None, weights):
        _, all_together = gradients(model, inputs, masked, None if sample_weight is None else tf.constant(weights))
        parts = []
        for name in WIDTHS:
            rows, alone = there[name], {n: np.full(B, missing[n]) for n in labels}
            few, of_few = some(inputs, rows), {n: y[rows] for n, y in (alone | {name: labels[name]}).items()}
            loss, found = gradients(model, few, of_few, None if sample_weight is None else tf.constant(weights[rows]))
            parts.append(found)
            if sample_weight is None:
                assert loss == pytest.approx(loss_of(name, labels[name][rows], scores[name][rows]), rel=1e-4)
        for weight, together, *alone in zip(model.trainable_variables, all_together, *parts, strict=True):
            np.testing.assert_allclose(together, sum(alone), rtol=1e-4, atol=1e-6, err_msg=weight.path)
    logs = model.evaluate(inputs, masked, sample_weight=weights, batch_size=B, verbose=0, return_dict=True)
    rows = there["dwell"]
    errors = np.abs(scores["dwell"][:, 0] - labels["dwell"])[rows]
    assert logs["dwell_mae"] == pytest.approx(errors.mean(), rel=1e-5)
    assert logs["dwell_weighted"] == pytest.approx((errors * weights[rows]).sum() / weights[rows].sum(), rel=1e-5)
    rows = there["genre"]
    accuracy = np.mean(scores["genre"].argmax(axis=1)[rows] == labels["genre"][rows])
    assert logs["genre_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    rows = there["click"]
    auc = keras.metrics.AUC()
    auc.update_state(labels["click"][rows], scores["click"][rows, 0])
    assert logs["click_AUC"] == pytest.approx(float(auc.result()), rel=1e-3)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_head_without_any_label_has_no_loss_and_no_gradient(rng, reduction):
    model, inputs, labels = randomized(matrices(), rng), inputs_of("matrices", rng), labels_of(rng)
    model.compile(
        loss={"dwell": keras.losses.MeanSquaredError(reduction=reduction), "genre": None}, metrics={"click": ["AUC"]}
    )
    labels["dwell"] = np.full(B, np.nan)
    before = model.get_layer("deep").kernel.numpy()
    logs = model.train_on_batch(inputs, labels, return_dict=True)
    assert logs["dwell_loss"] == 0 and np.isfinite(list(logs.values())).all() and "genre_loss" not in logs
    model.show_averages()
    changed = (model.get_layer("deep").kernel.numpy() != before).any(axis=0)
    assert changed.tolist() == [True, False, False, False, False]  # of the click alone
    nothing = {name: np.full(B, np.nan) for name in WIDTHS}
    logs = model.train_on_batch(inputs, nothing, return_dict=True)
    assert np.isfinite(list(logs.values())).all() and all(np.isfinite(w).all() for w in model.get_weights())


def test_sums_of_losses_are_not_means(rng):
    model, inputs, labels = randomized(matrices(), rng), inputs_of("matrices", rng), labels_of(rng)
    model.compile(loss={"dwell": keras.losses.MeanSquaredError(reduction="sum")})
    labels["dwell"][: B // 2] = np.nan
    logs = model.test_on_batch(inputs, labels, return_dict=True)
    scores = model.predict(inputs, verbose=0)["dwell"][:, 0]
    assert logs["dwell_loss"] == pytest.approx(np.nansum((scores - labels["dwell"]) ** 2), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_saving_and_going_on(rng, kind, tmp_path):
    """Learns with the recommended optimizer, priors on; what is loaded predicts and learns as what was saved."""
    inputs, labels = inputs_of(kind, rng, 400), labels_of(rng, 400)
    if kind == "matrices":  # the first field has ids of its own
        inputs[1][:] = 1
        inputs[0][:] = np.where(np.arange(F) == 0, inputs[0] % 10, 10 + inputs[0] % 30)
    ids = inputs[0][:, 0] if kind == "matrices" else inputs["user"]
    labels["genre"], labels["click"] = ids % 3, (ids % 2).astype("f")
    labels["click"][::3], labels["genre"][::5] = np.nan, -1
    keras.utils.set_random_seed(1)
    if kind == "matrices":
        counts = np.bincount(inputs[0].reshape(-1), minlength=V)
        model = matrices(feature_counts=counts, num_samples=400)
    else:
        model = columns(count_features=True)
    model.compile(metrics={"genre": ["accuracy"]})
    model.fit(inputs, labels, epochs=30, batch_size=16, verbose=0, validation_split=0.1)
    logs = model.evaluate(inputs, labels, verbose=0, return_dict=True)
    assert logs["genre_accuracy"] > 0.8 and logs["click_loss"] < 0.55  # by chance: 1/3 and 0.69
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for name, scores in model.predict(inputs, verbose=0).items():
        np.testing.assert_array_equal(again.predict(inputs, verbose=0)[name], scores)
    assert again.evaluate(inputs, labels, verbose=0, return_dict=True) == logs
    for some_model in (model, again):
        for _ in range(2):
            some_model.train_on_batch(inputs, labels)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone.predict(inputs, verbose=0)["genre"], model.predict(inputs, verbose=0)["genre"])


def test_weights_by_name(rng):
    table = {"city": ["Rome", "Oslo", "Rome"], "age": [0.1, 0.2, 0.3]}
    features = FeatureDictionary().fit(table, categorical=["city"], numeric=["age"])
    model = randomized(DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), task=TASK), rng)
    assert model.weight("city").shape == (2, 5) and model.embedding("city", "Rome").shape == (4,)
    first = model.get_layer("fm").w.numpy()
    np.testing.assert_array_equal(model.weight("city", "Rome"), first[features.index("city", "Rome")])
    dense = columns()
    assert dense.weight("price").shape == (2, 5) and dense.weight("user", 3).shape == (5,)
    assert dense.weight("tags").shape == (9, 5)


def test_it_grows_with_its_dictionary(rng):
    table = {"city": ["Rome", "Oslo"] * 20}
    features = FeatureDictionary().fit(table, categorical=["city"])
    model = DeepFM.from_features(features, embedding_dim=4, use_deep=False, task=TASK)
    model.compile()
    model.fit(features.transform(table), labels_of(rng, 40), verbose=0)
    before = model.weight("city", "Oslo")
    model.resize(features.update({"city": ["Bonn"]}))
    np.testing.assert_array_equal(model.weight("city", "Oslo"), before)
    np.testing.assert_array_equal(model.weight("city", "Bonn"), np.zeros(5))
    model.fit(features.transform(table), labels_of(rng, 40), verbose=0)


def test_labels_of_a_table_and_no_samples(rng):
    model, inputs, labels = matrices(), inputs_of("matrices", rng), labels_of(rng)
    model.compile()
    logs = model.evaluate(inputs, labels, batch_size=B, verbose=0)
    assert model.evaluate(inputs, pd.DataFrame(labels), batch_size=B, verbose=0) == logs
    dataset = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(B)
    assert model.evaluate(dataset, verbose=0) == pytest.approx(logs, rel=1e-6)
    empty = model.predict((inputs[0][:0], inputs[1][:0]), verbose=0)
    assert {name: x.shape for name, x in empty.items()} == {name: (0, width) for name, width in WIDTHS.items()}


@pytest.fixture(scope="module", name="compiled")
def _compiled():
    model = matrices()
    model.compile()
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"genre": np.full(B, 3)}, ValueError, r"labels\['genre'\]\[0\] = 3 is no class of \('multiclass', 3\)"),
        ({"genre": np.full(B, 0.5)}, ValueError, r"labels\['genre'\]\[0\] = 0.5 is no class"),
        ({"click": np.arange(B)}, ValueError, r"labels\['click'\]\[2\] = 2 is not in \[0, 1\], as task 'binary'"),
        ({"click": -np.ones(B)}, ValueError, r"labels\['click'\]\[0\] = -1.0 is not in \[0, 1\]"),
        ({"dwell": np.full(B, np.inf)}, ValueError, r"labels\['dwell'\]\[0\] = inf is not finite"),
        (
            {"dwell": np.zeros((B, 2))},
            ValueError,
            r"labels\['dwell'\] must have shape \[B\] or \[B, 1\], got",
        ),
        ({"dwell": ["long"] * B}, TypeError, r"labels\['dwell'\] must be numbers"),
        ({"dwell": None}, ValueError, r"labels must have 'dwell', a head of the model: NaN where"),
    ],
)
def test_bad_labels(rng, change, error, message, compiled):
    model, inputs, labels = compiled, inputs_of("matrices", rng), labels_of(rng)
    labels = {name: y for name, y in (labels | change).items() if y is not None}
    with pytest.raises(error, match=message):
        model.fit(inputs, labels, verbose=0)
    if error is ValueError and np.ndim(next(iter(change.values()))) == 1:  # in a step, too
        dataset = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(B)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message.replace("'", r"\\?'").replace("-1.0", "-1")):
            model.fit(dataset, verbose=0)


def test_labels_that_do_not_say_whose_they_are(rng):
    inputs, labels = inputs_of("matrices", rng), labels_of(rng)
    model = matrices()
    model.compile()
    with pytest.raises(TypeError, match="labels must be a dict with an array for each of .*, got ndarray"):
        model.fit(inputs, labels["click"], verbose=0)
    single = matrices(task=("multiclass", 3))
    single.compile()
    with pytest.raises(TypeError, match="labels must be an array, as the model predicts one thing"):
        single.fit(inputs, labels, verbose=0)
    with pytest.raises(ValueError, match=r"labels\[2\] = -1 is no class"):  # missing ones are for heads
        single.fit(inputs, np.where(np.arange(B) == 2, -1, labels["genre"]), verbose=0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "task must be a dict of names"),
        ({"": "binary"}, "task must be a dict of names"),
        ({"a": "ranking"}, r"task\['a'\] must be one of binary, regression, \('multiclass', classes\), got 'ranking'"),
        ({"a": {"b": "binary"}}, r"task\['a'\] must be one of"),
        (("multiclass", 1), "task must have 2 to 65,536 classes, a whole number, got 1"),
        (("multiclass", 2.5), "task must have 2 to 65,536 classes"),
        (None, "task must be one of"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_tasks(kind, task, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](task=task)


def test_losses_of_other_heads():
    for arguments in ({"loss": {"clik": "mse"}}, {"loss_weights": {"clik": 2.0}}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} has 'clik', which is no head of the model: it has"):
            matrices().compile(**arguments)
    for arguments in ({"loss": ["mse", "mse"]}, {"loss_weights": [1.0]}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} must have an entry for each of the heads .*, got "):
            matrices().compile(**arguments)
    for weight in (np.nan, np.inf, "2"):
        with pytest.raises(ValueError, match=rf"loss_weights\['dwell'\] must be a finite number, got {weight!r}"):
            matrices().compile(loss_weights={"dwell": weight})


def test_a_list_is_in_the_order_of_the_heads(rng):
    """A list of losses was once a list for each head, whose sum came out as many times as there are heads."""
    inputs, labels, found = inputs_of("matrices", rng), labels_of(rng), []
    model = randomized(matrices(), rng)
    for loss in (["mae", "mse", "mae"], {"click": "mae", "dwell": "mse", "genre": "mae"}):
        model.compile(loss=loss, loss_weights=[1.0, 2.0, 3.0])
        found.append(model.evaluate(inputs, labels, verbose=0, return_dict=True))
    assert found[0] == found[1]


def test_sample_weights_of_heads(rng):
    model, inputs, labels = randomized(matrices(), rng), inputs_of("matrices", rng), labels_of(rng)
    model.compile(metrics={"click": ["AUC"]})
    ones, zeros = np.ones(B, "f"), np.zeros(B, "f")
    logs = model.test_on_batch(inputs, labels, {"click": ones, "dwell": zeros, "genre": ones}, return_dict=True)
    assert logs["dwell_loss"] == 0 < logs["click_loss"]
    with pytest.raises(ValueError, match="sample_weight has nothing for the head 'dwell'"):
        model.fit(inputs, labels, sample_weight={"click": ones, "genre": ones}, verbose=0)
    with pytest.raises(ValueError, match="sample_weight has 'clik', which is no head of the model"):
        model.fit(inputs, labels, sample_weight={"click": ones, "clik": ones}, verbose=0)
