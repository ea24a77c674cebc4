"""The README's and the docstrings' code runs as it stands there."""

import doctest
import importlib
import pathlib
import re

import pytest
from testing import run_with_tensorflow

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = {
    f"{page.name}, block {number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
THERE = [name for name, block in BLOCKS.items() if block.startswith("# there")]


def test_there_are_blocks():
    assert len(BLOCKS) >= 10 and len(THERE) == 1


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in THERE])
def test_code_blocks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if BLOCKS[name].startswith("# files"):
        (tmp_path / "logs").mkdir()
        lines = [f"{row % 3}\t{row % 5}\t{row}\t{row % 2}" for row in range(60)]
        (tmp_path / "logs" / "a.tsv").write_text("\n".join(["user\titem\tage\tclicked", *lines]))
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "readme"})


def test_train_here_load_there(tmp_path):
    """The README's journey, in two processes."""
    names = list(BLOCKS)
    here = BLOCKS[names[names.index(THERE[0]) - 1]]
    run_with_tensorflow(here, tmp_path)
    assert {"model.keras", "model.scorer"} <= {path.name for path in tmp_path.iterdir()}
    printed = run_with_tensorflow(BLOCKS[THERE[0]], tmp_path)
    assert len(re.findall(r"0\.\d+", printed)) >= 2


def test_pages_that_are_named_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.parametrize(
    "module",
    [
        "features.dictionary",
        "data.libsvm",
        "data.pairs",
        "explanations.explaining",
        "layers",
        "models.matrix",
        "scorer.scoring",
        "scorer.ranking",
        "cluster.model",
    ],
)
def test_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"deepfm_ops.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
