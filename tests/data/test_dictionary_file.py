"""The file of a dictionary: written whole or not at all, and damage is found."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from unittest import mock

import numpy as np
import pytest
from crafting import ARRAYS, mutations
from roads import assert_equal, state

from deepfm_ops import FeatureDictionary
from deepfm_ops.features import DictionaryFileError, dictionary_file

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")


def test_a_full_disk_leaves_the_old_file(features, tmp_path):
    """In a file system of 64 KiB: nothing half-written, the old file as it was."""
    script = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import os, subprocess
        folder = {str(tmp_path)!r}
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
            sys.exit(77)
        from deepfm_ops.features.dictionary import FeatureDictionary
        small = FeatureDictionary().fit({{"k": ["a", "b"]}}, categorical="k")
        big = FeatureDictionary().fit({{"k": [f"value {{i}}" for i in range(5000)]}}, categorical="k")
        path = os.path.join(folder, "features.dfm")
        for old in (False, True):
            if old:
                small.save(path)
            before = open(path, "rb").read() if old else None
            try:
                big.save(path)
            except OSError as error:
                assert error.errno == 28, error
            else:
                raise AssertionError("it had room")
            assert os.listdir(folder) == ["features.dfm"] * old, os.listdir(folder)
            assert not old or open(path, "rb").read() == before
        assert FeatureDictionary.load(path).index("k", "b") == 2
    """
    command = ["unshare", "-m", sys.executable, "-c", textwrap.dedent(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fills_leaves_the_old_file(features, tmp_path, monkeypatch):
    path = tmp_path / "features.dfm"
    features.save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        features.save(path)
    assert os.listdir(tmp_path) == ["features.dfm"] and path.read_bytes() == before


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_vocabularies(tmp_path, cut):
    """Wherever a byte is another, or the file ends: an error that names the file, or what it held."""
    values = [f"value {i}" for i in range(300)]
    features = FeatureDictionary(min_count=1).fit(
        {"k": values, "n": np.arange(300.0), "t": [["x", "y"]] * 300},
        categorical="k",
        numeric={"n": "quantiles"},
        multivalued="t",
    )
    path = tmp_path / "features.dfm"
    features.save(path)
    content, wanted = path.read_bytes(), state(features)
    table = {"k": values, "n": np.arange(300.0), "t": [["x"]] * 300}
    matrices = features.transform(table)
    uses = [
        lambda f: assert_equal(f.transform(table), matrices),
        lambda f: [f.index("k", value) for value in values],
        lambda f: state(f),
        lambda f: f.update(table),
        lambda f: f.save(tmp_path / "again.dfm"),
    ]
    errors = 0
    for i in range(0, len(content), 97):
        damaged = content[:i] if cut else content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]
        path.write_bytes(damaged)
        for number, use in enumerate(uses):
            try:
                loaded = FeatureDictionary.load(path)
                used = use(loaded)
            except ValueError as error:
                assert "features.dfm" in str(error), error
                errors += 1
                continue
            assert not cut
            if number == 1:
                assert used == [features.index("k", value) for value in values]
            if number == 2:
                assert used == wanted
            if number == 4:
                assert state(FeatureDictionary.load(tmp_path / "again.dfm")) == wanted
    assert errors > len(content) // 97
    for other in (b"", b"PK", b"{}", b"[]", b"no"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"features.dfm is not a readable FeatureDictionary"):
            FeatureDictionary.load(path)


def crafted(path, manifest, arrays):
    """Writes a manifest and arrays, whatever they are, with the checksums that they have."""
    with mock.patch.object(dictionary_file, "replacing", contextlib.nullcontext):
        path.unlink(missing_ok=True)
        dictionary_file.write(path, manifest, arrays)


def survives(path, table):
    """Whether a file is refused as one, or does what a dictionary does, or says what is wrong with it."""
    try:
        loaded = FeatureDictionary.load(path)
    except DictionaryFileError as error:
        assert str(error).startswith(f"{path} is not a readable FeatureDictionary") and len(str(error)) < 2000
        return False
    for use in (
        lambda: loaded.transform(table)[0].shape,
        lambda: [loaded.values(field.name) for field in loaded.fields],
        lambda: loaded.evict(1),
        lambda: loaded.update(table),
    ):
        with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):
            use()
    return True


@pytest.fixture(name="good")
def _good():
    """(manifest, arrays, the table) of a dictionary with a column of every kind."""
    table = {"k": ["a", "b"], "t": ["x|y", "y"], "h": ["p", "q"], "n": [1.0, 2], "q": [3.0, 4], "s": [5.0, 7]}
    numeric = {"n": "identity", "q": "quantiles", "s": "standardize"}
    features = FeatureDictionary(unseen=True).fit(table, "k", numeric, "t", hash_buckets={"h": 3})
    manifest, arrays = features.state()
    return json.loads(json.dumps(manifest)), arrays, table


@pytest.mark.filterwarnings("ignore")
def test_every_value_of_a_manifest_changed(good, tmp_path):
    """With right checksums: the documented error, or a dictionary."""
    manifest, arrays, table = good
    refused = total = 0
    for _, _, mutant in mutations(manifest):
        crafted(tmp_path / "d", mutant, arrays)
        refused += not survives(tmp_path / "d", table)
        total += 1
    assert 0.7 * total < refused < total
    crafted(tmp_path / "d", manifest, arrays)
    assert survives(tmp_path / "d", table)


@pytest.mark.filterwarnings("ignore")
def test_every_array_changed(good, tmp_path):
    manifest, arrays, table = good
    for name, array in arrays.items():
        for change in ARRAYS.values():
            mutant = {**arrays, name: change(array)}
            crafted(tmp_path / "d", manifest, {k: x for k, x in mutant.items() if x is not None})
            survives(tmp_path / "d", table)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b"null", b"[]", b"{}", b"\xff", b"1" * 5000]
)
def test_manifests_that_are_none(zipped, content, good, tmp_path, monkeypatch):
    if zipped:
        monkeypatch.setattr(json, "dumps", lambda *_, **__: content.decode("latin-1"))
        crafted(tmp_path / "d", None, good[1])
        monkeypatch.undo()
    else:
        (tmp_path / "d").write_bytes(content)
    assert not survives(tmp_path / "d", good[2])


def test_entries_that_are_not_ours(good, tmp_path):
    with zipfile.ZipFile(tmp_path / "d", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", bytes(1 << 24))
        archive.comment = b"deepfm_ops features 1 sha256 " + b"0" * 64
    with pytest.raises(DictionaryFileError, match="the entry at byte 0 is compressed or encrypted: flags 0, method 8"):
        FeatureDictionary.load(tmp_path / "d")
    crafted(tmp_path / "d", good[0], good[1] | {"sums": np.zeros(3, "u8")})
    with pytest.raises(DictionaryFileError, match="entry 'sums.npy' is there twice"):
        FeatureDictionary.load(tmp_path / "d")


def test_columns_that_cannot_be_saved(tmp_path):
    features = FeatureDictionary().fit({"t": [["x"]]}, multivalued="t", max_length=(1 << 20) + 1)
    with pytest.raises(ValueError, match="matrices of 1,048,577 columns cannot be saved, 1,048,576 are the most"):
        features.save(tmp_path / "d")
