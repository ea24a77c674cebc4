"""`fit` on arrays: a fresh order every epoch, and what Keras's `fit` does with arrays."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import skewed

from deepfm_ops import Checkpoint, DeepFM, optimizers
from deepfm_ops.models.epochs import cut


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
    x, y = skewed(400)
    weights, classes = np.linspace(0, 1, 400), {0: 1.0, 1: 3.0}
    frames = {}
    for shuffle in (False, "batch", True):
        losses = []
        for options in (
            {"sample_weight": weights, "validation_split": 0.25},
            {"class_weight": classes},
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


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (list, "float32"),
        (tuple, "bool"),
        (lambda x: dict(zip(("indices", "values"), x, strict=True)), "int64"),
        (tuple, "int64"),
    ],
)
def test_forms_of_inputs_and_labels(form, labels):
    x, y = skewed()
    losses = []
    for shuffle in (True, False):
        model = DeepFM(60, 3, 4, (8,), seed=1)
        model.compile(optimizers.SGD(0.0))
        options = {"class_weight": {0: 1.0, 1: 2.0}, "validation_split": 0.25, "shuffle": shuffle, "verbose": 0}
        losses.append(model.fit(form(x), y.astype(labels), batch_size=150, **options).history)
    for name in losses[0]:
        np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=1e-5)


def test_the_order_of_an_epoch_begins_again_with_every_iteration():
    keras.utils.set_random_seed(4)
    straight = orders(lambda model, epochs: model.fit(*ROWS, epochs=epochs, batch_size=100, verbose=0))
    keras.utils.set_random_seed(4)
    stepped = orders(
        lambda model, epochs: model.fit(*ROWS, epochs=2 * epochs, batch_size=100, steps_per_epoch=5, verbose=0)
    )
    assert all(sorted(epoch) == list(range(1000)) for epoch in stepped)  # two epochs of five steps each
    np.testing.assert_array_equal(straight[0], stepped[0])


SLICES = {"a": np.arange(10), "b": (np.linspace(0, 1, 30, dtype="f").reshape(10, 3), np.array(list("abcdefghij")))}


@pytest.mark.parametrize("drop_remainder", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_batches_of_slices_are_cut_from_the_tensors(size, prefetch, drop_remainder):
    dataset = tf.data.Dataset.from_tensor_slices(SLICES).batch(size, drop_remainder)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 3
    dataset = dataset.with_options(options) if prefetch == 0 else dataset
    for _ in range(prefetch):
        dataset = dataset.prefetch(1)
    again = cut(dataset)
    if prefetch:
        assert again is not dataset
    assert again.element_spec == dataset.element_spec and again.cardinality() == dataset.cardinality()
    assert again.options().threading.private_threadpool_size == dataset.options().threading.private_threadpool_size
    for got, want in zip(again, dataset, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, got, want)


def test_other_datasets_are_as_they_are():
    slices = tf.data.Dataset.from_tensor_slices(SLICES)
    ragged = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3]])).batch(2)
    shuffled = slices.shuffle(10).batch(2)
    for dataset in (slices, ragged, shuffled, slices.batch(2).repeat(2), tf.data.Dataset.range(4).batch(2)):
        assert cut(dataset) is dataset


def test_fit_on_batches_of_slices():
    x, y = skewed(400)
    weights = np.linspace(0, 1, 400, dtype="f")
    results = []
    for tensors, options in (((x, y), {"class_weight": {0: 1.0, 1: 3.0}}), ((x, y, weights), {"steps_per_epoch": 3})):
        dataset = tf.data.Dataset.from_tensor_slices(tensors).batch(64)
        for some in (dataset, dataset.prefetch(1), dataset.map(lambda *batch: batch)):
            model = DeepFM(60, 3, 4, (8,), seed=1)
            model.compile(optimizers.Adagrad(0.1))
            losses = model.fit(some, epochs=2, verbose=0, **options).history["loss"]
            results.append((losses, int(model.optimizer.iterations), model.get_weights()))
    for first in (0, 3):
        for other in results[first + 1 : first + 3]:
            assert other[:2] == results[first][:2]
            for a, b in zip(other[2], results[first][2], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
