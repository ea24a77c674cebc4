"""The gradient and the update in one op: the same bits, where nobody else asks for the gradient, and nowhere else."""

import collections
import contextlib
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from testing import REFERENCE_MODE

from deepfm_ops import DeepFM, FMInteraction, fusion, optimizers

pytestmark = pytest.mark.skipif(REFERENCE_MODE, reason="the fallback has no ops")
GRADIENT, APART, TOGETHER = "DeepfmOpsResourceFmInteractionGrad", "DeepfmOpsSparseUpdate", "DeepfmOpsResourceFmUpdate"
V, B, F = 60, 24, 4
COUNTS = {"feature_counts": np.arange(V), "num_samples": 40}
OPTIMIZERS = {
    "SGD": lambda **k: optimizers.SGD(0.1, **k),
    "Adagrad": lambda **k: optimizers.Adagrad(0.1, **k),
    "RowWiseAdagrad": lambda **k: optimizers.RowWiseAdagrad(0.1, **k),
    "LazyAdam": lambda **k: optimizers.LazyAdam(0.1, **k),
    "Ftrl": lambda **k: optimizers.Ftrl(
        0.1,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.1,
        l2_shrinkage_regularization_strength=0.01,
        **k,
    ),
}


@pytest.fixture
def apart(monkeypatch):
    """A function after which nothing is fused."""
    return lambda: monkeypatch.setattr(fusion.Updates, "_is_all_of", lambda *args: False)


@pytest.fixture
def assert_same_bits(apart):
    """Of the arrays that a function returns with and without fusion; it is told which."""

    def compare(function):
        together = function(True)
        apart()
        assert_equal(together, function(False))

    return compare


class Net:
    """The layer, with a dense one on its embeddings if it returns them."""

    def __init__(self, k=4, values=True, constraint=None, **options):
        keras.utils.set_random_seed(7)
        self.values = values
        self.fm = FMInteraction(V, k, embeddings_initializer="normal", **options)
        self.fm.build(None)
        self.fm.embeddings.constraint = constraint
        self.dense = keras.layers.Dense(1)
        self.dense.build((None, F * k if self.fm.return_embeddings else 1))

    @property
    def trainable_variables(self):
        return [*self.fm.trainable_variables, *(self.dense.trainable_variables if self.fm.return_embeddings else [])]

    @property
    def tensors(self):
        return [v.value for v in self.trainable_variables]

    @property
    def variables(self):
        return [*self.fm.variables, *self.dense.variables]

    def __call__(self, indices, values):
        found = self.fm((indices, values) if self.values else indices, training=True)
        if not self.fm.return_embeddings:
            return tf.reduce_sum(found, 1, keepdims=True)
        embeddings, result = found
        return self.dense(tf.reshape(embeddings, [-1, self.dense.kernel.shape[0]])) + result

    def loss(self, data):
        x, y = data
        result = tf.cast(self(*x), tf.float64)
        return tf.reduce_mean((result - tf.cast(y, tf.float64)) ** 2) + tf.cast(sum(self.fm.losses, 0.0), tf.float64)

    def gradients(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss(data)
        return loss, tape.gradient(loss, self.tensors)


def made(optimizer="LazyAdam", net=None, **options):
    net, optimizer = Net(**(net or {})), OPTIMIZERS[optimizer](**options)
    optimizer.build(net.trainable_variables)
    return net, optimizer


def batch(step=0, ragged=False):
    r = np.random.default_rng(step)
    indices = tf.constant(r.integers(0, V, (B, F)) // 3 * 3)
    values = tf.constant(r.normal(size=(B, F)).astype("f"))
    if ragged:
        splits = np.sort(np.concatenate([[0, B * F], r.integers(0, B * F, B - 1)]))
        indices, values = (tf.RaggedTensor.from_row_splits(tf.reshape(x, [-1]), splits) for x in (indices, values))
    return (indices, values), tf.constant(r.normal(size=(B, 1)).astype("f"))


def plain_step(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        optimizer.apply(gradients, net.trainable_variables)
        return loss

    return step


def arrays_of(*owners):
    return [v.numpy() for owner in owners for v in owner.variables]


def run(make_step=plain_step, steps=3, ragged=False, graph=True, **options):
    """(what weights, slots and the step's results are after some steps, the numbers of ops of the traced step)."""
    net, optimizer = made(**options)
    step = make_step(net, optimizer)
    step = tf.function(step) if graph else step
    results = [step(batch(i, ragged)) for i in range(steps)]
    arrays = [x.numpy() for x in tf.nest.flatten(results)] + arrays_of(net, optimizer)
    return arrays, ops_of(step, batch(0, ragged)) if graph else None


def ops_of(function, *args):
    return collections.Counter(op.type for op in function.get_concrete_function(*args).graph.get_operations())


def assert_equal(some, others):
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(a, b)


def ops_that_run(function, *args):
    """The numbers of ops of what TensorFlow has left of a function that it calls for the first time."""
    context.context().enable_graph_collection()
    try:
        function(*args)
        graphs = [graph for f in context.export_run_metadata().function_graphs for graph in f.partition_graphs]
    finally:
        context.context().disable_graph_collection()
    return collections.Counter(node.op for graph in graphs for node in graph.node)


LINEAR, DEEP = {"use_linear": True}, {"return_embeddings": True}
PRIORS = {**COUNTS, "embedding_prior": 0.5, "linear_prior": 0.5}
CASES = [
    *((name, {}, {}) for name in OPTIMIZERS),
    *((name, {**LINEAR, **DEEP, "k": 3}, {"weight_decay": 0.1}) for name in OPTIMIZERS),
    *((name, {**LINEAR, "k": 16}, {"use_ema": True}) for name in OPTIMIZERS),
    *((name, {**LINEAR, "dtype": "float64"}, {}) for name in ("RowWiseAdagrad", "LazyAdam", "Ftrl")),
    *((name, {"dtype": "bfloat16", "k": 16}, {}) for name in ("SGD", "RowWiseAdagrad", "LazyAdam")),
    *(("LazyAdam", {**LINEAR, "k": k}, {"use_ema": True, "weight_decay": 0.1}) for k in (1, 70, 300)),
    ("LazyAdam", {**COUNTS}, {"rare_rate": 1.0}),
    ("LazyAdam", {**LINEAR, **PRIORS}, {"rare_rate": 1.0}),
    ("LazyAdam", {**LINEAR, **PRIORS, **DEEP}, {"rare_rate": 1.0, "use_ema": True, "weight_decay": 0.1}),
    ("Adagrad", {**LINEAR, **PRIORS, **DEEP}, {}),
    ("Adagrad", {**LINEAR, "l2": 0.1, "l2_linear": 0.2}, {}),
    ("SGD", {**LINEAR, **DEEP, "l2": 0.1, "values": False}, {}),
    ("RowWiseAdagrad", {**LINEAR, "field_sizes": (1, 3), "l2": 0.1}, {}),
    ("Ftrl", {"field_sizes": (2, 2), "output": "vector", "k": 16}, {}),
    ("LazyAdam", {**LINEAR, **DEEP, "field_sizes": (1, 1, 1, 1)}, {}),
    ("LazyAdam", {**LINEAR, "ragged": True, "l2": 0.1}, {}),
    ("Ftrl", {"ragged": True, **PRIORS}, {}),
    ("Adagrad", {**LINEAR, "constraint": keras.constraints.MaxNorm(0.05)}, {}),
]


@pytest.mark.parametrize(
    ("name", "net", "options"), CASES, ids=lambda x: re.sub(r"<.*?(\w+) object at \w+>", r"\1", str(x))
)
def test_the_bits_are_the_same(name, net, options, assert_same_bits):
    options = {"optimizer": name, "ragged": "ragged" in net, **options}
    net = {name: option for name, option in net.items() if name != "ragged"}

    def train(fused):
        arrays, count = run(net=net, **options)
        assert (count[TOGETHER], count[APART]) == ((1, 0) if fused else (0, 1 + net.get("use_linear", False)))
        return arrays

    assert_same_bits(train)


def test_the_gradient_is_not_computed_too(apart):
    for expected in ({TOGETHER: 1, GRADIENT: 0, APART: 0}, {TOGETHER: 0, GRADIENT: 1, APART: 2}):
        ran = ops_that_run(tf.function(plain_step(*made(net={**LINEAR, **DEEP}))), batch())
        assert {name: ran[name] for name in expected} == expected
        apart()


# Steps whose gradient is not, or not only, what one update of all tables takes.


def with_norm_after(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        optimizer.apply(gradients, net.trainable_variables)
        return loss, tf.linalg.global_norm(gradients), gradients[0].values

    return step


def with_norm_before(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        norm = tf.linalg.global_norm(gradients)
        optimizer.apply(gradients, net.trainable_variables)
        return loss, norm

    return step


def at_other_rows(net, optimizer):
    """As sharpness-aware minimization does."""

    def step(data):
        table = net.fm.embeddings.value
        away = 0.1 * tf.ones_like(table)
        table.assign_add(away)
        loss, gradients = net.gradients(data)
        table.assign_sub(away)
        optimizer.apply(gradients, net.trainable_variables)
        return loss

    return step


def at_other_rows_in_a_function(net, optimizer):
    @tf.function
    def move(by):
        net.fm.embeddings.value.assign_add(by * tf.ones_like(net.fm.embeddings.value))

    def step(data):
        move(0.1)
        loss, gradients = net.gradients(data)
        move(-0.1)
        optimizer.apply(gradients, net.trainable_variables)
        return loss

    return step


def table_alone(net, optimizer):
    def step(data):
        with tf.GradientTape() as tape:
            loss = net.loss(data)
        table = net.fm.embeddings
        optimizer.apply(tape.gradient(loss, [table.value]), [table])
        return loss

    return step


def weights_alone(net, optimizer):
    def step(data):
        with tf.GradientTape() as tape:
            loss = net.loss(data)
        optimizer.apply(tape.gradient(loss, [net.fm.w.value]), [net.fm.w])
        return loss

    return step


def gradient_of_values(net, optimizer):
    def step(data):
        (indices, values), y = data
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = net.loss(((indices, values), y))
        gradients = tape.gradient(loss, [values, *net.tensors])
        optimizer.apply(gradients[1:], net.trainable_variables)
        return loss, gradients[0]

    return step


def two_calls(net, optimizer):
    def step(data):
        with tf.GradientTape() as tape:
            loss = net.loss(data) + net.loss((data[0], 2 * data[1]))
        optimizer.apply(tape.gradient(loss, net.tensors), net.trainable_variables)
        return loss

    return step


def twice_applied(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        optimizer.apply(gradients, net.trainable_variables)
        optimizer.apply(gradients, net.trainable_variables)
        return loss

    return step


def other_rows_named(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        moved = [tf.IndexedSlices(g.values, g.indices + 1, g.dense_shape) for g in gradients]
        optimizer.apply(moved, net.trainable_variables)
        return loss

    return step


def in_an_inner_function(net, optimizer):
    @tf.function
    def apply(gradients):
        optimizer.apply(gradients, net.trainable_variables)

    def step(data):
        loss, gradients = net.gradients(data)
        apply(gradients)
        return loss

    return step


def in_a_branch(net, optimizer):
    def step(data):
        loss, gradients = net.gradients(data)
        if loss > 0:
            optimizer.apply(gradients, net.trainable_variables)
        return loss

    return step


NOT_ALONE = [
    (with_norm_before, {}, 0),
    (with_norm_after, {}, 1),
    (at_other_rows, {}, 0),
    (at_other_rows_in_a_function, {}, 0),
    (table_alone, {}, 0),
    (weights_alone, {}, 0),
    (gradient_of_values, {}, 0),
    (two_calls, {}, 0),
    (twice_applied, {}, 1),
    (other_rows_named, {}, 0),
    (in_an_inner_function, {}, 0),
    (in_a_branch, {}, 0),
    (plain_step, {"clipnorm": 0.01}, 0),
    (plain_step, {"global_clipnorm": 0.01}, 0),
    (plain_step, {"clipvalue": 0.001}, 0),
    (plain_step, {"gradient_accumulation_steps": 2}, 0),
    (plain_step, {"loss_scale_factor": 2.0}, 0),
]


@pytest.mark.parametrize(("make_step", "options", "fused"), NOT_ALONE, ids=lambda x: getattr(x, "__name__", str(x)))
def test_gradients_that_are_not_the_updates_alone(make_step, options, fused, apart):
    net = {**LINEAR, "l2": 0.1}
    together, count = run(make_step, net=net, **options)
    assert count[TOGETHER] == fused
    eager, _ = run(make_step, net=net, graph=False, **options)
    for a, b in zip(together, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    apart()
    assert_equal(together, run(make_step, net=net, **options)[0])


def test_a_gradient_that_is_returned_is_computed_before_the_update():
    """Many times, as an op that does not wait is right most of the time."""
    net, optimizer = made("SGD", {**LINEAR, **DEEP, "l2": 1.0})
    step = tf.function(with_norm_after(net, optimizer))
    gradient = tf.function(lambda data: net.gradients(data)[1][0].values)
    for i in range(200):
        expected = gradient(batch(i))
        np.testing.assert_allclose(step(batch(i))[2], expected, rtol=1e-4, atol=1e-6)


def test_a_table_whose_weights_are_not_trained(assert_same_bits):
    def train(fused):
        net, optimizer = Net(**LINEAR), OPTIMIZERS["LazyAdam"]()
        net.fm.w.trainable = False
        optimizer.build(net.trainable_variables)
        step = tf.function(plain_step(net, optimizer))
        step(batch())
        assert ops_of(step, batch())[TOGETHER] == 0 and not net.fm.w.numpy().any()
        return arrays_of(net, optimizer)

    assert_same_bits(train)


@pytest.mark.parametrize("both", [True, False])
def test_a_gradient_for_another_variable(both, assert_same_bits):
    def train(fused):
        net, optimizer = Net(), OPTIMIZERS["Adagrad"]()
        table, other = net.fm.embeddings, keras.Variable(net.fm.embeddings.numpy())
        before = other.numpy()
        optimizer.build([table, other])

        @tf.function
        def step(data):
            (gradient,) = net.gradients(data)[1]
            optimizer.apply([gradient] * (1 + both), [table, other] if both else [other])

        step(batch())
        assert np.any(other.numpy() != before)
        np.testing.assert_array_equal(table, other if both else before)
        return [other.numpy(), *arrays_of(net, optimizer)]

    assert_same_bits(train)


def in_a_loop(net, optimizer):
    one = plain_step(net, optimizer)

    def step(data):
        total = tf.zeros([], tf.float64)
        for _ in tf.range(3):
            total += one(data)
        return total

    return step


def test_a_loop_in_the_step(assert_same_bits):
    def train(fused):
        net, optimizer = made(net=LINEAR)
        step = tf.function(in_a_loop(net, optimizer))
        ran = ops_that_run(step, batch())
        assert (ran[TOGETHER], ran[GRADIENT]) == ((1, 0) if fused else (0, 1))
        return arrays_of(net, optimizer)

    assert_same_bits(train)


def test_two_models_in_a_step(assert_same_bits):
    """With an optimizer each, and with one for both."""

    def train(fused):
        nets, each = zip(made(net=LINEAR), made("Adagrad", {**LINEAR, "k": 16}), strict=True)
        variables = [v for net in nets for v in net.trainable_variables]
        shared = optimizers.SGD(0.1)
        shared.build(variables)

        @tf.function
        def step(data):
            for net, optimizer in zip(nets, each, strict=True):
                plain_step(net, optimizer)(data)

        @tf.function
        def step_of_both(data):
            shared.apply([g for net in nets for g in net.gradients(data)[1]], variables)

        for function in (step, step_of_both):
            for i in range(2):
                function(batch(i))
            assert ops_of(function, batch())[TOGETHER] == (2 if fused else 0)
        return arrays_of(*nets, *each, shared)

    assert_same_bits(train)


def test_threads_that_trace_with_one_optimizer():
    """Each has its own table; a step's updates are not mixed up with those of another thread's."""
    nets, optimizer = [Net(**LINEAR) for _ in range(4)], OPTIMIZERS["Adagrad"]()
    optimizer.build([v for net in nets for v in net.trainable_variables])
    ready, passed = threading.Barrier(len(nets)), []

    def trace(net):
        step = tf.function(plain_step(net, optimizer))
        ready.wait()
        step(batch())
        passed.append(ops_of(step, batch())[TOGETHER] == 1)

    threads = [threading.Thread(target=trace, args=[net]) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [True] * len(nets)
    for net in nets[1:]:
        assert_equal(arrays_of(net), arrays_of(nets[0]))


def test_a_strategy_of_tf_distribute_keeps_them_apart():
    results = []
    for strategy in (None, tf.distribute.MirroredStrategy(["CPU:0"])):
        with strategy.scope() if strategy else contextlib.nullcontext():
            net, optimizer = made("Adagrad", LINEAR)
        step = plain_step(net, optimizer)
        function = tf.function(lambda data, s=strategy, f=step: s.run(f, (data,)) if s else f(data))
        for i in range(3):
            function(batch(i))
        assert ops_of(function, batch())[TOGETHER] == (strategy is None)
        results.append(arrays_of(net))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# Keras's own loop.


def arrays(steps=6):
    batches = [batch(i) for i in range(steps)]
    x = [np.concatenate([b[0][i] for b in batches]) for i in (0, 1)]
    return tuple(x), (np.concatenate([b[1] for b in batches]) > 0).astype("f")


def fitted(optimizer=None, path=None, unrolled=1, **options):
    """(weights and slots after two epochs, the ops of the training step that ran)."""
    keras.utils.set_random_seed(3)
    model = DeepFM(V, F, 4, (8,), l2_embedding=0.01, seed=3)
    model.compile(optimizer or optimizers.LazyAdam(0.01), "binary_crossentropy", **options)
    model.unrolled_steps_per_execution = unrolled
    x, y = arrays()
    fit = lambda model: model.fit(x, y, batch_size=B, epochs=1, shuffle=False, verbose=0)  # noqa: E731
    ran = ops_that_run(fit, model)
    if path is not None:
        model.save(path)
        model = keras.models.load_model(path)
    fit(model)
    return arrays_of(model, model.optimizer), ran


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: None, {}),
        (lambda: optimizers.LazyAdam(0.01, use_ema=True), {"steps_per_execution": 3}),
        (lambda: optimizers.SGD(0.01), {"steps_per_execution": 6, "unrolled": 3}),
        (lambda: optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(0.05), keras.optimizers.Adam()), {}),
    ],
    ids=["default", "several steps per execution", "unrolled", "combined"],
)
def test_fit(make, options, assert_same_bits):
    def train(fused):
        arrays, ran = fitted(make(), **options)
        assert (ran[TOGETHER] > 0, ran[GRADIENT] > 0) == (fused, not fused)
        return arrays

    assert_same_bits(train)


def test_fit_with_loss_scaling(assert_same_bits):
    def train(fused):
        arrays, ran = fitted(keras.mixed_precision.LossScaleOptimizer(optimizers.LazyAdam(0.01)))
        assert ran[TOGETHER] == 0 and ran[GRADIENT] > 0
        return arrays

    assert_same_bits(train)


def test_fit_eagerly_learns_the_same():
    eager, graph = (fitted(optimizers.Adagrad(0.05), run_eagerly=eagerly) for eagerly in (True, False))
    assert eager[1][TOGETHER] == 0
    for a, b in zip(eager[0], graph[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_saved_and_trained_further(tmp_path):
    assert_equal(fitted()[0], fitted(path=tmp_path / "model.keras")[0])
