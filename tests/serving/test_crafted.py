"""Files that somebody made to do harm: their checksum is right, and what they hold is not. One error says so."""

import copy
import io
import json
import re
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pytest
from crafting import ARRAYS, changed, mutations, packed

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat, container
from deepfm_ops.features import vocabulary
from deepfm_ops.scorer import Scorer, ScorerFileError
from deepfm_ops.scorer import file as scorer_file

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
DOCUMENTED = (IndexError, KeyError, TypeError, ValueError)  # of `Scorer.score`
TABLE = {"user": ["ann", "bob", None], "age": [0.3, 0.5, None], "n": [1.0, 2, 3], "tags": ["a|b", "b", None]}
TABLE |= {"city": ["Rome", "Oslo", "Bern"], "income": [1.0, 5, 9]}


def sealed(path, content, version=scorer_file.FORMAT):
    """Writes a zip's bytes as a scorer's file, whatever they are, with the digest that they have, and returns it."""
    digest = scorer_file._digest(content[:-2])
    comment = f"deepfm_ops scorer {version} sha256 {digest}".encode()
    path.write_bytes(content[:-2] + struct.pack("<H", len(comment)) + comment)
    return digest


def sealed_shards(path, manifest, arrays, shards):
    """Writes a file and its shards, each (manifest, arrays), that name each other rightly."""
    digests = []
    for index, shard in enumerate(shards):
        digests.append(sealed(path.with_name("draft"), packed(*shard), scorer_file.SHARDED))
        path.with_name("draft").rename(scorer_file.shard_path(path, index, len(shards), digests[-1]))
    named = {**manifest, "shards": {"name": path.name, "digests": digests}}
    sealed(path, packed(named, arrays), scorer_file.SHARDED)


@pytest.fixture(scope="module", name="files")
def _files(tmp_path_factory):
    """{name: (path, what it scores)}."""
    folder = tmp_path_factory.mktemp("crafted")
    numeric = {"age": "standardize", "n": "quantiles", "income": "log1p"}
    features = FeatureDictionary(2, unseen=True).fit(
        pd.DataFrame(TABLE), ["user"], numeric, ["tags"], hash_buckets={"city": 4}
    )
    options = {"field_sizes": features.field_sizes, "hidden_units": (5, 3)}
    deep = DeepFM(features.num_features, features.num_fields, 4, **options)
    columns = [
        SparseFeat("id", 10, 4),
        SparseFeat("city", 7, 4, dtype="string", vocabulary={"Rome": 1}),
        VarLenSparseFeat(SparseFeat("tags", 20, 4, use_hash=True, dtype="string"), 2, length_name="count"),
        VarLenSparseFeat(SparseFeat("rated", 9, 4), 3, "max"),
        VarLenSparseFeat(SparseFeat("liked", 9, 6, group_name="b"), 3, "sum", weight_name="likes"),
        SparseFeat("shop", 9, 6, group_name="b"),
        DenseFeat("age", 2, embedding_dim=4),
        DenseFeat("income"),
    ]
    inputs = {"id": [1, 9], "city": ["Rome", "x"], "tags": [["a", "b"], ["c"]], "count": [2, 1], "rated": [[1], [2, 3]]}
    inputs |= {"liked": [[1, 2, 3]] * 2, "likes": [[1.0, 2, 3]] * 2, "shop": [1, 2], "age": [[1.0, 2]] * 2}
    inputs |= {"income": [1.0, 2]}
    grouped = DeepFM.from_columns(columns, columns, fm_group=["default_group", "b"], dnn_hidden_units=(5, 3))
    indices = np.arange(9).reshape(3, 3)
    deepfm_ops.export_scorer(deep, folder / "features", features=features)
    deepfm_ops.export_scorer(deep, folder / "int8", "int8", features=features)
    deepfm_ops.export_scorer(grouped, folder / "columns")
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, use_deep=False), folder / "fm", "bfloat16")
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (5,)), folder / "shards", shards=3)
    return {
        "features": (folder / "features", TABLE),
        "int8": (folder / "int8", TABLE),
        "columns": (folder / "columns", inputs),
        "fm": (folder / "fm", indices),
        "shards": (folder / "shards", indices),
    }


@pytest.fixture(name="small")
def _small(files):
    """(manifest, arrays) of the FM."""
    return scorer_file.read(files["fm"][0])[:2]


def survives(path, scored):
    """Whether a file is refused as one, or scores like one."""
    try:
        loaded = Scorer.load(path)
    except ScorerFileError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 2000
        return False
    rows = len(scored) if isinstance(scored, np.ndarray) else len(scored[next(iter(scored))])
    try:
        assert loaded.score(scored).shape == (rows,)
        if isinstance(scored, np.ndarray):
            splits = np.arange(0, scored.size + 1)
            loaded.score(scored.ravel(), bag_splits=splits)
            loaded.score(scored.ravel(), row_splits=splits[:: scored.shape[1]])
    except DOCUMENTED:
        pass
    return True


@pytest.fixture(name="parts", params=["features", "int8", "columns", "fm", "shards"])
def _parts(request, files, tmp_path):
    """(kind, what is scored, manifest, arrays) of a file that is good; its shards lie in `tmp_path`."""
    source, scored = files[request.param]
    manifest, arrays, _ = scorer_file.read_alone(source, source)
    for shard in source.parent.glob(f"{source.name}-*"):
        shutil.copy(shard, tmp_path)
    return request.param, scored, manifest, arrays


@pytest.fixture(name="sharded")
def _sharded(files):
    """(manifest, arrays, [(manifest, arrays) of each shard])."""
    path = files["shards"][0]
    main, *shards = [scorer_file.read_alone(x, x)[:2] for x in (path, *sorted(path.parent.glob("shards-*")))]
    return *main, shards


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:column")
def test_every_value_of_a_manifest_changed(parts, tmp_path):
    """Whatever stands anywhere in the manifest: the documented error, or scores."""
    kind, scored, manifest, arrays = parts
    manifest = json.loads(json.dumps(manifest))
    refused = total = 0
    for path, odd, mutant in mutations(manifest):
        if kind == "int8" and path[:1] == ("features",):  # as without
            continue
        sealed(tmp_path / "m", packed(mutant, arrays))
        try:
            refused += not survives(tmp_path / "m", scored)
        except Exception as error:
            error.add_note(f"{path}: {odd!r:.100}") if hasattr(error, "add_note") else None
            raise
        total += 1
    assert 0.7 * total < refused < total
    sealed(tmp_path / "m", packed(manifest, arrays))
    assert survives(tmp_path / "m", scored)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:column")
def test_every_array_changed(parts, tmp_path):
    """Also indices in the dictionary's slots that the table does not have."""
    _, scored, manifest, arrays = parts
    for name, array in arrays.items():
        for change in ARRAYS.values():
            other = change(array)
            mutant = {**arrays, name: other} if other is not None else {k: arrays[k] for k in arrays if k != name}
            sealed(tmp_path / "m", packed(manifest, mutant))
            survives(tmp_path / "m", scored)


def test_every_value_and_array_of_a_shard_changed(sharded, files, tmp_path):
    """Shards that their file names rightly, by digests that are right."""
    manifest, arrays, shards = sharded
    inner, held = shards[1]
    mutants = [(mutant, held) for _, _, mutant in mutations(inner)]
    for name, array in held.items():
        others = [(key, change(array)) for key, change in ARRAYS.items()]
        mutants += [(inner, {**held, name: other}) for _, other in others if other is not None]
        mutants.append((inner, {key: held[key] for key in held if key != name}))
    mutants += [(inner, {**held, "bias": np.zeros((7, 1), "f")}), (inner, {**held, "more": held["fm_rows"]})]
    survivors = []
    for number, mutant in enumerate(mutants):
        folder = tmp_path / str(number)
        folder.mkdir()
        sealed_shards(folder / "m", manifest, arrays, [shards[0], mutant, shards[2]])
        if survives(folder / "m", files["shards"][1]):
            survivors.append(mutant)
        shutil.rmtree(folder)
    assert len(mutants) > 60 and all(mutant == inner for mutant, _ in survivors)
    assert {name for _, other in survivors for name in held if other[name].shape != held[name].shape} == set()
    sealed_shards(tmp_path / "m", manifest, arrays, shards)
    assert survives(tmp_path / "m", files["shards"][1])


@pytest.mark.parametrize(
    ("shards", "text"),
    [
        ([], "it cannot have shards"),
        ({}, "it cannot have shards"),
        ({"name": "m", "digests": []}, "it cannot have shards"),
        ({"name": "m", "digests": ["a" * 64] * 5000}, "a name and 1 to 4,096 digests"),
        ({"name": "m", "digests": ["A" * 64]}, "it cannot have shards"),
        ({"name": "m", "digests": ["../../etc/passwd" * 4]}, "it cannot have shards"),
        ({"name": "../m", "digests": ["a" * 64]}, "it cannot have shards"),
        ({"name": "/etc/m", "digests": ["a" * 64]}, "it cannot have shards"),
        ({"name": "", "digests": ["a" * 64]}, "it cannot have shards"),
        ({"name": "m\n", "digests": ["a" * 64]}, "it cannot have shards"),
        ({"name": "m", "digests": ["a" * 64], "more": 1}, "it cannot have shards"),
        ({"name": ".", "digests": ["a" * 64]}, "does not hold a model"),
        ({"name": "..", "digests": ["a" * 64]}, "without its shard .*FileNotFoundError"),
        ({"name": "m" * 255, "digests": ["a" * 64]}, "without its shard .*File name too long"),
        ({"name": "\ud800", "digests": ["a" * 64]}, "without its shard .*UnicodeEncodeError"),
        ({"name": "m", "digests": ["a" * 64]}, "without its shard .*FileNotFoundError"),
    ],
    ids=range(16),
)
def test_shards_that_no_file_has(shards, text, sharded, tmp_path):
    manifest, arrays, _ = sharded
    sealed(tmp_path / "m", packed({**manifest, "shards": shards}, arrays), scorer_file.SHARDED)
    refuses(tmp_path / "m", text, 1 << 22)
    assert deepfm_ops.export_scorer(DeepFM(20, 3, 4, use_deep=False), tmp_path / "m") is None  # over it


def test_shards_that_hold_something_else(sharded, tmp_path):
    """Arrays of their file, no array, one that says to have a row more; or a file that is its own shard."""
    manifest, arrays, shards = sharded
    rows = [held["fm_rows"] for _, held in shards]
    for names, change, text in [
        (("bias",), lambda i: np.zeros((1, 1), "f"), "array 'bias' is in its shards too"),
        ((), None, "array 'fm_rows' must be float32 .*, got none"),
        (("fm_rows",), lambda i: rows[i], "array 'fm_weights' must be float32 .*, got none"),
        (("fm_rows", "fm_weights"), lambda i: rows[i], r"array 'fm_weights' must be float32 \(20, 1\), got"),
        (("fm_rows", "fm_weights"), lambda i: rows[i][:1], r"must fit \(20, 3\)|fm_weights"),
        (("fm_rows",), lambda i: rows[2 - i], "shard 0 has float32 .*, it should have"),
        (("fm_rows",), lambda i: rows[i].astype("f8"), "'fm_rows' is no table, but of float64"),
        (("fm_rows",), lambda i: rows[i].view("u1"), "int8, which holds them|weights"),
        (("kernel_1", "fm_rows", "fm_weights"), lambda i: rows[i], "'fm_weights' must be"),
    ]:
        made = [(inner, {name: change(i) for name in names}) for i, (inner, _) in enumerate(shards)]
        sealed_shards(tmp_path / "m", manifest, arrays, made)
        refuses(tmp_path / "m", text)
    apart = [(inner, {"fm_rows": held["fm_rows"]}) for inner, held in shards]
    weights = np.zeros((20, 1), "f")
    sealed_shards(tmp_path / "m", manifest, {**arrays, "fm_weights": weights}, apart)
    refuses(tmp_path / "m", "table 'fm_rows' and its weights are not in the same files")
    apart = [(inner, {"fm_weights": held["fm_weights"]}) for inner, held in shards]
    sealed_shards(tmp_path / "m", manifest, {**arrays, "fm_rows": np.zeros((20, 4), "f")}, apart)
    refuses(tmp_path / "m", "does not hold a model")
    deep = {name: array for name, array in arrays.items() if name != "deep"}
    apart = [
        (inner, {**held, "deep": np.zeros((size, 1), "f")})
        for (inner, held), size in zip(shards, (2, 2, 1), strict=True)
    ]
    sealed_shards(tmp_path / "m", manifest, deep, apart)
    refuses(tmp_path / "m", "does not hold a model")


def header(descr="'<f4'", fortran="False", shape="(20, 4)", version=(1, 0), text=None):
    """The first bytes of an .npy."""
    text = text or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    text = text.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text


HEADERS = {
    "object": header("'|O'"),
    "fortran": header(fortran="True"),
    "structured": header("[('a', '<f4')]"),
    "void": header("'|V4'"),
    "huge": header(shape="(4611686018427387904, 4611686018427387904)"),
    "overflowing": header(shape="(4294967296, 4294967296)"),
    "large": header(shape="(20000000000, 4)"),
    "huge and none": header(shape="(4611686018427387904, 0)"),
    "negative": header(shape="(-20, -4)"),
    "one more": header(shape="(21, 4)"),
    "one less": header(shape="(19, 4)"),
    "not whole": header(shape="(20.0, 4)"),
    "many": header(shape="(" + "1, " * 60 + ")"),
    "version 2": header(version=(2, 0)),
    "version 9": header(version=(9, 0)),
    "unclosed": header(text="{'descr': ((((" + "(" * 300),
    "token": header(text="{'descr': '''"),
    "backslash": header(text="\\"),
    "code": header(text="__import__('os').abort()"),
    "null": header(text="\0" * 100),
    "no magic": b"",
    "cut": header()[:20],
    "length": header()[:8] + b"\xff\xff" + header()[10:],
    "unaligned": header().rstrip(b"\n") + b"\n\n",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_arrays_that_are_not_ours(kind, small, tmp_path):
    buffer, (manifest, arrays) = io.BytesIO(), small
    data = arrays["fm_rows"].tobytes()
    with zipfile.ZipFile(buffer, "w") as archive:
        container.write_manifest(archive, manifest)
        container.write_entry(archive, "fm_rows.npy", data, HEADERS[kind])
    sealed(tmp_path / "m", buffer.getvalue())
    refuses(tmp_path / "m", "no .npy array of this package's form|does not fit")


def refuses(path, text, limit=1 << 20):
    """The file's error says so, and little memory was needed to know."""
    tracemalloc.start()
    try:
        with pytest.raises(ScorerFileError, match=text):
            Scorer.load(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_entries_that_are_not_ours(small, tmp_path):
    """As zip tools may write them, or nobody would."""
    manifest, arrays = json.dumps(small[0]).encode(), small[1]
    good = packed(manifest, arrays)

    def written(*entries, compression=zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, content in entries:
                archive.writestr(name, content)
        return buffer.getvalue()

    def named(name):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            container.write_entry(archive, "manifest.json", manifest)
            container.write_entry(archive, name, b"")
        return buffer.getvalue()

    def patched(place, content, entry=0):
        at = [match.start() for match in re.finditer(b"PK\x03\x04", good)][entry] + place
        return good[:at] + content + good[at + len(content) :]

    second = good.index(b"PK\x03\x04", 4)
    size_block = 26 + 4 + len("manifest.json") + struct.unpack("<H", good[28:30])[0] - 16
    bomb = np.zeros(50_000_000, "u1").tobytes()
    cases = {
        "compressed": (written(("manifest.json", bomb), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        "compressed later": (good[:second] + written(("a.npy", bomb), compression=8), "compressed or encrypted"),
        "no zip64": (written(("manifest.json", manifest)), "no size of 64 bits"),
        "twice": (packed(manifest, arrays)[:second] * 2 + good[second:], "has the name 'manifest.json'"),
        "array twice": (good[: good.index(b"PK\x01\x02")] + good[second:], "is there twice"),
        "no manifest": (good[second:], "entry 0 has the name 'bias.npy'"),
        "empty": (written(), "at byte 0 there is no entry"),
        "between": (good[:second] + b"\0" * 64 + good[second:], "there is no entry, and no zip's directory"),
        "no directory": (good[: good.index(b"PK\x01\x02")] + good[-22:], "there is no entry, and no zip's directory"),
        "encrypted": (patched(6, b"\x01\x00"), "compressed or encrypted: flags 1, method 0"),
        "streamed": (patched(6, b"\x08\x00", 1), "flags 8"),
        "bzip2": (patched(8, b"\x0c\x00", 1), "method 12"),
        "huge": (patched(size_block, struct.pack("<QQ", 2**63, 2**63)), "which the file does not have"),
        "past the end": (patched(size_block, struct.pack("<QQ", len(good), len(good))), "which the file does not have"),
        "two sizes": (patched(size_block, struct.pack("<QQ", 10, 11)), "has 10 bytes, stored as 11"),
        "shorter": (patched(size_block, struct.pack("<QQ", 10, 10)), "there is no entry"),
        "long name": (patched(26, b"\xff\xff"), "at byte 0 there is|has no size|which the file|can't decode"),
    }
    for name in ("/etc/passwd.npy", "../a.npy", "a/b.npy", "..\\a.npy", "a\nb.npy", "a", ".npy", "a.npz", "x" * 400):
        cases[name] = named(name), "entry 1 has the name"
    for name, (content, text) in cases.items():
        sealed(tmp_path / "m", content)
        try:
            refuses(tmp_path / "m", text)
        except BaseException as error:
            raise AssertionError(name) from error
    sealed(tmp_path / "m", good)
    Scorer.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "text", "limit"),
    [
        (b"[" * 100_000, "lists and objects more than 16 deep", 1 << 21),
        (b"[" * 100_000 + b"]" * 100_000, "lists and objects more than 16 deep", 1 << 21),
        (b'{"info":' * 900 + b"1" + b"}" * 900, "lists and objects more than 16 deep", 1 << 21),
        (b"[" * 17 + b"]" * 17, "lists and objects more than 16 deep", 1 << 20),
        (b"", "Expecting value", 1 << 20),
        (b"\xff\xff", "can't decode", 1 << 20),
        (b"null", "its JSON is null", 1 << 20),
        (b"[]", "the manifest must be an object", 1 << 20),
        (b"1" * 5000, "Exceeds the limit", 1 << 20),
        (b'{"info": {}, "plan": {}, "features": 1e999}', "the manifest cannot have features inf", 1 << 20),
    ],
    ids=range(10),
)
def test_manifests_that_are_none(content, text, limit, small, tmp_path):
    sealed(tmp_path / "m", packed(content, small[1]))
    refuses(tmp_path / "m", text, limit)


def test_a_manifest_is_not_larger_than_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer_file, "LARGEST_MANIFEST", 5000)
    with pytest.raises(ValueError, match="the manifest has 6,0.. bytes, 5,000 is the most"):
        scorer_file.write(tmp_path / "m", {"a": "x" * 6000}, {})
    sealed(tmp_path / "m", packed({"a": "x" * 6000}, {}))
    refuses(tmp_path / "m", "the manifest has 6,0.. bytes, 5,000 is the most")


@pytest.mark.parametrize(
    ("kind", "place", "value", "text"),
    [
        ("fm", ("info", "num_columns"), 4, r"must fit \(20, 4\)"),
        ("fm", ("plan", "lookups", 0, "field_sizes"), [1, 1, 2], r"must fit \(20, 3\)"),
        ("fm", ("plan", "lookups", 0, "field_sizes"), [2**62, -(2**62), 3], "cannot have field_sizes"),
        ("fm", ("plan", "lookups", 0, "table"), "nowhere", "array 'nowhere' must be float32 .*, got none"),
        ("fm", ("plan", "lookups", 0, "weights"), "fm_rows", r"array 'fm_rows' must be uint16 \(20, 1\)"),
        ("fm", ("plan", "second_order"), [1], "there is no second order 1"),
        ("fm", ("plan", "num_hidden"), 10**9, "hidden layers"),
        ("features", ("plan", "num_hidden"), 1, "array 'deep' must be float32"),
        ("features", ("plan", "activation"), "exec", "there is no activation 'exec'"),
        ("features", ("features", "fields", 0, "start"), 2**31, "field 1 cannot have start"),
        ("features", ("features", "fields", 1, "buckets"), 2**31 - 1, "field 2 cannot have start"),
        ("features", ("features", "fields", 5, "size"), 2**40, "cannot have size 1099511627776"),
        ("features", ("features", "fields", 0, "number"), 2, "field 1 cannot have number 2"),
        ("columns", ("plan", "encoders", 0, 0, "vocabulary_path"), "/dev/zero", "has one of .'vocabulary_path'"),
        ("columns", ("plan", "encoders", 0, 2, "maxlen"), 2**40, "the encoders make 1,099,511,.* pairs"),
        ("columns", ("plan", "inputs", "age"), [[2**20, 2**20], "float32"], "a sample's inputs have .* cells"),
        ("columns", ("plan", "inputs", "age"), [[3], "float32"], "input 'age' must be"),
        ("columns", ("plan", "lookups", 0, "encoder"), 9, "has encoder 9"),
        ("columns", ("plan", "linear_dense"), ["city"], "linear_dense must name inputs of numbers"),
    ],
)
def test_what_is_wrong_is_said(kind, place, value, text, files, tmp_path):
    manifest, arrays, _ = scorer_file.read(files[kind][0])
    manifest = changed(json.loads(json.dumps(manifest)), place, lambda owner, key: owner.__setitem__(key, value))
    sealed(tmp_path / "m", packed(manifest, arrays))
    refuses(tmp_path / "m", text)


def test_embeddings_are_not_larger_than_memory(small, tmp_path):
    """A million fields of one wide row are a small file, and a sample of four terabytes."""
    manifest, arrays = copy.deepcopy(small[0]), {**small[1], "fm_rows": np.zeros((20, 1 << 12), "u2")}
    manifest["info"]["num_columns"] = 1 << 18
    manifest["plan"]["lookups"][0]["field_sizes"] = [1] * (1 << 18)
    sealed(tmp_path / "m", packed(manifest, arrays))
    refuses(tmp_path / "m", "embeddings have 1,073,741,824 numbers, 67,108,864 are the most", 1 << 25)


def test_reload_keeps_the_model_of_a_crafted_file(files, small, tmp_path):
    loaded = Scorer.load(files["fm"][0])
    before = loaded.digest
    sealed(tmp_path / "m", packed(b"[" * 100_000, small[1]))
    with pytest.raises(ScorerFileError, match="does not hold a model"):
        loaded.reload(tmp_path / "m")
    assert loaded.digest == before and loaded.path == files["fm"][0]


def test_files_of_format_1(files, tmp_path):
    """Whose dictionaries are lists, and whose columns lie in the manifest's lists."""
    manifest, arrays, _ = scorer_file.read(files["fm"][0])
    fields = [{"name": "k", "kind": "categorical", "size": 1, "start": 1, "values": list("abcdefghi"), "dtype": "text"}]
    fields += [{"name": "n", "kind": "numeric", "size": 1, "start": 10, "values": ["n"], "dtype": None}]
    tags = [str(i) for i in range(9)]
    fields += [{"name": "t", "kind": "multivalued", "size": 1, "start": 11, "values": tags, "dtype": "text"}]
    manifest["features"] = {"format": 2, "separator": "|", "nonfinite": "error", "fields": fields}
    manifest["info"] |= {"inputs": "features", "kinds": {field["name"]: field["kind"] for field in fields}}
    sealed(tmp_path / "m", packed(manifest, arrays), version=1)
    loaded, plain = Scorer.load(tmp_path / "m"), Scorer.load(files["fm"][0])
    expected = plain.score([[2, 10, 13]], [[1, 0.5, 1]])
    np.testing.assert_array_equal(loaded.score({"k": ["b"], "n": [0.5], "t": ["2"]}), expected)


def test_names_outside_of_ascii_are_aligned(tmp_path):
    """They are longer in bytes than in characters."""
    array = np.arange(5, dtype="f4")
    scorer_file.write(tmp_path / "m", {"a": 1}, {"größe": array, "東京": array})
    _, arrays, _ = scorer_file.read(tmp_path / "m")
    for name in ("größe", "東京"):
        np.testing.assert_array_equal(arrays[name], array)


def test_a_text_of_counts_that_unpacks_to_too_much(files, tmp_path):
    import base64
    import zlib

    manifest, arrays, _ = scorer_file.read(files["fm"][0])
    fields = [{"name": "k", "kind": "categorical", "size": 1, "start": 1, "values": ["a"], "dtype": "text"}]
    bomb = base64.b64encode(zlib.compress(bytes(1 << 26), 9)).decode()
    manifest["features"] = {"format": 2, "separator": "|", "nonfinite": "error", "fields": fields, "counts": bomb}
    sealed(tmp_path / "m", packed(manifest, arrays))
    refuses(tmp_path / "m", "cut off, or more than 2", 1 << 22)


def test_slots_of_another_writer(files):
    """Indices that the dictionary does not have are found where they are used."""
    features = FeatureDictionary().fit({"k": ["a", "b"]}, categorical="k")
    arrays = {name: np.array(array) for name, array in features.vocabulary.arrays().items()}
    slots = arrays["slots"].view(vocabulary.SLOT)
    slots["id"][slots["key"] != 0] = 99
    other = FeatureDictionary.from_state(features.state()[0], arrays)
    assert other.index("k", "a") == 99
    with pytest.raises(ValueError, match="a value has index 99, there are 3"):
        other.evict(1) or other.update({"k": ["c"]})
