"""What a type checker says of the package and of a script that uses it."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import deepfm_ops

PACKAGE = pathlib.Path(deepfm_ops.__file__).parent
SCRIPT = """
import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, FMInteraction, optimizers

features = FeatureDictionary()
model = DeepFM(num_features=100, num_fields=3, hidden_units=(32,), seed=1)
model.compile(optimizers.LazyAdam(1e-3), "binary_crossentropy")
layer = FMInteraction(100, 16, use_linear=True)
native: bool = deepfm_ops.native_info()["native"]
features.save("features.json")
"""
WRONG = {
    "from deepfm_ops import DeepFMM\n": "DeepFMM",
    "import deepfm_ops\ndeepfm_ops.fm_interactoin\n": "fm_interactoin",
    "from deepfm_ops import FeatureDictionary\nFeatureDictionary().feet()\n": "feet",
}


def mypy(folder):
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    env = {**os.environ, "MYPYPATH": str(PACKAGE.parent)}  # checkers do not see editable installs
    return subprocess.run([*command, "script.py"], cwd=folder, env=env, capture_output=True, text=True)


def basedpyright(folder):
    config = {"include": ["script.py"], "extraPaths": [str(PACKAGE.parent)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("checker", [mypy, basedpyright])
def test_a_script(checker, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = checker(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for text, name in WRONG.items():
        script.write_text(text)
        done = checker(tmp_path)
        assert done.returncode == 1 and f'"{name}"' in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("checker", [["mypy"], ["basedpyright", "--pythonpath", sys.executable]])
def test_the_package(checker):
    done = subprocess.run([sys.executable, "-m", *checker], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stub_names_what_the_package_does():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = [alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == sorted(deepfm_ops.__all__)
    assert all(alias.asname == alias.name for node in tree.body for alias in node.names)
    assert (PACKAGE / "py.typed").exists()
