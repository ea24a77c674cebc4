"""Files and tables as sources: what is read, what is refused, and what is left out."""

import contextlib
import copy
import gzip
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from deepfm_ops import DeepFM, FeatureDictionary, data
from deepfm_ops.data import parquet_files, text_files

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
FIELDS = {"categorical": "city", "numeric": "age", "multivalued": "tags", "label": "label"}
HEAD = "label,city,age,tags\n"
LINES = ["1,Rome,0.5,war|drama\n", "0,Oslo,,war\n", '1,"a ""b"", c",7,ü|drama\n', "0,007,-3.25,\n", "1,7.0,1e3,x\n"]
TEXT = HEAD + "".join(LINES)
TABLE = {
    "label": [1, 0, 1, 0, 1],
    "city": ["Rome", "Oslo", 'a "b", c', "007", "7.0"],
    "age": [0.5, None, 7.0, -3.25, 1000.0],
    "tags": ["war|drama", "war", "ü|drama", None, "x"],
}
LISTS = [["war", "drama"], ["war"], ["ü", "drama"], None, ["x"]]
ENDINGS = ["", ".gz", ".zst"]


@pytest.fixture(scope="module", name="features")
def _features():
    return FeatureDictionary().fit(TABLE, **FIELDS)


@pytest.fixture(scope="module", name="model")
def _model(features):
    model = DeepFM.from_features(features, embedding_dim=2, hidden_units=(2,))
    model.compile()
    return model


@pytest.fixture(name="write")
def _write(tmp_path):
    def write(content, name="a.csv"):
        """A file of a text or bytes, compressed as its name says, or of a table; its path."""
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path, row_group_size=2)
            return str(path)
        content = content.encode() if isinstance(content, str) else content
        kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.OSFile(str(path), "wb") as file:
            if kind is None:
                file.write(content)
            else:
                with pa.CompressedOutputStream(file, kind) as stream:
                    stream.write(content)
        return str(path)

    return write


ROADS = ["fit", "update", "transform", "stream"]
ALL_ROADS = [*ROADS, "model.fit", "model.evaluate", "model.predict"]


def take(road, features, source, model=None, fields=FIELDS, **options):
    """(rows, records that were skipped) of a source, on a road."""
    if road == "fit":
        fresh = FeatureDictionary().fit(source, **fields, **options)
        return fresh.num_samples, fresh.num_skipped
    fresh = copy.copy(features)
    if road == "update":
        fresh.update(source, **options)
        return fresh.num_samples - features.num_samples, fresh.num_skipped
    if road == "transform":
        return len(fresh.transform(source, **options)[0]), fresh.num_skipped
    stream = features.stream(source, 2, **options)
    if road == "stream":
        rows = sum(len(batch[1]) for batch in stream)
    elif road == "model.fit":
        model.fit(stream, verbose=0)
        rows = None
    elif road == "model.evaluate":
        model.evaluate(stream, verbose=0)
        rows = None
    else:
        rows = len(model.predict(stream, verbose=0))
    return rows, stream.num_skipped


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def state(features):
    """What a dictionary holds, to be compared."""
    content = features.to_config()
    del content["arrays"]
    arrays = features.vocabulary.arrays()
    names = [features.name(i) for i in range(features.num_features)]
    return content, names, {name: arrays[name].tolist() for name in ("columns", "counts", "changed")}


# What is read.


def forms(write):
    """{form: the rows of TABLE in it}."""
    frame, arrow = pd.DataFrame(TABLE), pa.table(TABLE)
    lists = pa.table({**TABLE, "tags": LISTS})
    coded = arrow.set_column(1, "city", arrow["city"].dictionary_encode())
    numbers = pa.array(TABLE["age"], pa.float64()).cast(pa.decimal128(9, 3))
    typed = pa.table(
        {
            "label": pa.array(TABLE["label"]).cast(pa.bool_()),
            "city": pa.array(TABLE["city"], pa.large_string()),
            "age": numbers,
            "tags": pa.array(LISTS, pa.large_list(pa.large_string())),
        }
    )
    views = arrow.set_column(1, "city", arrow["city"].cast(pa.string_view()))
    views = views.set_column(3, "tags", pa.array(TABLE["tags"], pa.string()).dictionary_encode())
    views = views.set_column(2, "age", pa.array(["0.5", None, "7", "-3.25", "1e3"]))
    return {
        "pandas": frame,
        "polars": pl.DataFrame(TABLE),
        "arrow": arrow,
        "dict": TABLE,
        "csv": write(TEXT),
        "csv.gz": write(TEXT, "b.csv.gz"),
        "csv.zst": write(TEXT, "b.csv.zst"),
        "tsv": write(frame.to_csv(sep="\t", index=False), "a.tsv"),
        "crlf": write(TEXT.replace("\n", "\r\n"), "crlf.csv"),
        "no final newline": write(TEXT[:-1], "final.csv.gz"),
        "no final newline, crlf": write(TEXT.replace("\n", "\r\n")[:-2], "final.csv"),
        "BOM": write(b"\xef\xbb\xbf" + TEXT.encode(), "bom.csv"),
        "blank lines": write("\n\r\n" + TEXT.replace("\n", "\n\n") + "\n\n", "blank.csv"),
        "blank lines, gz": write("\n\n" + TEXT.replace("\n", "\n\r\n"), "blank.csv.gz"),
        "quoted": write(frame.to_csv(index=False, quoting=1), "quoted.csv"),
        "no header": data.files(write("".join(LINES), "bare.csv"), names=list(TABLE)),
        "BOM, no header": data.files(write("\ufeff" + "".join(LINES), "bare2.csv"), names=list(TABLE)),
        "other delimiter": data.files(write(frame.to_csv(sep=";", index=False), "semi.csv"), delimiter=";"),
        "parquet": write(arrow, "a.parquet"),
        "parquet, lists": write(lists, "lists.parquet"),
        "parquet, coded": write(coded, "coded.parquet"),
        "parquet, typed": write(typed, "typed.parquet"),
        "parquet, views": write(views, "views.parquet"),
        "parquet.gz": _zipped(write(arrow, "z.parquet")),
        "chunks of pandas": [frame[:2], frame[2:]],
        "chunks of arrow": (arrow[:3], arrow[3:]),
        "files": [
            write(HEAD + "".join(LINES[:2]), "c/1.csv.gz"),
            pathlib.Path(write(HEAD + "".join(LINES[2:]), "c/2.csv")),
        ],
        "columns in another order": [
            write(HEAD + "".join(LINES[:2]), "d/1.csv"),
            write(frame[2:][["tags", "age", "label", "city"]].assign(more=1).to_csv(index=False), "d/2.csv"),
        ],
        "a file with only a header": [write(TEXT, "e/1.csv"), write(HEAD, "e/2.csv"), write(HEAD[:-1], "e/3.csv")],
        "a Parquet file without rows": [write(arrow[:0], "e/1.parquet"), write(arrow, "e/2.parquet")],
    }


def _zipped(path):
    pathlib.Path(path + ".gz").write_bytes(gzip.compress(pathlib.Path(path).read_bytes()))
    return path + ".gz"


def test_forms(features, write):
    """The same rows are the same ids and values, in whatever they come."""
    indices, values = features.transform(TABLE)
    for name, source in forms(write).items():
        fitted = FeatureDictionary().fit(source, **FIELDS)
        assert state(fitted) == state(features), name
        assert_equal(fitted.transform(source), (indices, values))
        for (got, labels), rows in zip(features.stream(source, 2), ([0, 1], [2, 3], [4]), strict=True):
            assert_equal(got, (indices[rows], values[rows]))
            assert labels.tolist() == [TABLE["label"][row] for row in rows], name
        updated = copy.copy(features).update(source)
        assert updated.num_features == features.num_features and updated.num_samples == 10, name
        np.testing.assert_array_equal(updated.counts, 2 * features.counts)


def test_chunksize(features, write):
    path = write(TEXT.replace("Oslo", "").replace("007", "x").replace("7.0", "y"))
    whole = pd.read_csv(path)
    fitted = FeatureDictionary().fit(pd.read_csv(path, chunksize=2), **FIELDS)
    assert state(fitted) == state(FeatureDictionary().fit(whole, **FIELDS))
    assert_equal(fitted.transform(pd.read_csv(path, chunksize=2)), fitted.transform(whole))
    stream = fitted.stream(pd.read_csv(path, chunksize=2), 3)
    assert [len(labels) for _, labels in stream] == [3, 2]
    with pytest.raises(ValueError, match="can be passed over once"):
        list(stream)


def test_cells_of_text_stay_text(write):
    path = write('k,n\n7,1\n7.0,2\n007,3\n"7",4\nTrue,5\n 7,6\nnan,7\n')
    features = FeatureDictionary().fit(path, categorical="k", numeric="n")
    assert sorted(features.values("k")) == [" 7", "007", "7", "7.0", "True", "nan"]
    assert features.counts[features.index("k", "7")] == 2


def test_missing_numbers(write):
    """The marks of nothing are missing in a column of numbers, not zero."""
    marks = ["", "NA", "NaN", "null", "None", "\\N", "-", " ", '""']
    path = write("k,n\n" + "".join(f"a,{mark}\n" for mark in marks) + "a,0\na, 2 \na,+3\na,1e-400\n")
    indices, values = FeatureDictionary().fit(path, categorical="k", numeric="n").transform(path)
    assert indices[: len(marks), 1].tolist() == [0] * len(marks)
    assert (indices[len(marks) :, 1] > 0).all() and values[len(marks) :, 1].tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_once_at_every_size_of_piece(features, write, monkeypatch, ending):
    text = "\n" + TEXT.replace("\n", "\r\n").replace("0,Oslo", "\r\n0,Oslo")
    for number, content in enumerate([TEXT, TEXT[:-1], text, "\ufeff" + text]):
        path, wanted = write(content, f"{number}.csv{ending}"), features.transform(TABLE)
        for size in range(1, 201, 1 if number < 2 else 7):
            monkeypatch.setattr(text_files, "PIECE", size)
            monkeypatch.setattr(text_files, "BLOCK", 1 + size % 90)
            assert_equal(features.transform(path), wanted)


def test_place_of_a_bad_record_at_every_size_of_piece(features, write, monkeypatch):
    text = "\n" + HEAD + LINES[0] + "\n" + LINES[1] + "1,a\n" + "".join(LINES[2:4]) + "1,a,old,b\n" + LINES[4]
    for ending in ENDINGS:
        path = write(text, f"a.csv{ending}")
        for size in range(1, 201, 3):
            monkeypatch.setattr(text_files, "PIECE", size)
            for name, options in {"line 6: it has 2 columns, not 4": {}, "line 9, column 'age'": {}}.items():
                if name.startswith("line 9"):
                    path_here = write(text.replace("1,a\n", "\n"), f"b.csv{ending}")
                    with pytest.raises(ValueError, match=f"b.csv{ending}, {name}: 'old' is no number"):
                        features.transform(path_here, **options)
                else:
                    with pytest.raises(ValueError, match=f"a.csv{ending}, {name}"):
                        features.transform(path, **options)
            fresh = copy.copy(features)
            assert_equal(fresh.transform(path, on_bad="skip"), features.transform(TABLE))
            assert fresh.num_skipped == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_row_groups_and_chunks(features, write, monkeypatch, rows):
    monkeypatch.setattr(parquet_files, "ROWS", rows)
    path = write(pa.table(TABLE), "a.parquet")  # row groups of 2
    assert_equal(features.transform(path), features.transform(TABLE))
    for kind in (
        pa.list_(pa.string()),
        pa.list_(pa.string(), 2),
        pa.large_list(pa.dictionary(pa.int32(), pa.string())),
    ):
        tags = pa.array([["war", "drama"], ["war", None], ["ü", "drama"], None, ["x", None]], kind)
        path = write(pa.table({**TABLE, "tags": tags}), "lists.parquet")
        assert_equal(features.transform(path), features.transform(TABLE))
    nested = pa.array([[["war"], [], ["drama"]], [["war"]], [["ü", "drama"], None], None, [["x"]]])
    assert_equal(features.transform(write(pa.table({**TABLE, "tags": nested}), "n.parquet")), features.transform(TABLE))
    years = {"t": [[1999, 7], None, [7, None], [], [2**40]]}
    numbers = FeatureDictionary().fit(years, multivalued="t")
    assert_equal(numbers.transform(write(pa.table(years), "i.parquet")), numbers.transform(years))
    floats = {"t": [[0.5, 7.0], None, [7.0, None], [], [1e20]]}
    numbers = FeatureDictionary().fit(floats, multivalued="t")
    assert_equal(numbers.transform(write(pa.table(floats), "f.parquet")), numbers.transform(floats))
    bad = pa.table({**TABLE, "age": ["0.5", None, "7", "old", "1e3"]})
    with pytest.raises(ValueError, match="b.parquet, row group 1, row 1, column 'age': 'old' is no number"):
        features.transform(write(bad, "b.parquet"))


def test_criteo(tmp_path, write):
    """Criteo's form: a label, 13 numbers, 26 hex texts, without a header, empty for missing."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-2, 3, (20, 13))
    texts = rng.integers(0, 5, (20, 26))
    lines = []
    for i in range(20):
        some = ["" if x == 0 else str(x) for x in numbers[i]]
        lines.append("\t".join([str(i % 2), *some, *("" if x == 0 else f"{x:08x}" for x in texts[i])]) + "\n")
    named = dict(categorical=data.CRITEO[14:], numeric=data.CRITEO[1:14], label="label")
    numbered = dict(categorical=list(range(14, 40)), numeric=list(range(1, 14)), label=0)
    tables = []
    for ending in ("txt", "tsv.gz", "csv.zst"):
        path = write("".join(lines), f"a.{ending}")
        source = data.files(path, delimiter="\t")
        for columns in (named, numbered):
            features = FeatureDictionary().fit(source, **columns)
            ((indices, values), labels), *more = features.stream(source, 100)
            assert not more and labels.tolist() == [0, 1] * 10 and features.num_samples == 20
            assert (
                (indices == 0) == np.concatenate([texts, numbers], 1)[:, : indices.shape[1]].astype(bool)
            ).sum() == 0
            tables.append((indices, values))
    for table in tables[1:]:
        assert_equal(table, tables[0])


def test_weights_lengths_and_buckets_from_files(write):
    frame = pd.DataFrame({"t": ["a:2|b:0.5|c", "", "b:1e1", "a"], "u": ["x y  z", "y", " ", "x"], "k": list("abca")})
    fields = dict(categorical="k", multivalued=["t"], weighted=["t"], hash_buckets={"k": 3}, max_length={"t": 2})
    wanted = FeatureDictionary().fit(frame, **fields)
    lists = pa.table({**frame.to_dict("list"), "t": [["a:2", "b:0.5", "c"], [], ["b:1e1"], ["a"]]})
    for source in (write(frame.to_csv(index=False)), write(pa.table(frame), "a.parquet"), write(lists, "b.parquet")):
        features = FeatureDictionary().fit(source, **fields)
        assert state(features) == state(wanted)
        assert_equal(features.transform(source), wanted.transform(frame))
    assert wanted.transform(frame)[1].tolist() == [[1, 2, 0.5], [1, 0, 0], [1, 10, 0], [1, 1, 0]]
    blanks = FeatureDictionary().fit(write(frame.to_csv(index=False)), multivalued="u", separator=None)
    assert sorted(blanks.values("u")) == ["x", "y", "z"]


@pytest.mark.parametrize("transform", ["identity", "log1p", "standardize", "quantiles"])
def test_transforms_of_numbers_from_files(write, transform):
    frame = pd.DataFrame({"n": np.random.default_rng(0).normal(size=200).round(3), "k": "a"})
    frame.loc[3, "n"] = np.nan
    fields = dict(categorical="k", numeric={"n": transform})
    wanted = FeatureDictionary().fit(frame, **fields)
    for source in (write(frame.to_csv(index=False)), write(pa.table(frame), "a.parquet")):
        features = FeatureDictionary().fit(source, **fields)
        assert_equal(features.transform(source), wanted.transform(frame))
        assert features.transform(source)[0][3].tolist() == [features.index("k", "a"), 0]


def test_unseen_is_apart_from_missing(write):
    path = write("k,t\na,x|x\na,y\nb,\n,x\n")
    features = FeatureDictionary(min_count=2).fit(path, categorical="k", multivalued="t")
    indices, _ = features.transform(write("k,t\na,x\nnew,new\n,\n", "b.csv"))
    assert indices[2].tolist() == [0] * 3 and (indices[1, :2] > 0).all()
    assert indices[1, 0] != indices[0, 0] and indices[1, 0] == features.index("k", "new")


def test_prediction_files_need_no_labels(features, model, write):
    path = write(pd.DataFrame(TABLE).drop(columns="label").to_csv(index=False))
    assert_equal(features.transform(path), features.transform(TABLE))
    assert model.predict(features.stream(path, 2, labels=False), verbose=0).shape == (5, 1)
    with pytest.raises(KeyError, match=r"a.csv: column 'label' is missing"):
        list(features.stream(path, 2))


# Which files.


def test_globs_folders_and_lists(features, write, tmp_path, monkeypatch):
    paths = [write(HEAD + line, f"d/{i}.csv") for i, line in enumerate(LINES)]
    for hidden in (".hidden.csv", "_SUCCESS", "_temporary/0/x.csv", ".git/x.csv"):
        write("no table", f"d/{hidden}")
    deep = write(TEXT, "d/deep/a[1].csv")
    here, system = str(tmp_path / "d"), pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())
    monkeypatch.chdir(tmp_path)
    for source, count in {
        f"{here}/*.csv": 5,
        f"file://{here}/*.csv": 5,
        f"{here}/[0-2].csv": 3,
        f"file://{here}/[0-2].csv": 3,
        f"{here}/?.csv": 5,
        here: 10,
        f"{here}/": 10,
        f"file://{here}": 10,
        f"{here}/d*/**/*.csv": 5,
        deep: 5,
        f"file://{deep}": 5,
        "d/?.csv": 5,
        "d/deep/*": 5,
        "*": 10,
    }.items():
        assert len(features.transform(source)[0]) == count, source
    for source, count in {"d/*.csv": 5, "d/dee*/**/*.csv": 5, "d": 10, "d/?.csv": 5, "*/deep/**": 5, "*": 10}.items():
        assert len(features.transform(data.files(source, filesystem=system))[0]) == count, source
    assert len(features.transform([paths[0], pathlib.Path(here), f"{here}/1*"])[0]) == 12


def test_a_file_system_of_fsspec(features, write):
    fsspec = pytest.importorskip("fsspec")
    source = data.files([write(TEXT), write(TEXT, "b.csv.gz")], filesystem=fsspec.filesystem("file"))
    assert len(features.transform(source)[0]) == 10


@pytest.mark.parametrize("road", ROADS)
def test_files_that_are_none(features, write, tmp_path, road):
    (tmp_path / "empty").mkdir()
    csv, parquet = write(TEXT), write(pa.table(TABLE), "a.parquet")
    os.mkfifo(tmp_path / "pipe.csv")
    for source, error, what in [
        (f"{tmp_path}/none.csv", FileNotFoundError, "none.csv: no such file"),
        (f"{tmp_path}/none*.csv", FileNotFoundError, r"none\*.csv: no file has such a name"),
        ([csv, f"{tmp_path}/none*.csv"], FileNotFoundError, "no file has such a name"),
        (f"file://{tmp_path}/none/*.csv", FileNotFoundError, "no file has such a name"),
        (f"{tmp_path}/empty", FileNotFoundError, "empty is a folder without files"),
        (iter([csv]), TypeError, "a table must be"),
        ([csv, parquet], ValueError, "files must be of one kind"),
        (write("x", "a.json"), ValueError, "a.json: what is in it cannot be told from its name"),
        (f"{tmp_path}/pipe.csv", ValueError, "pipe.csv is neither a file nor a folder"),
        ("", FileNotFoundError, "no such file"),
        ("gopher://x/y.csv", ValueError, "gopher"),
    ]:
        with pytest.raises(error, match=what):
            take(road, features, source)
    with pytest.raises(FileNotFoundError, match="no paths"):
        data.files([])
    for delimiter in ("", ",,", '"', "\n", "é", 3):
        with pytest.raises(ValueError, match="delimiter must be one character"):
            data.files(csv, delimiter=delimiter)


# Bad input.

BAD_LINES = {
    "short": ("1,a,0.5\n", "it has 3 columns, not 4"),
    "long": ("1,a,0.5,b,c\n", "it has 5 columns, not 4"),
    "blanks": ("   \n", "it has 1 columns, not 4"),
    "open quote": ('1,"a,0.5,b\n', "a quote is not closed in the line"),
    "open quote at the end": ('1,a,0.5,"b\n', "a quote is not closed in the line"),
    "quote that closes in the next line": ('1,"a\nb",0.5,c\n', "a quote is not closed in the line"),
    "carriage return": ("1,a\rb,0.5,c\n", "or it has a carriage return within"),
    "carriage return between records": ("1,a,0.5,c\r1,a,0.5,c\n", "or it has a carriage return within"),
    "quote and carriage return": ('1,a,0.5,"c\nd"\n1,a,0.5,c\r1,a,0.5,c\n', "a quote is not closed in the line"),
    "text as number": ("1,a,old,b\n", "column 'age': 'old' is no number"),
    "two points": ("1,a,1.2.3,b\n", "column 'age': '1.2.3' is no number"),
    "hex": ("1,a,0x10,b\n", "column 'age': '0x10' is no number"),
    "decimal comma": ('1,a,"1,5",b\n', "column 'age': '1,5' is no number"),
    "underscores": ("1,a,1_000,b\n", "column 'age': '1_000' is no number"),
    "infinity": ("1,a,inf,b\n", "column 'age': 'inf' is no number to train on"),
    "1e300": ("1,a,1e300,b\n", "column 'age': '1e300' is no number to train on"),
    "1e999": ("1,a,-1e999,b\n", "column 'age': '-1e999' is no number to train on"),
    "not UTF-8": (b"1,a\xff,0.5,b\n", r"column 'city': b'a\\xff' is not UTF-8 text"),
    "not UTF-8 in a list": (b"1,a,0.5,b|\xff|c\n", r"column 'tags': b'\\xff' is not UTF-8 text"),
    "not UTF-8 as number": (b"1,a,\xff5,b\n", "column 'age': '\ufffd5' is no number"),
    "surrogate": (b"1,\xed\xa0\x80,0.5,b\n", "column 'city': .* is not UTF-8 text"),
    "a megabyte": (f"1,{'a' * 2**20},0.5,b\n", "column 'city': b'a* ... .* is not UTF-8 text of at most 65535 bytes"),
    "a megabyte in a list": (f"1,a,0.5,b|{'a' * 2**20}\n", "column 'tags': b'a* ... .* text of at most 65535 bytes"),
    "a megabyte as number": (f"1,a,{'a' * 2**20},b\n", "column 'age': 'a* ... .* is no number"),
    "5,000 values": (f"1,a,0.5,{'|'.join(map(str, range(5000)))}\n", "column 'tags': an entry of 5000 values"),
}
COUNTS = {"quote that closes in the next line": 2, "quote and carriage return": 3}


@pytest.mark.filterwarnings("ignore:column .* were not seen by fit")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(features, model, write, name, ending):
    line, what = BAD_LINES[name]
    line = line.encode() if isinstance(line, str) else line
    content = TEXT.encode() + line + "".join(LINES).encode()
    path = write(content, f"a.csv{ending}")
    with_model = not ending and name in ("short", "open quote", "text as number", "not UTF-8", "a megabyte")
    for road in ALL_ROADS if with_model else ROADS:
        if name == "5,000 values" and road not in ("fit", "update"):
            assert take(road, features, path, model)[0] in (11, None)  # the first values count
            continue
        with pytest.raises(ValueError, match=rf"a.csv{ending}, line 7.*{what}"):
            take(road, features, path, model)
        rows, skipped = take(road, features, path, model, on_bad="skip")
        assert rows in (10, None) and skipped == COUNTS.get(name, 1), road


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_open_quote_in_the_last_line(features, write, end):
    path = write(TEXT + '1,a,0.5,"b' + end)
    for road in ROADS:
        with pytest.raises(ValueError, match="a.csv, line 7: a quote is not closed"):
            take(road, features, path)
        assert take(road, features, path, on_bad="skip") == (5, 1)


def test_a_dictionary_is_as_it_was_after_an_error(features, write):
    path = write(TEXT.replace("Rome", "Paris") + "1,a,old,b\n")
    fresh = copy.copy(features)
    for road in (fresh.update, lambda source: fresh.fit(source, **FIELDS)):
        with pytest.raises(ValueError, match="line 7"):
            road(path)
        assert state(fresh) == state(features)


def test_values_of_a_megabyte_that_nobody_asks_for(features, write):
    path = write(
        TEXT.replace("\n", ",more\n", 1).replace("\n", f",{'x' * 2**20}\n").replace(f"more,{'x' * 2**20}", "more")
    )
    for source in (path, write(pathlib.Path(path).read_text() + "\n", "b.csv.gz")):
        assert_equal(features.transform(source), features.transform(TABLE))


def test_short_pieces_of_a_long_list(write):
    """A cell of a megabyte may be a list of many values."""
    path = write("t\n" + "|".join(f"v{i % 5}" for i in range(300_000)) + "\n")
    features = FeatureDictionary().fit(path, multivalued="t", max_length=5)
    assert features.transform(path)[0].shape == (1, 5)


@pytest.mark.parametrize("weight", ["b:old", "b:", "b:1:x"])
def test_weights_that_are_none(write, weight):
    lines = ["a:1|c:2", f"a:1|{weight}", "a:3", weight]
    entries = [line.split("|") for line in lines]
    text = write("t\n" + "\n".join(lines) + "\n")
    for source, place in {
        text: "a.csv, line 3",
        write(pa.table({"t": lines}), "a.parquet"): "a.parquet, row group 0, row 1",
        write(pa.table({"t": entries}), "b.parquet"): "b.parquet, row group 0, row 1",
    }.items():
        fields = dict(multivalued="t", weighted="t")
        with pytest.raises(ValueError, match=f"{place}, column 't': .* has a weight that is no number"):
            FeatureDictionary().fit(source, **fields)
        features = FeatureDictionary().fit(source, **fields, on_bad="skip")
        assert (features.num_samples, features.num_skipped) == (2, 2)
        for take_ in (features.transform, lambda s: list(features.stream(s, 2)), features.update):  # noqa: B023
            with pytest.raises(ValueError, match=place):
                take_(source)
        assert len(features.transform(source, on_bad="skip")[0]) == 2
    with pytest.raises(ValueError, match="column 't', row 1: .* has a weight that is no number"):
        FeatureDictionary().fit({"t": entries}, **fields)


@pytest.mark.parametrize("label", ["", "yes", "nan", "inf", "2", "-1"])
def test_labels_that_are_none(features, model, write, label):
    """Which numbers are labels only the model knows."""
    path = write(TEXT + f"{label},a,0.5,b\n" + LINES[0])
    column = [*map(str, TABLE["label"]), label or None, "1"]
    rows = {name: [*values, values[0], values[0]] for name, values in TABLE.items()}
    parquet = write(pa.table({**rows, "label": column}), "a.parquet")
    for source, place in ((path, "a.csv, line 7"), (parquet, "a.parquet, row group 2, row 1")):
        for road in ("stream", "model.fit", "model.evaluate"):
            if road == "stream" and label in ("2", "-1"):
                assert take(road, features, source) == (7, 0)
                continue
            with pytest.raises(ValueError, match=f"{place}, column 'label': .* is no label"):
                take(road, features, source, model)
            assert take(road, features, source, model, on_bad="skip")[1] == 1
        assert len(features.transform(source)[0]) == 7


def test_bad_files(features, write):
    """A file that cannot be read at all."""
    good, table = write(TEXT, "good.csv"), write(pa.table(TABLE), "good.parquet")
    whole = pathlib.Path(table).read_bytes()
    cases = {
        good: [
            (write("", "0.csv"), "0.csv is empty"),
            (write("\n\r\n\n", "1.csv"), "1.csv is empty"),
            (write(b"\xef\xbb\xbf", "2.csv"), "2.csv is empty"),
            (write("", "3.csv.gz"), "3.csv.gz is empty"),
            (write("\n\n", "4.csv.zst"), "4.csv.zst is empty"),
            (_of(write("", "5.csv"), "5.csv.gz", b""), "5.csv.gz is empty"),
            (_of(good, "6.csv.gz", TEXT.encode()), "6.csv.gz, line 1: it is damaged or cut off"),
            (_of(good, "7.csv.zst", gzip.compress(TEXT.encode())), "7.csv.zst, line 1: it is damaged or cut off"),
            (write(TEXT.encode("utf-16"), "8.csv"), "8.csv is UTF-16"),
            (write(TEXT.replace("\n", "\r"), "9.csv"), "9.csv, line 1: .* carriage return within"),
            (_of(good, "11.csv", gzip.compress(TEXT.encode())), "11.csv is compressed: its name must end in .gz"),
            (_of(good, "12.csv", whole), "12.csv is a Parquet file"),
            (write('"' + TEXT, "10.csv"), "10.csv, line 1: a quote is not closed"),
        ],
        table: [
            (_of(table, "0.parquet", b""), "0.parquet is no whole Parquet file"),
            (_of(table, "1.parquet", whole[:-9]), "1.parquet is no whole Parquet file"),
            (_of(table, "2.parquet", TEXT.encode()), "2.parquet is no whole Parquet file"),
            (_of(table, "3.parquet.gz", gzip.compress(whole)[:-30]), "3.parquet.gz is no whole Parquet file"),
        ],
    }
    for other, files in cases.items():
        for path, what in files:
            for road in ROADS:
                for source in (path, [other, path]):
                    with pytest.raises(ValueError, match=what):
                        take(road, features, source)
                assert take(road, features, [path, other], on_bad="skip") == (5, 1), path
    with pytest.raises(ValueError, match="nothing can be read: 1 of 1 records were skipped.*0.csv is empty"):
        take("fit", features, cases[good][0][0], on_bad="skip")


def _of(path, name, content):
    path = pathlib.Path(path).with_name(name)
    path.write_bytes(content)
    return str(path)


@pytest.mark.filterwarnings("ignore:column .* were not seen by fit")
@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_cut_off(features, model, write, monkeypatch, ending):
    """Files that end in the middle: never fewer rows without a word."""
    rng = np.random.default_rng(0)
    lines = [f"{i % 2},{rng.integers(1 << 40):x},{rng.random()},a|b\n" for i in range(2000)]
    path = write(HEAD + "".join(lines), f"a.csv{ending}")
    content = pathlib.Path(path).read_bytes()
    for road in ALL_ROADS:
        cut = _of(path, f"cut.csv{ending}", content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"cut.csv{ending}, (after )?line \d+: it is damaged or cut off"):
            take(road, features, cut, model)
    flipped = bytearray(content)
    flipped[-6] ^= 1  # of .gz the check sum
    cases = [content[:-kept] for kept in range(1, len(content), 997)] + [bytes(flipped)] * (ending == ".gz")
    for case in cases:
        monkeypatch.setattr(text_files, "PIECE", 4096)
        cut = _of(path, f"cut.csv{ending}", case)
        with pytest.raises(ValueError, match=rf"cut.csv{ending}, (after )?line \d+: it is damaged or cut off"):
            features.transform(cut)
        fresh = copy.copy(features)
        rows = len(fresh.transform([cut, write(TEXT)], on_bad="skip")[0])
        assert fresh.num_skipped == 1 and rows < 2005
    # Files that were written one after the other into one are one.
    double = _of(path, f"double.csv{ending}", content + pathlib.Path(write(LINES[0], f"b.csv{ending}")).read_bytes())
    assert len(features.transform(double)[0]) == 2001


def test_damaged_row_groups(features, model, write):
    rng = np.random.default_rng(0)
    cities = [f"{x:x}" for x in rng.integers(1 << 40, size=200)]
    table = pa.table({**{name: values * 40 for name, values in TABLE.items()}, "city": cities})
    path = write(TEXT, "a.csv").replace(".csv", ".parquet")
    pq.write_table(table, path, row_group_size=50, write_page_checksum=True, compression="zstd")
    with pq.ParquetFile(path) as file:
        start = file.metadata.row_group(1).column(1).data_page_offset
    content = bytearray(pathlib.Path(path).read_bytes())
    content[start + 100] ^= 0xFF
    pathlib.Path(path).write_bytes(content)
    for road in ALL_ROADS:
        with pytest.raises(ValueError, match=r"a.parquet, row group 1, row \d+ on: it is damaged"):
            take(road, features, path, model)
        assert take(road, features, path, model, on_bad="skip") in ((150, 50), (None, 50))


def test_columns_that_are_missing_or_of_another_type_in_the_third_file(features, model, write):
    good = [write(TEXT, f"{i}.csv") for i in range(2)]
    frame, arrow = pd.DataFrame(TABLE), pa.table(TABLE)
    tables = [write(arrow, f"{i}.parquet") for i in range(2)]
    when = pa.array([0] * 5, pa.timestamp("s"))
    for road in ALL_ROADS:
        for name in ("city", "age", "tags") if road in ROADS else ("age",):
            for files, third in (
                (good, write(frame.drop(columns=name).to_csv(index=False), "c.csv")),
                (good, write(frame.drop(columns=name).to_csv(index=False), "c.csv.gz")),
                (tables, write(arrow.drop([name]), "c.parquet")),
            ):
                for on_bad in (
                    ("error", "skip") if road in ROADS else ("error",)
                ):  # as skipped ones all its records would be lost
                    with pytest.raises(KeyError, match=rf"/c\..*: column '{name}' is missing; it has \["):
                        take(road, features, [*files, third], model, on_bad=on_bad)
            third = write(arrow.set_column(arrow.column_names.index(name), name, when), "c.parquet")
            with pytest.raises(ValueError, match=f"c.parquet: column '{name}' must hold .* it holds timestamp"):
                take(road, features, [*tables, third], model)
            twice = write(frame.assign(more=1).rename(columns={"more": name}).to_csv(index=False), "c.csv")
            with pytest.raises(ValueError, match=f"c.csv: column '{name}' is there more than once"):
                take(road, features, [*good, twice], model)
        bare = write("".join(LINES), "c.csv")
        with pytest.raises(KeyError, match="c.csv: column '.*' is missing.*of a file without a header give"):
            take(road, features, [*good, bare], model)
        texts = write(frame.assign(age="old").to_csv(index=False), "c.csv")
        with pytest.raises(ValueError, match="c.csv, line 2, column 'age': 'old' is no number"):
            take(road, features, [*good, texts], model)
        assert take(road, features, [*good, texts], model, on_bad="skip") in ((10, 5), (None, 5))
        texts = write(arrow.set_column(2, "age", pa.array(["1", "2", "x", "", None])), "c.parquet")
        with pytest.raises(ValueError, match="c.parquet, row group 1, row 0, column 'age': 'x' is no number"):
            take(road, features, [*tables, texts], model)
        assert take(road, features, [*tables, texts], model, on_bad="skip") in ((14, 1), (None, 1))


def test_types_of_parquet_that_nothing_can_be_made_of(features, write):
    structs = pa.array([{"a": 1}] * 5)
    for name, column in [
        ("city", structs),
        ("city", pa.array([["a"]] * 5)),
        ("tags", structs),
        ("tags", pa.array([1] * 5)),
        ("tags", pa.array([[{"a": 1}]] * 5)),
        ("age", pa.array([[1.0]] * 5)),
        ("label", pa.array([0] * 5, pa.date32())),
    ]:
        place = list(TABLE).index(name)
        path = write(pa.table(TABLE).set_column(place, name, column), "a.parquet")
        for road in ROADS if name != "label" else ["stream"]:
            with pytest.raises(ValueError, match=f"a.parquet: column '{name}' must hold .* it holds "):
                take(road, features, path)


def test_bad_cells_of_parquet(features, model, write):
    """Cells that a table's type allows, and no dictionary does."""
    arrow, long = pa.table(TABLE), "a" * 2**17

    def with_(name, values):
        return arrow.set_column(arrow.column_names.index(name), name, values)

    bad_text = pa.Array.from_buffers(
        pa.string(), 5, [None, pa.py_buffer(np.array([0, 1, 2, 3, 4, 5], np.int32)), pa.py_buffer(b"ab\xffcd")]
    )
    tags = [["a"], None, ["b", "\N{SNOWMAN}", None], [], ["c"]]
    as_bytes = [None if tag is None else [x and x.encode() for x in tag] for tag in tags]
    broken = copy.deepcopy(as_bytes)
    broken[2][1] = b"\xff"
    for number, (name, values, what) in enumerate(
        [
            ("city", bad_text, "is not UTF-8 text"),
            ("city", bad_text.dictionary_encode(), "is not UTF-8 text"),
            ("city", pa.array(["a", "b", long, "c", None]), "is not UTF-8 text of at most 65535 bytes"),
            ("tags", bad_text, "is not UTF-8 text"),
            ("tags", pa.array(broken), "is not UTF-8 text"),
            ("tags", pa.array([["a"], None, ["b", long], [], ["c"]]), "is not UTF-8 text of at most 65535 bytes"),
            ("tags", pa.array(["a", None, f"a|{long}", "", "b"]), "is not UTF-8 text of at most 65535 bytes"),
            ("age", pa.array([1.0, None, np.inf, 0, 1]), "is no number to train on"),
            ("age", pa.array([1, None, 1 << 60, 0, 1]), "is no number to train on"),
            ("age", pa.array([b"1", None, b"\xff", b"0", b"1"]), "is no number"),
            ("age", pa.array(["1", None, "x", "0", "1"]).dictionary_encode(), "'x' is no number"),
        ]
    ):
        path = write(with_(name, values), f"{number}.parquet")
        for road in ALL_ROADS if number in (1, 4) else ROADS:
            with pytest.raises(ValueError, match=f"{number}.parquet, row group 1, row 0, column '{name}': .*{what}"):
                take(road, features, path, model)
            assert take(road, features, path, model, on_bad="skip") in ((4, 1), (None, 1)), number
    many = write(with_("tags", pa.array([["a"], None, list(map(str, range(5000))), [], ["b"]])), "many.parquet")
    for road in ("fit", "update"):
        with pytest.raises(ValueError, match="row group 1, row 0, column 'tags': an entry of 5000 values"):
            take(road, features, many)
        assert take(road, features, many, on_bad="skip") == (4, 1)
    # As bytes they are the same values.
    assert_equal(
        features.transform(write(with_("tags", pa.array(tags)), "t.parquet")),
        features.transform(write(with_("tags", pa.array(as_bytes)), "b.parquet")),
    )


def test_names_that_are_a_header_or_too_few(features, write):
    with pytest.raises(ValueError, match="a.csv, line 1 is a header"):
        features.transform(data.files(write(TEXT), names=list(TABLE)))
    with pytest.raises(ValueError, match="a.csv, line 1: 3 names are given, but it has 4 columns"):
        features.transform(data.files(write("".join(LINES)), names=["label", "city", "age"]))


def test_what_was_skipped_is_told(features, model, write, caplog):
    path = write(TEXT + "1,a\n1,a,old,b\n" + LINES[0])
    said = "2 of 8 records were skipped, as on_bad='skip' says; the first: .*a.csv, line 7: it has 2 columns, not 4"
    for road in ALL_ROADS:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "deepfm_ops"):
            take(road, features, path, model, on_bad="skip")
            take(road, features, write(TEXT, "b.csv"), model, on_bad="skip")
        (record,) = caplog.records
        assert re.match(said, record.getMessage()), road
    stream = features.stream(path, 3, on_bad="skip")
    caplog.clear()
    for passes in (1, 2):
        assert sum(len(labels) for _, labels in stream) == 6
        assert stream.num_skipped == 2 * passes and len(caplog.records) == passes
    with pytest.raises(ValueError, match="on_bad must be 'error' or 'skip', got 'ignore'"):
        features.transform(path, on_bad="ignore")


def test_tables_are_never_skipped(features):
    bad = {**TABLE, "age": ["old", 1, 2, 3, 4]}
    entry = {**TABLE, "tags": [["a"], 3, [], [], []]}
    for road in ROADS:
        with pytest.raises(KeyError, match="table 1: column 'age' is missing"):
            take(road, features, [TABLE, {"city": [], "label": [], "tags": []}])
        with pytest.raises(ValueError, match="table 1: columns must be equally long"):
            take(road, features, [TABLE, {**TABLE, "age": [1]}])
        with pytest.raises(TypeError, match="table 2: a table must be"):
            take(road, features, iter([TABLE, TABLE, "a.csv"]))
        for source, place in ((bad, "row 0"), ([TABLE, bad], "table 1, row 0"), (iter([TABLE, bad]), "table 1, row 0")):
            with pytest.raises(TypeError, match=f"'age' must hold numbers, got 'old' in {place}"):
                take(road, features, source, on_bad="skip")
        with pytest.raises(TypeError, match="'tags': an entry must be a list or a string, got 3 in table 1, row 1"):
            take(road, features, [TABLE, entry], on_bad="skip")


def test_errors_come_out_of_keras_as_they_are(features, model, write):
    for source, error in (
        (write(TEXT + "1,a\n"), "a.csv, line 7: it has 2 columns"),
        (write(TEXT.replace("Rome,0.5", "Rome,old"), "b.csv"), "b.csv, line 2, column 'age'"),
    ):
        for validation in (False, True):
            stream, good = features.stream(source, 2), features.stream(TABLE, 2)
            with pytest.raises(ValueError, match=error) as raised:
                model.fit(
                    *(good,) if validation else (stream,), validation_data=stream if validation else None, verbose=0
                )
            assert type(raised.value).__name__ == "BadRecord"
    with pytest.raises(ZeroDivisionError):
        model.fit(features.stream((1 / 0 for _ in range(1)), 2), verbose=0)


def test_streams_without_records(features, model, write):
    path = write(HEAD)
    assert take("transform", features, path) == (0, 0) and take("stream", features, path) == (0, 0)
    for road in ("fit", "model.fit", "model.evaluate"):
        with pytest.raises(ValueError, match="without rows|no record"):
            take(road, features, path, model)


def test_states_of_other_files(features, write):
    path = write(TEXT)
    stream = features.stream(path, 2)
    next(iter(stream))
    position = json.loads(json.dumps(stream.state()))
    again = features.stream(path, 2)
    again.restore(position)
    assert_equal(next(iter(again))[0], [part[2:4] for part in features.transform(path)])
    for other in (write(TEXT, "b.csv"), write(TEXT + LINES[0], "c/a.csv"), [path, path], TABLE):
        with pytest.raises(ValueError, match="the state is of a stream with files"):
            features.stream(other, 2).restore(position)
    with pytest.raises(ValueError, match="the state is of a stream with batch_size 2, this one has 3"):
        features.stream(path, 3).restore(position)
    for bad in ({}, None, [], {**position, "row": "x"}, {**position, "piece": -1}):
        with pytest.raises(ValueError, match="this is no state of a stream"):
            again.restore(bad)


def test_files_that_change_while_they_are_read(features, write, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 30)
    path = write(TEXT)
    stream = features.stream(path, 2)
    assert sum(len(labels) for _, labels in stream) == 5
    write(TEXT[: TEXT.index("1,7.0")])
    with pytest.raises(ValueError, match="a.csv is shorter than it was"):
        list(stream)
    os.unlink(path)
    with pytest.raises(FileNotFoundError, match="a.csv"):
        list(stream)


def test_dictionaries_of_other_models(model, features, write):
    other = FeatureDictionary().fit({**TABLE, "city": list("abcde"), "age": [1] * 5, "tags": ["a"] * 5}, **FIELDS)
    path = write(TEXT)
    for road in ALL_ROADS[4:]:
        with pytest.raises(ValueError, match="features (have|number) "):
            take(road, other, path, model)


# Files of a vocabulary.


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


# Other file systems.


@pytest.fixture(scope="module", name="s3")
def _s3():
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"{host}:{port}"
    finally:
        server.stop()


def test_s3(features, s3, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        system = pa.fs.S3FileSystem(
            access_key="key", secret_key="secret", endpoint_override=s3, scheme="http", allow_bucket_creation=True
        )
    except (AttributeError, ImportError):
        pytest.skip("pyarrow without S3")
    system.create_dir("logs")
    for i, line in enumerate(LINES):
        with system.open_output_stream(
            f"logs/day/{i}.csv.gz" if i % 2 else f"logs/day/{i}.csv", compression=None
        ) as out:
            text = (HEAD + line).encode()
            out.write(gzip.compress(text) if i % 2 else text)
    with system.open_output_stream("logs/deep/er/a.parquet") as out:
        pq.write_table(pa.table(TABLE), out, row_group_size=2)
    wanted = features.transform(TABLE)
    uri, query = "s3://key:secret@logs", f"?endpoint_override={s3}&scheme=http"
    sources = {
        "folder": data.files("logs/day", filesystem=system),
        "glob": data.files("logs/*/?.csv*", filesystem=system),
        "URI with a file system": data.files("s3://logs/day/*", filesystem=system),
        "parquet": data.files("logs/**/*.parquet", filesystem=system),
        "URI": f"{uri}/deep/er/a.parquet{query}",
        "URI of a folder": f"{uri}/day{query}",
        "URI with marks": f"{uri}/da?/?.csv*{query}",
        "URIs": [f"{uri}/day/[01].*{query}", *(f"{uri}/day/{i}.csv{'.gz' * (i % 2)}{query}" for i in (2, 3, 4))],
    }
    for name, source in sources.items():
        assert_equal(features.transform(source), wanted)
        assert state(FeatureDictionary().fit(source, **FIELDS)) == state(features), name
    model = DeepFM.from_features(features, embedding_dim=2, hidden_units=(2,))
    model.compile()
    stream = features.stream(sources["URI with marks"], 2, shuffle=True)
    history = model.fit(stream, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all() and stream.epoch == 2
    for source in (f"{uri}/none/*.csv{query}", f"{uri}/none.csv{query}"):
        with pytest.raises(FileNotFoundError, match=r"none.*no (such file|file has such a name)"):
            features.transform(source)
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match="day/0.csv, line 2, column 'age'"):
        out = stack.enter_context(system.open_output_stream("logs/day/0.csv"))
        out.write((HEAD + "1,a,old,b\n").encode())
        out.close()
        features.transform(sources["URI of a folder"])
