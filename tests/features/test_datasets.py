"""MovieLens-100k without a network: a small stand-in with the same layout, and everything that can go wrong."""

import hashlib
import subprocess
import zipfile

import numpy as np
import pandas as pd
import pytest

from deepfm_ops import datasets

FILES = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t4\t881250949\n2\t11\t3\t881250950\n1\t11\t5\t881250951\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tToy Story\t1995\tAnimation Children's Comedy\n11\tFargo\t1996\tCrime\n",
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "1\t24\tM\ttechnician\t85711\n2\t17\tF\tother\tT8H1N\n",
}


@pytest.fixture
def stand_in(monkeypatch):
    """The files above, as if they were the whole data set."""
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    monkeypatch.setattr(datasets, "_SHA256", sums)


@pytest.fixture
def folder(tmp_path, stand_in):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_reads_a_local_folder(folder):
    table = datasets.movielens_100k(folder)
    assert table.to_dict("records")[0] == {
        "user": 1,
        "item": 10,
        "rating": 4,
        "timestamp": 881250949,
        "gender": "M",
        "occupation": "technician",
        "age_group": "1",
        "zip_prefix": "85",
        "release_year": "1995",
        "genres": "Animation|Children's|Comedy",
        "label": 1,
    }
    assert table["label"].tolist() == [1, 0, 1] and table["age_group"].tolist() == ["1", "0", "1"]


def test_missing_and_damaged_files(folder):
    (folder / "ml-100k.item").write_text(FILES["ml-100k.item"].replace("Fargo", "Farga"))
    with pytest.raises(ValueError, match="ml-100k.item is damaged: its SHA-256 is"):
        datasets.movielens_100k(folder)
    (folder / "ml-100k.user").unlink()
    (folder / "ml-100k.item").unlink()
    with pytest.raises(FileNotFoundError, match="ml-100k.item is missing; .* must hold ml-100k.inter, ml-100k.item"):
        datasets.movielens_100k(folder)


def fake_pip(monkeypatch, files, returncode=0):
    calls = []

    def run(command, **_):
        calls.append(command)
        if files is not None:
            with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/recbole.whl", "w") as archive:
                for name, text in files.items():
                    archive.writestr(f"{datasets._FOLDER_IN_WHEEL}/{name}", text)
        return subprocess.CompletedProcess(command, returncode, "", "no such host")

    monkeypatch.setattr(datasets.subprocess, "run", run)
    return calls


def test_downloads_once_into_the_cache(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = fake_pip(monkeypatch, FILES)
    assert len(datasets.movielens_100k()) == 3
    assert len(datasets.movielens_100k()) == 3
    assert len(calls) == 1 and "--no-deps" in calls[0] and "recbole==1.2.1" in calls[0]
    assert sorted(p.name for p in (tmp_path / "deepfm_ops" / "ml-100k").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("broken", ["no network", "damaged"])
def test_a_failed_download_leaves_nothing(broken, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "no network":
        fake_pip(monkeypatch, None, returncode=1)
        expected = pytest.raises(
            RuntimeError, match="could not download MovieLens-100k .*no such host.*pass it as path"
        )
    else:
        fake_pip(monkeypatch, {**FILES, "ml-100k.user": "other"})
        expected = pytest.raises(ValueError, match="ml-100k.user is damaged")
    with expected:
        datasets.movielens_100k()
    assert list((tmp_path / "deepfm_ops").rglob("*")) == []


def test_hold_out(rng):
    table = pd.DataFrame({"user": np.repeat(np.arange(20), 15), "n": np.arange(300)}).sample(frac=1, random_state=0)
    rest, held = datasets.hold_out(table, per_user=10, seed=3)
    assert (held["user"].value_counts() == 10).all() and len(held) == 200 and len(rest) == 100
    assert set(rest["n"]).isdisjoint(held["n"])
    again = datasets.hold_out(table, per_user=10, seed=3)[1]
    assert again["n"].tolist() == held["n"].tolist()
    assert datasets.hold_out(table, per_user=10, seed=4)[1]["n"].tolist() != held["n"].tolist()
    with pytest.raises(ValueError, match="every user needs more than per_user = 15 rows, one has 15"):
        datasets.hold_out(table, per_user=15)
