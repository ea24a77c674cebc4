"""An op left to its first use: a build that finds no TensorFlow, and what the first process then does."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import sysconfig

import pytest
import tensorflow as tf
from test_install import ROOT, SCORE, build_wheel, score, unpack
from testing import run_python, run_with_tensorflow

import deepfm_ops
from deepfm_ops import _build

LIBRARY = pathlib.Path(deepfm_ops.__file__).with_name("_native.so")
# The tests may run as root, who may write anywhere.
READ_ONLY = """
import os
access = os.access
os.access = lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more)
"""
FAKE_COMPILER = f"""#!/bin/sh
echo run >>"$LOG"
[ "$1" = -shared ] && exec cp {LIBRARY} "$3"
exit 0
"""
BROKEN_COMPILER = """#!/bin/sh
echo run >>"$LOG"
echo "warned" >&2
echo "fm_ops.cc:1:1: error: unknown type" >&2
exit 1
"""
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the package was installed without its op")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package, built by an interpreter whose environment has what a build needs and no TensorFlow, unpacked."""
    folder = tmp_path_factory.mktemp("deferred")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = pathlib.Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    for name in ("pip", "setuptools", "_distutils_hack", "pkg_resources", "wheel", "pybind11"):
        for path in pathlib.Path(sysconfig.get_paths()["purelib"]).glob(f"{name}*"):
            (site / path.name).symlink_to(path)
    done, _ = build_wheel(folder, "native", python=python)
    assert done.returncode != 0 and "needs TensorFlow" in done.stdout + done.stderr
    done, (file,) = build_wheel(folder, "auto", python=python)
    assert done.returncode == 0, done.stderr
    assert "linux" in file.name
    names = unpack(file, folder / "site")
    assert {f"deepfm_ops/{name}" for name in ("_native.so", "_csrc/kernels.o", "_csrc/tf/fm_ops.cc")} <= set(names)
    assert not (folder / "site" / "deepfm_ops" / "_native.so").stat().st_size  # pip is to know of it
    return folder / "site"


@pytest.fixture
def site(wheel, tmp_path):
    return shutil.copytree(wheel, tmp_path / "site")


@pytest.fixture
def compiler(tmp_path):
    """Makes the environment that runs the text as the compiler; it counts its runs in the file LOG."""

    def make(text):
        file = tmp_path / "compiler"
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return {"CXX": str(file), "LOG": str(tmp_path / "runs"), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    return make


def runs(tmp_path):
    file = tmp_path / "runs"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_two_processes_compile_once(site):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda folder: score(folder, run_python), [site] * 2))
    assert all("True | None" in text for text in printed)
    assert "".join(printed).count(f"WARNING Compiling the native op for TensorFlow {tf.__version__}, once") == 1
    assert "True | None" in (again := score(site)) and "WARNING" not in again
    assert {path.name for path in site.glob("deepfm_ops/_[bn]*")} >= {"_native.so", "_build_info.json"}
    assert not [*site.glob("deepfm_ops/*.so.*"), *site.glob("deepfm_ops/*.json.*")]


def test_importing_the_ops_is_the_first_use(site, compiler):
    printed = run_with_tensorflow(
        "import deepfm_ops.ops; print(deepfm_ops.native_info()['native'])", site, **compiler(FAKE_COMPILER)
    )
    assert printed == "True\n"


def test_a_package_that_is_not_writable(site, compiler, tmp_path):
    environment = compiler(FAKE_COMPILER)
    for _ in range(2):
        printed = run_with_tensorflow(READ_ONLY + SCORE, site, DEEPFM_OPS_BACKEND="auto", **environment)
        assert "True | None" in printed
    assert runs(tmp_path) == len([*ROOT.glob("csrc/tf/*.cc")]) + 2  # sources, the link, --version
    assert not (site / "deepfm_ops" / "_native.so").stat().st_size
    (folder,) = (tmp_path / "cache" / "deepfm_ops").iterdir()
    assert {path.name for path in folder.iterdir()} == {"_native.so", "_build_info.json"}


def test_a_failure_is_remembered(site, compiler, tmp_path):
    environment = compiler(BROKEN_COMPILER)
    printed = score(site, **environment)
    reason = (
        f"False | the native op could not be compiled: {environment['CXX']} failed: fm_ops.cc:1:1: error: unknown type"
    )
    info = site / "deepfm_ops" / "_build_info.json"
    assert reason in printed and f"to try again, remove {info}" in printed
    assert printed.count("WARNING") == 2 and printed.count("[[11.0]]") == 2
    before = runs(tmp_path)
    printed = score(site, **environment)
    assert reason in printed and printed.count("WARNING") == 1 and runs(tmp_path) == before
    info.unlink()
    assert "True | None" in score(site, **compiler(FAKE_COMPILER))


def test_without_a_compiler(site, compiler):
    reason = "False | the native op needs a C++ compiler, no-such-compiler, at its first use"
    assert reason in score(site, CXX="no-such-compiler")
    assert json.loads((site / "deepfm_ops" / "_build_info.json").read_text()) == {}
    assert "True | None" in score(site, **compiler(FAKE_COMPILER))  # there is one now


def test_the_reference_compiles_nothing(site, compiler, tmp_path):
    environment = compiler(BROKEN_COMPILER)
    assert "False | DEEPFM_OPS_BACKEND=reference" in score(site, DEEPFM_OPS_BACKEND="reference", **environment)
    assert runs(tmp_path) == 0


def test_an_unsupported_tensorflow(site):
    code = "import tensorflow as tf; tf.__version__ = '1.15.5'\n" + SCORE
    printed = run_with_tensorflow(code, site, DEEPFM_OPS_BACKEND="auto")
    assert "False | the native op needs TensorFlow" in printed and "found 1.15.5" in printed


def test_tensorflow_is_found_from_an_isolated_build(tmp_path, monkeypatch):
    """An isolated build by pip hides site-packages by a sitecustomize on PYTHONPATH; the flags are TensorFlow's own."""
    hide = "import sys\nsys.path = [path for path in sys.path if 'site-packages' not in path]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    visible = subprocess.run([sys.executable, "-c", "import tensorflow"], capture_output=True, env=os.environ)
    assert visible.returncode != 0
    expected = [tf.__version__, tf.sysconfig.get_compile_flags(), tf.sysconfig.get_link_flags()]
    assert _build.find_tensorflow() == expected
