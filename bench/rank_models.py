"""Makes the models of bench/rank.py: `python bench/rank_models.py FOLDER FM_ITEMS DEEP_ITEMS`; prints JSON last.

Per model with drawn weights a folder with the scorer's file, a table of items, a user's record and the matrices of the
two joined. What is printed is the recall of shortlists by the demo's models.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rank import SHORTLIST, THREADS, K

import deepfm_ops
from deepfm_ops import DeepFM, FeatureDictionary, datasets
from deepfm_ops.scorer import Scorer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import demo

ITEM = ["item", "release_year", "genres"]  # the demo's inputs that are the items'


def write(folder, items, user_fields, item_fields, **options):
    """A model whose weights are all large enough that a wrong one shows in the scores, and what it is measured with."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    table = {"item": np.arange(items)}
    table |= {f"i{n}": rng.integers(0, 100, items) for n in range(item_fields - 1)}
    user = {f"u{n}": rng.integers(0, 100, items) for n in range(user_fields)}
    features = FeatureDictionary().fit(table | user, categorical=[*user, *table])
    wide = keras.initializers.RandomNormal(stddev=0.1, seed=1)
    model = DeepFM(features.num_features, features.num_fields, 16, embeddings_initializer=wide, seed=1, **options)
    model.get_layer("fm").w.assign(rng.normal(size=(features.num_features, 1)) * 0.1)
    deepfm_ops.export_scorer(model, folder / "model.scorer", features=features)
    record = {name: column[0].item() for name, column in user.items()}
    joined = features.transform(table | {name: np.full(items, value) for name, value in record.items()})
    np.savez(folder / "items.npz", **table)
    np.savez(folder / "joined.npz", indices=joined[0], values=joined[1])
    (folder / "user.json").write_text(json.dumps(record))


def trained(folder):
    """{model: {"items", "users", "recall": {shortlist: share}}} of the demo."""
    features, parts = demo.prepare(None)
    table, found = datasets.movielens_100k(None), {}
    items = table.drop_duplicates("item")[ITEM]
    users = table.drop_duplicates("user")[[name for name in demo.CATEGORICAL if name not in ITEM]]
    for kind in ("DeepFM", "recommended"):
        keras.utils.set_random_seed(0)
        model = demo.build(features, kind, 0, argparse.Namespace(l2=None, l2_scope="table", optimizer="Adam"))
        stop = keras.callbacks.EarlyStopping("val_loss", patience=4, restore_best_weights=True)
        options = {"batch_size": demo.BATCH, "validation_batch_size": 8192, "epochs": 60, "verbose": 0}
        model.fit(*parts["train"], validation_data=parts["validation"], callbacks=[stop], **options)
        deepfm_ops.export_scorer(model, folder / "demo.scorer", features=features)
        scorer = Scorer.load(folder / "demo.scorer", threads=THREADS)
        ready = scorer.items(items)
        recall = {n: scorer.recall(users, ready, K, n) for n in (200, 500, SHORTLIST)}
        found[kind] = {"items": len(items), "users": len(users), "recall": recall}
    return found


def main():
    folder, fm_items, deep_items = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
    write(folder / "FM", fm_items, 4, 4, use_deep=False)
    write(folder / "DeepFM", deep_items, 20, 19, hidden_units=(400, 400, 400))
    print(json.dumps(trained(folder)))


if __name__ == "__main__":
    main()
