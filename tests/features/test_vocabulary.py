"""Columns of text and the table of a vocabulary: the compiled part against plain Python, and both against bad input."""

import collections
import concurrent.futures
import itertools
import locale

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from deepfm_ops.features import plain, vocabulary

# ruff: noqa: B023 (what is passed to same() is called at once)

native = pytest.importorskip("deepfm_ops._kernels", reason="a pure-Python install has no kernels").tables
SIDES = [native, plain]
ERRORS = (IndexError, MemoryError, RuntimeError, TypeError, ValueError)


def read(result):
    """A result in a form that compares bit for bit: arrays as dtype, shape and bytes, columns as lists."""
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    if isinstance(result, tuple):
        return tuple(map(read, result))
    if isinstance(result, native.Column | plain.Column):
        return [result[i] for i in range(len(result))]
    return result


def same(function):
    """function(native), once function(plain) was found to be the same, or to raise an error of the same type."""
    results = []
    for side in SIDES:
        try:
            results.append(function(side))
        except ERRORS as error:
            results.append(type(error))
    assert read(results[0]) == read(results[1])
    return results[0]


def random_texts(rng, count, alphabet=b"ab|: \t0.5", longest=12):
    letters = np.frombuffer(alphabet, np.uint8)
    return [rng.choice(letters, size).tobytes() for size in rng.integers(0, longest, count)]


def with_missing(rng, texts, share=0.2):
    return [None if missing else text for text, missing in zip(texts, rng.random(len(texts)) < share, strict=True)]


def of_arrow(side, array, empty_is_missing=False):
    validity, offsets, data = array.buffers()
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    offsets = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset :][: len(array) + 1]
    data = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    validity = None if validity is None else np.frombuffer(validity, np.uint8)
    return side.Column(offsets[:-1], offsets[1:], data, validity, array.offset, empty_is_missing)


def table_of(side, texts, column=1):
    """(the table of texts with the ids 1, 2, ..., its slots)."""
    keys = side.keys(column, side.Column.of_list(texts))
    slots = side.slots(keys, np.arange(1, len(texts) + 1, dtype=np.uint32))
    return side.Table(slots), slots


def found_in(side, table, texts, column=1, unseen=0, threads=1):
    ids, values = np.full(len(texts), -7), np.full(len(texts), -7, np.float32)
    counted = table.find(column, side.Column.of_list(texts), ids, values, unseen, threads)
    return ids, values, counted


def test_keys_and_buckets(rng):
    texts = [rng.bytes(size) for size in [*range(201), 256, 1000, 4096, 4097]]
    for column in (0, 1, 65535, 2**32 - 1):
        keys = same(lambda side: side.keys(column, side.Column.of_list([*texts, None])))
        assert keys[-1] == 0 and len(set(keys.tolist())) == len(keys)
    for buckets in (1, 2, 1000, 2**31 - 1, 2**63 - 1):
        found = same(lambda side: side.Column.of_list([*texts, None]).buckets(buckets))
        assert found.tolist() == [*tf.strings.to_hash_bucket_fast(texts, buckets).numpy().tolist(), -1]
    assert same(lambda side: side.Column.of_list(texts).buckets(0)) is ValueError


def test_columns_of_lists():
    texts = ["a", b"b", None, "", b"", "\0", "Ölo", "\ud800", "漢字🎲", b"\xff", "x" * 70000, None]
    column = same(lambda side: side.Column.of_list(texts))
    assert read(column)[:3] == [b"a", b"b", None] and column[7] == b"\xed\xa0\x80"
    assert same(lambda side: side.Column.of_list(texts)[len(texts)]) is IndexError
    assert same(lambda side: side.Column.of_list(texts)[-1]) is IndexError
    assert read(same(lambda side: side.Column.of_list([]))) == []
    for bad in (["a", 1], [1.5], ("a",), "a", None):
        assert same(lambda side: side.Column.of_list(bad)) is TypeError


def test_columns_of_integers(rng):
    some = rng.integers(-(2**63), 2**63 - 1, 50) >> rng.integers(0, 63, 50)
    numbers = np.concatenate([[0, -1, 2**63 - 1, -(2**63)], some])
    column = same(lambda side: side.Column.of_integers(numbers))
    assert read(column) == [str(number).encode() for number in numbers.tolist()]
    missing = rng.random(len(numbers)) < 0.5
    column = same(lambda side: side.Column.of_integers(numbers, missing))
    assert [cell is None for cell in read(column)] == missing.tolist()
    for other in (numbers[::3], numbers.astype(np.int8), np.zeros(0, np.int64), [1, 2], []):
        assert read(same(lambda side: side.Column.of_integers(other))) == [b"%d" % number for number in other]
    for bad in (numbers.astype(np.uint64), numbers.astype(float)):
        assert same(lambda side: side.Column.of_integers(bad)) is TypeError
    assert same(lambda side: side.Column.of_integers(numbers, missing[1:])) is ValueError
    assert same(lambda side: side.Column.of_integers(numbers, missing.astype(np.int8))) is TypeError
    assert same(lambda side: side.Column.of_integers(numbers.reshape(2, -1))) is ValueError


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
def test_columns_of_arrow(rng, kind):
    """Where they lie: slices begin at any bit of the validity."""
    texts = [text.decode() for text in random_texts(rng, 100)]
    for cells in (texts, with_missing(rng, texts), [None] * 100, [""] * 100):
        whole = pa.array(cells, pa.large_string()).cast(kind)
        for start, end in [(0, 100), (0, 0), (100, 100), *rng.integers(0, 101, (20, 2)).tolist()]:
            array = whole[start:end]
            expected = [None if cell is None else cell.encode() for cell in cells[start:end]]
            assert read(same(lambda side: of_arrow(side, array))) == expected
            expected = [cell or None for cell in expected]
            assert read(same(lambda side: of_arrow(side, array, empty_is_missing=True))) == expected


def test_splitting(rng):
    texts = [b"", b"|", b"||", b"|||", b"a|||b", b" a\x0b\x0c\r\nb ", b"a\x85b", b":", *random_texts(rng, 300)]
    texts = [*texts, *with_missing(rng, texts)]
    for separator in ("|", "||", "", b"|", "\0", ":"):
        row_splits, pieces, _, bad = same(lambda side: side.Column.of_list(texts).split(separator))
        by = separator.encode() if isinstance(separator, str) else separator
        expected = [[piece for piece in (cell or b"").split(by or None) if piece] for cell in texts]
        assert read(pieces) == [piece for some in expected for piece in some] and bad == -1
        assert np.diff(row_splits).tolist() == list(map(len, expected))
        same(lambda side: side.Column.of_list(texts).split(separator, True))
    _, _, weights, _ = same(lambda side: side.Column.of_list([]).split("|", True))
    assert weights.dtype == np.float32


def test_weights():
    good = ["a:0.5|b:c:-2|d|:3|e: +1e3 |f:4294967296", None, "g:1e-60|h:5."]
    row_splits, pieces, weights, bad = same(lambda side: side.Column.of_list(good).split("|", True))
    assert read(pieces) == [b"a", b"b:c", b"d", b"e", b"f", b"g", b"h"] and row_splits.tolist() == [0, 5, 5, 7]
    assert weights.tolist() == [0.5, -2, 1, 1000, 2**32, 0, 5] and bad == -1
    for spelled in ("", "x", "nan", "NA", "1x", "1_0", "0x1", "-", "inf", "-inf", "1e60", "4294967297"):
        cells = ["a:1", f"a:2|b:{spelled}|c:3", "d:bad"]
        _, pieces, weights, bad = same(lambda side: side.Column.of_list(cells).split("|", True))
        assert bad == 1 and read(pieces) == [b"a", b"a", b"b", b"c", b"d"] and weights.tolist() == [1, 2, 1, 3, 1]


MISSING = ["", " ", "\t\r\n", "NA", "N/A", "NaN", "nan", " nan ", "NULL", "null", "None", "\\N", "-", "-nan", "NAN"]
NO_NUMBERS = ["abc", "1_000", "0x10", "1e", "1e+", "e5", ".", "+", "-.", "+-1", "-+1", "++1", "--1", "1 2", "1.2.3"]
NO_NUMBERS += ["1,5", "infinit", "none", "nan(", "nan( )", "1\0", "\0", "\u0661", "1f", "1.5e1.5", "\xa07", "na", "+NA"]
NUMBERS = ["1", "-1.5", "+2", " 7 ", ".5", "5.", "1e-3", "1E+3", "inf", "-inf", "+inf", "Infinity", "1e400", "-1e400"]
NUMBERS += ["1e-400", "-1e-400", "-0", "0", "5e-324", "2e-324", "1.7976931348623159e308", "123456789012345", "\v1\f"]
NUMBERS += [
    "-.5e1",
    "00012",
    "0." + "0" * 400 + "1",
    "9" * 400,
    "9007199254740993",
    "0.1234567890123456789",
    "1e9999999999",
]


def test_numbers(rng):
    numbers, bad = same(lambda side: side.Column.of_list([*NUMBERS, *MISSING, "nan(1)", None]).numbers())
    assert numbers[: len(NUMBERS)].tolist() == list(map(float, NUMBERS)) and bad == -1
    assert np.signbit(numbers[NUMBERS.index("-0")]) and np.isnan(numbers[len(NUMBERS) :]).all()
    for spelled in NO_NUMBERS:
        numbers, bad = same(lambda side: side.Column.of_list(["1", None, spelled, "x", "2"]).numbers())
        assert bad == 2 and np.isnan(numbers[1:4]).all() and numbers[4] == 2, spelled
    same(lambda side: side.Column.of_list([]).numbers())
    made = [repr(x) for x in (rng.normal(size=500) * 10.0 ** rng.integers(-320, 308, 500)).tolist()]
    made += [f"{x:.{digits}f}" for x, digits in zip(rng.normal(size=500) * 1e3, rng.integers(0, 20, 500), strict=True)]
    numbers, bad = same(lambda side: side.Column.of_list(made).numbers())
    assert numbers.tolist() == list(map(float, made)) and bad == -1
    for text in random_texts(rng, 3000, b"0123456789+-.eE ", 9) + random_texts(rng, 1000, b"+-infatyINFATY()_ ", 6):
        same(lambda side: side.Column.of_list([text]).numbers())


def test_numbers_in_a_locale_with_a_decimal_comma():
    before = locale.setlocale(locale.LC_NUMERIC)
    try:
        locale.setlocale(locale.LC_NUMERIC, "de_DE.UTF-8")
    except locale.Error:
        pytest.skip("this machine has no such locale")
    try:
        numbers, bad = same(lambda side: side.Column.of_list(["1.5", "1.5e-400", "1.5e400", "1,5"]).numbers())
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)
    assert numbers[:3].tolist() == [1.5, 0, np.inf] and bad == 3


def test_texts_that_cannot_be_values(rng):
    bad = [b"\xff", b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf0\x8f\xbf\xbf"]
    bad += [
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xc3",
        b"\xe6\xbc",
        b"\xf0\x9f\x8e",
        b"abcdefgh\xff",
        b"abcdefg\xc3h",
        b"x" * 65536,
    ]
    good = ["", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"]
    good += ["x" * 65535]
    assert same(lambda side: side.Column.of_list([*good, None]).first_bad()) == -1
    for text in bad:
        assert same(lambda side: side.Column.of_list([*good, None, text, b"\xff"]).first_bad()) == len(good) + 1
        counter = [side.Counter(1) for side in SIDES]
        for i, side in enumerate(SIDES):
            assert counter[i].add(side.Column.of_list(["a", None, "b", text, "c"])) == (1, 3, 3)
            assert counter[i].total == 3 and len(counter[i]) == 2
    for text in random_texts(rng, 3000, b"a\x7f\x80\x8f\x90\x9f\xa0\xbf\xc1\xc2\xdf\xe0\xed\xef\xf0\xf4\xf5", 14):
        try:
            expected = -1 if text.decode() is not None else None
        except UnicodeDecodeError:
            expected = 0
        assert same(lambda side: side.Column.of_list([text]).first_bad()) == expected


def test_finding(rng):
    texts = sorted(set(random_texts(rng, 700)))
    known = texts[::2]
    asked = with_missing(rng, [texts[i] for i in rng.integers(0, len(texts), 1000)])
    for size, unseen in itertools.product((len(known), 3, 1, 0), (0, 5)):
        slots = same(lambda side: table_of(side, known[:size])[1])
        number = {text: i + 1 for i, text in enumerate(known[:size])}
        for side, other in itertools.product(SIDES, SIDES):
            table = side.Table(table_of(other, known[:size])[1])
            ids, values, (missing, unknown) = found_in(side, table, asked, unseen=unseen)
            assert ids.tolist() == [0 if text is None else number.get(text, unseen) for text in asked]
            assert values.tolist() == (ids != 0).tolist()
            assert missing == asked.count(None) and unknown == sum(t is not None and t not in number for t in asked)
            assert [table.id(1, text) for text in texts] == [number.get(text, 0) for text in texts]
            assert table.id(1, texts[1].decode()) == number.get(texts[1], 0) and table.id(2, known[0]) == 0
        assert len(slots) == 16 * max(8, size + size // 2 + 1)


def test_finding_into_a_matrix(rng):
    known = sorted(set(random_texts(rng, 100)))
    asked = with_missing(rng, [*known, b"new"])

    def into(side, at, step):
        ids, values = np.full((len(asked), 5), -1), np.full((len(asked), 5), -1, np.float32)
        table_of(side, known)[0].find(1, side.Column.of_list(asked), ids[::step, at], values[::step, 4 - at], 3)
        return ids, values

    for at, step in itertools.product(range(5), (1, -1)):
        ids, values = same(lambda side: into(side, at, step))
        others = np.delete(ids, at, 1), np.delete(values, 4 - at, 1)
        assert (others[0] == -1).all() and (others[1] == -1).all()
        assert ids[::step, at].tolist() == found_in(native, table_of(native, known)[0], asked, unseen=3)[0].tolist()


def test_threads_find_the_same(rng):
    known = [str(i) for i in range(3000)]
    asked = with_missing(rng, [str(i) for i in rng.integers(0, 4000, 100_000)])
    table, _ = table_of(native, known)
    one = found_in(native, table, asked, unseen=9)
    for threads in (2, 3, 8):
        assert read(found_in(native, table, asked, unseen=9, threads=threads)) == read(one)
    assert read(found_in(plain, table_of(plain, known)[0], asked, unseen=9, threads=2)) == read(one)
    for threads in (0, -1):
        assert same(lambda side: found_in(side, table_of(side, known)[0], ["a"], threads=threads)) is ValueError


def test_slots_that_collide(rng):
    """Many keys of one home, and those of the last homes, whose places are the first ones."""
    last = 2**64 - 1
    for keys in (
        last - np.arange(50, dtype=np.uint64),
        1 + np.arange(50, dtype=np.uint64),
        np.concatenate([last - np.arange(20, dtype=np.uint64), 1 + np.arange(20, dtype=np.uint64)]),
        np.full(7, 12345, np.uint64),
        rng.integers(1, last, 1000, np.uint64),
    ):
        ids = rng.permutation(len(keys)).astype(np.uint32) + 1
        slots = same(lambda side: side.slots(keys, ids)).view("<u8,<u4,<u4")
        taken = {slot[0]: slot[1] for slot in slots.tolist() if slot[0]}
        assert taken == dict(zip(keys.tolist(), ids.tolist(), strict=True)) or len(taken) < len(keys)
    some = [str(i) for i in range(100_000)]
    highest = np.argsort(native.keys(1, native.Column.of_list(some)))[-40:]
    wrapped = [some[i] for i in highest]
    for side in SIDES:
        ids, _, counted = found_in(side, table_of(side, wrapped)[0], [*wrapped, *some[:500]])
        assert ids[:40].tolist() == list(range(1, 41)) and counted[1] == 500 - len(set(some[:500]) & set(wrapped))
    assert same(lambda side: side.slots(np.array([3, 0], np.uint64), np.array([1, 2], np.uint32))) is ValueError
    assert same(lambda side: side.slots(np.array([3], np.uint64), np.array([1, 2], np.uint32))) is ValueError


def test_slots_of_which_none_is_empty(rng):
    """Somebody else's: a search ends."""
    slots = np.zeros(16, "<u8,<u4,<u4")
    slots["f0"], slots["f1"] = rng.integers(1, 2**64 - 1, 16, np.uint64), np.arange(1, 17)
    for side in SIDES:
        table = side.Table(slots.view(np.uint8))
        ids, _, counted = found_in(side, table, ["a", "b", None], unseen=4)
        assert ids.tolist() == [4, 4, 0] and counted == (1, 2) and table.id(1, "a") == 0
        assert side.Counter(1).add(side.Column.of_list(["a"]), table, np.zeros(17, np.int64)) == (0, 1, -1)


def finished(counter, least=1):
    """{key: (count, text)}, in the order in which they came."""
    keys, counts, ends, texts = counter.finish(least)
    assert (keys.dtype, counts.dtype, ends.dtype, texts.dtype) == (np.uint64, np.uint64, np.uint64, np.uint8)
    ends = [0, *ends.tolist()]
    cut = [texts[start:end].tobytes() for start, end in zip(ends, ends[1:], strict=False)] or [None] * len(keys)
    return {key: (count, text) for key, count, text in zip(keys.tolist(), counts.tolist(), cut, strict=True)}


def counted_by(side, batches, known=(), counts=None, sketch=None, **options):
    counter = side.Counter(1, sketch=None if sketch is None else side.Sketch(sketch), **options)
    table = table_of(side, list(known))[0] if known else None
    results = [counter.add(side.Column.of_list(batch), table, counts) for batch in batches]
    return counter, tuple(results)


def test_counting(rng):
    texts = sorted(set(random_texts(rng, 400)))
    asked = [texts[int(i)] for i in len(texts) * rng.random(3000) ** 3]
    batches = [with_missing(rng, asked[at : at + 701]) for at in range(0, 3000, 701)] + [[]]
    expected = collections.Counter(text for batch in batches for text in batch if text is not None)
    known = texts[:200:3]
    for some, keep_texts in itertools.product(((), known), (True, False)):
        seen = {}
        for side in SIDES:
            counts = np.zeros(len(some) + 1, np.int64)
            counter, results = counted_by(side, batches, some, counts, keep_texts=keep_texts)
            assert counts[1:].tolist() == [expected[text] for text in some]
            others = {text: count for text, count in expected.items() if text not in some}
            assert len(counter) == len(others) and counter.total == sum(others.values()) and counter.nbytes > 0
            seen[side] = results, [finished(counter, least) for least in (1, 3, 10**6)]
            for least, of in zip((1, 3, 10**6), seen[side][1], strict=True):
                frequent = {text: count for text, count in others.items() if count >= least}
                keys = side.keys(1, side.Column.of_list(list(frequent))).tolist()
                pairs = [(count, text if keep_texts else None) for text, count in frequent.items()]
                assert of == dict(zip(keys, pairs, strict=True))
        assert seen[native] == seen[plain]
        assert [list(of) for of in seen[native][1]] == [list(of) for of in seen[plain][1]]


def test_counts_of_known_values_must_fit():
    def count(side, size, dtype=np.int64):
        counter = side.Counter(1)
        return counter.add(side.Column.of_list(["a", "b"]), table_of(side, ["a", "b"])[0], np.zeros(size, dtype))

    assert same(lambda side: count(side, 3)) == (0, 0, -1)
    assert same(lambda side: count(side, 2)) is ValueError and same(lambda side: count(side, 0)) is ValueError
    assert same(lambda side: count(side, 3, np.int32)) is TypeError
    table = [table_of(side, ["a"])[0] for side in SIDES]
    assert same(lambda side: side.Counter(1).add(side.Column.of_list(["a"]), table[side is plain])) is TypeError


@pytest.mark.parametrize("least", [1, 2, 5, 255, 300])
@pytest.mark.parametrize("size", [0, 64, 1024])
def test_the_sketch_never_counts_too_little(rng, least, size):
    texts = [str(int(i)) for i in 500 * rng.random(8000) ** 6]
    expected = collections.Counter(texts)
    both = []
    for side in SIDES:
        counter, results = counted_by(side, [texts[:3000], texts[3000:]], sketch=size, least=least)
        assert counter.total == len(texts)
        both.append((results, finished(counter), len(counter)))
    assert both[0] == both[1]
    found = {text.decode(): count for count, text in both[0][1].values()}
    frequent = {text: count for text, count in expected.items() if count >= least}
    assert frequent and all(found[text] >= count for text, count in frequent.items())
    assert all(found[text] <= len(texts) for text in found)


def test_a_large_sketch_keeps_rare_values_out():
    texts = [str(i) for i in range(2000)] + ["often"] * 3
    counter, _ = counted_by(native, [texts], sketch=1 << 20, least=3)
    assert finished(counter, 3).keys() == set(native.keys(1, native.Column.of_list(["often"])).tolist())


def test_counters_share_a_sketch_among_threads():
    sketch, texts = native.Sketch(1 << 16), native.Column.of_list([str(i % 1000) for i in range(20_000)])
    counters = [native.Counter(number, sketch=sketch, least=5) for number in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: counters[i % 4].add(texts), range(16)))
    for counter in counters:
        counts = counter.finish(1)[1]
        assert len(counts) == 1000 and counts.min() >= 80 and counter.total == 80_000


def test_ids_fall_with_the_counts(rng):
    texts = {b"", b"\0", b"\0\0", b"aaaaaaaa", b"aaaaaaaa\0", b"aaaaaaaab", *random_texts(rng, 800, b"ab\0\xc3", 13)}
    texts = sorted(texts)
    rng.shuffle(texts)
    size = len(texts)
    columns, keys = rng.integers(1, 4, size, np.uint32), rng.permutation(size).astype(np.uint64)
    ends, joined = np.cumsum([len(t) for t in texts], dtype=np.uint64), np.frombuffer(b"".join(texts), np.uint8)
    for most in (2, 70, 10**6):
        counts = rng.integers(0, most, size, np.uint64)
        order = same(lambda side: side.order(counts, columns, keys, ends, joined)).tolist()
        by_text = [(-int(counts[i]), columns[i], texts[i]) for i in order]
        assert by_text == sorted(by_text) and sorted(order) == list(range(size))
        order = same(lambda side: side.order(counts, columns, keys, None, joined[:0])).tolist()
        by_key = [(-int(counts[i]), columns[i], keys[i]) for i in order]
        assert by_key == sorted(by_key)
    twice = [np.tile(array, 2) for array in (counts, columns, keys)]
    same(lambda side: side.order(*twice, np.concatenate([ends, ends + ends[-1]]), np.tile(joined, 2)))
    empty = [np.zeros(0, dtype) for dtype in (np.uint64, np.uint32, np.uint64, np.uint64, np.uint8)]
    assert len(same(lambda side: side.order(*empty))) == 0
    for bad in (ends + np.uint64(1), ends[::-1].copy(), ends[1:]):
        assert same(lambda side: side.order(counts, columns, keys, bad, joined)) is ValueError
    assert same(lambda side: side.order(counts, columns[1:], keys, None, joined)) is ValueError


def test_bags(rng):
    def fill(side, lengths, ids, weights, size):
        splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        indices, values = np.full((len(lengths), 9), -1), np.full((len(lengths), 9), -1, np.float32)
        side.fill_bags(splits, ids, weights, indices[:, 1 : 1 + size], values[:, 1 : 1 + size])
        return indices, values

    for size in (0, 1, 3, 7):
        lengths = rng.integers(0, 6, 60)
        ids = rng.integers(0, 4, lengths.sum())
        weights = rng.normal(size=len(ids)).astype(np.float32)
        for some in (None, weights):
            indices, values = same(lambda side: fill(side, lengths, ids, some, size))
            for row, (first, length) in enumerate(zip(np.cumsum(lengths) - lengths, lengths, strict=True)):
                taken = first + np.flatnonzero(ids[first : first + length])[:size]
                assert indices[row, 1 : 1 + size].tolist() == ids[taken].tolist() + [0] * (size - len(taken))
                expected = (
                    weights[taken] if some is not None else np.float32(1 / max(1, len(taken))) * np.ones(len(taken))
                )
                assert values[row, 1 : 1 + size].tolist() == expected.tolist() + [0] * (size - len(taken))
            assert (indices[:, [0, 8]] == -1).all() and (values[:, [0, 8]] == -1).all()

    def bad(side, splits, dtype=np.int64, rows=2, weights=None):
        side.fill_bags(
            np.array(splits), np.ones(5, np.int64), weights, np.zeros((rows, 2), dtype), np.zeros((rows, 2), np.float32)
        )

    assert same(lambda side: bad(side, [0, 3, 5])) is None
    for splits in ([0, 3, 6], [-1, 3, 5], [0, 4, 3], [3, 6, 5]):
        assert same(lambda side: bad(side, splits)) is ValueError
    assert same(lambda side: bad(side, [0, 3, 5], weights=np.ones(4, np.float32))) is ValueError
    assert same(lambda side: bad(side, [0, 3, 5], np.int32)) is TypeError
    assert same(lambda side: bad(side, [0, 3, 5], rows=3)) is TypeError
    assert same(lambda side: bad(side, np.zeros(0, np.int64))) is TypeError
    read_only = np.zeros((1, 2), np.int64)
    read_only.flags.writeable = False
    args = np.array([0, 1]), np.ones(1, np.int64), None, read_only, np.zeros((1, 2), np.float32)
    assert same(lambda side: side.fill_bags(*args)) is ValueError


def test_every_damaged_byte_is_found(rng):
    content = rng.integers(0, 256, 2 * 4096 + 300, np.uint8)
    sums = same(lambda side: side.sums(content))
    assert len(sums) == 3 and len(same(lambda side: side.sums(content[:0]))) == 0
    for side, step in ((native, 1), (plain, 131)):
        assert side.Blocks(content, sums).first_bad(0, len(content)) == -1
        for at in range(0, len(content), step):
            flipped = np.uint8(1 << rng.integers(0, 8))
            content[at] ^= flipped
            blocks, block = side.Blocks(content, sums), at // 4096 * 4096
            assert blocks.first_bad(0, len(content)) == blocks.first_bad(at, at + 1) == block
            assert blocks.first_bad(0, block) == -1
            content[at] ^= flipped


def test_blocks_are_checked():
    content = np.zeros(5000, np.uint8)
    sums = native.sums(content)
    for begin, end in ((-1, 5), (0, 5001)):
        assert same(lambda side: side.Blocks(content, sums).first_bad(begin, end)) is IndexError
    assert same(lambda side: side.Blocks(content, sums).first_bad(4999, 4999)) == -1
    assert same(lambda side: side.Blocks(content, sums).first_bad(2**62, 7)) == -1
    assert same(lambda side: side.Blocks(content[:0], sums[:0]).first_bad(0, 0)) == -1
    for bad in (sums[1:], np.concatenate([sums, sums])):
        assert same(lambda side: side.Blocks(content, bad)) is ValueError
    for args in ((content.view(np.int8), sums), (content, sums.view(np.int64)), (content[::2], sums), (5, sums)):
        assert same(lambda side: side.Blocks(*args)) is TypeError


def test_a_table_in_a_damaged_file(rng):
    known = [str(i) for i in range(1000)]
    _, slots = table_of(native, known)
    content = np.zeros((128 + len(slots) + 16) // 8 * 8, np.uint8)
    content[128 : 128 + len(slots)] = slots
    sums = native.sums(content)

    def find(side, start=128):
        table = side.Table(content[start : start + len(slots)], side.Blocks(content, sums))
        return found_in(side, table, known)[0].tolist()

    assert same(find) == list(range(1, 1001))
    for at in rng.integers(128, 128 + len(slots), 5):
        content[at] ^= 4
        assert same(find) is RuntimeError
        table = [side.Table(content[128 : 128 + len(slots)], side.Blocks(content, sums)) for side in SIDES]
        counter = lambda side: side.Counter(1)  # noqa: E731
        args = [(side.Column.of_list(known), table[side is plain], np.zeros(1001, np.int64)) for side in SIDES]
        assert same(lambda side: counter(side).add(*args[side is plain])) is RuntimeError
        content[at] ^= 4
    assert same(lambda side: find(side, 136)) is ValueError  # slots would lie in two blocks
    other = [side.Blocks(content.copy(), sums) for side in SIDES]
    assert same(lambda side: side.Table(content[128:256], other[side is plain])) is ValueError


def test_cells_outside_the_data():
    def column(side, starts, ends, dtype=np.int64, data=b"abcd", **others):
        return side.Column(np.array(starts, dtype), np.array(ends, dtype), np.frombuffer(data, np.uint8), **others)

    for dtype in (np.int32, np.int64):
        largest = np.iinfo(dtype).max
        assert read(same(lambda side: column(side, [0, 4, 2], [4, 4, 3], dtype))) == [b"abcd", b"", b"c"]
        for start, end in ((-1, 2), (0, 5), (3, 2), (5, 5), (largest, largest), (-largest, -1), (~largest, largest)):
            assert same(lambda side: column(side, [0, start], [1, end], dtype)) is ValueError
    assert same(lambda side: column(side, [0, 1], [1])) is ValueError
    for dtype in (np.int16, np.uint32, np.uint64, float, ">i8", ">i4", object):
        assert same(lambda side: column(side, [0], [1], dtype)) is TypeError
    assert read(same(lambda side: column(side, [0, 0], [0, 0], data=b""))) == [b"", b""]
    for size, first_bit, good in (
        (1, 0, 1),
        (1, 6, 1),
        (2, 14, 1),
        (1, 7, 0),
        (0, 0, 0),
        (1, -1, 0),
        (1, 2**63 - 1, 0),
    ):
        options = {"validity": np.full(size, 255, np.uint8), "first_bit": first_bit}
        found = same(lambda side: column(side, [0, 1], [1, 2], **options))
        assert read(found) == [b"a", b"b"] if good else found is ValueError


def test_arrays_of_another_kind(rng):
    offsets, data = np.arange(8), np.frombuffer(b"abcdefgh", np.uint8)
    odd = np.frombuffer(b"\0" * 65, np.uint8)[1:].view(np.int64)  # not aligned
    for starts, ends, content, validity in (
        (offsets[::2], offsets[::2], data, None),
        (offsets.reshape(2, 4), offsets.reshape(2, 4), data, None),
        (offsets.tolist(), offsets, data, None),
        (offsets, offsets.astype(np.int32), data, None),
        (odd, offsets, data, None),
        (offsets, odd, data, None),
        (offsets, offsets, data[::-1], None),
        (offsets, offsets, data.view(np.int8), None),
        (offsets, offsets, b"abcdefgh", None),
        (offsets, offsets, data, np.ones(8, bool)),
        (offsets, offsets, data, np.ones(16, np.uint8)[::2]),
    ):
        assert same(lambda side: side.Column(starts, ends, content, validity)) is TypeError

    _, slots = table_of(native, ["a", "b"])
    for bad in (slots.view(np.uint64), slots[::2], slots.reshape(8, -1), slots.tobytes()):
        assert same(lambda side: side.Table(bad)) is TypeError
    for bad in (slots[:-1], slots[8:], slots[4:-12], slots[:0]):
        assert same(lambda side: side.Table(bad)) is ValueError

    def find(side, ids, values=None):
        return table_of(side, ["a", "b"])[0].find(1, side.Column.of_list(["b", None, "x"]), ids, values)

    record = np.zeros(3, [("id", "i8"), ("other", "i4")])  # 12 bytes: its ids are not a whole number of ids apart
    read_only = np.zeros(3, np.int64)
    read_only.flags.writeable = False
    for bad in (np.zeros(3, np.int32), np.zeros((3, 1), np.int64), record["id"], [0, 0, 0], np.zeros(3, ">i8")):
        assert same(lambda side: find(side, bad)) is TypeError
    for bad in (np.zeros(2, np.int64), np.zeros(4, np.int64), read_only, np.broadcast_to(np.int64(0), 3)):
        assert same(lambda side: find(side, bad)) is ValueError
    good = np.zeros(3, np.int64)
    assert same(lambda side: find(side, good, np.zeros(3))) is TypeError
    assert same(lambda side: find(side, good, np.zeros(2, np.float32))) is ValueError
    assert same(lambda side: find(side, good, np.zeros(3, np.float32))) == (1, 1) and good.tolist() == [2, 0, 0]


def test_arrays_stay_alive():
    """A column, its pieces, a table and its blocks hold the memory that they read."""
    for side in SIDES:
        column = of_arrow(side, pa.array(["a|b", None, "c"] * 1000))
        pieces = column.split("|")[1]
        del column
        content = np.concatenate([table_of(side, ["a", "b", "c"])[1]])
        table = side.Table(content, side.Blocks(content, side.sums(content)))
        sketch = side.Sketch(1 << 20)
        counter = side.Counter(1, sketch=sketch, least=1)
        del content, sketch
        _ = [np.ones(1 << 16) for _ in range(10)]
        ids = np.zeros(len(pieces), np.int64)
        assert table.find(1, pieces, ids) == (0, 0) and ids[:3].tolist() == [1, 2, 3]
        assert counter.add(pieces) == (0, 3000, -1) and len(counter) == 3


def test_empty_columns():
    for side in SIDES:
        empty = [side.Column.of_list([]), side.Column(*[np.zeros(0, np.int32)] * 2, np.zeros(0, np.uint8))]
        empty.append(side.Column.of_integers(np.zeros(0, np.int64)))
        for column in empty:
            assert len(column) == 0 and column.first_bad() == -1 and len(column.buckets(3)) == 0
            assert len(side.keys(1, column)) == 0 and column.split("|", True)[0].tolist() == [0]
            assert table_of(side, [])[0].find(1, column, np.zeros(0, np.int64), threads=2) == (0, 0)
            counter = side.Counter(1)
            assert counter.add(column) == (0, 0, -1) and [len(part) for part in counter.finish()] == [0, 0, 0, 0]


def test_vocabularies_are_the_same(rng, monkeypatch):
    batches = [[str(int(i)) for i in 90 * rng.random(500) ** 2] for _ in range(2)]

    def grown(side):
        monkeypatch.setattr(vocabulary, "native", side)
        found, results = vocabulary.Vocabulary.empty(), []
        for texts in batches:
            counters = [side.Counter(column) for column in (1, 2)]
            counts = found.counts.copy()
            assert [found.count(counter, side.Column.of_list(texts), counts) for counter in counters] == [-1, -1]
            values = [vocabulary.Values(counter, *counters[counter - 1].finish(2)) for counter in (1, 2)]
            found, _ = found.with_values(values, counts=counts)
            found = found.without(found.of(2)[::3])
            arrays = found.arrays()
            results += [arrays[name] for name in sorted(arrays)]
            results += [(str(texts), ids) for texts, ids in map(found.values, (1, 2))]
        return tuple(results)

    same(grown)
