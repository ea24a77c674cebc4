"""Runs one side of bench/serve.py: `python bench/serve_worker.py SIDE FOLDER`, commands on standard input.

A side is (ready, score): `ready` makes of two matrices what a caller of that side would hold, outside of the clock;
`score` makes NumPy scores of it. Each side imports its own library alone.
"""

import importlib
import json
import os
import pathlib
import sys
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers
CORES = len(os.sched_getaffinity(0))


def scorer(folder, table):
    from deepfm_ops.scorer import Scorer

    threads = int(os.environ.get("OMP_NUM_THREADS", CORES))
    score = Scorer.load(folder / f"{table}.scorer", threads=threads).score
    return lambda *pair: pair, lambda pair: score(*pair)


def saved_model(folder, kind):
    import tensorflow as tf

    if kind == "native":
        importlib.import_module("deepfm_ops.ops")  # registers the op

    loaded = tf.saved_model.load(str(folder / kind))
    serve = loaded.signatures["serving_default"]
    serve.keep = loaded  # its variables live as long as it does
    return (
        lambda indices, values: {"indices": tf.constant(indices), "values": tf.constant(values)},
        lambda inputs: serve(**inputs)["score"].numpy(),
    )


def keras_model(folder, how):
    import keras
    import tensorflow as tf

    importlib.import_module("deepfm_ops.models")  # registers the class
    model = keras.saving.load_model(folder / "model.keras", compile=False)
    if how == "predict":
        return lambda *pair: pair, lambda pair: model.predict(pair, batch_size=len(pair[0]), verbose=0)
    return (
        lambda indices, values: (tf.constant(indices), tf.constant(values)),
        lambda pair: model(pair, training=False).numpy(),
    )


def pytorch(folder, how):
    import torch

    torch.set_num_threads(CORES)
    sizes = json.loads((folder / "fields.json").read_text())
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def weight(name):
        return torch.from_numpy(np.load(folder / f"weight-{name}.npy"))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.v = torch.nn.Embedding.from_pretrained(weight("fm-embeddings"))
            self.w = torch.nn.Embedding.from_pretrained(weight("fm-w"))
            self.bias = torch.nn.Parameter(weight("head-bias"))
            layers = []
            for number in range(len(list(folder.glob("weight-hidden_*-kernel.npy")))):
                layers += [self.dense(f"hidden_{number}"), torch.nn.ReLU()]
            self.mlp = torch.nn.Sequential(*layers, self.dense("deep")) if layers else None

        @staticmethod
        def dense(name):
            kernel = weight(f"{name}-kernel")
            layer = torch.nn.Linear(*kernel.shape, bias=(folder / f"weight-{name}-bias.npy").exists())
            layer.weight.data = kernel.T.contiguous()
            if layer.bias is not None:
                layer.bias.data = weight(f"{name}-bias")
            return layer

        def forward(self, indices, values):
            values = values.unsqueeze(2)
            e = self.v(indices) * values
            if max(sizes) > 1:  # the columns of a field are summed; runs of single ones stay as they are
                singles = next(i for i, size in enumerate([*sizes, 2]) if size > 1)
                spans = zip(bounds[singles:-1], bounds[singles + 1 :], strict=True)
                e = torch.cat([e[:, :singles], *(e[:, a:b].sum(1, keepdim=True) for a, b in spans)], 1)
            s = e.sum(1)
            y = self.bias + (self.w(indices) * values).sum(1) + 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)
            return torch.sigmoid(y if self.mlp is None else y + self.mlp(e.flatten(1)))

    model = Model().eval()
    ready = lambda *pair: tuple(map(torch.from_numpy, pair))  # noqa: E731
    if how == "TorchScript":
        example = ready(*(np.load(folder / f"{name}.npy")[:2] for name in ("indices", "values")))
        with torch.no_grad():
            model = torch.jit.freeze(torch.jit.trace(model, example))

    def score(pair):
        with torch.inference_mode():
            return model(*pair).numpy()

    return ready, score


def onnx(folder, _):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return (
        lambda indices, values: {"indices": indices, "values": values},
        lambda inputs: session.run(["score"], inputs)[0],
    )


SIDES = {
    "Scorer float32": (scorer, "float32"),
    "Scorer bfloat16": (scorer, "bfloat16"),
    "Scorer int8": (scorer, "int8"),
    "SavedModel portable": (saved_model, "portable"),
    "SavedModel native": (saved_model, "native"),
    "Keras __call__": (keras_model, "call"),
    "Keras predict": (keras_model, "predict"),
    "PyTorch eager": (pytorch, "eager"),
    "TorchScript": (pytorch, "TorchScript"),
    "ONNX Runtime": (onnx, None),
}


class Side:
    """One side with its samples."""

    def __init__(self, name, folder):
        make, argument = SIDES[name.removesuffix(", one thread")]
        self.ready, self.score = make(folder, argument)
        self.indices, self.values, self.right = (np.load(folder / f"{n}.npy") for n in ("indices", "values", "scores"))
        self.done = 0

    def sets(self, batch, count, first):
        """Batches of the pool, ready to score: none twice before all were used."""
        starts = [(first + i) % (len(self.indices) // batch) * batch for i in range(count)]
        return [self.ready(self.indices[at : at + batch], self.values[at : at + batch]) for at in starts]

    def check(self, batches):
        """The largest difference from the Keras model: over the whole pool in large batches, then in the others."""
        worst = 0.0
        for batch in batches:
            count = len(self.indices) // batch if batch == max(batches) else 20
            for number, inputs in enumerate(self.sets(batch, count, 0)):
                found = np.asarray(self.score(inputs), np.float64).ravel()
                right = self.right[number * batch : (number + 1) * batch]
                if found.shape != right.shape or not np.isfinite(found).all():
                    raise ValueError(f"scores of shape {found.shape}, or not finite")
                worst = max(worst, float(np.abs(found - right).max()))
        return worst

    def time(self, batch, seconds, least, most):
        """Microseconds of each call, for so many seconds."""
        clock, times, warm = time.perf_counter, [], 3
        chunk = least + warm
        while len(times) < most and (len(times) < least or sum(times) < seconds * 1e6):
            sets = self.sets(batch, chunk, self.done)  # made in pieces, so that a slow side holds few
            self.done += chunk
            for inputs in sets[:warm]:  # the others had the caches
                self.score(inputs)
            for inputs in sets[warm:]:
                start = clock()
                self.score(inputs)
                times.append((clock() - start) * 1e6)
            chunk, warm = min(4 * chunk, most), 0
        return times


def main():
    name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    side = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if side is None:
                side = Side(name, folder)
            reply = {"ok": getattr(side, command.pop("do"))(**command)}
        except Exception as error:  # the bench goes on without this side, and says why
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
