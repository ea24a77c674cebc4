"""`tf.autodiff.ForwardAccumulator` over the op and its gradient, against central differences in float64."""

import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import FMInteraction, reference

INDICES = np.array([[0, 1, 2, 1], [3, 3, 4, 0]])


def forward(function, primals, tangents, where="eager"):
    """The Jacobian-vector product of function(), whose result may be a structure."""
    inner = function if where in ("eager", "inside") else tf.function(function)
    if where == "traced before":
        inner()

    def product():
        with tf.autodiff.ForwardAccumulator(primals, tangents) as accumulator:
            result = inner()
        return [tf.convert_to_tensor(accumulator.jvp(y, "zero")) for y in tf.nest.flatten(result)]

    return (tf.function(product) if where == "inside" else product)()


def difference(function, start, tangent, step=1e-5):
    up, down = (tf.nest.flatten(function(start + sign * step * tangent)) for sign in (1, -1))
    return [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]


def assert_close(got, want, tolerance=1e-8):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("where", ["eager", "inside", "outside", "traced before"])
@pytest.mark.parametrize("kind", ["tensor", "variable", "values"])
def test_of_the_interaction(fm, kind, where, rng):
    start, values = rng.normal(size=(6, 3)), tf.constant(rng.normal(size=INDICES.shape))
    table = tf.constant(start) if kind == "tensor" else tf.Variable(start)
    primal = values if kind == "values" else table
    tangent = tf.constant(rng.normal(size=primal.shape))
    got = forward(lambda: fm(table, INDICES, values, output="vector"), primal, tangent, where)
    if kind == "values":
        want = difference(lambda x: reference.fm_interaction(start, INDICES, x, output="vector"), values, tangent)
    else:
        want = difference(lambda t: reference.fm_interaction(t, INDICES, values, output="vector"), start, tangent)
    assert_close(got, want)


@pytest.mark.parametrize("where", ["eager", "inside"])
@pytest.mark.parametrize("name", ["embeddings", "w"])
def test_of_a_layer_with_first_order_and_penalty(name, where, rng):
    """Of one of its tables, where the other has no tangent; its outputs, and the gradient, which has the penalty's."""
    options = {"linear_initializer": "normal", "l2": 0.5, "l2_linear": 0.25, "dtype": "float64"}
    layer = FMInteraction(6, 3, use_linear=True, return_embeddings=True, **options)
    layer(INDICES)
    tables = [layer.embeddings.value, layer.w.value]

    def call():
        with tf.GradientTape() as tape:
            outputs = layer(INDICES)
            loss = sum(tf.reduce_sum(tf.sin(y)) for y in outputs) + sum(layer.losses)
        return [*outputs, *map(tf.convert_to_tensor, tape.gradient(loss, tables))]

    variable = getattr(layer, name).value
    tangent = tf.constant(rng.normal(size=variable.shape))
    got = forward(call, variable, tangent, where)

    def moved(value):
        variable.assign(value)
        return call()

    assert_close(got, difference(moved, variable.numpy(), tangent))


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
@pytest.mark.parametrize("kind", ["tensor", "variable"])
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over forward"])
def test_hessian_times_vector(fm, order, kind, wrap, rng):
    start, tangent = rng.normal(size=(6, 3)), tf.constant(rng.normal(size=(6, 3)))
    table = tf.constant(start) if kind == "tensor" else tf.Variable(start)

    def gradient(function, table):
        with tf.GradientTape() as tape:
            tape.watch(table)
            result = function()
        return tf.convert_to_tensor(tape.gradient(result, table))

    def loss(table, fm=fm):
        return tf.reduce_sum(tf.sin(fm(table, INDICES)))

    if order == "forward over reverse":
        product = lambda: forward(lambda: gradient(lambda: loss(table), table), table, tangent)  # noqa: E731
    else:
        product = lambda: [gradient(lambda: forward(lambda: loss(table), table, tangent)[0], table)]  # noqa: E731

    def plain(t):
        t = tf.convert_to_tensor(t)
        return gradient(lambda: loss(t, reference.fm_interaction), t)

    assert_close(wrap(product)(), difference(plain, start, tangent))


def test_of_a_gradient_that_only_the_loss_moves(fm, rng):
    """The accumulator meets the gradient alone: what the op was called with has no tangent."""
    table, scale = tf.Variable(rng.normal(size=(6, 3))), tf.Variable(2.0, dtype=tf.float64)

    def gradient(scale):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.exp(scale * fm(table, INDICES) / 10))
        return tf.convert_to_tensor(tape.gradient(loss, table))

    got = forward(lambda: gradient(tf.identity(scale)), scale, tf.constant(1.0, tf.float64))
    assert_close(got, difference(lambda s: gradient(tf.constant(s, tf.float64)), 2.0, 1.0))
