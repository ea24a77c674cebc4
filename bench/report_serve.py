"""The part of bench/RESULTS.md about scoring, from what bench/serve.py measured."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import target_table

OURS, PREDICT = "Scorer float32", "Keras predict"
TITLES = {
    "demo": "The demo's DeepFM: V=2,836, 8 fields in 13 columns, K=16, MLP 128",
    "DeepFM": "DeepFM: V=10,000,000, F=39, K=16, MLP 3x400",
    "FM": "FM: V=1,000,000, F=39, K=16",
}
TABLES = ("float32", "bfloat16", "int8")
BATCHES = ("1", "32", "512")


def _get(found, side, batch="1", what="p50"):
    return found.get(side, {}).get("batches", {}).get(batch, {}).get(what)


def _ratio(found, side, other):
    top, bottom = _get(found, side), _get(found, other)
    return top / bottom if top and bottom else None


def targets(report):
    """(what, target, measured or None, whether less is better)."""
    models, accuracy = report["models"], report["accuracy"]
    deep = models.get("DeepFM", {})
    yield "Scorer float32, FM, V=1,000,000, B=1: p50, microseconds", 20, _get(models.get("FM", {}), OURS), True
    for side, goal in (("SavedModel native", 5), ("SavedModel portable", 5), (PREDICT, 100)):
        yield f"DeepFM, V=10,000,000, B=1: {side} over Scorer float32", goal, _ratio(deep, side, OURS), False
    for model, sizes in report["bytes"].items():
        yield (
            f"int8 file over float32's, K=16, {TITLES[model].split(':')[0]}",
            0.35,
            sizes["int8"] / sizes["float32"],
            True,
        )
    for table in ("bfloat16", "int8"):
        off = abs(accuracy["AUC"][table] - accuracy["AUC"]["Keras"])
        yield f"demo: AUC of {table} off by", 0.001, off, True
    worst = accuracy["difference"]["float32"]
    yield f"demo: float32 from Keras, worst of {accuracy['samples']:,} test samples", 1e-5, worst, True
    for table in TABLES:
        first = report["first score"].get(f"Scorer {table}", {})
        yield f"first score, V=10,000,000, {table}, worst start: seconds", 1, first.get("worst"), True


def _losing(models):
    """Who was faster than the scorer with float32 tables."""
    for model, found in models.items():
        for side in found:
            for batch in BATCHES:
                theirs, ours = _get(found, side, batch), _get(found, OURS, batch)
                if theirs and ours and theirs < ours and not side.startswith("Scorer"):
                    yield f"- {model}, B={batch}: {side} took {theirs / ours:.2f} of our time"


def _model_table(found):
    yield f"| side | {' | '.join(f'B={b}: p50, us | p99 | over ours | samples/s' for b in BATCHES)} | off by |"
    yield "|" + "---|" * (4 * len(BATCHES) + 2)
    for side, result in found.items():
        if "error" in result:
            yield f"| {side} | failed: {result['error'].splitlines()[0]} |" + " |" * (4 * len(BATCHES))
            continue
        cells = []
        for batch in BATCHES:
            row, ours = result["batches"][batch], _get(found, OURS, batch)
            over = f"{row['p50'] / ours:.2f} x" if ours else ""
            cells += [f"{row['p50']:,.1f}", f"{row['p99']:,.1f}", over, f"{row['samples/s']:,.0f}"]
        yield f"| {side} | {' | '.join(cells)} | {result['difference']:.1e} |"


def _accuracy_table(report):
    accuracy = report["accuracy"]
    yield "| table | AUC | largest difference | " + " | ".join(f"MB, {model}" for model in report["bytes"]) + " |"
    yield "|" + "---|" * (3 + len(report["bytes"]))
    for name in ("Keras", *TABLES, "SavedModel portable"):
        auc, off = accuracy["AUC"].get(name), accuracy["difference"].get(name)
        cells = ["" if auc is None else f"{auc:.5f}", "" if off is None else f"{off:.1e}"]
        for sizes in report["bytes"].values():
            cells.append(f"{sizes[name] / 1e6:,.2f} ({sizes[name] / sizes['float32']:.3f})")
        yield f"| {name} | {' | '.join(cells)} |"


def _first_table(first):
    yield "| side | seconds | worst | of which |"
    yield "|---|---|---|---|"
    for side, found in first.items():
        if "error" in found:
            yield f"| {side} | failed: {found['error']} | | |"
            continue
        median, low, high = found["seconds"]
        steps = ", ".join(f"{name} {1e3 * seconds:,.0f} ms" for name, seconds in found["steps"].items())
        yield f"| {side} | {median:.2f} [{low:.2f}, {high:.2f}] | {found['worst']:.2f} | {steps} |"


def draw(models, path):
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.5 * len(models) + 2, 4.8), layout="constrained", sharey=True, squeeze=False
    )
    sides = list(dict.fromkeys(side for found in models.values() for side in found))
    for axis, (model, found) in zip(axes[0], models.items(), strict=True):
        for number, side in enumerate(sides):  # a side has one colour everywhere, also where it has no points
            points = [(int(b), _get(found, side, b)) for b in BATCHES if _get(found, side, b)]
            style = "-" if side.startswith("Scorer") else ":"
            axis.plot(
                *(zip(*points, strict=True) if points else ([], [])),
                marker="o",
                linestyle=style,
                color=plt.get_cmap("tab20")(number),
                label=side,
            )
        axis.set(xscale="log", yscale="log", xlabel="batch", title=TITLES[model].replace(": ", "\n", 1))
        axis.title.set_fontsize(10)
    axes[0][0].set_ylabel("microseconds per call, median")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def lines(report, folder):
    """The lines of the section; draws its picture."""
    models = report["models"]
    draw(models, folder / "serve.png")
    found = [
        "",
        "## Scoring",
        "",
        f"Machine: {report['machine']}. Command: `{report['command']}`.",
        "Every side is a process of its own and may use all cores, those named otherwise excepted; they take turns. A",
        "call starts with ready inputs (tensors where the side takes tensors) and ends with scores in NumPy; samples/s",
        "are those of the median call. Off by: the largest difference from the Keras model over 32768 samples.",
        "",
        *target_table(targets(report)),
        "",
        "### Who is faster than the scorer with float32 tables",
        "",
        *(list(_losing(models)) or ["- nobody"]),
        "",
        "![latency over batch](results/serve.png)",
        "",
        "### Files and accuracy",
        "",
        "AUC and difference on the demo's test set; in brackets the size over float32's.",
        "",
        *_accuracy_table(report),
        "",
        "### From the start of Python to the first score, V=10,000,000",
        "",
        "Fresh processes, the files in the page cache; the scorer checks the whole file's checksum.",
        "",
        *_first_table(report["first score"]),
    ]
    for model, sides in models.items():
        found += ["", f"### {TITLES[model]}", ""]
        if model == "DeepFM":
            found += [
                "tf2onnx did not take this model: it ran out of memory at 23 GB, and with --large_model and at most 11",
                "GB it failed to serialize. ONNX Runtime has the same graph, converted with few rows, and the tables",
                "put in afterwards.",
                "",
            ]
        found += _model_table(sides)
    return found
