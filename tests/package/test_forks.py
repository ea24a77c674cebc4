"""Forked processes, which have none of their parent's threads: nothing that these held keeps a child waiting."""

import textwrap

import numpy as np
import pytest
from testing import run_python

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")

# Forks while a thread of the parent's is inside of `held`, and says how the child ended.
FORKS = """
import os, signal, sys, threading, time

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() is not False else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "waits for ever"

inside, leave = threading.Event(), threading.Event()

def stay(*_):
    inside.set()
    leave.wait()

def while_held(held, work):
    thread = threading.Thread(target=held)
    thread.start()
    inside.wait()
    found = in_child(work)
    leave.set()
    thread.join()
    return found
"""


def run(code, **names):
    assigned = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return run_python(FORKS + assigned + textwrap.dedent(code)).strip()


@pytest.fixture(scope="module", name="path")
def _path(tmp_path_factory):
    """A model with its dictionary."""
    table = {"user": ["ann", "bob"], "age": [0.5, 1.0]}
    features = FeatureDictionary().fit(table, categorical="user", numeric="age")
    path = tmp_path_factory.mktemp("forks") / "m"
    model = DeepFM(features.num_features, 2, 4, (5,), seed=1)
    deepfm_ops.export_scorer(model, path, features=features)
    return str(path)


def test_a_child_reloads_while_a_thread_of_the_parent_does(path):
    code = """
        from deepfm_ops.scorer import Scorer, file
        scorer, parent, read = Scorer.load(path), os.getpid(), file.read
        def held(path):
            if os.getpid() == parent:
                stay()
            return read(path)
        file.read = held
        print(while_held(scorer.reload, lambda: scorer.reload() is False and len(scorer.score([[1, 2]])) == 1))
    """
    assert run(code, path=path) == "0"


def test_a_child_counts_bad_records_while_a_thread_of_the_parent_does():
    code = """
        from deepfm_ops.data.records import Bad
        class Slow(int):
            def __radd__(self, other):
                stay()
                return int(self) + other
        bad = Bad("skip")
        def count():
            bad("what", 2)
            return bad.count >= 2 and "2 of 2" in bad.summary(0)
        print(while_held(lambda: bad("what", Slow(1)), count), bad.count)
    """
    assert run(code) == "0 1"


@pytest.mark.parametrize("name", ["counts", "field_sizes", "_matrices"])
def test_a_child_computes_what_a_thread_of_the_parent_does(name):
    """functools.cached_property has a lock for all instances of a class, before Python 3.12."""
    code = """
        import numpy as np
        from deepfm_ops.data import read_libsvm
        def samples():
            with open("some.libsvm", "w") as file:
                file.write("1 3:1 4:1\\n0 5:1\\n")
            return read_libsvm("some.libsvm")
        class Slow(type(samples())):
            num_features = property(stay)
            num_fields = property(stay)
            def padded(self, sizes):
                stay()
        slow, fast = Slow(*[vars(samples())[k] for k in ("labels", "row_splits", "flat_fields", "flat_indices",
                                                        "flat_values")]), samples()
        slow.flat_fields = None if name != "field_sizes" else np.zeros(3, np.int32)
        def held():
            try:
                getattr(slow, name)
            except TypeError:  # of what `stay` returns
                pass
        print(while_held(held, lambda: getattr(fast, name)))
    """
    assert run(f"import os, tempfile\nos.chdir(tempfile.mkdtemp())\n{textwrap.dedent(code)}", name=name) == "0"


@pytest.mark.parametrize("threads", [1, 2])
def test_children_score_with_the_parents_scorer(path, threads):
    """The mapped file, the dictionary and the pool of threads, before and after the parent has used them."""
    code = """
        import numpy as np
        from deepfm_ops.scorer import Scorer
        scorer = Scorer.load(path, threads)
        table = {"user": ["ann", "bob", "cid"] * 2000, "age": [0.5, 1.0, None] * 2000}
        expected = []
        alike = lambda: np.array_equal(scorer.score(table), expected)
        again = lambda: alike() and in_child(alike) == 0
        scorer.score([[1, 2]])
        first = in_child(lambda: len(scorer.score(table)) == 6000)
        expected = scorer.score(table)
        print(first, [in_child(alike) for _ in range(3)], in_child(again), alike())
    """
    assert run(code, path=path, threads=threads) == "0 [0, 0, 0] 0 True"


def test_children_use_the_parents_dictionary(tmp_path):
    features = FeatureDictionary().fit({"k": [f"value {i}" for i in range(3000)]}, categorical="k")
    features.save(tmp_path / "d")
    code = """
        from deepfm_ops import FeatureDictionary
        features = FeatureDictionary.load(path)
        table = {"k": [f"value {i}" for i in range(3000)]}
        work = lambda: sorted(features.transform(table)[0].ravel()) == list(range(1, 3001))
        print(in_child(work), in_child(work), work())
    """
    assert run(code, path=str(tmp_path / "d")) == "0 0 True"


def test_a_pass_over_a_stream_is_the_parents(tmp_path):
    """Its threads are not in the child, which says so; another pass is the child's own."""
    features = FeatureDictionary().fit({"k": ["a", "b"], "y": [0.0, 1]}, categorical="k", label="y")
    features.save(tmp_path / "d")
    code = """
        from deepfm_ops import FeatureDictionary
        tables = [{"k": ["a", "b"] * 50, "y": [0.0, 1] * 50}] * 40
        stream = FeatureDictionary.load(path).stream(tables, 10)
        batches = stream.batches()
        next(batches)
        def goes_on():
            try:
                list(batches)
            except RuntimeError as error:
                return "forked" in str(error)
            return False
        print(in_child(goes_on), in_child(lambda: len(list(stream.batches(1))) == 400), len(list(batches)))
    """
    assert run(code, path=str(tmp_path / "d")) == "0 0 399"


def test_locks_of_the_package():
    """Whoever adds a lock, or a cache with one, thinks of forks; the chief of a cluster never forks."""
    code = r"""
        import pathlib, re
        import deepfm_ops
        folder = pathlib.Path(deepfm_ops.__file__).parent
        lock = re.compile(r"Lock\(|@(functools\.)?cached_property")
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if lock.search(path.read_text())}
        print(*sorted(found))
    """
    assert run(code) == "cluster/coordinator.py cluster/feeding.py forks.py"


def test_cached():
    from deepfm_ops.forks import cached

    class Counted:
        calls = 0

        @cached
        def value(self):
            """What it is."""
            self.calls += 1
            return np.zeros(self.calls)

    one, other = Counted(), Counted()
    assert one.value is one.value and one.calls == 1 and other.value is not one.value
    assert Counted.value.__doc__ == "What it is."


def test_children_that_are_forked_while_threads_multiply_matrices(tmp_path):
    """NumPy's own locks, which a child would find taken: the fork waits until no product is under way."""
    model = DeepFM(100, 5, 8, hidden_units=(256, 256), seed=1)
    path = tmp_path / "model.scorer"
    deepfm_ops.export_scorer(model, path)
    code = """
    import numpy as np
    from deepfm_ops.scorer import Scorer

    scorer = Scorer.load(path)
    indices, ended = np.arange(640).reshape(128, 5) % 100, threading.Event()
    expected = scorer.score(indices)

    def score():
        while not ended.is_set():
            scorer.score(indices)

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    found = {in_child(lambda: bool(np.allclose(scorer.score(indices), expected))) for _ in range(40)}
    ended.set()
    for thread in threads:
        thread.join()
    print(found)
    """
    assert run(code, path=str(path)) == "{0}"
