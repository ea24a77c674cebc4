"""What tests of files share."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from roads import FIELDS, TABLE

from deepfm_ops import DeepFM, FeatureDictionary


@pytest.fixture(scope="module", name="features")
def _features():
    return FeatureDictionary().fit(TABLE, **FIELDS)


@pytest.fixture(scope="module", name="model")
def _model(features):
    model = DeepFM.from_features(features, embedding_dim=2, hidden_units=(2,))
    model.compile()
    return model


@pytest.fixture(name="write")
def _write(tmp_path):
    def write(content, name="a.csv"):
        """A file of a text or bytes, compressed as its name says, or of a table; its path."""
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path, row_group_size=2)
            return str(path)
        content = content.encode() if isinstance(content, str) else content
        kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.OSFile(str(path), "wb") as file:
            if kind is None:
                file.write(content)
            else:
                with pa.CompressedOutputStream(file, kind) as stream:
                    stream.write(content)
        return str(path)

    return write
