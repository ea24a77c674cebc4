"""Scorer's files in shards: bit for bit the scores of one file, whole or refused, written where no table is whole."""

import concurrent.futures
import itertools
import pathlib
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
from test_scorer import COLUMNS, KINDS, matrices, raw, shuffled
from testing import run_python

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, files
from deepfm_ops.container import Rows
from deepfm_ops.scorer import Scorer, ScorerFileError, export
from deepfm_ops.scorer import file as scorer_file
from deepfm_ops.scorer import rows as scorer_rows
from deepfm_ops.scorer.content import TABLES

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")


def both(model, folder, table="float32", shards=3, **options):
    """(Scorer of one file, Scorer of shards)."""
    deepfm_ops.export_scorer(model, folder / "one", table, **options)
    deepfm_ops.export_scorer(model, folder / "many", table, shards=shards, **options)
    return Scorer.load(folder / "one"), Scorer.load(folder / "many")


def shards_of(path):
    """The files beside a scorer's file that have its name, in order."""
    return sorted(path.parent.glob(f"{path.name}-*"))


def constant(value, rows=20):
    """A model whose scores are all `value`, in the first-order weights alone."""
    model = DeepFM(rows, 1, 2, use_fm=False, use_deep=False, task="regression")
    model.get_layer("first_order").w.assign(np.full((rows, 1), value, "f"))
    return model


# Scores.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", TABLES)
def test_scores_are_those_of_one_file(kind, table, rng, tmp_path):
    model = shuffled(DeepFM(61, 5, 7, (9, 4), **KINDS[kind]), rng)
    for shards in (1, 4, 70):  # 70: some shards have no row
        one, many = both(model, tmp_path, table, shards)
        assert many.info == one.info | {"shards": shards} and one.info["shards"] is None
        for batch in (33, 1, 0, 3000):
            indices, values = matrices(rng, 61, 5, batch)
            for i, x in ((indices, values), (indices.astype(np.int32), None)):
                np.testing.assert_array_equal(many.score(i, x), one.score(i, x))
    assert one.score(indices).std() > 0


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("threads", [1, 2])
def test_scores_of_bags(table, threads, rng, tmp_path):
    model = shuffled(DeepFM(61, 3, 7, (5,), field_sizes=[1, 3, 2]), rng)
    both(model, tmp_path, table)
    one, many = (Scorer.load(tmp_path / name, threads=threads) for name in ("one", "many"))
    indices, values = matrices(rng, 61, 6, 500)
    np.testing.assert_array_equal(many.score(indices, values), one.score(indices, values))
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 3, 3 * 50))])
    pairs = rng.integers(0, 61, splits[-1])
    np.testing.assert_array_equal(many.score(pairs, bag_splits=splits), one.score(pairs, bag_splits=splits))
    none = np.zeros(0, int)
    np.testing.assert_array_equal(many.score(none, bag_splits=[0] * 7), one.score(none, bag_splits=[0] * 7))


@pytest.mark.parametrize("kind", ["LR", "FM", "no linear"])
@pytest.mark.parametrize("table", TABLES)
def test_scores_of_samples_of_any_length(kind, table, rng, tmp_path):
    one, many = both(shuffled(DeepFM(61, 5, 7, **KINDS[kind]), rng), tmp_path, table)
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 6, 33))])
    pairs, values = rng.integers(0, 61, splits[-1]), rng.normal(size=splits[-1]).astype("f")
    expected = one.score(pairs, values, row_splits=splits)
    np.testing.assert_array_equal(many.score(pairs, values, row_splits=splits), expected)


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("table", TABLES)
def test_scores_of_a_column_model(kind, table, rng, tmp_path):
    """Every table is in shards, also those that have fewer rows than there are shards."""
    columns, inputs = COLUMNS[kind], raw(rng)
    groups = sorted({column.group_name for column in columns if hasattr(column, "group_name")})
    model = shuffled(DeepFM.from_columns(columns, columns, fm_group=groups, dnn_hidden_units=(6, 5)), rng)
    one, many = both(model, tmp_path, table, 7)
    np.testing.assert_array_equal(many.score(inputs), one.score(inputs))


def test_scores_of_raw_features(rng, tmp_path):
    df = pd.DataFrame(
        {"user": ["ann", "bob", None, "cid"], "age": [0.3, np.nan, -2, 0.5], "tags": ["a|b", "b", "", "c"]}
    )
    features = FeatureDictionary().fit(df, categorical=["user"], numeric=["age"], multivalued=["tags"])
    model = shuffled(DeepFM(features.num_features, 3, 4, (6,), field_sizes=features.field_sizes), rng)
    one, many = both(model, tmp_path, features=features)
    np.testing.assert_array_equal(many.score(df), one.score(df))


@pytest.mark.parametrize(
    ("indices", "values", "options"),
    [
        ([[0, 1, 20], [99, 0, 0]], None, {}),
        ([[0, 1, -1]], None, {}),
        (np.int32([[0, -(2**31), 3]]), None, {}),
        ([[0, 2**62, 3]], None, {}),
        ([[0, 1, 20]], [[1.0, 2]], {}),  # two things are wrong: the same one is said
        ([[0, 1]], None, {}),
        ([0, 50, 2], None, {"bag_splits": [0, 1, 2, 3]}),
        ([0, 50, 2], None, {"bag_splits": [0, 1, 2, 4]}),
        ([[0], [50], [2]], None, {"bag_splits": [0, 1, 2, 3]}),
    ],
)
def test_errors_are_those_of_one_file(indices, values, options, tmp_path):
    said = []
    for loaded in both(DeepFM(20, 3, 4, (6,)), tmp_path):
        with pytest.raises((IndexError, ValueError)) as error:
            loaded.score(indices, values, **options)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_threads_and_children(rng, tmp_path):
    model = shuffled(DeepFM(1000, 10, 16, (32,)), rng)
    one, many = both(model, tmp_path)
    batches = [matrices(rng, 1000, 10, batch=1 + i * 7) for i in range(24)]
    expected = [one.score(*batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for got, want in zip(pool.map(lambda b: many.score(*b), batches * 3), expected * 3, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    code = f"""
import os, sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["pandas"] = None  # an import of them fails
import numpy as np
from deepfm_ops.scorer import Scorer
scorer, indices = Scorer.load({str(tmp_path / "many")!r}), np.arange(500).reshape(50, 10)
expected = scorer.score(indices)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(scorer.score(indices), expected) and not scorer.reload() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code).strip() == "0"


# The files.


@pytest.mark.parametrize("table", TABLES)
def test_a_row_is_in_the_shard_of_its_index(table, rng, tmp_path):
    model = shuffled(DeepFM(62, 3, 4, (6,)), rng)
    both(model, tmp_path, table, 4)
    whole, held = np.load(tmp_path / "one"), np.load(tmp_path / "many")
    shards = shards_of(tmp_path / "many")
    assert [shard.name[:20] for shard in shards] == [f"many-0000{i}-of-00004-" for i in range(4)]
    tables = set(whole.files) - set(held.files)
    assert tables == ({"fm_rows"} if table == "int8" else {"fm_rows", "fm_weights"})
    for index, shard in enumerate(shards):
        parts = np.load(shard)
        assert set(parts.files) - {"manifest.json"} == tables
        for name in tables:
            np.testing.assert_array_equal(parts[name], whole[name][index::4])


def test_shards_are_mapped_and_shared(tmp_path):
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), tmp_path / "m", shards=2)
    loaded = Scorer.load(tmp_path / "m")
    for shard, rows in zip(shards_of(tmp_path / "m"), loaded._model.lookups[0].table.parts, strict=True):
        here = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if str(shard) in line]
        assert here and all(" r--s " in line for line in here)
        spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in here]
        assert any(start <= rows.ctypes.data < end for start, end in spans) and not rows.flags.writeable


def test_the_same_model_is_the_same_files(tmp_path):
    """What a file is called, and its digest, depend on nothing but the content."""
    path = tmp_path / "m"
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=1), path, shards=3)
    loaded, before = Scorer.load(path), sorted(tmp_path.iterdir())
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=1), path, shards=3)
    assert sorted(tmp_path.iterdir()) == before and not loaded.reload()
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=2), path, shards=3)
    assert len(list(tmp_path.iterdir())) == 4 and not set(shards_of(path)) & set(before) and loaded.reload()


def test_shards_that_nothing_names_are_removed(tmp_path):
    path, other = tmp_path / "m", tmp_path / "m-other"
    deepfm_ops.export_scorer(constant(1), other, shards=2)
    deepfm_ops.export_scorer(constant(1), path, shards=4)
    mapped = Scorer.load(path)
    for value, shards in ((2, 3), (3, None), (4, 1), (4, 2), (5, None)):
        deepfm_ops.export_scorer(constant(value), path, shards=shards)
        assert Scorer.load(path).score([[7]]) == value
        assert len(list(tmp_path.iterdir())) == 1 + (shards or 0) + 3
    assert mapped.score([[7]]) == 1 and Scorer.load(other).score([[7]]) == 1


def test_a_file_under_another_name_and_behind_a_link(tmp_path):
    (tmp_path / "v1").mkdir()
    deepfm_ops.export_scorer(constant(1), tmp_path / "v1" / "m", shards=2)
    (tmp_path / "current").symlink_to(tmp_path / "v1" / "m")
    assert Scorer.load(tmp_path / "current").score([[7]]) == 1
    deepfm_ops.export_scorer(constant(2), tmp_path / "current", shards=3)
    assert (tmp_path / "current").is_symlink() and len(list((tmp_path / "v1").iterdir())) == 4
    assert Scorer.load(tmp_path / "current").score([[7]]) == 2
    (tmp_path / "v1" / "m").rename(tmp_path / "v1" / "renamed")
    assert Scorer.load(tmp_path / "v1" / "renamed").score([[7]]) == 2
    (tmp_path / "v1").rename(tmp_path / "v2")
    assert Scorer.load(tmp_path / "v2" / "renamed").score([[7]]) == 2


def test_shards_have_the_mode_of_their_file(tmp_path):
    path = tmp_path / "m"
    deepfm_ops.export_scorer(constant(1), path)
    path.chmod(0o640)
    deepfm_ops.export_scorer(constant(1), path, shards=2)
    assert {x.stat().st_mode & 0o777 for x in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("shards", [0, -1, 1 << 13, 2.0, True, "4"])
def test_numbers_of_shards_that_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="shards must be None or an integer from 1 to 4,096, got "):
        deepfm_ops.export_scorer(constant(1), tmp_path / "m", shards=shards)
    assert not list(tmp_path.iterdir())


# What is damaged, or not there.


@pytest.fixture(name="path")
def _path(tmp_path):
    path = tmp_path / "model.scorer"
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=1), path, shards=3)
    return path


def refused(path, text):
    with pytest.raises(ScorerFileError, match=text) as error:
        Scorer.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_every_changed_byte_of_a_shard_is_seen(path):
    shard = shards_of(path)[1]
    content = shard.read_bytes()
    for place in range(len(content)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        refused(path, "is damaged|not a scorer file|is of format")
    for size in [1, 100, len(content) // 2, len(content) - 1]:
        shard.write_bytes(content[:size])
        refused(path, "is damaged: it was cut off|not a scorer file")
    shard.write_bytes(b"")
    refused(path, f"a shard of it is wrong: {shard} is empty")
    shard.write_bytes(content)
    Scorer.load(path)


def test_a_shard_that_is_not_there(path):
    loaded, shard = Scorer.load(path), shards_of(path)[2]
    expected = loaded.score([[1, 2, 3]])
    shard.unlink()
    refused(path, f"cannot be used without its shard {shard}: FileNotFoundError")
    with pytest.raises(ScorerFileError, match="cannot be used without its shard"):
        loaded.reload()
    np.testing.assert_array_equal(loaded.score([[1, 2, 3]]), expected)
    shard.mkdir()
    refused(path, f"cannot be used without its shard {shard}: IsADirectoryError")


def test_a_shard_of_another_export_or_another_place(path, tmp_path):
    """In files of the right names, whose own checksums are right."""
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=2), tmp_path / "other", shards=3)
    shards, others = shards_of(path), shards_of(tmp_path / "other")
    contents = [shard.read_bytes() for shard in shards]
    for wrong in (others[1].read_bytes(), contents[0], path.read_bytes()):
        shards[1].write_bytes(wrong)
        refused(path, f"{shards[1]} is not the shard that it names")
    shards[1].write_bytes(contents[1])
    shards[0].write_bytes(contents[1])
    shards[1].write_bytes(contents[0])
    refused(path, "is not the shard that it names")


def test_a_shard_alone(path):
    refused(shards_of(path)[0], "is one shard of a scorer's file: load the file that it lies beside")


def test_shards_do_not_make_a_damaged_file_whole(path):
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        refused(path, "is damaged|not a scorer file|is of format")


@pytest.mark.parametrize("place", ["shard", "main", "row"])
def test_an_export_that_fails_leaves_the_old_files(place, path, monkeypatch):
    """Also shards that it had written anew, as they were."""
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=1), path, "int8", shards=3)
    before = {x: x.read_bytes() for x in path.parent.iterdir()}
    model, calls = DeepFM(20, 3, 4, (6,), seed=1 if place == "row" else 2), []
    if place == "row":
        table = model.get_layer("fm").embeddings
        table.assign(np.where(np.arange(20)[:, np.newaxis] == 17, np.nan, table.numpy()))
        error, text = ValueError, "row 17 of a table holds NaN or infinity"
    else:
        error, text = OSError, "no space left"

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) > {"shard": 4, "main": 6}[place]:  # a file is synchronized, then its folder
                raise OSError("no space left")

        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(error, match=text):
        deepfm_ops.export_scorer(model, path, "int8", shards=3)
    assert {x: x.read_bytes() for x in path.parent.iterdir()} == before
    Scorer.load(path)


def test_a_file_is_loaded_while_new_ones_are_exported(tmp_path):
    """A reader that has read the old file, and finds its shards gone, reads the new one."""
    path, ended, seen = tmp_path / "m", threading.Event(), set()
    models = [constant(value, 5) for value in (1, 2, 3)]
    deepfm_ops.export_scorer(models[0], path, shards=3)

    def load():
        while not ended.is_set():
            scores = Scorer.load(path).score(np.arange(5)[:, np.newaxis])
            assert (scores == scores[0]).all()
            seen.add(float(scores[0]))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(load) for _ in range(2)]
        try:
            for model, shards in itertools.product(models * 5, (3, None)):
                deepfm_ops.export_scorer(model, path, shards=shards)
        finally:
            ended.set()
        for future in futures:
            future.result(timeout=60)
    assert seen <= {1, 2, 3} and seen


def test_shards_that_go_while_they_are_opened(path, tmp_path, monkeypatch):
    """The file is read again, as long as it is another one each time, and not for ever."""
    read, models = scorer_file.read_alone, [DeepFM(20, 3, 4, (6,), seed=seed) for seed in (2, 3)]

    def exports(*args, often):
        found = read(*args)
        if args[0].name == path.name and often:
            often.pop()
            deepfm_ops.export_scorer(models[len(often) % 2], path, shards=3)
        return found

    for often, good in ((1, True), (7, True), (8, False)):
        left = [None] * often
        monkeypatch.setattr(scorer_file, "read_alone", lambda *args, left=left: exports(*args, often=left))
        if good:
            assert Scorer.load(path).info["shards"] == 3
        else:
            refused(path, "was replaced 8 times while it was read")


# Tables that no process holds.


def source(array, sizes):
    """An array as blocks of given sizes, again and again."""

    def chunks():
        start, size = 0, itertools.cycle(sizes)
        while start < len(array):
            end = start + next(size)
            yield array[start:end]
            start = end

    return Rows(array.shape, array.dtype, chunks)


@pytest.mark.parametrize("kind", ["LR", "FM", "DeepFM", "no linear"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_from_a_source(kind, table, rng, tmp_path):
    """Bit for bit the files of a model that holds them; the model that is given has other rows, and others of them."""
    model = shuffled(DeepFM(61, 3, 7, (5,), seed=1, **KINDS[kind]), rng)
    template = DeepFM(2, 3, 7, (5,), **KINDS[kind])
    layer = model.plan.tables[0].source
    rows = {name: getattr(layer, name, None) for name in ("embeddings", "w")}
    rows = {name: variable.numpy() for name, variable in rows.items() if variable is not None}
    tables = {weight.path for weight in (getattr(layer, "embeddings", None), layer.w) if weight is not None}
    dense = [weight for weight in model.weights if weight.path not in tables]
    same = [weight for weight in template.weights if weight.shape[:1] != (2,)]
    for weight, value in zip(same, dense, strict=True):
        weight.assign(value)
    for sizes in ([1000], [1], [7, 1, 0, 13]):
        given = {name: source(array, sizes[i:] + sizes[:i]) for i, (name, array) in enumerate(rows.items())}
        for shards in (None, 4):
            deepfm_ops.export_scorer(model, tmp_path / "m", table, shards=shards)
            expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            export.write_scorer(template, tmp_path / "m", table, rows=given, shards=shards)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
    indices, values = matrices(rng, 61, 3)
    np.testing.assert_allclose(
        Scorer.load(tmp_path / "m").score(indices, values), np.ravel(model((indices, values))), atol=0.2
    )


@pytest.mark.parametrize("table", TABLES)
def test_shards_that_processes_write_by_themselves(table, rng, tmp_path):
    """Without TensorFlow, in any order; the file is that of `export_scorer`."""
    model = shuffled(DeepFM(61, 3, 7, (5,), seed=1), rng)
    path = tmp_path / "m"
    layer = model.get_layer("fm")
    np.savez(tmp_path / "held.npz", embeddings=layer.embeddings.numpy(), w=layer.w.numpy())
    code = f"""
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = None
import numpy as np
from deepfm_ops.scorer import file, rows
held, index = np.load({str(tmp_path / "held.npz")!r}), INDEX
arrays = rows.stored("fm", held["embeddings"][index::2], held["w"][index::2], {table!r}, index, 2)
print(file.write_shard({str(path)!r}, index, 2, arrays))
"""
    digests = [run_python(code.replace("INDEX", index)).strip() for index in ("1", "0")][::-1]
    with pytest.raises(FileNotFoundError):
        Scorer.load(path)
    export.write_main(DeepFM(9, 3, 7, (5,)), path, digests, table, num_features=61)
    one, many = both(model, tmp_path, table, 2)
    assert [x.read_bytes() for x in shards_of(path)] == [x.read_bytes() for x in shards_of(tmp_path / "many")]
    assert Scorer.load(path).info == many.info
    export.write_main(model, path, digests, table)
    indices, values = matrices(rng, 61, 3)
    np.testing.assert_array_equal(Scorer.load(path).score(indices, values), one.score(indices, values))


def test_a_file_is_not_written_before_its_shards(path):
    before = sorted(path.parent.iterdir())
    with pytest.raises(
        ValueError, match="-00001-of-00002-bbbbbbbbbbbbbbbb is not there|-00000-of-00002-aaaaaaaaaaaaaaaa"
    ):
        export.write_main(DeepFM(20, 3, 4, (6,)), path, ["a" * 64, "b" * 64])
    assert sorted(path.parent.iterdir()) == before
    for index, count in ((2, 2), (-1, 2), (0, 0), (0, 5000)):
        with pytest.raises(ValueError, match=r"index must be in \[0, count\), and count at most 4,096, got"):
            scorer_file.write_shard(path, index, count, {})


def test_a_dictionary_of_a_table_that_is_elsewhere(rng, tmp_path):
    features = FeatureDictionary().fit({"k": list("abcdefg")}, categorical="k")
    template = DeepFM(2, 1, 4, (6,))
    rows = {name: np.zeros((features.num_features, size), "f") for name, size in (("embeddings", 4), ("w", 1))}
    export.write_scorer(template, tmp_path / "m", features=features, rows=rows, shards=2)
    assert Scorer.load(tmp_path / "m").score({"k": ["a", "z"]}).shape == (2,)
    with pytest.raises(ValueError, match="features number 8 features, but the model has 2"):
        export.write_scorer(template, tmp_path / "n", features=features)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"embeddings": (61, 4)}, r"rows must have the columns {'embeddings': 4, 'w': 1}, got {.*'w': None}"),
        ({"embeddings": (61, 5), "w": (61, 1)}, "rows must have the columns"),
        ({"embeddings": (61, 4), "w": (60, 1)}, "embeddings and w must have equally many rows, got 6[01] and 6[01]"),
        ({"embeddings": (61, 4), "w": (61, 1), "x": (61, 1)}, "rows must have the columns"),
    ],
)
def test_rows_that_do_not_fit(rows, text, tmp_path):
    rows = {name: np.zeros(shape, "f") for name, shape in rows.items()}
    with pytest.raises(ValueError, match=text):
        export.write_scorer(DeepFM(2, 3, 4, (5,)), tmp_path / "m", rows=rows)
    columns = COLUMNS["plain"]
    with pytest.raises(ValueError, match="rows are for a model over matrices"):
        export.write_scorer(DeepFM.from_columns(columns, columns), tmp_path / "m", rows=rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [None, 4])
def test_a_row_that_int8_cannot_hold_has_its_number(shards, rng, tmp_path):
    """Of the table, whatever the shard and the block."""
    for place in (0, 7, 38, 60):
        rows = {"embeddings": rng.normal(size=(61, 4)).astype("f"), "w": np.zeros((61, 1), "f")}
        rows["embeddings"][place, 1] = np.inf
        rows = {name: source(array, [5, 9]) for name, array in rows.items()}
        with pytest.raises(ValueError, match=f"row {place} of a table holds NaN or infinity"):
            export.write_scorer(DeepFM(2, 3, 4, (5,)), tmp_path / "m", "int8", rows=rows, shards=shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shards", [None, 2])
@pytest.mark.parametrize("name", ["embeddings", "w"])
@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([(30, 0)], "ended after 30 rows"),
        ([(30, 0), (32, 0)], "up to row 62"),
        ([(30, 0), (31, 1)], r"gave a block \(31, "),
        ([], "ended after 0 rows"),
    ],
)
def test_sources_that_do_not_keep_their_word(blocks, text, name, shards, table, tmp_path):
    good = {"embeddings": 4, "w": 1}
    rows = {key: Rows((61, size), "f", lambda size=size: [np.ones((61, size), "f")]) for key, size in good.items()}
    rows[name].chunks = lambda: [np.ones((count, good[name] + more), "f") for count, more in blocks]
    with pytest.raises(ValueError, match=text):
        export.write_scorer(DeepFM(2, 3, 4, (5,)), tmp_path / "m", table, rows=rows, shards=shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [None, 2])
@pytest.mark.parametrize("table", TABLES)
def test_memory_does_not_grow_with_the_table(table, shards, tmp_path):
    """Of a process that writes 100 MB of rows: its peak, mapped pages included."""
    code = f"""
import pathlib
import numpy as np
from deepfm_ops.container import Rows
from deepfm_ops.scorer import file
from deepfm_ops.scorer.rows import stored

def source(columns, rows):
    return Rows((rows, columns), "f4", lambda: (np.full((5000, columns), i, "f4") for i in range(rows // 5000)))

def write(rows, shards={shards!r}):
    for index in range(shards or 1):
        parts = [source(columns, rows).shard(index, shards or 1) for columns in (16, 1)]
        arrays = stored("fm", *parts, {table!r}, index, shards or 1)
        if shards is None:
            file.write("m", {{}}, arrays)
        else:
            file.write_shard("m", index, shards, arrays)

def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

file._PIECE = 1 << 20
write(50_000)
before = peak()
write(1_500_000)
print(peak() - before)
"""
    assert int(run_python(code, tmp_path)) < 32 << 10  # KiB
    largest = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert largest > {"float32": 100e6, "bfloat16": 50e6, "int8": 32e6}[table]
    shutil.rmtree(tmp_path)


# The parts.


def test_gathered_rows(rng):
    for rows, shards, shape in (
        (61, 4, (5, 3)),
        (61, 1, (7,)),
        (3, 5, (4, 1)),
        (1 << 12, 1 << 12, (9, 9)),
        (61, 4, (0, 3)),
    ):
        tables = [rng.normal(size=(rows, 7)).astype("f"), rng.integers(0, 99, (rows, 1)).astype("u2")]
        sharded = [scorer_rows.Sharded([table[i::shards] for i in range(shards)]) for table in tables]
        assert [(x.shape, x.dtype, x.ndim) for x in sharded] == [(x.shape, x.dtype, 2) for x in tables]
        for dtype in (np.int32, np.int64):
            indices = rng.integers(0, rows, shape, dtype)
            found, positions = scorer_rows.gathered(sharded, indices)
            assert positions.shape == shape and positions.dtype == np.int64
            for got, table in zip(found, tables, strict=True):
                np.testing.assert_array_equal(got[positions], table[indices])
                assert got.dtype == table.dtype and got.shape == (indices.size, table.shape[1])


def test_parts_that_are_not_of_one_table():
    parts = [np.zeros((3, 2), "f"), np.zeros((2, 2), "f")]
    assert scorer_rows.Sharded(parts).shape == (5, 2)
    wrong = [
        parts[::-1],
        [parts[0], np.zeros((1, 2), "f")],
        [parts[0], np.zeros((2, 2))],
        [parts[0], np.zeros((2, 3), "f")],
    ]
    for other in [*wrong, [parts[0], None], [np.zeros(3), np.zeros(3)]]:
        with pytest.raises(ValueError, match="it should have|its shards must hold the same tables"):
            scorer_rows.Sharded(other)


def test_rows_of_an_array_are_cut_into_blocks(monkeypatch, rng):
    from deepfm_ops import container

    monkeypatch.setattr(container, "_BLOCK", 100)
    array = rng.normal(size=(50, 3)).astype("f")
    rows = Rows.of(array)
    assert Rows.of(rows) is rows and max(len(block) for block in rows.blocks()) == 8
    np.testing.assert_array_equal(np.concatenate(list(rows.blocks())), array)
    for index, count in ((0, 1), (2, 7), (60, 70)):
        shard = rows.shard(index, count)
        found = np.concatenate([np.zeros((0, 3), "f"), *shard.blocks()])
        np.testing.assert_array_equal(found, array[index::count])
        assert shard.shape == found.shape


def test_a_shard_that_the_process_has_no_descriptor_for(path):
    code = f"""
import os, resource
from deepfm_ops.scorer import Scorer
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 4, most))
try:
    Scorer.load({str(path)!r})
except ValueError as error:
    print(error)
"""
    said = run_python(code)
    assert "cannot be used without its shard" in said and "Too many open files" in said
