"""What tests of models in parts share."""

import pytest

from deepfm_ops.cluster import coordinator


@pytest.fixture(name="parts")
def _parts(monkeypatch):
    """Sets how many parts the tables have, all of them here."""

    def choose(number, workers=1):
        chief = coordinator.Chief()
        chief.servers, chief.workers = chief.servers * number, chief.workers * workers
        monkeypatch.setattr("deepfm_ops.cluster.model.connect", lambda wait: chief)

    return choose
