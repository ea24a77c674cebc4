"""Tests the grid of TensorFlow series and Pythons, each cell on a copy of the sources in an environment of its own.

python tests/matrix.py                  every cell
python tests/matrix.py X.Y-3.10 ...     these cells
"""

import argparse
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERSIONS = runpy.run_path(str(ROOT / "deepfm_ops" / "_version.py"))
PYTHONS = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
INFO = """
import json, keras, platform, tensorflow as tf, deepfm_ops
info = deepfm_ops.native_info()
print(json.dumps([tf.__version__, keras.__version__, platform.python_version(), info["native"], info["reason"]]))
"""
NOT_SOURCES = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json", "_csrc")
COLUMNS = ("TensorFlow", "Keras", "Python", "native op", "passed", "failed", "skipped", "note")


def find_python(series):
    """The interpreter pythonX.Y that runs: of PYTHONS (paths, separated by colons), PATH, or pyenv; None if none is."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = os.environ.get("PYTHONS", "").split(":")
    candidates += [shutil.which(f"python{series}"), *sorted(pyenv.glob(f"versions/{series}.*/bin/python"))]
    for python in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == series:
            return str(python)
    return None


def run(command, folder, **environment):
    """Runs a command in a cell's folder, into its log; returns what it printed and whether it succeeded."""
    with (folder / "log").open("a") as log:
        log.write(f"$ {' '.join(map(str, command))}\n")
        log.flush()
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
        done = subprocess.run(command, cwd=folder / "source", env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        log.write(done.stdout)
    return done.stdout, done.returncode == 0


def counts(printed):
    """How many tests passed, failed and were skipped, from pytest's last line."""
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", (printed.strip().splitlines() or [""])[-1])
    numbers = {kind: int(number) for number, kind in found}
    failed = numbers.get("failed", 0) + numbers.get("error", 0)
    return {"passed": numbers.get("passed", 0), "failed": failed, "skipped": numbers.get("skipped", 0)}


def run_cell(tensorflow, series, folder, tests, reference):
    """Installs and tests one cell; returns its row of the table."""
    row = dict.fromkeys(COLUMNS, "") | {"TensorFlow": tensorflow, "Python": series}
    if (tensorflow, series) in VERSIONS["NOT_PUBLISHED"]:
        return row | {"note": "does not exist: no wheels of this TensorFlow for this Python"}
    interpreter = find_python(series)
    if interpreter is None:
        return row | {"note": f"no python{series} here"}
    folder /= f"tf{tensorflow}-py{series}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for objects in [*ROOT.glob("build/kernels"), *ROOT.glob("build/cuda-*")]:  # that are the same in every cell
        shutil.copytree(objects, folder / "source" / "build" / objects.name)
    python = folder / "venv" / "bin" / "python"
    requirement = f"{os.environ.get('TENSORFLOW', 'tensorflow-cpu')}=={tensorflow}.*"
    pip = [python, "-m", "pip", "install", "--quiet"]
    for command in (
        [interpreter, "-m", "venv", folder / "venv"],
        [*pip, "--upgrade", "pip"],
        [*pip, requirement, "setuptools>=77", "pybind11>=2.13"],  # the tests build wheels without isolation
        [*pip, "--editable", ".[test]"],  # in isolation, against the TensorFlow that is there by now
    ):
        if not run(command, folder, DEEPFM_OPS_BUILD="native")[1]:
            return row | {"failed": "install", "note": f"see {folder.name}/log"}
    printed, succeeded = run([python, "-c", INFO], folder)
    if not succeeded:
        return row | {"failed": "import", "note": f"see {folder.name}/log"}
    found, keras, full, native, reason = json.loads(printed.splitlines()[-1])
    row |= {"TensorFlow": found, "Keras": keras, "Python": full, "native op": "yes" if native else "no"}
    row["note"] = reason or ""
    for backend in ("auto", "reference")[: 1 + reference]:
        command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *tests]
        printed, _ = run(command, folder, DEEPFM_OPS_BACKEND=backend)
        for name, number in counts(printed).items():
            row[name] = f"{row[name]} + {number}" if row[name] else str(number)
    return row


def table(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [f"{tensorflow}-{python}" for tensorflow in VERSIONS["TENSORFLOW"] for python in PYTHONS]
    parser.add_argument("cells", nargs="*", metavar="cell", help=f"of {', '.join(every)}; all by default")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest runs")
    parser.add_argument("--reference", action="store_true", help="test the fallback too")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build" / "matrix")
    arguments = parser.parse_args()
    if unknown := set(arguments.cells) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: not of {', '.join(every)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for cell in arguments.cells or every:
        rows.append(run_cell(*cell.split("-"), arguments.folder.resolve(), arguments.tests, arguments.reference))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        (arguments.folder / "results.md").write_text(table(rows))
    print(f"\n{table(rows)}", end="")
    return any(row["failed"].strip("0 +") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
