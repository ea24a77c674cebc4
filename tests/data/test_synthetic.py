"""The click log: rows follow from a few numbers, files have Criteo's form, the true model is the best there is."""

import doctest
import gzip
import itertools
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from testing import run_python

from deepfm_ops.data import synthetic
from deepfm_ops.data.synthetic import CHUNK_ROWS, ClickLog, auc

SMALL = 0.001  # of Criteo's cardinalities


@pytest.fixture(scope="module")
def log():
    return ClickLog(seed=3, scale=SMALL)


def assert_equal(chunk, other, rows=None):
    (columns, probabilities), (other_columns, other_probabilities) = chunk, other
    assert list(columns) == list(other_columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(np.ma.getmaskarray(column), np.ma.getmaskarray(other_columns[name])[:rows])
        np.testing.assert_array_equal(column.data, other_columns[name].data[:rows])
    np.testing.assert_array_equal(probabilities, other_probabilities[:rows])


def test_rows_follow_from_seed_day_and_number(log):
    whole = log.chunk(day=2, number=1)
    assert_equal(ClickLog(seed=3, scale=SMALL).chunk(2, 1), whole)
    assert_equal(log.chunk(2, 1, rows=1000), whole, rows=1000)
    for other in (log.chunk(3, 1), log.chunk(2, 2), ClickLog(seed=4, scale=SMALL).chunk(2, 1)):
        for name, column in other[0].items():
            assert not np.array_equal(column.data, whole[0][name].data)


def test_columns(log):
    columns, probabilities = log.chunk(0, 0)
    assert list(columns) == list(log.columns) == ["label", *log.numeric, *log.categorical] and len(log.columns) == 40
    assert columns["label"].dtype == np.int32 and set(columns["label"].tolist()) == {0, 1}
    assert all(columns[name].dtype == np.int32 for name in log.numeric)
    assert all(columns[name].dtype == "S8" for name in log.categorical)
    digits = np.stack([columns[name].compressed()[:1000] for name in ("C1", "C9")]).view("S1")
    assert set(digits.ravel().tolist()) == {b"%x" % digit for digit in range(16)}
    assert probabilities.dtype == np.float64 and 0 < probabilities.min() and probabilities.max() < 1
    assert columns["label"].mean() == pytest.approx(probabilities.mean(), abs=0.02)
    assert 0.22 < probabilities.mean() < 0.29


def test_missing_rates(log):
    columns, _ = log.chunk(0, 0)
    rates = {name: np.ma.getmaskarray(column).mean() for name, column in columns.items()}
    expected = {"label": 0, "I1": 0.45, "I2": 0, "I12": 0.77, "C1": 0, "C3": 0.034, "C20": 0.44, "C22": 0.76}
    assert {name: rates[name] for name in expected} == pytest.approx(expected, abs=0.02)


def test_numbers_are_skewed_and_some_negative(log):
    columns, _ = log.chunk(0, 0)
    assert all((columns[name].min() < 0) == (name == "I2") for name in log.numeric)
    assert all(columns[name].mean() > 1.2 * np.ma.median(columns[name]) for name in log.numeric)
    assert columns["I5"].max() > 100_000


def test_frequent_values_are_few():
    log = ClickLog()
    column = np.concatenate([log.chunk(0, number)[0]["C10"].data for number in range(2)])
    _, counts = np.unique(column, return_counts=True)
    # An even logarithm: the first of 93,145 ranks has log(2) / log(93,146) of the rows.
    assert counts.max() / len(column) == pytest.approx(np.log(2) / np.log(93146), abs=0.01)
    assert 5000 < len(counts) and (counts == 1).mean() > 0.5


def test_large_columns_get_new_values_every_day(log):
    """At this scale every value of C18, one of the twelve largest columns, turns up every day."""
    assert log.cardinalities["C18"] == log.cardinalities["C1"] == 100 and log.cardinalities["C9"] == 3
    days = [log.chunk(day, 0)[0] for day in range(4)]
    seen = {name: [set(columns[name].compressed().tolist()) for columns in days] for name in ("C1", "C9", "C18")}
    sizes = {name: [len(set().union(*sets[: n + 1])) for n in range(4)] for name, sets in seen.items()}
    assert sizes["C9"] == [3] * 4 and sizes["C1"] == [100] * 4
    assert sizes["C18"][0] == 100 and all(5 <= new <= 7 for new in np.diff(sizes["C18"]))
    assert all(len(day) == 100 for day in seen["C18"])  # each in the place of another


def test_values_of_columns_are_their_own(log):
    """Equal ranks of two columns are other texts, with other effects."""
    columns, _ = log.chunk(0, 0)
    assert not set(columns["C5"].tolist()) & set(columns["C8"].tolist())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [SMALL, 1.0])
def test_the_ceiling_is_near_080_and_the_true_model_alone_reaches_it(seed, scale, rng):
    log = ClickLog(seed, scale)
    rows = 2 * CHUNK_ROWS
    ceiling = log.ceiling(5, rows)
    assert 0.79 < ceiling < 0.825
    chunks = [log.chunk(5, number) for number in range(2)]
    truth = np.concatenate([probabilities for _, probabilities in chunks])
    labels = np.concatenate([columns["label"] for columns, _ in chunks])
    assert auc(truth, truth) == ceiling == auc(truth, np.log(truth) + 3)
    assert auc(labels, truth) == pytest.approx(ceiling, abs=0.01)
    for noise in (0.3, 1.0):
        logit = np.log(truth / (1 - truth)) + rng.normal(0, noise, rows)
        assert auc(truth, logit) < ceiling - 0.003
    assert auc(truth, rng.random(rows)) == pytest.approx(0.5, abs=0.01)


def test_the_true_model_drifts(log):
    rows = 2 * CHUNK_ROWS
    stale = [log.ceiling(6, rows, model_day=day) for day in (6, 5, 3, 0)]
    assert stale[0] == log.ceiling(6, rows) and all(np.diff(stale) < 0)
    assert stale[0] - stale[1] < 0.003 and stale[0] - stale[-1] > 0.01
    columns, probabilities = log.chunk(6, 0, model_day=0)
    own_columns, own = log.chunk(6, 0)
    np.testing.assert_array_equal(columns["label"], own_columns["label"])
    assert 0.7 < np.corrcoef(probabilities, own)[0, 1] < 0.99


def test_what_is_missing_has_no_effect_and_values_alone_have_one(log):
    """Rows that show the same cells have the same probability, whatever was drawn behind those that are missing."""
    rows = log._draw(0, 0)
    shown = rows.present[:13], rows.present[13:]
    hidden = rows._replace(numbers=np.where(shown[0], rows.numbers, 77), values=np.where(shown[1], rows.values, 77))
    np.testing.assert_array_equal(log._probabilities(rows, 1), log._probabilities(hidden, 1))


def test_auc(rng):
    scores = rng.integers(5, size=40)
    labels, truth = rng.integers(2, size=40), rng.random(40)

    def by_pairs(truth):
        pairs = [(i, j, truth[i] * (1 - truth[j])) for i, j in itertools.permutations(range(40), 2)]
        won = sum(weight * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2) for i, j, weight in pairs)
        return won / sum(weight for *_, weight in pairs)

    assert auc(labels, scores) == pytest.approx(by_pairs(labels), rel=1e-12)
    assert auc(truth, scores) == pytest.approx(by_pairs(truth), rel=1e-12)
    assert np.isnan(auc(np.ones(3), [1, 2, 3]))


@pytest.fixture(scope="module")
def written(log, tmp_path_factory):
    """{format: its files} of two days of 20,000 rows, two files a day; the folder was not there."""
    folder = tmp_path_factory.mktemp("log") / "made" / "now"
    return {format: log.write(folder, range(2), 20_000, 2, format) for format in synthetic.FORMATS}


def test_tsv_is_the_rows_as_text(log, written):
    assert [path.name for path in written["tsv"]] == [f"day-0{d}-part-0{p}.tsv" for d in range(2) for p in range(2)]
    lines = b"".join(path.read_bytes() for path in written["tsv"][2:]).split(b"\n")
    assert len(lines) == 20_001 and lines[-1] == b""
    assert {line.count(b"\t") for line in lines[:-1]} == {39}
    chunks = [log.chunk(1, 0)[0], log.chunk(1, 1, 20_000 - CHUNK_ROWS)[0]]
    cells = [
        [cell if isinstance(cell, bytes) else b"" if cell is None else b"%d" % cell for cell in column]
        for column in ([*a.tolist(), *b.tolist()] for a, b in zip(*(c.values() for c in chunks), strict=True))
    ]
    assert lines[:-1] == [b"\t".join(row) for row in zip(*cells, strict=True)]


def test_every_number_has_its_text():
    numbers = np.array([[-1, 0, 7, 9_999, 10_000, 10_001, 99_999, 100_000, 12_030_405, 99_999_999]], np.int32)
    size = numbers.size
    rows = synthetic._Rows(
        np.repeat(numbers, 13, 0), np.zeros((26, size), np.uint32), np.ones((39, size), bool), np.zeros(size)
    )
    texts = [text.tobytes().replace(b"\0", b"").decode() for text in synthetic._texts(rows)[0]]
    assert texts == [str(number) for number in numbers[0]]


def test_formats_hold_the_same_rows(log, written):
    for tsv, zipped, csv, parquet in zip(*(written[format] for format in synthetic.FORMATS), strict=True):
        content = tsv.read_bytes()
        assert gzip.decompress(zipped.read_bytes()) == content
        header, rows = csv.read_bytes().split(b"\n", 1)
        assert header.decode().split(",") == list(log.columns) and rows.replace(b",", b"\t") == content
        table = pa.parquet.read_table(parquet)
        table.validate(full=True)
        read = pa.csv.read_csv(
            tsv,
            pa.csv.ReadOptions(column_names=list(log.columns)),
            pa.csv.ParseOptions(delimiter="\t"),
            pa.csv.ConvertOptions(column_types=table.schema, strings_can_be_null=True, null_values=[""]),
        )
        assert table.num_rows == 10_000 and table.equals(read)
        assert table.schema.types == [pa.int32()] * 14 + [pa.string()] * 26


@pytest.mark.parametrize("format", synthetic.FORMATS)
def test_equal_rows_are_equal_files(format, log, written, tmp_path):
    again = ClickLog(seed=3, scale=SMALL).write(str(tmp_path), [1], 20_000, 2, format)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written[format][2:]]
    if format.startswith("tsv"):
        opened = gzip.open if format.endswith("gz") else open
        contents = []
        for path in log.write(tmp_path, [1], 20_000, 1, format) + again[1:]:
            with opened(path) as file:
                contents.append(file.read())
        assert contents[0].endswith(contents[1])  # whatever the number of files


@pytest.mark.parametrize("format", synthetic.FORMATS)
def test_files_without_rows(format, log, tmp_path):
    paths = log.write(tmp_path, [0], rows_per_day=1, files_per_day=2, format=format)
    assert [path.exists() for path in paths] == [True, True]
    if format == "parquet":
        assert [pa.parquet.read_table(path).num_rows for path in paths] == [0, 1]


def test_a_parquet_file_has_row_groups_of_several_chunks(tmp_path):
    (path,) = ClickLog(scale=SMALL).write(tmp_path, [0], 9 * CHUNK_ROWS, format="parquet")
    metadata = pa.parquet.read_metadata(path)
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [8 * CHUNK_ROWS, CHUNK_ROWS]


def test_a_file_is_replaced_whole_or_not_at_all(log, tmp_path, monkeypatch):
    (path,) = log.write(tmp_path, [0], 10)
    before = path.read_bytes()
    draw = log._draw
    monkeypatch.setattr(log, "_draw", lambda day, number: draw(day, number) if number == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.write(tmp_path, [0], 2 * CHUNK_ROWS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_text_needs_no_pyarrow(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert log.write(tmp_path, [0], 10)[0].read_bytes().count(b"\n") == 10
    with pytest.raises(ImportError, match=r"parquet needs pyarrow: pip install deepfm_ops\[data\]"):
        log.write(tmp_path, [0], 10, format="parquet")


def test_it_imports_neither_tensorflow_nor_pyarrow(tmp_path):
    run_python(
        "import sys; from deepfm_ops.data import synthetic\n"
        "assert not {'tensorflow', 'keras', 'pyarrow', 'pandas'} & set(sys.modules)",
        tmp_path,
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda log, folder: ClickLog(seed=-1), r"seed must be at least 0, got -1"),
        (lambda log, folder: ClickLog(scale=0), r"scale must be in \(0, 100\], got 0"),
        (lambda log, folder: ClickLog(scale=float("nan")), r"scale must be in \(0, 100\], got nan"),
        (lambda log, folder: log.chunk(-1, 0), r"day must be at least 0, got -1"),
        (lambda log, folder: log.chunk(0, -1), r"number must be at least 0, got -1"),
        (lambda log, folder: log.chunk(0, 0, 0), r"rows must be from 1 to 16384, got 0"),
        (lambda log, folder: log.chunk(0, 0, 20_000), r"rows must be from 1 to 16384, got 20000"),
        (lambda log, folder: log.chunk(0, 0, 1, -1), r"model_day must be at least 0, got -1"),
        (lambda log, folder: log.ceiling(0, 0), r"rows must be at least 1, got 0"),
        (lambda log, folder: log.ceiling(0, 1, -2), r"model_day must be at least 0, got -2"),
        (lambda log, folder: log.write(folder, [0, -1], 1), r"days must be at least 0, got -1"),
        (lambda log, folder: log.write(folder, [0], 0), r"rows_per_day must be at least 1, got 0"),
        (lambda log, folder: log.write(folder, [0], 1, 0), r"files_per_day must be at least 1, got 0"),
        (
            lambda log, folder: log.write(folder, [0], 1, format="txt"),
            r"format must be one of tsv, tsv.gz, csv, parquet, got 'txt'",
        ),
    ],
)
def test_arguments_out_of_range(make, message, log, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(log, tmp_path)
    assert not list(tmp_path.iterdir())


def test_days_is_no_number(log, tmp_path):
    with pytest.raises(TypeError, match=r"days must be a list or a range of days, got 7"):
        log.write(tmp_path, 7, 10)


def test_docstring():
    result = doctest.testmod(synthetic)
    assert result.attempted > 0 and result.failed == 0
