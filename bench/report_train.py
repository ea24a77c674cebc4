"""The part of bench/RESULTS.md about training steps, from what bench/train.py measured."""

import matplotlib
from common import target_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, MLP = "DeepFM, deepfm_ops LazyAdam", "MLP alone"
MLP_INPUT = "MLP alone, with its input's gradient"
KERAS, DEEPCTR = "DeepFM, Keras 3 Adam", "DeepFM, DeepCTR Adam"
ROW_WISE, FBGEMM = "FM, deepfm_ops RowWiseAdagrad", "FM, FBGEMM row-wise Adagrad"
ADAGRAD, XLEARN = "FM and first order, deepfm_ops Adagrad", "FM and first order, xLearn Adagrad"
BATCH, ROW_BYTES = 4096, 17 * 4


def _median(found, side):
    return found[side]["ms"][0] if "ms" in found.get(side, {}) else None


def _ratio(rows, side, other, at, other_at=None):
    top, bottom = _median(rows.get(at, {}), side), _median(rows.get(other_at or at, {}), other)
    return top / bottom if top and bottom else None


def targets(rows):
    """(what, target, measured, whether less is better)."""
    large, small = 10**7, 10**5
    yield "DeepFM step, V=10,000,000, over the MLP alone", 1.25, _ratio(rows, OURS, MLP, large), True
    yield "the same over the MLP with its input's gradient", 1.12, _ratio(rows, OURS, MLP_INPUT, large), True
    yield "DeepFM step, V=10,000,000 over V=100,000", 1.08, _ratio(rows, OURS, OURS, large, small), True
    yield "Keras 3 Adam over ours, V=10,000,000", 7, _ratio(rows, KERAS, OURS, large), False
    yield "Keras 3 Adam over ours, V=30,000,000", 20, _ratio(rows, KERAS, OURS, 3 * 10**7), False
    yield "DeepCTR over ours, V=10,000,000", 6, _ratio(rows, DEEPCTR, OURS, large), False
    for at in (10**6, large):
        yield f"FBGEMM's FM step over ours, V={at:,}", 3, _ratio(rows, FBGEMM, ROW_WISE, at), False
    yield "FM samples per second over xLearn's, V=1,000,000", 1.0, _ratio(rows, XLEARN, ADAGRAD, 10**6), False
    ours = rows.get(large, {}).get(OURS, {})
    if "gigabytes" in ours:
        over = ours["gigabytes"] - 3 * large * ROW_BYTES / 2**30
        yield "peak memory, V=10,000,000, LazyAdam: GB beyond table and two slots", 1, over, True


def draw(rows, path):
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for side in [name for name in next(iter(rows.values())) if name.startswith(("DeepFM", "MLP"))]:
        points = [(at, _median(found, side)) for at, found in sorted(rows.items()) if _median(found, side)]
        if points:
            axis.plot(
                *zip(*points, strict=True), marker="o", label=side, linestyle=":" if side.startswith("MLP") else "-"
            )
    axis.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="ms per step of 4096 samples")
    axis.set_title("A training step over the size of the vocabulary")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def fit_targets(fit):
    """Of `fit` over train_on_batch, from what bench/fit.py measured."""
    for name, sides in fit["optimizers"].items() if fit else ():
        for side, found in sides.items():
            yield f"FM fit over train_on_batch, {name}, {side}", 0.9, found["clock"][0], False
            yield "the same, by the processor's time", 0.9, found["cpu"][0], False


def lines(report, fit, folder):
    """The lines of the section; draws its picture."""
    rows = {row["rows"]: row["sides"] for row in report["rows"]}
    draw(rows, folder / "train.png")
    found = [
        "",
        "## Training",
        "",
        f"Machine: {report['machine']}. Command: `{report['command']}`. B=4096, F=39, K=16, MLP 3x400.",
        "Every side is a process of its own; memory is its peak. DeepCTR runs without its penalties on whole tables. A",
        "loss is that of the first and of the last step; xLearn's step is the time of further epochs over a file.",
        "",
        *target_table([*targets(rows), *fit_targets(fit)]),
    ]
    found += ["", "![step over vocabulary](results/train.png)"]
    for at, sides in rows.items():
        ours = _median(sides, OURS)
        found += [
            "",
            f"### V={at:,}",
            "",
            "| side | ms per step | over ours | samples/s | GB | loss |",
            "|" + "---|" * 6,
        ]
        for side, result in sides.items():
            if "error" in result:
                found.append(f"| {side} | {result['error']} | | | | |")
                continue
            median, low, high = result["ms"]
            losses = ", ".join(f"{loss:.3f}" for loss in result["losses"])
            over = f"{median / ours:.2f} x" if ours and side.startswith(("DeepFM", "MLP")) else ""
            found.append(
                f"| {side} | {median:.1f} [{low:.1f}, {high:.1f}] | {over} | {BATCH / median * 1e3:,.0f} | "
                f"{result['gigabytes']:.2f} | {losses} |"
            )
    return found
