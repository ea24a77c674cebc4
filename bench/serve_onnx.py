"""Makes model.onnx of a folder of bench/serve.py: `python bench/serve_onnx.py FOLDER`, in the environment of tf2onnx.

tf2onnx holds a model many times over: of one of 0.7 GB it ran out of memory at 23 GB, and with --large_model and at
most 11 GB it failed to serialize. So bench/serve_models.py writes a large model with few rows too, in `few`; that is
what is converted here, and the tables then enter from their .npy files.
"""

import os
import pathlib
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import onnx

FEW = 1000


def put_in(model, folder, name):
    """Replaces the only initializer of FEW rows and the array's width by the array, where it lies."""
    path = folder / f"weight-{name}.npy"
    array = np.load(path, mmap_mode="r")
    (tensor,) = (x for x in model.graph.initializer if list(x.dims) == [FEW, array.shape[1]])
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.dims[0] = len(array)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", array.offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def main():
    folder = pathlib.Path(sys.argv[1])
    few, target = folder / "few", folder / "model.onnx"
    source = few if few.exists() else folder / "portable"
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(source), "--opset", "18"]
    subprocess.run([*command, "--signature_def", "serving_default", "--output", str(target)], check=True)
    if few.exists():
        model = onnx.load(target)
        for name in ("fm-embeddings", "fm-w"):
            put_in(model, folder, name)
        onnx.save(model, target)


if __name__ == "__main__":
    main()
