"""libsvm and libffm files as the source of a model."""

import gzip

import numpy as np
import pytest

from deepfm_ops import DeepFM
from deepfm_ops.data import PairFeatures, read_libffm, read_libsvm

ROWS = 300


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """Rows of one to six pairs; what an index adds to the logit is known."""
    r = np.random.default_rng(0)
    for name, form in (("a.svm", "{1}:{2}"), ("a.ffm", "{0}:{1}:{2}")):
        lines = []
        for _ in range(ROWS):
            indices = np.sort(r.choice(40, r.integers(1, 7), replace=False))
            label = "+1" if r.random() < 1 / (1 + np.exp(-np.sin(indices).sum())) else "-1"
            pairs = [form.format(index // 10, index, round(r.random() + 0.5, 3)) for index in indices]
            lines.append(" ".join([label, *pairs]))
        (tmp_path / name).write_text("\n".join(lines))
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", ["a.svm", "a.ffm", "a.svm.gz", "a.ffm.gz"])
def test_sizes_and_batches(name, folder):
    features = PairFeatures().fit(folder / name)
    samples = (read_libffm if "ffm" in name else read_libsvm)(folder / name)
    indices, values, labels, field_sizes = samples
    assert features.has_fields == ("ffm" in name) and features.field_sizes == field_sizes
    assert (features.num_features, features.num_samples) == (samples.num_features, ROWS)
    np.testing.assert_array_equal(features.counts, np.bincount(indices[values != 0], minlength=40))
    np.testing.assert_array_equal(features.counts, samples.counts)
    batches = list(features.stream(folder / name, 64))
    np.testing.assert_array_equal(np.concatenate([x[0] for x, _ in batches]), indices)
    np.testing.assert_array_equal(np.concatenate([x[1] for x, _ in batches]), values)
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), labels)
    assert set(labels) == {0, 1}
    np.testing.assert_array_equal(features.transform(folder / name)[0], indices)
    shuffled = features.stream([folder / name] * 2, 64, shuffle=True, seed=1)
    assert sum(len(y) for _, y in shuffled) == 2 * ROWS
    state = features.stream(folder / name, 64).state()
    assert state["files"] == f"{name} {(folder / name).stat().st_size}"


@pytest.mark.parametrize("name", ["a.svm", "a.ffm"])
def test_a_model_trains_on_them(name, folder):
    features = PairFeatures().fit(folder / name)
    model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=1)
    assert (model.plan.deep is not None) == features.has_fields
    model.compile("adam", metrics=["AUC"])
    stream = features.stream(folder / name, 32, shuffle=True)
    model.fit(stream, epochs=20, verbose=0)
    assert model.evaluate(features.stream(folder / name, 100), verbose=0)[1] > 0.7
    assert model.predict(features.stream(folder / name, 100, labels=False), verbose=0).shape == (ROWS, 1)
    samples = (read_libffm if features.has_fields else read_libsvm)(folder / name)
    ready = DeepFM.from_features(samples, embedding_dim=4, hidden_units=(8,), seed=1)
    assert [w.shape for w in ready.weights] == [w.shape for w in model.weights]
    ready.compile("adam")
    ready.fit((samples.indices, samples.values), samples.labels, verbose=0)


def test_a_deep_part_needs_fields(folder):
    for features in (PairFeatures().fit(folder / "a.svm"), read_libsvm(folder / "a.svm")):
        with pytest.raises(ValueError, match="libsvm rows have no fields, which a deep part needs"):
            DeepFM.from_features(features, use_deep=True)


def test_bad_lines(folder):
    text = (folder / "a.svm").read_text().splitlines()
    text[7] = "1 3:x"
    (folder / "b.svm").write_text("\n".join(text))
    with pytest.raises(ValueError, match="b.svm, line 8, column .*: the value must be a finite float32"):
        PairFeatures().fit(folder / "b.svm")
    features = PairFeatures().fit(folder / "b.svm", on_bad="skip")
    assert (features.num_skipped, features.num_samples) == (1, ROWS - 1)
    stream = features.stream(folder / "b.svm", 50, on_bad="skip")
    assert sum(len(y) for _, y in stream) == ROWS - 1 and stream.num_skipped == 1
    with pytest.raises(ValueError, match="b.svm, line 8"):
        list(features.stream(folder / "b.svm", 50))
    (folder / "long.svm").write_text("1 " + " ".join(f"{i}:1" for i in range(9)))
    with pytest.raises(ValueError, match="field_sizes have 6 columns, row 0 has 9 pairs"):
        list(features.stream(folder / "long.svm", 50))
    with pytest.raises(ValueError, match="fit"):
        PairFeatures().stream(folder / "a.svm", 50)
