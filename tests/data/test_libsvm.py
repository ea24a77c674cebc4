"""libsvm and libffm files, by the compiled parser and by the one in Python, which is its oracle too."""

import doctest
import gzip
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deepfm_ops import data
from deepfm_ops.data import libsvm, libsvm_python

NAMES = ("LibsvmParser", "most_pairs", "pad_rows")
READERS = {False: data.read_libsvm, True: data.read_libffm}
ITERATORS = {False: data.iter_libsvm, True: data.iter_libffm}


def parts(name):
    """What is compiled, or the same in Python."""
    if name == "python":
        return libsvm_python
    return pytest.importorskip("deepfm_ops._kernels", reason="a pure-Python install has no kernels")


@pytest.fixture(params=["compiled", "python"], autouse=True, name="use")
def _use(request, monkeypatch):
    found = parts(request.param)
    for name in NAMES:
        monkeypatch.setattr(libsvm, name, getattr(found, name))
    return found


@pytest.fixture(name="write")
def _write(tmp_path):
    def write(text, name="rows.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def plain(samples):
    """Everything in it, comparable."""
    fields = getattr(samples, "flat_fields", None)
    arrays = (samples.labels, samples.row_splits, samples.flat_indices, samples.flat_values)
    return [(a.dtype.str, a.tolist()) for a in arrays] + [None if fields is None else fields.tolist()]


def test_libsvm(write):
    samples = data.read_libsvm(write("1 3:1 7:0.5\n0\n1 2:-2e1 9:1 4:.25\n"))
    assert len(samples) == 3 and samples.skipped == 0 and samples.flat_fields is None
    assert plain(samples)[:4] == [
        ("<f4", [1, 0, 1]),
        ("<i8", [0, 2, 2, 5]),
        ("<i8", [3, 7, 2, 9, 4]),
        ("<f4", [1, 0.5, -20, 1, 0.25]),
    ]
    assert (samples.num_features, samples.num_fields) == (10, 3)
    indices, values, labels, field_sizes = samples
    assert indices.dtype == np.int64 and indices.tolist() == [[3, 7, 0], [0, 0, 0], [2, 9, 4]]
    assert values.dtype == np.float32 and values.tolist() == [[1, 0.5, 0], [0, 0, 0], [-20, 1, 0.25]]
    assert labels is samples.labels and field_sizes == [1, 1, 1]
    assert samples.indices is indices and samples.values is values  # made once
    assert repr(samples) == "<3 samples of 5 pairs, 10 features>"


def test_libffm(write):
    samples = data.read_libffm(write("1 0:3:1 3:8:.5 1:7:.5\n0 1:9:2 1:7:1 0:4:1 1:7:3\n"))
    assert samples.flat_fields.dtype == np.int32 and samples.flat_fields.tolist() == [0, 3, 1, 1, 1, 0, 1]
    assert (samples.num_features, samples.num_fields) == (10, 4)
    indices, values, labels, field_sizes = samples
    assert field_sizes == [1, 3, 1, 1]  # nobody's field 2 has a column too: a layer's field has one at least
    assert indices.tolist() == [[3, 7, 0, 0, 0, 8], [4, 9, 7, 7, 0, 0]]
    assert values.tolist() == [[1, 0.5, 0, 0, 0, 0.5], [1, 2, 1, 3, 0, 0]]
    assert labels.tolist() == [1, 0]


ROW = ([1.0], [0, 2], [3, 7], [1.0, 0.5])
LINES = {
    "no end of line": ("1 3:1 7:0.5", ROW),
    "CRLF": ("1 3:1 7:0.5\r\n", ROW),
    "CRLF, no final newline": ("1 3:1 7:0.5\r", ROW),
    "tabs": ("1\t3:1\t7:0.5\n", ROW),
    "several blanks": ("  1  3:1 \t 7:0.5  \n", ROW),
    "commas": ("1,3:1,7:0.5\n", ROW),
    "commas and blanks": ("1, 3:1, 7:0.5,\n", ROW),
    "a comment": ("1 3:1 7:0.5 # 9:9 nonsense\n", ROW),
    "a comment without a blank": ("1 3:1 7:0.5#\n", ROW),
    "lines of comments": ("# a\n 1 3:1 7:0.5\n\t#1 2:3\n", ROW),
    "blank lines": ("\n\r\n1 3:1 7:0.5\n \t\n\n", ROW),
    "forms of numbers": ("+1. 3:1.e0 7:+5E-1\n", ROW),
    "more forms": ("1e-0 003:10E-01 007:.5\n", ROW),
    "many digits": ("1.0000000000000000000000000 3:0.99999999999999999999999999 7:00000000000000000000.5\n", ROW),
    "no pairs": ("2.5\n-3\n", ([2.5, -3.0], [0, 0, 0], [], [])),
    "one index twice": ("1 3:1 3:0.5\n", ([1.0], [0, 2], [3, 3], [1.0, 0.5])),
    "not in order": ("1 7:1 3:0.5\n", ([1.0], [0, 2], [7, 3], [1.0, 0.5])),
    "index 0": ("1 0:1 7:0\n", ([1.0], [0, 2], [0, 7], [1.0, 0.0])),
    "the largest index": (f"1 {2**63 - 1}:1 {'0' * 30}{2**63 - 1}:0.5\n", ([1], [0, 2], [2**63 - 1] * 2, [1, 0.5])),
    "tiny numbers": ("1e-500 3:1e-46 7:1e-45\n", ([0.0], [0, 2], [3, 7], [0, float(np.float32(1e-45))])),
    "large numbers": ("1 3:3.4028235e38 7:-340282350000000000000000000000000000000\n", None),
    "exponents beyond all": ("1 3:0e99999999999999999999 7:1e-99999999999999999999\n", ([1], [0, 2], [3, 7], [0, 0])),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines(kind, write):
    text, expected = LINES[kind]
    if expected is None:
        largest = float(np.finfo(np.float32).max)
        expected = ([1], [0, 2], [3, 7], [largest, -largest])
    samples = data.read_libsvm(write(text))
    assert [array for _, array in plain(samples)[:4]] == [list(x) for x in expected]
    if kind != "the largest index":  # which is no field
        ffm = data.read_libffm(write(text.replace(":", ":0:")))
        assert ffm.flat_fields.tolist() == list(expected[2]) and not ffm.flat_indices.any()
        assert ffm.flat_values.tolist() == list(expected[3])


INDEX = "must be an integer in [0, 9223372036854775807], got"
FIELD = "the field must be an integer in [0, 2147483647], got"
VALUE = "the value must be a finite float32, got"
BAD = [  # fields?, line, column, what
    (False, "1 3", 3, "a pair must be index:value, got '3'"),
    (False, "1 3:1 :", 7, "the index must be an integer in [0, 9223372036854775807], got '' in ':'"),
    (False, "1 -3:1", 3, f"the index {INDEX} '-3' in '-3:1'"),
    (False, "1 +3:1", 3, f"the index {INDEX} '+3' in '+3:1'"),
    (False, "1 1:1 3.0:1", 7, f"the index {INDEX} '3.0' in '3.0:1'"),
    (False, "1 9223372036854775808:1", 3, f"the index {INDEX} '9223372036854775808' in '9223372036854775808:1'"),
    (False, "1 18446744073709551617:1", 3, f"the index {INDEX} '18446744073709551617'"),
    (False, f"1 {'9' * 200}:1", 3, f"the index {INDEX} '{'9' * 45}...' in '{'9' * 45}...'"),
    (False, "1 a:1", 3, f"the index {INDEX} 'a' in 'a:1'"),
    (False, "1 3:nan", 3, f"{VALUE} 'nan' in '3:nan'"),
    (False, "1 3:-inf", 3, f"{VALUE} '-inf' in '3:-inf'"),
    (False, "1 3:1e39", 3, f"{VALUE} '1e39' in '3:1e39'"),
    (False, "1 3:3.4028236e38", 3, f"{VALUE} '3.4028236e38' in"),
    (False, "1 3:1e999999999999999999999", 3, f"{VALUE} '1e999999999999999999999' in"),
    (False, f"1 3:.{'0' * 2000}1e20000", 3, f"{VALUE} '.{'0' * 44}...' in '3:.{'0' * 42}...'"),
    (False, "1 3:", 3, f"{VALUE} '' in '3:'"),
    (False, "1 3: 1", 3, f"{VALUE} '' in '3:'"),
    (False, "1 3 :1", 3, "a pair must be index:value, got '3'"),
    (False, "1 3:.", 3, f"{VALUE} '.' in '3:.'"),
    (False, "1 3:1e", 3, f"{VALUE} '1e' in '3:1e'"),
    (False, "1 3:1e+", 3, f"{VALUE} '1e+' in '3:1e+'"),
    (False, "1 3:--1", 3, f"{VALUE} '--1' in '3:--1'"),
    (False, "1 3:1.2.3", 3, f"{VALUE} '1.2.3' in '3:1.2.3'"),
    (False, "1 3:0x10", 3, f"{VALUE} '0x10' in '3:0x10'"),
    (False, "1 3:1_0", 3, f"{VALUE} '1_0' in '3:1_0'"),
    (False, "1 3:1;7:2", 3, "a pair must be index:value, got '3:1;7:2'; read_libffm reads fields"),
    (False, "1 0:3:1", 3, "a pair must be index:value, got '0:3:1'; read_libffm reads fields"),
    (False, "1 0:3:1:1", 3, "a pair must be index:value, got '0:3:1:1'"),
    (False, "1 3:1 0:3:1", 7, "a pair must be index:value, got '0:3:1'; read_libffm reads fields"),
    (False, "1 qid:2 3:1", 3, "query ids, of ranking, cannot be read, got 'qid:2'"),
    (False, "3:1 7:0.5", 1, "a label must stand before the pairs, got '3:1'; files without labels cannot be read"),
    (False, "yes 3:1", 1, "a label must be a finite number, got 'yes'"),
    (False, "nan 3:1", 1, "a label must be a finite number, got 'nan'"),
    (False, "1e40 3:1", 1, "a label must be a finite number, got '1e40'"),
    (False, " \t 1- 3:1", 4, "a label must be a finite number, got '1-'"),
    (False, "1,2 3:1", 3, "a pair must be index:value, got '2'"),
    (False, b"\x00\xff\x1b\x80", 1, r"a label must be a finite number, got '\x00\\xff\x1b\\x80'"),
    (False, b"1 3:1\x00", 3, r"the value must be a finite float32, got '1\x00' in '3:1\x00'"),
    (False, b"\xef\xbb\xbf1 3:1", 1, "a label must be a finite number, got '\\ufeff1'"),
    (True, "1 3", 3, "a pair must be field:index:value, got '3'"),
    (True, "1 3:1", 3, "a pair must be field:index:value, got '3:1'; read_libsvm reads pairs without a field"),
    (True, "1 0:3:1 3:1", 9, "a pair must be field:index:value, got '3:1'; read_libsvm reads pairs without a field"),
    (True, "1 0:3:1:2", 3, "a pair must be field:index:value, got '0:3:1:2'"),
    (True, "1 -1:3:1", 3, f"{FIELD} '-1' in '-1:3:1'"),
    (True, "1 2147483648:3:1", 3, f"{FIELD} '2147483648' in '2147483648:3:1'"),
    (True, "1 :3:1", 3, f"{FIELD} '' in ':3:1'"),
    (True, "1 0:-3:1", 3, f"the index {INDEX} '-3' in '0:-3:1'"),
    (True, "1 0::1", 3, f"the index {INDEX} '' in '0::1'"),
    (True, "1 0:3:", 3, f"{VALUE} '' in '0:3:'"),
    (True, "1 0:3:inf", 3, f"{VALUE} 'inf' in '0:3:inf'"),
]


@pytest.mark.parametrize("fields, line, column, what", BAD)
def test_bad_lines(fields, line, column, what, write):
    good = b"1 0:1:1\n" if fields else b"1 1:1\n"
    line = line if isinstance(line, bytes) else line.encode()
    path = write(b"# two rows, then\n" + good + b"\n" + good + line + b"\n" + good)
    message = f"{path}, line 5, column {column}: {what}"
    for read in (READERS[fields], lambda path: list(ITERATORS[fields](path, 1))):
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(error.value).startswith(message)
    skipped = READERS[fields](path, on_bad="skip")
    assert skipped.skipped == 1 and skipped.labels.tolist() == [1] * 3 and skipped.row_splits.tolist() == [0, 1, 2, 3]
    assert [(chunk.line, chunk.skipped) for chunk in ITERATORS[fields](path, 2, on_bad="skip")] == [(1, 0), (5, 1)]


def test_the_largest_field_is_read(write):
    samples = data.read_libffm(write(f"1 {2**31 - 1}:3:1 0:1:1\n"))
    assert samples.flat_fields.tolist() == [2**31 - 1, 0] and samples.num_fields == 2**31
    with pytest.raises(ValueError, match=r"fields must be below 1048576 to have columns of their own, got 2147483647"):
        _ = samples.field_sizes
    samples.flat_fields = np.unique(samples.flat_fields, return_inverse=True)[1].astype(np.int32)
    assert samples.field_sizes == [1, 1] and samples.indices.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("-1 1 +1 -1", [0, 1, 1, 0]),
        ("-1 -1", [0, 0]),
        ("-1.0 1e0", [0, 1]),
        ("1 1", [1, 1]),
        ("0 1 0", [0, 1, 0]),
        ("-1 0 1", [-1, 0, 1]),
        ("-1 1 2.5", [-1, 1, 2.5]),
    ],
)
def test_labels(labels, expected, write):
    assert data.read_libsvm(write(labels.replace(" ", " 1:1\n"))).labels.tolist() == expected
    files = [write(label, f"{i}.svm") for i, label in enumerate(labels.split())]
    assert data.read_libsvm(files).labels.tolist() == expected  # of all files together
    raw = [float(label) for label in labels.split()]
    assert [chunk.labels[0] for chunk in data.iter_libsvm(files)] == raw  # who reads in pieces knows not yet


def random_number(rng):
    kind = rng.integers(8)
    x = rng.normal() * 10.0 ** rng.integers(-3, 4)
    if kind < 3:
        return str(rng.integers(-3, 1000))
    if kind == 3:
        return repr(float(x))
    if kind == 4:
        return f"{x:.3e}"
    if kind == 5:
        return f"{'+' if x > 0 else '-'}.{rng.integers(10**9)}"
    return f"{x:.4g}" if kind == 6 else f"{rng.integers(10**9)}."


def random_line(rng, fields):
    ids = lambda: (":".join(str(int(10 ** rng.uniform(0, 7))) for _ in range(1 + fields)),)  # noqa: E731
    separator = lambda: str(rng.choice([" ", " ", " ", "\t", "  ", ",", ", "]))  # noqa: E731
    pairs = [separator() + ":".join([*ids(), random_number(rng)]) for _ in range(rng.poisson(4))]
    line = random_number(rng) + "".join(pairs) + str(rng.choice(["", "", "", " ", "\r", " # 1:2"]))
    return "" if rng.random() < 0.03 else line


def random_text(rng, fields, lines, mutations=0):
    text = bytearray("\n".join(random_line(rng, fields) for _ in range(lines)).encode() + b"\n")
    for at in rng.integers(len(text), size=mutations):
        text[at] = rng.choice(list(b"0123456789:::.-+eE ,\t\r\n#nq\x00\xff"))
    return bytes(text)


def parsed(parser, text, pieces=None):
    """What a parser makes of a text: as a whole, or cut at those lines."""
    lines = text.rstrip(b"\n").split(b"\n")
    groups = [lines] if pieces is None else [lines[a:b] for a, b in zip([0, *pieces], [*pieces, None], strict=True)]
    for group in groups:
        if group:
            parser.parse(b"\n".join(group) + b"\n", 0, 1 << 40)
    state = parser.num_rows, parser.lines, parser.skipped, parser.bad
    return [state, *((None if a is None else (a.dtype.str, a.tobytes())) for a in parser.take())]


@pytest.mark.parametrize("fields", [False, True])
def test_random_files(fields, use):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        text = random_text(rng, fields, 40)
        expected = parsed(libsvm_python.LibsvmParser(fields, False), text)
        assert expected[0][0] > 20 and expected[0][3] is None
        assert parsed(use.LibsvmParser(fields, False), text, [1, 17]) == expected
        text = random_text(rng, fields, 40, mutations=60)  # most lines are bad now
        for skip in (False, True):
            expected = parsed(libsvm_python.LibsvmParser(fields, skip), text)
            assert parsed(use.LibsvmParser(fields, skip), text) == expected


def test_numbers_are_those_of_numpy(use, rng):
    texts = [random_number(rng) for _ in range(3000)]
    bits = rng.integers(0, 0x7F800000, 3000).astype(np.uint32).view(np.float32)
    texts += [repr(float(x)) for x in bits] + [f"{x:.9g}" for x in bits]
    # Halfway between two of float32, and next to that.
    halves = bits[:500].astype(np.float64) / 2 + np.nextafter(bits[:500], np.float32(0)).astype(np.float64) / 2
    texts += [f"{x:.60e}" for x in halves] + [repr(float(x)) for x in halves]
    texts += [
        f"{int(n)}.{'0' * k}{d}" for n in (16777217, 16777219, 33554434) for k in (0, 3, 9, 12) for d in (0, 1, 5)
    ]
    texts += [f"{d}e{e}" for d in ("1", "9007199254740993", "18446744073709551615", "5") for e in range(-60, 20)]
    texts += [f"0.{'0' * k}{rng.integers(1, 10**18)}" for k in range(30)] + [f"0.{'0' * 2000}12e2001"]
    parser = use.LibsvmParser(False, False)
    parser.parse(("\n".join(f"{text} 1:{text}" for text in texts) + "\n").encode(), 0, 1 << 40)
    expected = np.array([float(text) for text in texts]).astype(np.float32)
    labels, _, _, _, values = parser.take()
    np.testing.assert_array_equal(labels.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("fields", [False, True])
@pytest.mark.parametrize("final", [b"\n", b"", b"\r\n"])
def test_blocks_end_anywhere(fields, final, write, monkeypatch):
    text = random_text(np.random.default_rng(5), fields, 6).rstrip(b"\n") + final
    path = write(text)
    expected = plain(READERS[fields](path))
    for size in range(1, len(text) + 2):
        monkeypatch.setattr(libsvm, "BLOCK_BYTES", size)
        assert plain(READERS[fields](path)) == expected
        chunks = list(ITERATORS[fields](path, 2))
        assert np.concatenate([chunk.indices for chunk in chunks]).tolist() == expected[2][1]
        assert np.concatenate([chunk.labels for chunk in chunks]).tolist() == expected[0][1]


def test_chunks(write):
    first = write("# a\n1 1:1\n-1 2:1 3:1\n\n1\n", "a.svm")
    second = write("1 4:1\n-1 5:1", "b.svm")
    chunks = list(data.iter_libsvm([first, second], chunk_rows=2))
    assert [(pathlib.Path(c.path).name, c.line, len(c.labels)) for c in chunks] == [
        ("a.svm", 1, 2),
        ("a.svm", 4, 1),
        ("b.svm", 1, 2),
    ]
    assert [c.row_splits.tolist() for c in chunks] == [[0, 1, 3], [0, 0], [0, 1, 2]]
    assert [c.indices.tolist() for c in chunks] == [[1, 2, 3], [], [4, 5]]
    assert [c.labels.tolist() for c in chunks] == [[1, -1], [1], [1, -1]] and chunks[0].fields is None
    (ffm,) = data.iter_libffm(write("1 2:1:1 0:3:1\n"))
    assert ffm.fields.tolist() == [2, 0] and ffm.fields.dtype == np.int32
    whole = list(data.iter_libsvm(first, chunk_rows=3))  # no empty chunk follows the last row
    assert [len(c.labels) for c in whole] == [3]


def test_paths(write, tmp_path, monkeypatch):
    text = "1 1:1\n0 2:1 3:0.5\n"
    path = write(text, "b.svm")
    write(gzip.compress(b"0 4:1\n"), "c.svm.gz")
    write("1 5:1\n", "a[1].svm")
    expected = plain(data.read_libsvm(path))
    assert plain(data.read_libsvm(str(path))) == expected
    assert data.read_libsvm(tmp_path / "a[1].svm").flat_indices.tolist() == [5]  # a name is not a pattern
    assert data.read_libsvm(str(tmp_path / "*.svm*")).flat_indices.tolist() == [5, 1, 2, 3, 4]
    assert data.read_libsvm([tmp_path / "*.gz", path]).flat_indices.tolist() == [4, 1, 2, 3]
    monkeypatch.chdir(tmp_path)
    assert plain(data.read_libsvm("b.svm")) == expected
    for missing, message in (("no.svm", "there is no file no.svm"), ("no*.svm", "no file matches no*.svm")):
        for read in (data.read_libsvm, data.iter_libsvm):  # when called, not at the first chunk
            with pytest.raises(FileNotFoundError) as error:
                read(["b.svm", missing])
            assert str(error.value) == message
    with pytest.raises(ValueError, match="path must name a file at least, got an empty list"):
        data.read_libsvm([])
    with pytest.raises(TypeError, match="path must be a path, a glob or a list of these, got int"):
        data.read_libsvm(3)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(suffix, write):
    text = random_text(np.random.default_rng(3), False, 300)
    if suffix == ".zst":
        packed = pytest.importorskip("pyarrow").compress(text, "zstd", asbytes=True)
    else:
        packed = gzip.compress(text)
    path = write(packed, f"rows.svm{suffix}")
    expected = plain(data.read_libsvm(write(text)))
    assert plain(data.read_libsvm(path)) == expected
    path.write_bytes(packed + packed)  # several in one file, as tools that write in parallel leave
    assert data.read_libsvm(path).flat_indices.tolist() == expected[2][1] * 2
    for wrong in (packed[:-3], packed[: len(packed) // 2], packed[:5], b"1 3:1\n"):
        path.write_bytes(wrong)
        for read in (data.read_libsvm, lambda path: list(data.iter_libsvm(path))):
            with pytest.raises(ValueError, match="is cut off or damaged: ") as error:
                read(path)
            assert str(error.value).startswith(str(path))


def test_zst_without_pyarrow(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"rows.zst: reading .zst takes pyarrow: pip install 'deepfm_ops\[data\]'"):
        data.read_libsvm(write("1 1:1\n", "rows.zst"))


@pytest.mark.parametrize("text", [b"", b"\n", b"# nothing\n\n  \r\n"])
def test_files_without_rows(text, write):
    path = write(text)
    for read in (data.read_libsvm, lambda path: list(data.iter_libsvm(path)), data.read_libffm):
        with pytest.raises(ValueError) as error:
            read([write("1\n", "good.svm"), path])
        assert str(error.value) == f"{path} holds no rows"


def test_all_lines_are_skipped(write):
    path = write("yes 1:1\nno 2:1\n")
    with pytest.raises(ValueError) as error:
        data.read_libsvm(path, on_bad="skip")
    assert str(error.value) == f"{path} holds no rows; 2 lines were skipped"


def test_a_file_without_lines(write, monkeypatch):
    monkeypatch.setattr(libsvm, "BLOCK_BYTES", 100)
    monkeypatch.setattr(libsvm, "LONGEST_LINE", 1000)
    path = write("1 " + "1:1 " * 240 + "\n0\n")
    assert data.read_libsvm(path).row_splits.tolist() == [0, 240, 240]
    path = write("1\n1 " + "1:1 " * 300 + "\n0\n")
    with pytest.raises(ValueError, match=r"rows.txt, line 2: longer than 1000 bytes; is this a file of text\?"):
        data.read_libsvm(path)


def test_arguments(write):
    path = write("1 1:1\n")
    for read in (data.read_libsvm, data.read_libffm, data.iter_libsvm, data.iter_libffm):
        with pytest.raises(ValueError, match="on_bad must be 'error' or 'skip', got 'ignore'"):
            read(path, on_bad="ignore")
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        data.iter_libsvm(path, 0)


def test_random_rows_in_matrices(use, rng):
    for fields in (False, True):
        for _ in range(20):
            lengths = rng.integers(0, 6, size=rng.integers(1, 20))
            splits, nnz = np.concatenate([[0], np.cumsum(lengths)]), lengths.sum()
            flat = rng.integers(0, 4, nnz).astype(np.int32) if fields else None
            arrays = (splits, flat, rng.integers(1, 100, nnz), rng.normal(size=nnz).astype(np.float32))
            samples = data.Samples(np.zeros(len(lengths), np.float32), *arrays)
            sizes = samples.field_sizes
            assert len(sizes) == samples.num_fields and min(sizes) == 1 or max(sizes) > 0
            indices, values, starts = samples.indices, samples.values, np.cumsum([0, *sizes])
            for row, (begin, end) in enumerate(zip(splits[:-1], splits[1:], strict=True)):
                for field in range(len(sizes)) if fields else [slice(None)]:
                    of = flat[begin:end] == field if fields else field
                    columns = slice(starts[field], starts[field + 1]) if fields else field
                    for got, full in ((indices, arrays[2]), (values, arrays[3])):
                        expected = full[begin:end][of].tolist()
                        got = got[row, columns].tolist()
                        assert got == expected + [0] * (len(got) - len(expected))
            wider = [size + 1 for size in sizes] + [2]
            assert (samples.padded(wider)[0] != 0).sum() == nnz


def test_rows_that_do_not_fit(write):
    svm = data.read_libsvm(write("1 1:1\n0 1:1 2:1 3:1\n"))
    assert svm.padded([1] * 4)[0].tolist() == [[1, 0, 0, 0], [1, 2, 3, 0]]
    with pytest.raises(
        ValueError, match="field_sizes have 2 columns, row 1 has 3 pairs; a model for both takes the larger"
    ):
        svm.padded([1, 1])
    ffm = data.read_libffm(write("1 0:1:1\n0 1:1:1 2:1:1 1:3:1\n"))
    assert ffm.padded([1, 2, 1, 1])[0].tolist() == [[1, 0, 0, 0, 0], [0, 1, 3, 1, 0]]
    with pytest.raises(ValueError, match="field_sizes have 1 columns of field 1, row 1 has 2 pairs of it"):
        ffm.padded([1, 1, 1])
    with pytest.raises(ValueError, match="field_sizes have 2 fields, row 1 has a pair of field 2"):
        ffm.padded([1, 2])
    with pytest.raises(MemoryError, match=r"matrices of shape \(2, 35184372088832\) are too large"):
        svm.padded([2**45])
    with pytest.raises(ValueError, match=r"field_sizes must not be negative, got \[1, -1\]"):
        ffm.padded([1, -1])


def test_values_that_were_changed(write):
    samples = data.read_libsvm(write("1 1:1 2:3\n"))
    samples.flat_values = np.log1p(samples.flat_values.astype(np.float64))
    assert samples.values.dtype == np.float32 and samples.values.tolist() == [np.log1p(np.float32([1, 3])).tolist()]


def test_a_row_of_no_pairs(write):
    for read in READERS.values():
        indices, values, labels, field_sizes = read(write("1\n0\n"))
        assert (indices.tolist(), values.tolist(), labels.tolist(), field_sizes) == ([[0]] * 2, [[0]] * 2, [1, 0], [1])


def test_arrays_that_do_not_fit():
    kernels = parts("compiled")
    i64, i32, f32 = (lambda *x: np.array(x, np.int64)), (lambda *x: np.array(x, np.int32)), np.float32
    rows = "row_splits must ascend from 0 to the number of pairs"
    for splits in (i64(), i64(1, 2), i64(0, 3), i64(0, 3, 2), i64(0, -1, 2)):
        with pytest.raises(ValueError, match=rows):
            kernels.most_pairs(splits, i32(0, 0), 1)
    for fields in (i32(0, 1), i32(-1, 0)):
        with pytest.raises(ValueError, match=r"fields must be in \[0, 1\)"):
            kernels.most_pairs(i64(0, 2), fields, 1)
    good = {"row_splits": i64(0, 1, 2), "fields": i32(0, 1), "indices": i64(4, 5), "values": np.ones(2, f32)}
    to = {"field_splits": i64(0, 1, 2), "to_indices": np.zeros((2, 2), np.int64), "to_values": np.zeros((2, 2), f32)}
    assert kernels.pad_rows(**good, **to) == -1 and to["to_indices"].tolist() == [[4, 0], [0, 5]]
    assert kernels.pad_rows(**{**good, "fields": i32(0, 2)}, **to) == 1
    assert kernels.pad_rows(**{**good, "fields": i32(-1, 2)}, **to) == 0
    for name, wrong in {
        "row_splits": i64(0, 1, 3),
        "fields": i32(0),
        "values": np.ones(1, f32),
        "field_splits": i64(0, 1, 3),
        "to_indices": np.zeros((1, 2), np.int64),
        "to_values": np.zeros((2, 3), f32),
    }.items():
        with pytest.raises(ValueError, match="must"):
            kernels.pad_rows(**{**good, **to, name: wrong})
    for splits in (i64(), i64(0, 3, 2), i64(1, 2)):
        with pytest.raises(ValueError, match="field_splits must ascend from 0 to the columns of the matrices"):
            kernels.pad_rows(**good, **{**to, "field_splits": splits})
    with pytest.raises(TypeError):
        kernels.pad_rows(**good, **{**to, "to_values": np.zeros((2, 2))})
    parser = kernels.LibsvmParser(False, False)
    for text, begin in ((b"", 0), (b"1 1:1", 0), (b"1\n", 2), (b"1\n", -1)):
        with pytest.raises(ValueError, match="data must hold lines from begin on, the last with its end"):
            parser.parse(text, begin, 1)
    with pytest.raises(ValueError, match="data must be bytes in a row"):
        parser.parse(np.zeros(4, np.int64), 0, 1)


def test_the_examples():
    result = doctest.testmod(libsvm)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("compiled", [True, False])
def test_without_tensorflow_or_kernels(compiled, write):
    path = write("1 0:3:0.5\n")
    hide = ["tensorflow", "keras", "pyarrow", "pandas", *([] if compiled else ["deepfm_ops._kernels"])]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({hide}))
import deepfm_ops
samples = deepfm_ops.data.read_libffm({str(path)!r})
print(samples.flat_values, deepfm_ops.data.libsvm.LibsvmParser.__module__)
"""
    if compiled:
        parts("compiled")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == ("deepfm_ops._kernels" if compiled else "deepfm_ops.data.libsvm_python")


def test_fm_on_rows_of_any_length(write, rng, use):
    """Whether two of a row's features are of one kind is learned by the second order alone."""
    if use is libsvm_python:
        pytest.skip("the same arrays")
    from deepfm_ops import DeepFM

    lines = []
    for _ in range(400):
        kinds = rng.integers(2) * np.ones(2, int) if rng.random() < 0.5 else rng.permutation(2)
        features = [1 + 2 * rng.integers(3) + kind for kind in kinds]
        noise = [f"{7 + i}:0.1" for i in rng.permutation(5)[: rng.integers(0, 5)]]
        lines.append(" ".join(["+1" if kinds[0] == kinds[1] else "-1", *(f"{i}:1" for i in features), *noise]))
    samples = data.read_libsvm(write("\n".join(lines)))
    indices, values, labels, field_sizes = samples
    assert set(labels.tolist()) == {0, 1} and len(field_sizes) == 6 and samples.num_features == 12
    model = DeepFM(samples.num_features, samples.num_fields, 4, use_deep=False, field_sizes=field_sizes, seed=1)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    model.optimizer.learning_rate = 0.05
    model.fit((indices, values), labels, epochs=15, batch_size=50, verbose=0)
    assert model.evaluate((indices, values), labels, verbose=0)[1] > 0.95
    wider = samples.padded([1] * 9)  # padding is nothing: another model's columns give the same scores
    same = DeepFM(samples.num_features, 9, 4, use_deep=False, seed=1)
    same.set_weights(model.get_weights())
    got, expected = same.predict(wider, verbose=0), model.predict((indices, values), verbose=0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_deepfm_on_fields_of_any_length(write, rng, use):
    if use is libsvm_python:
        pytest.skip("the same arrays")
    from deepfm_ops import DeepFM

    lines = []
    for _ in range(300):
        user, tags = rng.integers(5), rng.permutation(6)[: rng.integers(1, 4)]
        label = int((user + tags.min()) % 2)
        pairs = [f"0:{user}:1", *(f"1:{5 + tag}:{1 / len(tags):.4f}" for tag in tags), f"2:11:{rng.normal():.3f}"]
        lines.append(" ".join([str(label), *pairs]))
    samples = data.read_libffm(write("\n".join(lines)))
    indices, values, labels, field_sizes = samples
    assert field_sizes == [1, 3, 1] and (samples.num_features, samples.num_fields) == (12, 3)
    model = DeepFM(12, 3, 4, (16, 16), field_sizes=field_sizes, seed=1)
    model.compile("adam", "binary_crossentropy")
    model.optimizer.learning_rate = 0.02
    history = model.fit((indices, values), labels, epochs=20, batch_size=50, verbose=0).history["loss"]
    assert history[0] > 0.65 and history[-1] < 0.3
