"""These tests need neither TensorFlow nor what the others share: bench/gpu/run.sh runs them on a machine without."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "op"))  # the oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)
