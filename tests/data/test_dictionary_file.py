"""The file of a dictionary: written whole or not at all, and damage is found."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from roads import assert_equal, state

from deepfm_ops import FeatureDictionary

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
