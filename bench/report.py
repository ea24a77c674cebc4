"""Writes bench/RESULTS.md and its pictures from what the other programs here measured."""

import json
import pathlib

import matplotlib
import report_cluster
import report_data
import report_explain
import report_learning
import report_orders
import report_rank
import report_serve
import report_train
from common import Case, target_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
OP, NUMPY, FLOOR = "deepfm_ops op", "deepfm_ops kernels on NumPy", "touch floor"
EMPTY = "empty tf.function"
BASE = Case()


def median(found, side, kind):
    value = found.get(side, {}).get(kind)
    return value[0] if isinstance(value, list) else None


class Report:
    """The measurements, and the lines made of them."""

    def __init__(self, op, kernels):
        self.op, self.kernels = op, kernels
        self.cases = {Case(**row["case"]): row["sides"] for row in op["cases"]}

    def ratio(self, case, side, kind, ours=OP):
        found = self.cases.get(case, {})
        theirs, mine = median(found, side, kind), median(found, ours, kind)
        return theirs / mine if theirs and mine else None

    def targets(self):
        """(what, number to reach, measured, whether less is better)."""
        for what, goal, got in self.ratios_to_reach():
            yield what, goal, got, False
        found = self.cases.get(BASE, {})
        parts = [median(found, side, "forward") for side in (OP, NUMPY, EMPTY)]
        over = parts[0] / (parts[1] + parts[2]) if all(parts) else None
        yield "op forward, same shape, over the kernel on NumPy and an empty tf.function's call", 1.1, over, True

    def ratios_to_reach(self):
        """(what, number to reach, measured)."""
        for row in self.kernels["floors"]:
            rows = row["case"]["rows"]
            goal = 60 if rows == 1000 else 85
            yield f"kernel forward, B=16384, V={rows:,}: percent of the touch floor", goal, row["percent of the floor"]
        for side, goal in (("TensorFlow formula", 4), ("TensorFlow formula, XLA", 4), ("FBGEMM lookup alone", 2.5)):
            yield f"op forward, B=4096, V=1,000,000: {side} over ours", goal, self.ratio(BASE, side, "forward")
        for side, goal in (("TensorFlow formula", 1.5), ("TensorFlow formula, tf.unique", 4)):
            yield f"op gradient, same shape: {side} over ours", goal, self.ratio(BASE, side, "gradient")
        narrow = Case(rows=1000, dim=10)
        yield (
            "op forward, K=10, V=1,000: TensorFlow formula over ours",
            3,
            self.ratio(narrow, "TensorFlow formula", "forward"),
        )
        small = Case(batch=128)
        for kind in ("forward", "gradient"):
            yield f"B=128, {kind}: TensorFlow formula over ours", 1, self.ratio(small, "TensorFlow formula", kind)
        yield "gradient, uniform over Zipf(1.05)", 1, self.kernels["zipf"][0]["uniform over zipf"]
        yield (
            "bfloat16 table, K=64, forward: float32 over bfloat16",
            1.5,
            self.kernels["bfloat16"][0]["float32 over bfloat16"],
        )
        for row in self.kernels["threads"]:
            if row["kind"] == "touch":
                continue
            yield f"{row['kind']}, B=65536: one thread over two", 1.8, row["speedup"]
        for row in self.kernels["dims"]:
            worst = row["worst"]
            what = f"slowest K of 1..130 per byte (K={worst['K']}), V={row['rows']:,}: share of its slower power of two"
            yield what, 0.5, worst["share of the slower power of two"]

    def reasons(self):
        """What bounds the targets that are ratios to others: the floor of this run."""
        found = self.cases.get(BASE, {})
        floor, call = median(found, FLOOR, "forward"), median(self.cases.get(Case(batch=1), {}), OP, "forward")
        lines = []
        for side in ("TensorFlow formula", "TensorFlow formula, XLA", "FBGEMM lookup alone"):
            theirs = median(found, side, "forward")
            if theirs and floor and call:
                lines.append(
                    f"- {side} over the touch floor alone is {theirs / floor:.2f}; over the floor and the call of a "
                    f"tf.function ({call:.2f} ms, the op's time at B=1) it is {theirs / (floor + call):.2f}."
                )
        touch = [row["speedup"] for row in self.kernels["threads"] if row["kind"] == "touch"]
        if touch:
            lines.append(f"- A second thread makes the touch floor itself {touch[0]:.2f} times faster at B=65536.")
        return lines

    def case_tables(self):
        for case, found in self.cases.items():
            yield f"\n### {case}\n"
            yield "| side | forward, ms | | GB/s | of the floor | gradient, ms | |"
            yield "|---|---|---|---|---|---|---|"
            floor = median(found, FLOOR, "forward")
            for side, kinds in found.items():
                cells = []
                for kind in ("forward", "gradient"):
                    value = kinds.get(kind)
                    if value is None:
                        cells += ["", ""] + (["", ""] if kind == "forward" else [])
                    elif isinstance(value, str):
                        cells += [f"failed: {value.splitlines()[0][:80]}", ""] + (["", ""] if kind == "forward" else [])
                    else:
                        ours = median(found, OP, kind)
                        cells += [f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]", f"{value[0] / ours:.2f} x"]
                        if kind == "forward":
                            cells.append(f"{case.useful_bytes / value[0] / 1e6:.1f}")
                            cells.append(f"{100 * floor / value[0]:.0f} %" if floor else "")
                yield f"| {side} | " + " | ".join(cells) + " |"

    def losing(self):
        """Cases in which somebody who computes the same was faster than the op."""
        lines = []
        for case, found in self.cases.items():
            for side in found:
                for kind in ("forward", "gradient"):
                    ratio = self.ratio(case, side, kind)
                    if ratio and ratio < 1 and side not in (OP, NUMPY, FLOOR, EMPTY):
                        lines.append(f"- {case}, {kind}: {side} took {ratio:.2f} of our time")
        return lines or ["- none"]

    def draw_batch(self, path):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
        cases = sorted((c for c in self.cases if c == Case(batch=c.batch)), key=lambda c: c.batch)
        sides = sorted({s for c in cases for s in self.cases[c]} - {OP, NUMPY, FLOOR, EMPTY})
        for axis, kind in zip(axes, ("forward", "gradient"), strict=True):
            for number, side in enumerate(sides):  # a side has one colour in both, also where it has no points
                points = [(c.batch, self.ratio(c, side, kind)) for c in cases if self.ratio(c, side, kind)]
                axis.plot(*(zip(*points, strict=True) if points else ([], [])), "o-", color=f"C{number}", label=side)
            axis.axhline(1, color="black", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="batch", title=kind)
        axes[0].set_ylabel("time over that of the op")
        axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle("Speed-up of the op, F=39, K=16, V=1,000,000")
        figure.savefig(path, dpi=110)

    def draw_roofline(self, path):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        intensities = [0.25, 4]
        for row in self.kernels["floors"]:
            case = Case(**row["case"])
            best = min(t[0] for name, t in row["times"].items() if name.startswith("touch"))
            roof = case.useful_bytes / best / 1e6
            (line,) = axis.plot(
                intensities, [roof * i for i in intensities], label=f"touch floor, V={case.rows:,}: {roof:.0f} GB/s"
            )
            # Per element: times the value, into the sum, into the sum of squares: 4 operations on 4 bytes.
            reached = case.useful_bytes / row["times"]["forward"][0] / 1e6
            axis.plot([1], [reached], "o", color=line.get_color())
            axis.annotate(
                f"float32, {100 * reached / roof:.0f} %",
                (1.04, reached),
                fontsize=8,
                va="top" if case.rows > 10**6 else "bottom",
            )
        axis.set(
            xscale="log", yscale="log", xlabel="operations per byte of rows", ylabel="billion operations per second"
        )
        axis.legend(fontsize=8)
        axis.set_title("Roofline of the forward, B=16384, F=39, K=16, two threads")
        figure.savefig(path, dpi=110)

    def draw_naive(self, path):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        rows = self.kernels["naive"]
        for name, label in (("pairwise", "sum over all pairs, O(n² k)"), ("fused", "fused, O(n k)")):
            axis.plot([row["n"] for row in rows], [row["times"][name][0] for row in rows], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="features per sample, n", ylabel="ms, 64 samples, K=16, one thread")
        axis.legend()
        axis.set_title("The identity that factorization machines rest on")
        figure.savefig(path, dpi=110)


def main():
    report = Report(*(json.loads((RESULTS / name).read_text()) for name in ("op.json", "kernels.json")))
    report.draw_batch(RESULTS / "batch.png")
    report.draw_roofline(RESULTS / "roofline.png")
    report.draw_naive(RESULTS / "identity.png")
    lines = [
        "# Results",
        "",
        "Written by `make bench`, `bench-train`, `bench-serve`, `bench-rank`, `bench-learning`, `bench-data` and",
        "`bench-cluster`; change nothing here by hand.",
        "",
        f"Machine: {report.op['machine']}; kernels: {report.kernels['machine'].rsplit(', ', 1)[1]}.",
        "The machine is shared: read ratios, of sides that took turns in one run; brackets hold the quartiles.",
        f"Commands: `{report.op['command']}`, `{report.kernels['command']}`.",
        "",
        "A gradient is a forward and a gradient. The op's and FBGEMM's gradients, and that of tf.unique, have each row",
        "once; those of the plain formula, PyTorch and DeepCTR repeat rows. FBGEMM's is a whole step of its fused SGD.",
        "The kernels on NumPy run without TensorFlow. GB/s counts the bytes of the rows and nothing else.",
        "",
        "## Targets",
        "",
        *target_table(report.targets()),
        "",
        *report.reasons(),
        "",
        "## Where we lose",
        "",
        *report.losing(),
        "",
        "## Pictures",
        "",
        "![speed-up over batch size](results/batch.png)",
        "![roofline](results/roofline.png)",
        "![the identity](results/identity.png)",
        "",
        "## Every case",
        *report.case_tables(),
    ]
    if "orders" in report.kernels:
        lines += report_orders.lines(
            report.kernels["orders"], report.kernels.get("apart", {}).get("orders", report.kernels)
        )
    if (RESULTS / "train.json").exists():
        fit = json.loads((RESULTS / "fit.json").read_text()) if (RESULTS / "fit.json").exists() else None
        lines += report_train.lines(json.loads((RESULTS / "train.json").read_text()), fit, RESULTS)
    if (RESULTS / "serve.json").exists():
        lines += report_serve.lines(json.loads((RESULTS / "serve.json").read_text()), RESULTS)
    if (RESULTS / "rank.json").exists():
        lines += report_rank.lines(json.loads((RESULTS / "rank.json").read_text()))
    if (RESULTS / "explain.json").exists():
        lines += report_explain.lines(json.loads((RESULTS / "explain.json").read_text()))
    if (RESULTS / "learning.json").exists():
        lines += report_learning.lines(json.loads((RESULTS / "learning.json").read_text()), RESULTS)
    if (RESULTS / "data.json").exists():
        lines += report_data.lines(json.loads((RESULTS / "data.json").read_text()), RESULTS)
    if (RESULTS / "cluster.json").exists():
        lines += report_cluster.lines(json.loads((RESULTS / "cluster.json").read_text()))
    lines.append("")
    (HERE / "RESULTS.md").write_text("\n".join(lines))
    print("\n".join(target_table(report.targets())))


if __name__ == "__main__":
    main()
