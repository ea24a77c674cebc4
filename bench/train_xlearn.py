"""Training of xLearn's FM with AdaGrad and two threads; a step is B samples of an epoch.

xLearn trains on files. The time of a step is that of the additional epochs of a longer run, reading not included.
"""

import pathlib
import tempfile
import time

import xlearn
from train import B, K

EPOCHS = (1, 6)


def step(side, rows, indices, labels):
    folder = pathlib.Path(tempfile.mkdtemp())
    samples = len(indices) * B
    with open(folder / "train.txt", "w") as file:
        for batch, y in zip(indices, labels, strict=True):
            for row, label in zip(batch, y[:, 0], strict=True):
                file.write(f"{int(label)} " + " ".join(f"{i}:1" for i in row) + "\n")

    def epochs(n):
        model = xlearn.create_fm()
        model.setTrain(str(folder / "train.txt"))
        model.disableEarlyStop()
        model.setQuiet()
        start = time.perf_counter()
        model.fit(
            {"task": "binary", "lr": 0.1, "lambda": 0, "k": K, "epoch": n, "opt": "adagrad", "nthread": 2},
            str(folder / "model.out"),
        )
        return time.perf_counter() - start

    def run(n):
        short, long = epochs(EPOCHS[0]), epochs(EPOCHS[1])
        return None, (long - short) / (EPOCHS[1] - EPOCHS[0]) * B / samples

    return run
