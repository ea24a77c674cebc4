"""The next day: dictionaries that learn new values and forget old ones, and models that follow."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, optimizers
from deepfm_ops.data.synthetic import auc
from deepfm_ops.scorer import Scorer

DAYS, ROWS = 7, 2000
OPTIMIZERS = {
    "recommended": lambda: None,
    "Adam": lambda: "adam",
    "SGD, momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adafactor": lambda: "adafactor",
    "RMSprop": lambda: "rmsprop",
    "Keras's averages": lambda: keras.optimizers.Adam(use_ema=True),
    "accumulated": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
    "Ftrl": lambda: optimizers.Ftrl(0.1),
    "RowWiseAdagrad": lambda: optimizers.RowWiseAdagrad(0.1),
    "LazyAdam": lambda: optimizers.LazyAdam(0.01),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(optimizers.Adagrad(0.1)),
}


def day(number, rows=ROWS):
    """A day's table: users come and go, items stay."""
    r = np.random.default_rng(number)
    user, item = r.integers(40 * number, 40 * number + 200, rows), r.integers(0, 30, rows)
    effect = np.sin(user * 1.7) + np.cos(item * 2.3) + np.sin(user + item)
    label = r.random(rows) < 1 / (1 + np.exp(-1.5 * effect))
    return {"user": user, "item": item, "age": r.normal(size=rows), "label": label.astype(int)}


COLUMNS = {"categorical": ["user", "item"], "numeric": ["age"], "label": "label"}


def make(features, optimizer="adam", seed=1, **arguments):
    keras.utils.set_random_seed(seed)
    model = DeepFM.from_features(features, **{"embedding_dim": 4, "hidden_units": (8,), "seed": seed, **arguments})
    model.compile(optimizer)
    return model


def fit_day(model, features, table):
    model.fit(features.stream(table, 100), verbose=0)


def test_update_appends():
    features = FeatureDictionary().fit(day(0), **COLUMNS)
    size, names = features.num_features, [features.name(i) for i in range(features.num_features)]
    counts, zero = features.counts.copy(), features.transform(day(0))
    features.update(day(1))
    assert [features.name(i) for i in range(size)] == names and features.num_features > size
    for before, after in zip(zero, features.transform(day(0)), strict=True):
        np.testing.assert_array_equal(before, after)
    indices, values = features.transform(day(1))
    assert (indices > 0).all() and features.num_samples == 2 * ROWS
    expected = np.bincount(indices.ravel()[values.ravel() != 0], minlength=features.num_features)
    expected[:size] += counts
    np.testing.assert_array_equal(features.counts, expected)
    assert (np.diff(features.counts[size:]) <= 0).all(), "new indices by falling counts"
    both = FeatureDictionary().fit([day(0), day(1)], **COLUMNS)
    assert sorted(both.values("user")) == sorted(features.values("user"))


def test_rare_values_wait():
    table = {"a": ["x"] * 5 + ["y"] * 2 + ["z", None]}
    features = FeatureDictionary(min_count=2).fit(table, categorical="a")
    unseen = features.index("a", "z")
    assert unseen and unseen == features.index("a", "never") != features.index("a", None) == 0
    assert features.counts[unseen] == 1 and features.name(unseen) == ("a", None)
    features.update({"a": ["z"]})
    assert features.index("a", "z") == unseen and features.counts[unseen] == 2
    features.update({"a": ["z", "z"]})
    assert features.index("a", "z") == features.num_features - 1 and features.counts[-1] == 2
    assert features.indices("a").tolist() == [1, 2, 3, 4]


def test_an_update_that_fails_changes_nothing():
    features = FeatureDictionary().fit(day(0), **COLUMNS)
    before = features.vocabulary
    counts = features.counts.copy()
    for wrong in ([day(1), {**day(2), "user": [(1, 2)] * ROWS}], [day(1), {"user": [1], "item": [2]}]):
        with pytest.raises((TypeError, KeyError)):
            features.update(wrong)
        assert features.vocabulary is before and features.num_samples == ROWS
        np.testing.assert_array_equal(features.counts, counts)
    with pytest.raises(ValueError, match="fit or load"):
        FeatureDictionary().update(day(0))


def test_evict():
    features = FeatureDictionary().fit({"a": ["x", "x", "x", "y", "y", "z"]}, categorical="a")
    features.update({"a": ["x", "w"]})
    assert features.evict(2) == 0 and features.evict(unused_for=1) == 2  # y and z
    assert features.index("a", "y") == 0 and features.name(2) == features.name(3) == (None, None)
    assert features.counts[2] == 0 and features.values("a") == ["x", "w"]
    features.update({"a": ["x", "new", "newer", "newer", "newest"]})
    assert (
        features.name(2) == ("a", "newer") and features.name(3) == ("a", "new") and features.index("a", "newest") == 5
    )
    assert features.index("a", "y") == 0, "a value that was freed comes back as another"
    features = FeatureDictionary().fit({"a": ["A", "B", "C"]}, categorical="a").update({"a": ["A", "C"]})
    assert (features.evict(1), features.evict(1)) == (1, 0), "evictions are no updates"
    for wrong in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="unused_for must be a number of updates from 1 on"):
            features.evict(wrong)


@pytest.mark.parametrize(
    ("name", "saved"),
    [*((name, True) for name in OPTIMIZERS), *((name, False) for name in ("recommended", "Adam", "loss scale"))],
)
def test_resize_adds_and_moves_nothing(name, saved, tmp_path):
    features = FeatureDictionary().fit(day(0), **COLUMNS)
    model = make(features, OPTIMIZERS[name]())
    fit_day(model, features, day(0))
    if saved:
        model.save(tmp_path / "m.keras")
        model = keras.models.load_model(tmp_path / "m.keras")
    model._hide_averages()
    size, before = features.num_features, [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    features.update(day(5))
    assert model.resize(features) is model
    model._hide_averages()
    fresh = make(features, OPTIMIZERS[name]())
    fresh.optimizer.build(fresh.trainable_variables)
    after = [*model.variables, *model.optimizer.variables]
    expected = [*fresh.variables, *fresh.optimizer.variables]
    assert [v.shape for v in after] == [v.shape for v in expected]
    grown = 0
    for old, new, other in zip(before, after, expected, strict=True):
        if old.shape != new.shape:
            grown += 1
            if "feature_counts" in new.path:
                np.testing.assert_array_equal(new, features.counts)
                continue
            np.testing.assert_array_equal(new.numpy()[:size], old)
            np.testing.assert_array_equal(new.numpy()[size:], other.numpy()[size:])
        elif "samples" not in new.path:
            np.testing.assert_array_equal(new, old)
    assert grown >= 2
    fit_day(model, features, day(5))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        again.predict(features.stream(day(6), 100)), model.predict(features.stream(day(6), 100))
    )


def test_rows_of_evicted_values_are_fresh():
    features = FeatureDictionary().fit(day(0), **COLUMNS)
    model = make(features, optimizers.LazyAdam(0.01))
    fit_day(model, features, day(0))
    features.update(day(4))  # users 160 to 360; 0 to 159 are gone
    freed = features.indices("user")[features.vocabulary.seen[features.indices("user")] == 0]
    assert features.evict(1) == len(freed) == 160
    features.update(day(9))  # users 360 to 560
    assert set(freed) < set(features.indices("user"))
    kept = np.setdiff1d(np.arange(make(features).get_layer("fm").num_features), freed)
    size = model.get_layer("fm").num_features
    kept = kept[kept < size]
    before = [v.numpy() for v in (*model.trainable_variables, *model.optimizer.variables)]
    model.resize(features)
    fresh = make(features, optimizers.LazyAdam(0.01))
    fresh.optimizer.build(fresh.trainable_variables)
    after = (*model.trainable_variables, *model.optimizer.variables)
    for old, new, other in zip(before, after, (*fresh.trainable_variables, *fresh.optimizer.variables), strict=True):
        if old.shape and old.shape[0] == size:
            np.testing.assert_array_equal(new.numpy()[kept], old[kept])
            np.testing.assert_array_equal(new.numpy()[freed], other.numpy()[freed])


def test_an_update_with_other_types(tmp_path):
    for first, later in (([True, False], ["maybe"]), ([0.5, 1.5], ["maybe"]), ([3, 4], ["x", 0.5])):
        features = FeatureDictionary().fit({"b": first}, categorical="b")
        model = make(features)
        features.update({"b": later})
        model.resize(features)
        deepfm_ops.export(model, tmp_path / "saved")
        serve = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"]
        texts = [features.name(i)[1] for i in range(1, features.num_features)]
        expected = model.predict(features.transform({"b": texts}), verbose=0)
        np.testing.assert_allclose(serve(b=tf.constant(texts))["score"], expected, rtol=1e-5)


def test_features_that_were_fitted_again_are_refused():
    features = FeatureDictionary().fit(day(0), **COLUMNS)
    model = make(features)
    for other in (FeatureDictionary().fit(day(3), **COLUMNS), FeatureDictionary().fit(day(0), categorical="user")):
        with pytest.raises(ValueError, match="features are not the model's after `update` or `evict`"):
            model.resize(other)
    of_texts = [
        FeatureDictionary().fit({"id": [f"{i:08x}" for i in range(start, start + 50)]}, categorical="id")
        for start in (0, 500)
    ]
    with pytest.raises(ValueError, match="features are not the model's"):  # of equally long texts
        make(of_texts[0]).resize(of_texts[1])
    features.update(day(1))
    later = make(features)
    with pytest.raises(ValueError, match="features are not the model's"):
        later.resize(FeatureDictionary().fit(day(0), **COLUMNS))
    plain = DeepFM(features.num_features, features.num_fields, 4, (8,))
    with pytest.raises(ValueError, match="this model does not know its features"):
        plain.resize(features)


def test_seven_days(tmp_path):
    """As good as a model that knew all values from the start; of the linear model, the same."""
    everything = FeatureDictionary().fit([day(number) for number in range(DAYS)], **COLUMNS)
    linear = {"use_fm": False, "use_deep": False, "feature_counts": None, "num_samples": None}
    pairs = []
    for arguments, optimizer in ((linear, lambda: optimizers.Adagrad(0.1)), ({}, lambda: optimizers.LazyAdam(0.01))):
        features = FeatureDictionary().fit(day(0), **COLUMNS)
        growing, knowing = make(features, optimizer(), **arguments), make(everything, optimizer(), **arguments)
        for number in range(DAYS):
            if number:
                features.update(day(number))
                growing.resize(features)
            fit_day(growing, features, day(number))
            fit_day(knowing, everything, day(number))
        test = day(DAYS - 1, 2 * ROWS)  # other draws of its users
        pairs.append((growing.predict(features.transform(test)), knowing.predict(everything.transform(test))))
    np.testing.assert_allclose(*pairs[0], rtol=1e-4, atol=1e-6)
    got, expected = (auc(test["label"], scores[:, 0]) for scores in pairs[1])
    assert got > 0.7 and abs(got - expected) < 0.02

    deepfm_ops.export_scorer(growing, tmp_path / "m.scorer")
    raw = {name: test[name] for name in ("user", "item", "age")}
    scores = Scorer.load(tmp_path / "m.scorer").score(raw)
    np.testing.assert_allclose(scores, pairs[1][0][:, 0], rtol=1e-4, atol=1e-6)
    deepfm_ops.export(growing, tmp_path / "saved")
    serve = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"]
    given = {
        "user": tf.constant(raw["user"]),
        "item": tf.constant(raw["item"]),
        "age": tf.constant(raw["age"], tf.float32),
    }
    np.testing.assert_allclose(serve(**given)["score"], pairs[1][0], rtol=1e-4, atol=1e-6)
