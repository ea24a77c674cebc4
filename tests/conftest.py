import gc
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import numpy as np
import pytest


def pytest_collection_finish():
    """Garbage is not looked for among TensorFlow's modules."""
    gc.freeze()


@pytest.fixture(params=["op", "reference"], name="fm")
def _fm(request):
    """`fm_interaction`, of the package and of the reference."""
    from testing import FUNCTIONS  # TensorFlow is not for the process that hands out the tests

    return FUNCTIONS[request.param]


@pytest.fixture
def rng():
    return np.random.default_rng(2010)
