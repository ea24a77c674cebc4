"""Makes the models of bench/serve.py: `python bench/serve_models.py FOLDER`; the last line it prints is JSON.

Per model a folder with the scorer's three files, both SavedModels, a Keras file, and as .npy the weights, a pool of
samples and what the Keras model says of them.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from serve import FIELDS, POOL, SIZES, TABLES

import deepfm_ops
from deepfm_ops import DeepFM
from deepfm_ops.scorer import Scorer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import demo


def trained():
    """(the demo's DeepFM, its test set)."""
    features, parts = demo.prepare(None)
    keras.utils.set_random_seed(0)
    model = demo.build(features, "DeepFM", 0, argparse.Namespace(l2=None, l2_scope="table", optimizer="Adam"))
    stop = keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True)
    model.fit(
        *parts["train"],
        validation_data=parts["validation"],
        batch_size=demo.BATCH,
        validation_batch_size=8192,
        epochs=60,
        verbose=0,
        callbacks=[stop],
    )
    return model, parts["test"]


def drawn(rows, use_deep):
    """A model with random weights, all of them large enough that a wrong one shows in the scores."""
    wide = keras.initializers.RandomNormal(stddev=0.1, seed=1)
    model = DeepFM(rows, FIELDS, 16, (400, 400, 400), use_deep=use_deep, seed=1, embeddings_initializer=wide)
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if not variable.path.endswith(("embeddings", "kernel")):
            variable.assign(rng.standard_normal(variable.shape, np.float32) * np.float32(0.1))
    return model


def write_few(folder, model):
    """A SavedModel of the same graph with few rows, which tf2onnx can take."""
    few = drawn(1000, True)
    for variable, other in zip(few.variables, model.variables, strict=True):
        if variable.shape == other.shape:
            variable.assign(other)
    deepfm_ops.export(few, folder / "few")


def scores_of(model, indices, values):
    """The Keras model's scores, float32 [B]."""
    return model.predict((indices, values), batch_size=4096, verbose=0).ravel()


def accuracy(folder, model, test):
    """AUC by table, and how far each is from the Keras model on every sample of the test set."""
    (indices, values), labels = test
    right = scores_of(model, indices, values)
    found = {"samples": len(labels), "AUC": {"Keras": float(demo.auc(labels, right))}, "difference": {}}
    for table in TABLES:
        scores = Scorer.load(folder / f"{table}.scorer").score(indices, values)
        found["AUC"][table] = float(demo.auc(labels, scores))
        found["difference"][table] = float(np.abs(scores.astype(np.float64) - right).max())
    return found


def write(folder, model, indices, values):
    """All formats, the weights and the pool."""
    folder.mkdir(parents=True)
    for table in TABLES:
        deepfm_ops.export_scorer(model, folder / f"{table}.scorer", table)
    deepfm_ops.export(model, folder / "portable")
    deepfm_ops.export(model, folder / "native", portable=False)
    model.save(folder / "model.keras")
    for variable in model.variables:
        np.save(folder / f"weight-{variable.path.replace('/', '-')}.npy", variable.numpy())
    sizes = model.get_layer("fm").field_sizes
    (folder / "fields.json").write_text(json.dumps(list(sizes)))
    for name, array in (("indices", indices), ("values", values), ("scores", scores_of(model, indices, values))):
        np.save(folder / f"{name}.npy", array)
    return {
        name: sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        for name, path in [
            *((table, folder / f"{table}.scorer") for table in TABLES),
            ("SavedModel portable", folder / "portable"),
            ("SavedModel native", folder / "native"),
            ("Keras", folder / "model.keras"),
        ]
    }


def main():
    folder, found = pathlib.Path(sys.argv[1]), {"bytes": {}}
    rng = np.random.default_rng(0)
    for name, (rows, use_deep) in SIZES.items():
        if rows is None:
            model, test = trained()
            chosen = rng.integers(0, len(test[1]), POOL)
            indices, values = (matrix[chosen] for matrix in test[0])
        else:
            model = drawn(rows, use_deep)
            indices, values = rng.integers(0, rows, (POOL, FIELDS)), rng.random((POOL, FIELDS), np.float32)
        found["bytes"][name] = write(folder / name, model, indices, values)
        if rows is None:
            found["accuracy"] = accuracy(folder / name, model, test)
        if rows is not None and rows > 10**6:
            write_few(folder / name, model)
        del model
        keras.backend.clear_session()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
