"""The example of the road from files to a model that serves, in processes of its own."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from testing import LIGHT

from deepfm_ops.data.synthetic import ClickLog

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "criteo.py"


def run(*arguments):
    command, env = [sys.executable, SCRIPT, *map(str, arguments)], {**os.environ, **LIGHT}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def numbers(pattern, output):
    return [float(found.replace(",", "")) for found in re.findall(pattern, output)]


def test_the_made_log(tmp_path):
    """All of its steps: killed in the middle, the training goes on from a checkpoint."""
    output = run("--rows", 20_000, "--batch-size", 128, "--folder", tmp_path)
    before, after = output.split("killed")
    assert f"1. Making a log of 20,000 rows in 8 days: {tmp_path}" in before
    assert numbers(r"([\d,]+) features", before)[0] > 1000
    (killed,), (resumed,) = numbers(r" after row ([\d,]+)\.", after), numbers(r"goes on after row ([\d,]+)", after)
    assert " starts" in before and 9_000 < resumed <= killed < 15_000 and resumed % (9 * 128) == 0
    assert numbers(r"([\d,]+) rows, [\d,]+ rows/s, loss", before)[-1] in (resumed, resumed + 9 * 128)
    assert numbers(r"([\d,]+) rows, [\d,]+ rows/s, loss", after)[0] > resumed
    (auc,), (best,) = numbers(r"AUC (0\.\d+), logloss", after), numbers(r"the true model has an AUC of (0\.\d+)", after)
    assert 0.64 < auc < best < 0.83
    earlier, now = numbers(r"AUC of the test: (0\.\d+) before", after) + numbers(r"(0\.\d+) now", after)
    assert 0.62 < earlier < 0.83 and 0.62 < now < 0.83
    assert numbers(r"([\d,]+) new features", after)[0] > 0
    assert 0 < numbers(r"score (0\.\d+) \(the label was [01]\), \d+ us a request", after)[0] < 1
    peaks = numbers(r"at most ([\d,]+) MB", output)
    assert len(peaks) >= 8 and max(peaks) < 2000
    assert {"features", "model.keras", "model.scorer", "log.json"} <= {path.name for path in tmp_path.iterdir()}


def test_files_of_ones_own(tmp_path):
    log = ClickLog(seed=1, scale=0.001)
    files = log.write(tmp_path, range(2), 3000, format="tsv.gz")
    valid = log.write(tmp_path, [2], 1000, format="parquet")
    command = [*files, "--valid", *valid, "--batch-size", 128, "--folder", tmp_path / "made"]
    output = run(*command)
    assert "1. " not in output and "killed" not in output
    assert "Validating on day-02-part-00.parquet" in output and "us a request" in output
    (auc,) = numbers(r"AUC (0\.\d+), logloss", output)
    assert 0.6 < auc < 0.83
    again = run(*command)
    assert "was done before" in again and numbers(r"AUC (0\.\d+), logloss", again) == [auc]


@pytest.fixture(name="example")
def _example():
    spec = importlib.util.spec_from_file_location("criteo", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_log_is_kept_if_it_is_whole(tmp_path, example, capsys):
    def made(rows):
        example.make_log(tmp_path, rows)
        return "Making" in capsys.readouterr().out

    assert [made(1600), made(1600), made(800), made(800)] == [True, False, True, False]
    example.files_of(tmp_path)[3].unlink()
    assert made(800) and not made(800)
    assert len(example.files_of(tmp_path)) == 16 and json.loads((tmp_path / "log.json").read_text())["rows"] == 800


@pytest.mark.parametrize("format", ["tsv", "tsv.gz", "csv", "parquet"])
def test_the_record_of_a_request(tmp_path, example, format):
    log = ClickLog(scale=0.001)
    (file,) = log.write(tmp_path, [0], 5, format=format)
    columns, _ = log.chunk(0, 0, rows=5)
    record = example.first_record(file)
    assert list(record) == list(log.columns) and None in record.values()
    for name, column in columns.items():
        cell = column[:1].tolist()[0]
        assert record[name] == (cell.decode() if isinstance(cell, bytes) else cell), name


def test_nothing_to_validate_on(tmp_path, example, capsys, monkeypatch):
    (file,) = ClickLog(scale=0.001).write(tmp_path, [0], 5)
    monkeypatch.setattr(sys, "argv", ["criteo.py", str(file), "--folder", str(tmp_path / "made")])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2 and "name one with --valid" in capsys.readouterr().err
