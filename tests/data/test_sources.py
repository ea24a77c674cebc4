"""Files and tables as sources: what is read, and which files there are."""

import contextlib
import copy
import gzip
import os
import pathlib

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from roads import ENDINGS, FIELDS, HEAD, LINES, LISTS, ROADS, TABLE, TEXT, assert_equal, state, take

from deepfm_ops import DeepFM, FeatureDictionary, data
from deepfm_ops.data import parquet_files, text_files

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")


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
