"""What a stranger installs: the wheel, the fallback without the library, versions that do not match."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from testing import REFERENCE_MODE, run_python, run_with_tensorflow

import deepfm_ops
from deepfm_ops import _build, _library
from deepfm_ops._version import REQUIREMENT, TENSORFLOW, supports

ROOT = pathlib.Path(__file__).parents[2]
SCORE = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level=logging.WARNING)
import deepfm_ops
print("from", deepfm_ops.__file__)
for _ in range(2):
    print(deepfm_ops.fm_interaction([[1.0, 2.0], [3.0, 4.0]], [[0, 1]]).numpy().tolist())
info = deepfm_ops.native_info()
print(info["native"], "|", info["reason"])
"""


@pytest.fixture
def copy(tmp_path):
    """The installed package's files, to be damaged."""
    package = pathlib.Path(deepfm_ops.__file__).parent
    shutil.copytree(package, tmp_path / "deepfm_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def score(folder, run=run_with_tensorflow, **environment):
    environment.setdefault("DEEPFM_OPS_BACKEND", "auto")
    printed = run(SCORE, folder, **environment)
    assert f"from {folder}" in printed
    return printed


def without_library(copy):
    (copy / "deepfm_ops" / "_native.so").unlink()


def without_anything(copy):
    without_library(copy)
    (copy / "deepfm_ops" / "_build_info.json").unlink()


def other_version(copy):
    info = copy / "deepfm_ops" / "_build_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "tensorflow": "2.20.99"}))


def not_a_library(copy):
    (copy / "deepfm_ops" / "_native.so").write_bytes(b"\x7fELF and then nothing")


def failed_build(copy):
    without_library(copy)
    error = {"error": "the native library could not be built: no <cstdint>"}
    (copy / "deepfm_ops" / "_build_info.json").write_text(json.dumps(error))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_library, "the native library _native.so is missing; to build it: pip install"),
        (without_anything, "deepfm_ops was installed without its native library; to build it: pip install"),
        (
            other_version,
            r"the native library was built for TensorFlow 2.20.99, found \d+.\d+.\d+; to rebuild it: pip install .*, "
            "or install TensorFlow 2.20.99",
        ),
        (not_a_library, "the native library could not be loaded: .*; to rebuild it: pip install"),
        (failed_build, "could not be built: no <cstdint>; to build it: pip install"),
    ],
)
def test_falls_back_and_says_why(damage, reason, copy):
    if not (copy / "deepfm_ops" / "_build_info.json").exists():
        return  # a pure-Python install has nothing to damage: without_anything is what it is
    damage(copy)
    printed = score(copy)
    assert printed.count("[[11.0]]") == 2
    assert re.search(rf"^False \| .*{reason}", printed, re.MULTILINE)
    assert printed.count("WARNING") == 1 and "Using the plain TensorFlow fallback, which is slower." in printed


def test_the_switch(copy):
    printed = score(copy, DEEPFM_OPS_BACKEND="reference")
    assert "False | DEEPFM_OPS_BACKEND=reference" in printed and "WARNING" not in printed
    if not REFERENCE_MODE:
        assert "True | None" in score(copy, DEEPFM_OPS_BACKEND="native")
        assert "baseline" in run_with_tensorflow(
            "import deepfm_ops; print(deepfm_ops.native_info()['instruction_set'])", DEEPFM_OPS_ISA="baseline"
        )
    without_anything(copy)
    with pytest.raises(AssertionError, match="RuntimeError: deepfm_ops was installed without its native library"):
        score(copy, DEEPFM_OPS_BACKEND="native")
    with pytest.raises(AssertionError, match="DEEPFM_OPS_BACKEND must be one of auto, native, reference, got 'fast'"):
        score(copy, DEEPFM_OPS_BACKEND="fast")


def test_native_info():
    info = deepfm_ops.native_info()
    assert supports(info["tensorflow_found"]) and info["threads"] >= 1
    assert info["tensorflow_supported"] == TENSORFLOW and info["version"] == deepfm_ops.__version__
    assert info["instruction_set"] in (None, "baseline", "avx2", "avx512")
    if not REFERENCE_MODE:
        assert info["tensorflow_built"] == info["tensorflow_found"]


def build_wheel(tmp_path, mode, python=sys.executable, **environment):
    """A wheel, built in a copy of the sources, with the TensorFlow of `python`'s environment."""
    source = tmp_path / "source"
    if not source.exists():
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", "dist", "*.so", "_build_info.json", "_csrc", "*.egg-info", "__pycache__", "build"
        )
        shutil.copytree(ROOT, source, ignore=ignored)
        if (ROOT / "build").exists() and mode != "python":
            objects = shutil.ignore_patterns("matrix", "wheel", "docs", "lib*", "bdist*")
            shutil.copytree(ROOT / "build", source / "build", ignore=objects)  # the compiler is not what is tested
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    has_cuda = _library._build_info(pathlib.Path(deepfm_ops.__file__).parent).get("cuda_architectures")
    cuda = {} if has_cuda else {"DEEPFM_OPS_CUDA": "0"}  # nothing is compiled for minutes
    env = {**os.environ, "DEEPFM_OPS_BUILD": mode, **cuda, **environment}
    done = subprocess.run([*command, "-w", str(tmp_path), str(source)], env=env, capture_output=True, text=True)
    return done, sorted(tmp_path.glob("*.whl"))


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return archive.namelist()


def test_wheel(tmp_path):
    done, (wheel,) = build_wheel(tmp_path, "native")
    assert done.returncode == 0, done.stderr
    names = unpack(wheel, tmp_path / "site")
    files = ("_native.so", "_build_info.json", "py.typed", "__init__.pyi", "_kernels.pyi")
    assert {f"deepfm_ops/{file}" for file in files} <= set(names)
    assert not any(name.endswith((".cc", ".h")) or name.startswith("tests") for name in names)
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    for extra, package in (("cpu", "tensorflow-cpu"), ("gpu", "tensorflow")):
        found = re.search(rf'Requires-Dist: {package}([<>=].*); extra == "{extra}"', metadata)
        assert set(found[1].split(",")) == set(REQUIREMENT.split(","))
    assert "True | None" in score(tmp_path / "site")


def test_a_wheel_for_serving(tmp_path):
    """Without TensorFlow at build and at run time: the scorer works, the op says why it does not."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "tensorflow.py").write_text("raise ImportError('no TensorFlow here')")
    done, (wheel,) = build_wheel(tmp_path, "kernels", PYTHONPATH=str(blocked))
    assert done.returncode == 0, done.stderr
    names = unpack(wheel, tmp_path / "site")
    assert any("_kernels" in name for name in names) and "deepfm_ops/_native.so" not in names
    assert not any("_csrc" in name for name in names)  # never compiled at first use
    reason = "deepfm_ops was installed with DEEPFM_OPS_BUILD=kernels, without its op; to build it: pip install"
    assert f"False | {reason}" in score(tmp_path / "site")
    model = tmp_path / "model.scorer"
    deepfm_ops.export_scorer(deepfm_ops.DeepFM(20, 3, 4, (6,)), model)
    code = f"""
from deepfm_ops import scorer
print(scorer.__file__, scorer.Scorer.load({str(model)!r}).score([[0, 1, 2]]).shape)
"""
    printed = run_python(code, tmp_path / "site", PYTHONPATH=str(blocked))
    assert printed == f"{tmp_path / 'site' / 'deepfm_ops' / 'scorer' / '__init__.py'} (1,)\n"


@pytest.mark.parametrize("why", ["switch", "no compiler"])
def test_pure_python_wheel(why, tmp_path):
    environment = {"CXX": "no-such-compiler"} if why == "no compiler" else {}
    done, (wheel,) = build_wheel(tmp_path, "python" if why == "switch" else "auto", **environment)
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("py3-none-any.whl")
    names = unpack(wheel, tmp_path / "site")
    assert not {"deepfm_ops/_native.so", "deepfm_ops/_build_info.json", "deepfm_ops/_csrc/kernels.o"} & set(names)
    assert "False | deepfm_ops was installed without its native library" in score(tmp_path / "site")


def test_a_wheel_that_cannot_have_cuda(tmp_path):
    done, wheels = build_wheel(tmp_path, "python", DEEPFM_OPS_CUDA="1")
    assert done.returncode != 0 and not wheels
    assert "DEEPFM_OPS_CUDA=1 needs a C++ compiler, and DEEPFM_OPS_BUILD other than python" in done.stderr


def test_a_module_of_an_earlier_build_is_left_out(tmp_path):
    build_wheel(tmp_path, "python")
    (stale,) = (tmp_path / "source" / "build").glob("lib*/deepfm_ops")
    (stale / "gone.py").touch()
    _, (wheel,) = build_wheel(tmp_path, "python")
    assert not {"deepfm_ops/gone.py"} & set(unpack(wheel, tmp_path / "site"))


def test_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    done, wheels = build_wheel(tmp_path, "native", CXX=str(compiler))
    assert done.returncode != 0 and not wheels
    done, (wheel,) = build_wheel(tmp_path, "auto", CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    unpack(wheel, tmp_path / "site")
    assert re.search(r"False \| the native library could not be built: .*broken-compiler", score(tmp_path / "site"))


def test_kernels_know_nothing_of_tensorflow():
    for path in (path for room in ("kernels", "cuda", "tables", "python") for path in ROOT.glob(f"csrc/{room}/**/*.*")):
        text = path.read_text()
        assert not re.search(r'#include\s*[<"](tensorflow|tsl|absl|Eigen|xla)', text), path


def test_every_flag_of_a_build_is_asked_of_the_processor():
    text = (ROOT / "csrc" / "kernels" / "cpu_dispatch.cc").read_text()
    asked = {}
    for name, condition in re.findall(r"const bool kRuns(\w+) =(.*?);", text, re.DOTALL):
        asked[name] = set(re.findall(r'"(\w+)"', condition)).union(
            *map(asked.get, re.findall(r"kRuns(\w+)", condition))
        )
    for file, flags in _build.FLAGS.items():
        name = re.search("fm_cpu_(.*).cc", file)[1].capitalize()
        assert {flag.removeprefix("-m") for flag in flags} <= asked[name]


def test_one_version_constant():
    """TensorFlow's versions stand in one place."""
    pattern = re.compile(rf"(?<![\d.])({'|'.join(map(re.escape, TENSORFLOW))})(?![\d])")
    places = [ROOT / name for name in ("setup.py", "pyproject.toml", "Makefile", ".ci/run", "tests/matrix.py")]
    places += sorted(ROOT.glob("deepfm_ops/**/*.py"))
    assert [p.name for p in places if pattern.search(p.read_text())] == ["_version.py"]
    assert _library.TENSORFLOW == TENSORFLOW == tuple(sorted(TENSORFLOW, key=lambda v: [*map(int, v.split("."))]))
    assert [supports(version) for version in (f"{TENSORFLOW[0]}.1", f"{TENSORFLOW[-1]}.0-rc1", "1.15.5")] == [1, 1, 0]
