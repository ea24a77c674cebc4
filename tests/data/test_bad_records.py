"""What is refused of files and tables, and what is left out."""

import copy
import gzip
import json
import logging
import os
import pathlib
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from roads import ALL_ROADS, ENDINGS, FIELDS, HEAD, LINES, ROADS, TABLE, TEXT, assert_equal, state, take

from deepfm_ops import FeatureDictionary, data
from deepfm_ops.data import text_files

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")


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
