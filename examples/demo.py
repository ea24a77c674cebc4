"""Trains LR, FM, DNN and DeepFM on MovieLens-100k, and DeepFM as it is recommended, and shows what an FM learns: what
`make demo` runs.

python examples/demo.py [--seeds N] [--data FOLDER] [--output FOLDER] [--checkpoints FOLDER] [--optimizer NAME]
"""

import argparse
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib
import numpy as np
import pandas as pd
import tensorflow as tf

import deepfm_ops
from deepfm_ops import Checkpoint, DeepFM, FeatureDictionary, FMInteraction, datasets, optimizers

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCH = 1024
AGES = ["under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and more"]  # of `age_group`
CATEGORICAL = ["user", "item", "gender", "age_group", "occupation", "zip_prefix", "release_year"]
# Learning rates and L2 strengths were chosen on the validation part, the DNN has those of DeepFM; the last model has
# the package's defaults, which were not chosen here.
MODELS = {
    "LR": {"use_fm": False, "use_deep": False, "rate": 5e-3},
    "FM": {"use_deep": False, "rate": 5e-3},
    "DNN": {"use_linear": False, "use_fm": False, "rate": 2e-3, "l2_embedding": 1e-3},
    "DeepFM": {"rate": 2e-3, "l2_embedding": 1e-3},
    "recommended": None,
}


def auc(labels, scores):
    """Area under the ROC curve, by ranks."""
    ranks, positives = pd.Series(scores).rank().to_numpy(), labels.sum()
    negatives = len(labels) - positives
    return (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)


def logloss(labels, scores):
    """Mean cross-entropy."""
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.mean(np.where(labels == 1, np.log(scores), np.log1p(-scores)))


def prepare(path):
    """(feature dictionary, {part: ((indices, values), labels)}): fitted on the training part alone."""
    table = datasets.movielens_100k(path)
    rest, test = datasets.hold_out(table, per_user=10, seed=0)
    in_validation = np.random.default_rng(0).random(len(rest)) < 0.1
    parts = {"train": rest[~in_validation], "validation": rest[in_validation], "test": test}
    features = FeatureDictionary().fit(parts["train"], categorical=CATEGORICAL, multivalued=["genres"])
    return features, {name: (features.transform(p), p["label"].to_numpy()) for name, p in parts.items()}


def build(features, kind, seed, choices):
    """One of the models, compiled."""
    if MODELS[kind] is None:
        model = DeepFM.from_features(features, seed=seed, name=kind)
        model.compile()
        return model
    settings = dict(MODELS[kind])
    rate = settings.pop("rate")
    if choices.l2 is not None:
        settings["l2_embedding"] = choices.l2
    model = DeepFM(
        features.num_features,
        features.num_fields,
        embedding_dim=16,
        hidden_units=(128,),
        field_sizes=features.field_sizes,
        l2_linear=1e-5,
        l2_scope=choices.l2_scope,
        seed=seed,
        name=kind,
        **settings,
    )
    optimizer = keras.optimizers.Adam if choices.optimizer == "Adam" else optimizers.LazyAdam
    model.compile(optimizer=optimizer(rate), loss="binary_crossentropy")
    return model


class Progress(keras.callbacks.Callback):
    """Prints an epoch a line, and keeps the curves."""

    def __init__(self, validation):
        super().__init__()
        self.inputs, self.labels = validation
        self.curve = []

    def on_epoch_end(self, epoch, logs=None):
        scores = self.model.predict(self.inputs, batch_size=8192, verbose=0).ravel()
        self.curve.append((logs["loss"], logs["val_loss"], auc(self.labels, scores)))
        loss, val_loss, val_auc = self.curve[-1]
        print(
            f"  {self.model.name:11s} epoch {epoch + 1:2d}: training loss {loss:.4f}, "
            f"validation loss {val_loss:.4f}, validation AUC {val_auc:.4f}",
            flush=True,
        )


def train(features, parts, kind, seed, choices):
    """(test AUC, test logloss, curve) after early stopping on the validation part."""
    keras.utils.set_random_seed(seed)
    model = build(features, kind, seed, choices)
    progress = Progress(parts["validation"])
    stop = keras.callbacks.EarlyStopping("val_loss", patience=4, restore_best_weights=True)
    checkpoints = [Checkpoint(choices.checkpoints / f"{kind}-{seed}")] if choices.checkpoints else []
    model.fit(
        *parts["train"],
        validation_data=parts["validation"],
        batch_size=BATCH,
        validation_batch_size=8192,
        epochs=60,
        verbose=0,
        callbacks=[progress, stop, *checkpoints],
    )
    inputs, labels = parts["test"]
    scores = model.predict(inputs, batch_size=8192, verbose=0).ravel()
    return auc(labels, scores), logloss(labels, scores), progress.curve


def compare_speed(features, parts, rounds=30):
    """Median seconds of the op and of the fallback: forward and gradient on a batch of this model."""
    (indices, values), _ = parts["train"]
    inputs = (tf.constant(indices[:BATCH]), tf.constant(values[:BATCH]))
    steps = {}
    for backend in ("auto", "reference"):
        layer = FMInteraction(
            features.num_features, 16, return_embeddings=True, field_sizes=features.field_sizes, backend=backend
        )
        layer.build()

        def step(layer=layer):
            with tf.GradientTape() as tape:
                embeddings, y = layer(inputs)
                loss = tf.reduce_sum(y) + tf.reduce_sum(embeddings)
            gradient = tape.gradient(loss, layer.embeddings.value)
            return gradient.indices, gradient.values

        steps[backend] = tf.function(step)
    seconds = {backend: [] for backend in steps}
    for _ in range(rounds):
        for backend, step in steps.items():
            step()  # warm, so that neither side pays for the other's turn
            start = time.perf_counter()
            step()
            seconds[backend].append(time.perf_counter() - start)
    return {backend: statistics.median(times) for backend, times in seconds.items()}


def draw(curves, path):
    """The learning curves of one seed, as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, curve in curves.items():
        loss, val_loss, val_auc = zip(*curve, strict=True)
        epochs = range(1, len(loss) + 1)
        (line,) = left.plot(epochs, val_loss, label=kind)
        left.plot(epochs, loss, color=line.get_color(), linestyle=":")
        right.plot(epochs, val_auc, color=line.get_color(), label=kind)
    left.set(xlabel="epoch", ylabel="loss (with penalties)", title="validation (line) and training (dots)")
    right.set(xlabel="epoch", ylabel="AUC", title="validation AUC")
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("MovieLens-100k: rating of 4 or more")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def teach(table, output, seed=0):
    """What film does a woman of 25 to 34 like, when only men of that age, and women of others, were seen?

    An FM answers it, as it crosses gender and age with genres, each by itself. Prints and draws the terms that it
    learned, and explains one of its scores.
    """
    table = table.assign(age=[AGES[int(group)] for group in table["age_group"]])
    is_asked = (table["gender"] == "F") & (table["age"] == "25-34")
    seen, asked = table[~is_asked], table[is_asked]
    features = FeatureDictionary().fit(seen, categorical=["gender", "age"], multivalued="genres")
    scores = {}
    for use_fm in (False, True):  # thirty features, each of which occurs thousands of times, bear a wide prior
        start = keras.initializers.RandomNormal(stddev=0.1, seed=seed)
        options = {"use_deep": False, "use_fm": use_fm, "embedding_prior": 0.3, "embeddings_initializer": start}
        keras.utils.set_random_seed(seed)
        model = DeepFM.from_features(features, embedding_dim=8, seed=seed, **options)
        model.compile(optimizers.LazyAdam(1e-2))
        model.fit(features.transform(seen), seen["label"], batch_size=2048, epochs=8, verbose=0)
        scores[use_fm] = model.predict(features.transform(asked), verbose=0).ravel()
    print(
        f"\nWhat film does a woman of 25 to 34 like? An FM of gender, age and genres, which saw none of their "
        f"{len(asked):,} ratings, has AUC {auc(asked['label'].to_numpy(), scores[True]):.4f} on them; "
        f"without crossings, {auc(asked['label'].to_numpy(), scores[False]):.4f}."
    )

    genres = sorted(set(asked["genres"].str.split("|").explode()) - {"unknown"})
    columns = [("gender", "F"), ("gender", "M"), *(("age", age) for age in AGES)]
    terms = model_terms(model, genres, columns)
    print(f"{'terms of':12s} {'women':>7s} {'men':>7s} {'25-34':>7s}   of their ratings, liked: by the FM, and truly")
    for genre, (woman, man, *ages) in zip(genres, terms, strict=True):
        of_genre = asked["genres"].str.split("|").map(lambda entry, genre=genre: genre in entry).to_numpy()
        liked, truly = scores[True][of_genre].mean(), asked["label"][of_genre].mean()
        print(f"{genre:12s} {woman:+7.3f} {man:+7.3f} {ages[2]:+7.3f}   {of_genre.sum():5d}: {liked:.2f}, {truly:.2f}")
    draw_terms(terms, genres, [name for _, name in columns], output / "terms.png")

    summary = deepfm_ops.explain(model, asked, summary=True, top=10)
    summary.plot(output / "terms_of_fields.png")
    sample = deepfm_ops.explain(model, asked.head(1))
    sample.plot(output / "sample.png")
    print(f"\nOver their ratings: {summary}\n\nOne of them: {sample}")
    print(
        f"Learned terms: {output / 'terms.png'}, {output / 'terms_of_fields.png'}; one sample: {output / 'sample.png'}"
    )


def model_terms(model, genres, columns):
    """[genres, columns]: the second-order term of each pair, the inner product of the two embeddings."""
    others = np.array([model.embedding(*column) for column in columns])
    return np.array([others @ model.embedding("genres", genre) for genre in genres])


def draw_terms(terms, genres, names, path):
    """A heat map of the terms of genres with genders and ages."""
    most = np.abs(terms).max()
    figure, axes = plt.subplots(figsize=(6.5, 7), layout="constrained")
    image = axes.imshow(terms, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(genres)), genres)
    axes.axvline(1.5, color="black", linewidth=1)  # between genders and ages
    axes.set_title("What an FM learned of gender x genre and age x genre")
    figure.colorbar(image, label="second-order term")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="train every model this many times")
    parser.add_argument("--data", help="folder with MovieLens-100k; default: the user's cache, or a download")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizer", choices=["Adam", "LazyAdam"], default="Adam")
    parser.add_argument("--l2-scope", choices=["table", "batch"], default="table", help="what the penalties act on")
    parser.add_argument("--l2", type=float, help="strength on the embeddings; default: chosen on the validation part")
    parser.add_argument("--checkpoints", type=pathlib.Path, help="save every epoch here, and resume from here")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo-output"))
    arguments = parser.parse_args()

    print(datasets.TERMS)
    features, parts = prepare(arguments.data)
    sizes = ", ".join(f"{len(labels):,} {name}" for name, (_, labels) in parts.items())
    print(f"{sizes} ratings; {features.num_features:,} features in {features.num_fields} fields")
    results, curves = {kind: [] for kind in arguments.models}, {}
    for seed in range(arguments.seeds):
        for kind in arguments.models:
            print(f"{kind}, seed {seed}")
            test_auc, test_logloss, curve = train(features, parts, kind, seed, arguments)
            results[kind].append((test_auc, test_logloss))
            curves.setdefault(kind, curve)

    print(f"\n{'model':11s} {'test AUC':>9s} {'logloss':>9s}   (mean of {arguments.seeds} seed(s))")
    for kind, pairs in results.items():
        means = np.mean(pairs, axis=0)
        each = ", ".join(f"{a:.4f}" for a, _ in pairs)
        print(f"{kind:11s} {means[0]:9.4f} {means[1]:9.4f}   AUC by seed: {each}")

    info = deepfm_ops.native_info()
    seconds = compare_speed(features, parts)
    picture = arguments.output / "learning_curves.png"
    draw(curves, picture)
    if info["native"]:
        print(
            f"\nThe native op was in use ({info['instruction_set']}, {info['threads']} threads): forward and gradient "
            f"of a batch of {BATCH} took {seconds['auto'] * 1e3:.2f} ms, "
            f"{seconds['reference'] / seconds['auto']:.1f} times faster than the fallback's "
            f"{seconds['reference'] * 1e3:.2f} ms."
        )
    else:
        print(f"\nThe fallback was in use: {info['reason']}")
    print(f"Learning curves: {picture}")
    teach(datasets.movielens_100k(arguments.data), arguments.output)


if __name__ == "__main__":
    main()
