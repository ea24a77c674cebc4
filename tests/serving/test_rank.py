"""Ranking: scores are those of the joined rows, the order is theirs, and files of items are whole or refused."""

import json
import os
import pathlib
import struct

import numpy as np
import pandas as pd
import pytest
from crafting import ARRAYS, mutations, packed
from testing import run_python, runnable_instruction_sets

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat
from deepfm_ops.scorer import Items, Scorer, ScorerFileError
from deepfm_ops.scorer import file as scorer_file

kernels = pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
KINDS = {
    "LR": {"use_fm": False, "use_deep": False},
    "FM": {"use_deep": False},
    "DNN": {"use_linear": False, "use_fm": False},
    "DeepFM": {},
    "no hidden layer": {"hidden_units": ()},
    "batch_norm": {"batch_norm": True},
    "gelu's kin": {"activation": "silu"},
    "regression": {"task": "regression"},
    "FM of order 3": {"order": 3, "use_deep": False},
    "DeepFM of order 3": {"order": 3},
    "FM with field weights": {"field_weights": True, "use_deep": False},
    "DeepFM with field weights": {"field_weights": True},
}
N = 83


def shuffled(model, rng):
    """The model with weights that are nowhere zero or one."""
    for weight in model.weights:
        noise = rng.normal(size=weight.shape) * 0.3
        weight.assign(np.abs(noise) + 0.5 if "variance" in weight.path else noise)
    return model


def first(scores, k, among=None):
    """The positions of the k highest of scores [N], of equal ones the first."""
    among = range(len(scores)) if among is None else among
    return sorted(among, key=lambda place: (-scores[place], place))[:k]


def logit(scores):
    x = scores.astype(np.float64)
    return np.log(x / (1 - x))


def joined(user, items, row=None):
    """The rows of every item with a user: a record, or row `row` of a table."""
    count = len(next(iter(items.values())))
    return items | {name: [x if row is None else x[row]] * count for name, x in user.items()}


def score(scorer, table, head=None):
    """The scores of one head [N]."""
    name, number = head if isinstance(head, tuple) else (head, None) if isinstance(head, str) else (None, head)
    scores = scorer.score(table)
    scores = scores if name is None else scores[name]
    return scores if number is None else scores[:, number]


def check(scorer, users, table, k=10, head=None, items=None, **options):
    """Ranks a table of users, each with the joined rows' scores and in their order."""
    items = scorer.items(table) if items is None else items
    positions, scores = scorer.rank(users, items, k, head=head, **options)
    count = len(next(iter(users.values())))
    assert positions.shape == scores.shape == (count, min(k, N)) and positions.dtype == np.int64
    assert scores.dtype == np.float32
    for row in range(count):
        want = score(scorer, joined(users, table, row), head)
        np.testing.assert_allclose(scores[row], want[positions[row]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores[row], np.sort(want)[::-1][:k], rtol=1e-5, atol=1e-5)
        assert len(set(positions[row].tolist())) == min(k, N)
    return items


@pytest.fixture(name="table")
def _table(rng):
    """Items of raw features; some are missing or unknown."""
    price = rng.normal(size=N).astype(object)
    price[3] = None
    return {
        "item": [f"i{n}" for n in range(N)],
        "tags": [["a", "b", "c", "d"][: n % 4] for n in range(N)],
        "price": list(price),
        "kind": [None if n % 7 == 0 else f"k{n % 5}" for n in range(N)],
        "marks": [f"m{n % 3}:{n % 5 / 4}|m1:0.5" if n % 6 else None for n in range(N)],
    }


USERS = {"user": ["ann", "bob", None, "eve"], "age": [0.3, None, -1.0, 2.0], "past": ["a|c", "d", None, "a|b|c"]}


@pytest.fixture(name="features")
def _features(table, rng):
    seen = {name: [x[n] for n in rng.integers(0, N, 400)] for name, x in table.items()}
    seen |= {name: [x[n] for n in rng.integers(0, 3, 400)] for name, x in USERS.items()}
    numeric = {"age": "standardize", "price": "quantiles"}
    return FeatureDictionary(2).fit(
        seen, ["user", "item"], numeric, ["tags", "past", "marks"], hash_buckets={"kind": 4}, weighted="marks"
    )


@pytest.fixture(name="make")
def _make(features, rng, tmp_path):
    """A function that exports and loads a model of the features."""

    def make(name="m", export=None, threads=1, **options):
        options = {"embedding_dim": 7, "hidden_units": (9, 4)} | options
        model = shuffled(DeepFM.from_features(features, **options), rng)
        deepfm_ops.export_scorer(model, tmp_path / name, **(export or {}))
        return Scorer.load(tmp_path / name, threads=threads)

    return make


@pytest.mark.filterwarnings("ignore:column")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_raw_features(kind, make, table):
    scorer = make(threads=2, **KINDS[kind])
    items = check(scorer, USERS, table)
    assert items.inputs == ["item", "kind", "price", "tags", "marks"] and len(items) == N
    check(scorer, USERS, table, k=1000)
    record = {name: x[1] for name, x in USERS.items()}
    positions, scores = scorer.rank(record, items, 5)
    both = scorer.rank(USERS, items, 5)
    np.testing.assert_array_equal(positions, both[0][1])
    np.testing.assert_allclose(scores, both[1][1], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:column")
@pytest.mark.parametrize(
    "export", [{"table": "int8"}, {"table": "bfloat16"}, {"shards": 3}, {"table": "int8", "shards": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["FM", "DeepFM", "LR", "DeepFM of order 3"])
def test_scores_of_narrow_and_sharded_tables(kind, export, make, table):
    check(make(export=export, **KINDS[kind]), USERS, table)


COLUMNS = [
    SparseFeat("id", 90, 4),
    SparseFeat("city", 50, 4, use_hash=True, dtype="string"),
    VarLenSparseFeat(SparseFeat("tags", 20, 4), 3, "max"),
    VarLenSparseFeat(SparseFeat("liked", 90, 4, embedding_name="id"), 3, "mean", length_name="count"),
    VarLenSparseFeat(SparseFeat("words", 9, 6, group_name="b"), 2, "sum", weight_name="strength"),
    SparseFeat("shop", 9, 6, group_name="b"),
    SparseFeat("tier", 4, 3, group_name="c"),
    DenseFeat("age", 2, embedding_dim=4),
    DenseFeat("price"),
    DenseFeat("income", 2),
]


@pytest.mark.parametrize("interaction", [{}, {"order": 3}, {"field_weights": True}], ids=str)
@pytest.mark.parametrize(("kind", "task"), [("FM", "heads"), ("DeepFM", "binary"), ("DeepFM", "heads")])
def test_scores_of_columns(kind, task, interaction, rng, tmp_path):
    """Groups that one side has alone, tables that both share, maxima, lengths and weights on each side."""
    options = {"dnn_hidden_units": () if kind == "FM" else (6, 3), "task": TASK if task == "heads" else task}
    options |= interaction
    model = DeepFM.from_columns(COLUMNS, COLUMNS, fm_group=["default_group", "b", "c"], **options)
    shuffled(model, rng)
    deepfm_ops.export_scorer(model, tmp_path / "m")
    scorer = Scorer.load(tmp_path / "m")
    integers = lambda most, *shape: rng.integers(0, most, shape).tolist()  # noqa: E731
    item = {"id": integers(90, N), "tags": integers(20, N, 3), "words": integers(9, N, 2), "price": integers(5, N)}
    item |= {"strength": rng.normal(size=(N, 2)).tolist(), "tier": integers(4, N)}
    user = {"city": ["Rome", "Oslo"], "liked": integers(90, 2, 3), "count": [2, 0], "shop": [1, 2]}
    user |= {"age": [[0.5, 2], [1, 3]], "income": [[1.0, 2], [3, 4]]}
    swapped = scorer.items(user)  # the users are the items
    for head in HEADS if task == "heads" else [None]:
        check(scorer, user, item, head=head)
        positions, scores = scorer.rank({name: x[:5] for name, x in item.items()}, swapped, 2, head=head)
        for row in range(5):
            want = score(scorer, joined(item, user, row), head)
            np.testing.assert_allclose(scores[row], want[positions[row]], rtol=1e-5, atol=1e-5)
    split = {name: x for name, x in item.items() if name != "strength"}
    with pytest.raises(ValueError, match=r"column 'words' needs \['words', 'strength'\] of one side"):
        scorer.items(split)


def test_every_input_is_the_items(make, table):
    """The user is then an empty record."""
    scorer = make()
    whole = table | {name: [x[0]] * N for name, x in USERS.items()}
    positions, scores = scorer.rank({}, scorer.items(whole), 6)
    want = scorer.score(whole)
    assert positions.tolist() == first(want, 6)
    np.testing.assert_allclose(scores, want[positions], rtol=0, atol=1e-5)


def test_tables_of_pandas_and_many_blocks(make, table, monkeypatch):
    from deepfm_ops.scorer import ranking

    scorer = make()
    whole = scorer.items(table)
    monkeypatch.setattr(ranking, "_ENCODED", 10)
    monkeypatch.setattr(ranking, "_SCORED", 7)
    blocks = scorer.items(pd.DataFrame(table | {"unused": [0] * N}))
    np.testing.assert_allclose(blocks.rows, whole.rows, rtol=0, atol=1e-6)
    np.testing.assert_allclose(blocks.hidden, whole.hidden, rtol=0, atol=1e-5)
    check(scorer, USERS, table)
    assert scorer.rank(pd.DataFrame(USERS), blocks, 3)[0].shape == (4, 3)


# Heads.

TASK = {"click": "binary", "dwell": "regression", "mood": ("multiclass", 3)}
HEADS = ["click", "dwell", ("mood", 0), ("mood", 2)]


WIDTHS = {"LR": 0, "FM": 7, "no hidden layer": 7, "FM of order 3": 14, "DeepFM with field weights": 5 * 7}


@pytest.mark.parametrize("kind", WIDTHS)
def test_scores_of_heads(kind, make, table, tmp_path):
    """By items that are encoded once for all of them."""
    scorer = make(threads=2, task=TASK, **KINDS[kind])
    items = scorer.items(table, key="item")
    assert items.rows.shape == (N, 5 + WIDTHS[kind])
    items.save(tmp_path / "i")
    loaded = Items.load(tmp_path / "i", scorer)
    manifest, arrays = scorer_file.read_items(tmp_path / "i")
    sealed(tmp_path / "narrow", packed(manifest, {**arrays, "rows": arrays["rows"][:, 1:].copy()}))
    with pytest.raises(ScorerFileError, match=f"array 'rows' must be float32 .83, {5 + WIDTHS[kind]}.,"):
        Items.load(tmp_path / "narrow", scorer)
    for head in HEADS:
        check(scorer, USERS, table, head=head, items=loaded)
    changed = {name: list(x) for name, x in table.items()}
    changed["price"][4], changed["tags"][4] = 2.5, ["d"]
    loaded.update({name: x[4:5] for name, x in changed.items()})
    for head in HEADS:
        check(scorer, USERS, changed, head=head, items=loaded)
        check(scorer, USERS, changed, head=head, items=loaded, shortlist=N)


def test_shortlists_of_heads(make, table):
    """What is on the list has the exact score, and the list is that of the head without its deep part."""
    scorer = make(hidden_units=(64, 32), task=TASK)
    items, record = scorer.items(table), {name: x[0] for name, x in USERS.items()}
    own = items._users(record)[1][0]
    numbers = own[:5] + items.rows[:, :5] + (items.rows[:, 5:] * own[5:]) @ scorer._model.projections[0]
    odds = np.exp(numbers[:, 2:])
    for head, by in zip(HEADS, [*numbers.T[:2], *(odds.T[[0, 2]] / odds.sum(axis=1))], strict=True):
        want = score(scorer, joined(record, table), head)
        short, scores = scorer.rank(record, items, 10, shortlist=12, head=head)
        np.testing.assert_allclose(scores, want[short], rtol=1e-5, atol=1e-5)
        listed = first(by, 12)
        assert short.tolist() == [place for place in first(want, N) if place in listed][:10] != first(want, 10)
        assert scorer.recall(record, items, 10, 12, head=head) == np.isin(first(want, 10), short).mean()


def test_a_probability_of_classes_alone(make, table):
    scorer = make(task=("multiclass", 4))
    for number in range(4):
        items = check(scorer, USERS, table, head=number)
    some = np.arange(N) % 3 == 0
    positions, _ = scorer.rank(USERS, items, 7, head=1, among=some)
    for row in range(4):
        want = score(scorer, joined(USERS, table, row), 1)
        np.testing.assert_allclose(want[positions[row]], np.sort(want[some])[::-1][:7], rtol=1e-5, atol=1e-5)
    items.rows[[40, 11], 3] = np.nan
    with pytest.raises(ValueError, match="item 11 has a score that is NaN"):
        scorer.rank(USERS, items, 3, head=1)


def test_the_only_head_needs_no_name(make, table):
    scorer = make(task={"click": "binary"})
    check(scorer, USERS, table, head="click")
    positions, _ = scorer.rank(USERS, scorer.items(table), 5)
    np.testing.assert_array_equal(positions, scorer.rank(USERS, scorer.items(table), 5, head="click")[0])


@pytest.mark.parametrize(
    ("task", "heads", "text"),
    [
        (
            TASK,
            [None, "x", 0, "mood", ("mood", 3), ("mood", -1), ("mood", True), ("mood", 1.0), ("click", 0), {}],
            r"head must be 'click', 'dwell', \('mood', 0\) to \('mood', 2\), got ",
        ),
        (("multiclass", 4), [None, 4, "a", True, (None, 2)], "head must be 0 to 3, got "),
        ("regression", ["x", 0], "head must be None, got "),
    ],
    ids=["heads", "classes", "one"],
)
def test_heads_that_are_not_there(task, heads, text, make, table):
    scorer = make(task=task)
    items = scorer.items(table)
    for head in heads:
        with pytest.raises(KeyError if head == "x" and isinstance(task, dict) else ValueError, match=text):
            scorer.rank(USERS, items, 3, head=head)


# Order.


@pytest.mark.parametrize("kind", ["FM", "DeepFM"])
def test_equal_items_stay_as_they_lie(kind, make, table):
    scorer, places = make(**KINDS[kind]), [5, 1, 1, 5, 2, 1, 5, 2]
    copies = {name: [x[n] for n in places] for name, x in table.items()}
    positions, scores = scorer.rank({name: x[0] for name, x in USERS.items()}, scorer.items(copies), 8)
    runs = np.split(positions, np.flatnonzero(np.diff(np.array(places)[positions])) + 1)
    assert len(runs) == 3 and all((np.diff(run) > 0).all() for run in runs)
    for k in range(1, 8):  # the same items, however few
        shorter, _ = scorer.rank({name: x[0] for name, x in USERS.items()}, scorer.items(copies), k)
        np.testing.assert_array_equal(shorter, positions[:k])


@pytest.mark.parametrize("kind", ["FM", "DeepFM"])
def test_some_of_the_items(kind, make, table, rng):
    scorer = make(**KINDS[kind])
    items, record = scorer.items(table), {name: x[0] for name, x in USERS.items()}
    order, values = scorer.rank(record, items, N)
    mask = rng.random(N) < 0.3
    for among in (mask, np.flatnonzero(mask), rng.permutation(np.flatnonzero(mask)).tolist() * 2):
        positions, scores = scorer.rank(record, items, 7, among=among)
        keep = mask[order]
        np.testing.assert_array_equal(positions, order[keep][:7])
        np.testing.assert_allclose(scores, values[keep][:7], rtol=0, atol=1e-6)
    for nothing in (np.zeros(N, bool), []):
        positions, scores = scorer.rank(record, items, 7, among=nothing)
        assert positions.shape == scores.shape == (0,) and positions.dtype == np.int64
        positions, scores = scorer.rank(USERS, items, 7, among=nothing, shortlist=9)
        assert positions.shape == scores.shape == (4, 0)
    assert scorer.rank({name: x[:0] for name, x in USERS.items()}, items, 7)[0].shape == (0, 7)


def test_no_items(make, table, tmp_path):
    scorer = make()
    items = scorer.items({name: [] for name in table}, key="item")
    assert len(items) == 0 and scorer.rank(USERS, items, 3)[0].shape == (4, 0)
    items.save(tmp_path / "i")
    assert scorer.rank(USERS, Items.load(tmp_path / "i", scorer), 3)[1].shape == (4, 0)


def test_shortlists_and_their_recall(make, table):
    """What is on the list has the exact score, and the list is that of the model without it."""
    scorer = make(use_fm=False, hidden_units=(64, 32))
    items, record = scorer.items(table), {name: x[0] for name, x in USERS.items()}
    exact, values = scorer.rank(record, items, N)
    short, scores = scorer.rank(record, items, 10, shortlist=12)
    np.testing.assert_allclose(scores, values[[exact.tolist().index(place) for place in short]], rtol=0, atol=1e-6)
    assert (np.diff(scores) <= 0).all() and short.tolist() != exact[:10].tolist()
    query = items._users(record)[1][0]
    query[0] = 1
    listed = first(items.rows @ query, 12)
    np.testing.assert_array_equal(short, [place for place in exact if place in listed][:10])
    assert scorer.recall(record, items, 10, 12) == np.isin(exact[:10], short).mean()
    assert scorer.recall(USERS, items, 10, N) == scorer.recall(USERS, items, 10, 10**9) == 1
    assert scorer.rank(record, items, 10, shortlist=1)[0].shape == (10,)
    assert scorer.recall(USERS, items, 10, 5, among=[]) == 1


# Keys and files.


def test_update_by_keys(make, table, tmp_path):
    scorer = make()
    items = scorer.items(table | {"sku": list(range(100, 100 + N))}, key="sku")
    assert items.keys([0, 5]) == ["100", "105"] and items.keys([[1], [2]]) == [["101"], ["102"]]
    items.save(tmp_path / "i")
    mapped, other = Items.load(tmp_path / "i", scorer), Items.load(tmp_path / "i", scorer)
    before = (tmp_path / "i").read_bytes()
    changed = {name: list(x) for name, x in table.items()}
    for place, source in ((7, 1), (3, 2)):
        for name in changed:
            changed[name][place] = table[name][source]
    some = {name: [x[7], x[3]] for name, x in changed.items()} | {"sku": ["107", 103.0]}  # one value, one key
    for each in (items, mapped):
        each.update(some)
        np.testing.assert_allclose(each.rows, scorer.items(changed).rows, rtol=0, atol=1e-6)
        np.testing.assert_allclose(each.hidden, scorer.items(changed).hidden, rtol=0, atol=1e-6)
    assert (tmp_path / "i").read_bytes() == before
    np.testing.assert_array_equal(other.rows, scorer.items(table).rows)
    mapped.save(tmp_path / "i")
    np.testing.assert_array_equal(Items.load(tmp_path / "i", scorer).rows, mapped.rows)
    rows = np.array(items.rows)
    for wrong, error, text in [
        (some | {"sku": ["107", "999"]}, KeyError, "no item has the key '999'"),
        (some | {"sku": ["107", "107"]}, ValueError, "key '107' is in rows 0 and 1"),
        (some | {"sku": ["107", None]}, ValueError, "column 'sku', row 1: an item without a key"),
        (table, KeyError, "column 'sku' is missing"),
        ({"sku": ["107"]}, KeyError, "missing"),
        (some | {"sku": ["107"]}, ValueError, "column 'sku' has 1 keys, the table's inputs have 2 rows"),
    ]:
        with pytest.raises(error, match=text):
            items.update(wrong)
        np.testing.assert_array_equal(items.rows, rows)
    for without in (lambda: scorer.items(table).update(table), lambda: scorer.items(table).keys([0])):
        with pytest.raises(ValueError, match="made without keys"):
            without()
    with pytest.raises(ValueError, match="key 'k0' is in rows 0 and 15"):
        scorer.items(
            {name: x[1:] for name, x in table.items()} | {"kind": [f"k{n % 15}" for n in range(N - 1)]}, key="kind"
        )


@pytest.fixture(name="saved")
def _saved(make, table, tmp_path):
    """(scorer, path of items, manifest, arrays)."""
    scorer = make()
    scorer.items(table, key="item").save(tmp_path / "items")
    manifest, arrays = scorer_file.read_items(tmp_path / "items")
    # Copies: what is mapped changes with what tests write into the file.
    return scorer, tmp_path / "items", manifest, {name: np.array(array) for name, array in arrays.items()}


def test_a_file_is_what_was_saved(saved, table, tmp_path):
    scorer, path, _, arrays = saved
    items, loaded = scorer.items(table, key="item"), Items.load(path, scorer)
    for name in ("rows", "hidden"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(items, name))
    assert (loaded.inputs, loaded.key, loaded.digest) == (items.inputs, "item", scorer.digest)
    assert loaded.keys(range(N)) == table["item"]
    for got, want in zip(scorer.rank(USERS, loaded, 9), scorer.rank(USERS, items, 9), strict=True):
        np.testing.assert_array_equal(got, want)
    with np.load(path) as archive:  # any zip tool reads it
        np.testing.assert_array_equal(archive["rows"], items.rows)
    again = Scorer.load(scorer.path)
    assert again.rank(USERS, loaded, 9)[0].shape == (4, 9)


def test_items_of_another_model(saved, make, table):
    scorer, path, *_ = saved
    items, other = scorer.items(table), make("other")
    with pytest.raises(
        ValueError, match=f"items were made with the model {scorer.digest}, this scorer has {other.digest}"
    ):
        other.rank(USERS, items, 3)
    with pytest.raises(ScorerFileError, match=f"{path} does not hold items of this scorer: .*: make them anew"):
        Items.load(path, other)
    scorer.reload(other.path)
    with pytest.raises(ValueError, match="make them anew"):
        scorer.rank(USERS, items, 3)
    assert scorer.rank(USERS, scorer.items(table), 3)[0].shape == (4, 3)


def sealed(path, content, word="items", version=1):
    """Writes a zip's bytes as a file of items, whatever they are, with the digest that they have."""
    comment = f"deepfm_ops {word} {version} sha256 {scorer_file._digest(content[:-2])}".encode()
    path.write_bytes(content[:-2] + struct.pack("<H", len(comment)) + comment)


def refused(path, scorer):
    """Whether a file is refused as one, or ranks like one."""
    try:
        loaded = Items.load(path, scorer)
    except ScorerFileError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 2000
        return True
    try:
        positions, _ = scorer.rank(USERS, loaded, 5)
        assert positions.min() >= 0 and positions.max() < len(loaded)
        loaded.keys(positions)
    except (KeyError, ValueError):  # what they say to be the user's, or NaN
        pass
    return False


def test_every_value_of_a_manifest_changed(saved):
    scorer, path, manifest, arrays = saved
    verdicts = []
    for _, _, mutant in mutations(json.loads(json.dumps(manifest))):
        sealed(path, packed(mutant, arrays))
        verdicts.append(refused(path, scorer))
    assert 0.8 * len(verdicts) < sum(verdicts) < len(verdicts)
    sealed(path, packed(manifest, arrays))
    assert not refused(path, scorer)


def test_every_array_changed(saved):
    scorer, path, manifest, arrays = saved
    verdicts = {}
    for name, array in arrays.items():
        for key, change in ARRAYS.items():
            other = change(array)
            mutant = {**arrays, name: other} if other is not None else {k: arrays[k] for k in arrays if k != name}
            sealed(path, packed(manifest, mutant))
            verdicts[name, key] = refused(path, scorer)
    survivors = {key for key, verdict in verdicts.items() if not verdict}
    # Numbers may be any, and texts; a change may change nothing.
    assert survivors <= {
        (name, kind) for name in arrays for kind in ("nan", "ones", "uint8", "int64", "flat", "turned", "big-endian")
    }
    starts = arrays["starts"].copy()
    starts[3] += 5
    sealed(path, packed(manifest, {**arrays, "starts": starts}))
    assert refused(path, scorer)
    sealed(path, packed(manifest, {**arrays, "more": starts}))
    assert refused(path, scorer)


def test_damaged_files(saved, tmp_path):
    scorer, path, manifest, arrays = saved
    whole = path.read_bytes()
    for content, text in [
        (b"", "is empty"),
        (whole[:-30], "is damaged: it was cut off"),
        (whole[:5000], "is damaged: it was cut off"),
        (whole[:3000] + b"\x55" + whole[3001:], "is damaged: its checksum is"),
        (b"something else", "is not a file of items; Items.save writes them"),
        (pathlib.Path(scorer.path).read_bytes(), "is not a file of items"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ScorerFileError, match=text):
            Items.load(path, scorer)
    sealed(path, packed(manifest, arrays), version=2)
    with pytest.raises(ScorerFileError, match="is of format 2, this version of deepfm_ops reads 1"):
        Items.load(path, scorer)
    sealed(path, packed(b"[" * 100_000, arrays))
    with pytest.raises(ScorerFileError, match="does not hold items: .* more than 16 deep"):
        Items.load(path, scorer)
    path.write_bytes(whole)
    with pytest.raises(ScorerFileError, match="is not a scorer file; deepfm_ops.export_scorer writes them"):
        Scorer.load(path)
    with pytest.raises(FileNotFoundError):
        Items.load(tmp_path / "none", scorer)


# Wrong calls.


def test_inputs_that_both_give_or_neither(make, table):
    scorer = make()
    items = scorer.items(table)
    with pytest.raises(ValueError, match=r"the inputs \['kind', 'tags'\] are given by the user and by the items"):
        scorer.rank(USERS | {"tags": [[]] * 4, "kind": ["k"] * 4}, items, 3)
    with pytest.raises(KeyError, match=r"inputs are missing \['age'\]: neither the user nor the items give them"):
        scorer.rank({"user": "ann", "past": "a"}, items, 3)
    assert scorer.rank(USERS | {"unused": [0] * 4}, items, 3)[0].shape == (4, 3)
    with pytest.raises(ValueError, match=r"the table has none of the model's inputs \['user', .*; it has \['x'\]"):
        scorer.items({"x": [1]})
    with pytest.raises(KeyError, match="column 'sku' is missing"):
        scorer.items(table, key="sku")
    with pytest.raises(TypeError, match="a table must be"):
        scorer.items([1, 2])
    with pytest.raises(TypeError, match="a table must be"):
        scorer.rank("ann", items, 3)
    with pytest.raises(TypeError, match=r"items must be Items, which scorer.items\(table\) makes, got dict"):
        scorer.rank(USERS, table, 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"k": 0}, ValueError, "k must be a whole number from 1 on, got 0"),
        ({"k": 2.0}, ValueError, "k must be a whole number from 1 on, got 2.0"),
        ({"k": True}, ValueError, "k must be a whole number"),
        ({"k": None}, ValueError, "k must be a whole number"),
        ({"shortlist": 0}, ValueError, "shortlist must be a whole number from 1 on, got 0"),
        ({"among": [True, False]}, ValueError, r"among must be a mask of 83 items or .* positions, got bool \(2,\)"),
        ({"among": np.zeros((2, N), bool)}, ValueError, r"got bool \(2, 83\)"),
        ({"among": [0.5]}, ValueError, r"got float64 \(1,\)"),
        ({"among": [3, N]}, IndexError, r"among has position 83, which is not in \[0, 83\)"),
        ({"among": [-1, 3]}, IndexError, r"among has position -1, which"),
        ({"among": np.array([2**63], np.uint64)}, IndexError, r"among has position 9223372036854775808, which"),
    ],
)
def test_wrong_arguments(options, error, text, make, table):
    scorer = make()
    with pytest.raises(error, match=text):
        scorer.rank(USERS, scorer.items(table), **({"k": 3} | options))


def test_positions_that_have_no_key(make, table, tmp_path):
    """One before the first was once an empty text."""
    scorer = make()
    items = scorer.items(table, key="item")
    assert items.keys([]) == [] and items.keys(np.uint8([[N - 1]])) == [[table["item"][N - 1]]]
    for wrong in (-1, N):
        with pytest.raises(IndexError, match=rf"position {wrong} is not in \[0, 83\)"):
            items.keys([0, wrong])
    for wrong in (None, [1.0], [True], ["i1"]):
        with pytest.raises(TypeError, match="positions must be integers, got dtype"):
            items.keys(wrong)
    items.save(tmp_path / "items")
    with pytest.raises(TypeError, match="scorer must be a Scorer, got str"):
        Items.load(tmp_path / "items", "m.scorer")


@pytest.mark.parametrize("kind", ["LR", "FM", "DeepFM"])
def test_scores_that_are_nan_name_the_item(kind, make, table, features, rng):
    scorer = make(**KINDS[kind])
    items = scorer.items(table, key="item")
    items.rows[[40, 11], 0] = np.nan
    allowed = np.arange(N) != 11
    for options in ({}, {"shortlist": 50}):
        with pytest.raises(ValueError, match="item 'i11', at position 11, has a score that is NaN"):
            scorer.rank(USERS, items, 3, **options)
        with pytest.raises(ValueError, match="item 'i40', at position 40, has"):
            scorer.rank(USERS, items, 3, among=allowed, **options)
    allowed[40] = False
    assert scorer.rank(USERS, items, 3, among=allowed)[0].shape == (4, 3)
    if items.hidden is not None:
        items = scorer.items(table)
        items.hidden[5] = np.nan
        with pytest.raises(ValueError, match="item 5 has a score that is NaN"):
            scorer.rank(USERS, items, 3)


@pytest.mark.parametrize("kind", ["LR", "FM", "DeepFM"])
def test_a_user_that_is_nan_is_no_items_fault(kind, features, table, rng, tmp_path):
    model = shuffled(DeepFM.from_features(features, **KINDS[kind]), rng)
    row, lookup = features.index("user", "bob"), (model.plan.lookups or model.plan.first_orders)[0]
    weights = lookup.source.w if getattr(lookup.source, "embeddings", None) is None else lookup.source.embeddings
    place = np.arange(weights.shape[0]).reshape(-1, *[1] * (len(weights.shape) - 1))
    weights.assign(np.where(place == row, np.nan, weights.numpy()))
    deepfm_ops.export_scorer(model, tmp_path / "m")
    scorer = Scorer.load(tmp_path / "m")
    items = scorer.items(table)
    users = {"user": ["ann", "bob"], "age": [0.1, 0.2], "past": ["a", "a"]}
    for options in ({}, {"shortlist": 5}):
        with pytest.raises(ValueError, match="user 1 makes every score NaN: mend the model's weights"):
            scorer.rank(users, items, 3, **options)
    assert scorer.rank({name: x[:1] for name, x in users.items()}, items, 3)[0].shape == (1, 3)


def test_models_of_matrices_have_no_names(tmp_path):
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, use_deep=False), tmp_path / "m")
    with pytest.raises(ValueError, match="ranking needs a model of raw inputs"):
        Scorer.load(tmp_path / "m").items({"a": [1]})


def test_warnings_are_the_callers(make, table):
    """Once per column and model, of the line that called."""
    strange = table | {"item": [f"x{n}" for n in range(N)]}
    users = USERS | {"user": ["x", "y", "z", "w"]}
    for call in (
        lambda scorer: scorer.items(strange),
        lambda scorer: scorer.rank(users, scorer.items(table), 3),
        lambda scorer: scorer.items(table | {"sku": range(N)}, key="sku").update(strange | {"sku": range(N)}),
    ):
        with pytest.warns(UserWarning, match="column '(item|user)': .* were not seen by fit") as warned:
            call(make())
        assert [pathlib.Path(each.filename).name for each in warned] == ["test_rank.py"]


# The kernel.


def expected(rows, query, k, chosen=None):
    """What NumPy says, in float32 too: sums of a row may differ in their last bits."""
    products = rows.astype(np.float64) @ query
    chosen = np.arange(len(rows)) if chosen is None else chosen
    return chosen[np.argsort(-products[chosen], kind="stable")[:k]]


@pytest.mark.parametrize("isa", runnable_instruction_sets() or [kernels.isa()])
@pytest.mark.parametrize("dim", [0, 1, 2, 15, 16, 17, 33, 128, 129, 300])
def test_the_largest_products(isa, dim, rng):
    """Of integers, whose sums are exact, so that many are equal."""
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        rows = rng.integers(-2, 3, (700, dim)).astype("f")
        queries = rng.integers(-2, 3, (3, dim)).astype("f")
        some = np.flatnonzero(rng.random(700) < 0.2)
        for k in (1, 2, 99, 349, 350, 699, 700, 5000):
            for chosen in (None, some, some[:0]):
                places, products, nan = kernels.top_products(rows, queries, k, chosen, threads=2)
                assert (nan == -1).all()
                for b, query in enumerate(queries):
                    np.testing.assert_array_equal(places[b], expected(rows, query, k, chosen))
                    np.testing.assert_array_equal(products[b], rows[places[b]] @ query)
    finally:
        kernels.set_isa(before)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_many_rows_on_threads(order, rng):
    """Pieces of their own, each with a list that fills up and is cut again."""
    values = {"random": rng.normal(size=100_000), "rising": np.arange(1e5), "equal": np.ones(100_000)}
    values["falling"] = -values["rising"]
    rows = np.zeros((100_000, 3), "f")
    rows[:, 1] = values[order]
    rows[[1000, 99_000], 1] = -np.inf
    query = np.float32([[0, 1, 0]])
    for k in (1, 7, 1000, 30_000, 100_000):
        alone = kernels.top_products(rows, query, k, threads=1)
        for got, want in zip(kernels.top_products(rows, query, k, threads=4), alone, strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(alone[0][0], np.argsort(-rows[:, 1], kind="stable")[:k])
    rows[[70_000, 20_000], 1] = np.nan
    assert kernels.top_products(rows, query, 5, threads=4)[2].tolist() == [20_000]
    assert kernels.top_products(rows, query, 5, np.arange(30_000, 90_000), threads=4)[2].tolist() == [70_000]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rows": np.zeros((4, 3))}, TypeError, "rows must be float32"),
        ({"rows": np.zeros(3, "f")}, ValueError, "rows must have two dimensions"),
        ({"rows": np.zeros((4, 6), "f")[:, ::2]}, ValueError, "rows must be C-contiguous"),
        ({"queries": np.zeros(3, "f")}, ValueError, "queries must have shape"),
        ({"queries": np.zeros((1, 2), "f")}, ValueError, "queries must have shape"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"chosen": np.zeros(1, "i4")}, TypeError, "chosen must be int64"),
        ({"chosen": np.zeros((1, 1), "i8")}, ValueError, "chosen must have shape"),
        ({"chosen": np.int64([0, 4])}, IndexError, r"chosen\[1\] = 4 is not above the one before it and in \[0, 4\)"),
        ({"chosen": np.int64([-1])}, IndexError, r"chosen\[0\] = -1"),
        ({"chosen": np.int64([2, 2])}, IndexError, r"chosen\[1\] = 2 is not above"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_what_the_kernel_refuses(change, error, text):
    arguments = {"rows": np.zeros((4, 3), "f"), "queries": np.zeros((1, 3), "f"), "k": 2} | change
    with pytest.raises(error, match=text):
        kernels.top_products(**arguments)


def test_ranking_imports_no_tensorflow(saved):
    scorer, path, *_ = saved
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorflow', 'keras', 'pandas']))\n"
        "from deepfm_ops.scorer import Items, Scorer\n"
        f"scorer = Scorer.load({os.fspath(scorer.path)!r}); items = Items.load({os.fspath(path)!r}, scorer)\n"
        "print(scorer.rank({'user': 'ann', 'age': 0.3, 'past': ['a']}, items, 4)[0].shape)"
    )
    assert "(4,)" in run_python(code)
