"""Checkpoints: resuming, and processes that are killed at any moment."""

import os
import pathlib
import random
import time

import numpy as np
import pytest
from testing import REFERENCE_MODE, Process

from deepfm_ops import Checkpoint, DeepFM, optimizers

KILLS = int(os.environ.get("DEEPFM_OPS_KILLS", "4"))
TRAINING = pathlib.Path(__file__).parent / "checkpointed_training.py"


def make(rows=60):
    model = DeepFM(rows, 3, embedding_dim=4, hidden_units=(8,), seed=1)
    model.compile(optimizers.LazyAdam(0.01), "binary_crossentropy")
    return model


def data():
    r = np.random.default_rng(0)
    return (r.integers(0, 60, (200, 3)), np.ones((200, 3), "f")), r.integers(0, 2, (200, 1)).astype("f")


def test_resumes_where_it_stopped(tmp_path):
    x, y = data()
    options = {"batch_size": 50, "shuffle": False, "verbose": 0}
    straight = make()
    straight.fit(x, y, epochs=4, **options)
    make().fit(x, y, epochs=2, callbacks=[Checkpoint(tmp_path)], **options)
    second, checkpoint = make(), Checkpoint(tmp_path)
    second.fit(x, y, epochs=4, callbacks=[checkpoint], **options)
    assert checkpoint.epoch == 2
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00000004"]
    for a, b in zip(
        [*straight.variables, *straight.optimizer.variables],
        [*second.variables, *second.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert len(second.fit(x, y, epochs=2, **options).epoch) == 2
    with pytest.raises(ValueError, match="written with LazyAdam, not Ftrl"):
        second.compile(optimizers.Ftrl(0.01), "binary_crossentropy")
        second.fit(x, y, epochs=5, callbacks=[Checkpoint(tmp_path)], **options)


def test_what_was_left_unfinished_is_ignored(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "state.json").write_text("{")
    checkpoint = Checkpoint(tmp_path)
    x, y = data()
    make().fit(x, y, epochs=1, verbose=0, callbacks=[checkpoint])
    assert checkpoint.epoch == 0 and [path.name for path in tmp_path.iterdir()] == ["epoch-00000001"]
    with pytest.raises(ValueError):
        make(rows=70).fit(x, y, epochs=2, verbose=0, callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match="every"):
        Checkpoint(tmp_path, every=0)


def test_killed_at_random_moments(tmp_path):
    """Each start must find a whole checkpoint, no older than the last one the killed process reported."""
    if REFERENCE_MODE:
        return
    random.seed(20)
    reported = 0
    for _ in range(KILLS):
        process = Process(TRAINING.read_text(), tmp_path)
        first = process.stdout.readline()
        if not first.startswith("resumed"):
            raise AssertionError(process.wait())
        assert int(first.split()[1]) >= reported
        saved = process.stdout.readline()  # however slow the machine is
        time.sleep(random.uniform(0.0, 1.0))
        process.kill()
        rest = [saved, *process.wait()[1].splitlines()]
        reported = max(
            [reported, int(first.split()[1]), *(int(line.split()[1]) for line in rest if len(line.split()) == 2)]
        )
    assert reported > 0
