"""The part of bench/RESULTS.md about how well models learn, from what bench/learning.py measured."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"default": "C0", "tuned": "C1"}


def _of(runs, key):
    """Mean and standard deviation over the seeds; None for the latter of a single one."""
    found = [run[key] for run in runs]
    return np.mean(found), np.std(found, ddof=1) if len(found) > 1 else None


def _text(mean, deviation):
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _seconds(runs):
    """Of an epoch: the median, of the later ones where there are any."""
    return np.median(np.concatenate([run["seconds"][1:] or run["seconds"] for run in runs]))


def _results(found):
    """(side, setting, settings, runs) of a set."""
    for side, results in found["sides"].items():
        for setting in COLOURS:
            if setting in results:
                yield side, setting, results[setting]["settings"], results[setting]["runs"]


def _table(found):
    yield "| side | setting | test AUC | test logloss | validation logloss | epochs (best) | s per epoch |"
    yield "|" + "---|" * 7
    for side, setting, settings, runs in _results(found):
        cells = [_text(*_of(runs, key)) for key in ("auc", "logloss", "validation")]
        epochs = ", ".join(f"{len(run['losses'])} ({1 + np.argmin(run['losses'])})" for run in runs)
        what = ", ".join([setting, *(f"{name} {value:g}" for name, value in settings.items())])
        yield f"| {side} | {what} | {' | '.join(cells)} | {epochs} | {_seconds(runs):.2f} |"
    for side, results in found["sides"].items():
        if "error" in results:
            yield f"| {side} | failed: {results['error'].splitlines()[0]} | | | | | |"


def draw(sets, path):
    figure, axes = plt.subplots(
        1, len(sets), figsize=(5 * len(sets) + 2, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    sides = list(dict.fromkeys(side for found in sets.values() for side in found["sides"]))
    for axis, (title, found) in zip(axes[0], sets.items(), strict=True):
        for side, setting, _, runs in _results(found):
            mean, deviation = _of(runs, "logloss")
            at = sides.index(side) + (0.1 if setting == "tuned" else -0.1)
            axis.errorbar(mean, at, xerr=deviation, fmt="o", color=COLOURS[setting], capsize=3)
        axis.set(xlabel="test logloss", title=title)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(sides)), sides)
    axes[0][0].invert_yaxis()
    points = [plt.Line2D([], [], marker="o", linestyle="", color=colour) for colour in COLOURS.values()]
    axes[0][-1].legend(points, COLOURS, fontsize=8)
    figure.suptitle("How well the defaults learn: less is better")
    figure.savefig(path, dpi=110)


def lines(report, folder):
    """The lines of the section; draws its picture."""
    sets = report["sets"]
    draw({title: found for title, found in sets.items() if "one pass" not in title}, folder / "learning.png")
    found = [
        "",
        "## Learning",
        "",
        f"Machine: {report['machine']}. Commands: `{report['command']}`.",
        "Every side has the same arrays, embeddings of 16, an MLP of 256-128 and batches of 1024, stops early on the",
        "validation logloss after 2 epochs without a better one (recommended: 4) and keeps the best epoch's weights;",
        "± is the standard deviation over seeds 0, 1, 2. Tuned: l2 of 1e-6 to 1e-3 on whole tables, then dropout of",
        "0.3, then a patience of 4 epochs; or scikit-learn's C: chosen by seed 0's validation logloss. The test part",
        "was scored after the choice. DeepCTR has a row of its own for what is missing, and keeps numbers out of the",
        "embeddings. Recommended: what `DeepFM.from_features` and `compile()` choose, untuned. LazyAdam: at 1e-3 on",
        "the same model, without priors and averages. Seconds, of a shared machine, are those of training alone, the",
        "median of all epochs but the first; LR's are the whole fit.",
        "",
        "![test logloss](results/learning.png)",
    ]
    for title, each in sets.items():
        rows = ", ".join(f"{rows:,} {part}" for part, rows in each["rows"].items())
        found += ["", f"### {title}", "", f"{rows}; {each['fields']} fields, {each['features']:,} indices.", ""]
        found += _table(each)
    return found
