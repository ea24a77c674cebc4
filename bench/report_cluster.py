"""The part of bench/RESULTS.md about many machines, from what bench/cluster.py measured."""

import numpy as np
from common import target_table

FM, DEEP, SUMS = "FM", "DeepFM 3x400", "FM, sums"


def _megabytes(report, model, wire):
    """The most over numbers of servers."""
    found = [row["megabytes"] for row in report.get("bytes", []) if (row["model"], row["wire"]) == (model, wire)]
    return max(found, default=None)


def _times(report, model, what):
    return [row[what] / row["local"] for row in report.get("time", []) if row["model"] == model]


def _rates(report):
    """{workers: steps per second of each round}."""
    found = {}
    for row in report.get("workers", []):
        found.setdefault(row["workers"], []).append(row["steps per second"])
    return found


def _auc(report, optimizer, in_flight, wire="float32"):
    rows = [row for row in report.get("quality", []) if (row["optimizer"], row["in_flight"]) == (optimizer, in_flight)]
    return [row["AUC"] for row in rows if row.get("wire", "float32") == wire]


def _median(values):
    return float(np.median(values)) if values else None


def targets(report):
    """(what, target, measured or None, whether less is better)."""
    for model, wire, goal in (
        (FM, "float32", 10),
        (FM, "bfloat16", 5.3),
        (DEEP, "float32", 14.5),
        (DEEP, "bfloat16", 9.9),
    ):
        yield (
            f"{model}, wire {wire}: MB per step, the most over 1, 2 and 4 servers",
            goal,
            _megabytes(report, model, wire),
            True,
        )
    yield (
        "DeepFM 3x400: one worker and one server over one process",
        1.3,
        _median(_times(report, DEEP, "cluster")),
        True,
    )
    rates = _rates(report)
    scaled = [four / one for four, one in zip(rates.get(4, []), rates.get(1, []), strict=False)]
    yield "DeepFM 3x400, 200 Mbit/s each: four workers over one", 3.4, _median(scaled), False
    worker, server = (report.get("faults", {}).get(name, {}) for name in ("worker", "server"))
    for what, goal, found in (
        ("worker killed: seconds until the others' rate is back", 5, worker.get("killed")),
        ("worker started again: seconds until the whole rate is back", 15, worker.get("back")),
        ("server killed: seconds until the job has ended with one line", 15, server.get("detected")),
        ("job started again: seconds until its first step", 60, server.get("running again")),
    ):
        yield what, goal, found, True
    one = _auc(report, "LazyAdam", 1)
    for number in (2, 4):
        many = _auc(report, "LazyAdam", number)
        gap = abs(np.mean(many) - np.mean(one)) if many and one else None
        yield (
            f"LazyAdam(1e-3): AUC with {number} steps in flight from that with one, means of 3 seeds",
            0.002,
            gap,
            True,
        )


def lines(report):
    found = [
        "",
        "# Many machines",
        "",
        f"{report['machine']}; `python bench/cluster.py`, part by part. All processes on this machine.",
        "",
    ]
    found += [
        *target_table(targets(report)),
        "",
        "| model | servers | wire | MB per step | the formula |",
        "|---|---|---|---|---|",
    ]
    for row in report.get("bytes", []):
        found.append(
            f"| {row['model']} | {row['servers']} | {row['wire']} | {row['megabytes']:.2f} | {row['formula']:.2f} |"
        )
    found += ["", "B=4096, F=39, K=16, V=1,000,000, Zipf(1.05). Milliseconds per step, one worker and one server:", ""]
    found += ["| model | one process | cluster | the same, prefetched | over one process |", "|---|---|---|---|---|"]
    for model in (FM, DEEP):
        rows = [row for row in report.get("time", []) if row["model"] == model]
        if rows:
            local, plain, ahead = (float(np.median([row[k] for row in rows])) for k in ("local", "cluster", "prefetch"))
            ratio = f"{_median(_times(report, model, 'cluster')):.2f}, {_median(_times(report, model, 'prefetch')):.2f}"
            found.append(f"| {model} | {local:.1f} | {plain:.1f} | {ahead:.1f} | {ratio} |")
    found += ["", "Steps per second of all workers, one thread and 200 Mbit/s each, two servers, each round:", ""]
    found += ["| workers | DeepFM 3x400 |", "|---|---|"]
    found += [f"| {n} | {', '.join(f'{rate:.2f}' for rate in rates)} |" for n, rates in sorted(_rates(report).items())]
    if "faults" in report:
        rates = report["faults"]["worker"]["steps per second"]
        texts = ", ".join(f"{what} {rate:.2f}" for what, rate in rates.items())
        found += [
            "",
            f"Four such workers, one of them killed and started again after 15 seconds, steps per second: {texts}.",
        ]
    found += ["", "AUC of the day after, one pass over a made-up log, each seed:", ""]
    found += ["| optimizer | in flight | wire | AUC | mean |", "|---|---|---|---|---|"]
    for optimizer in ("LazyAdam", "recommended"):
        for number, wire in ((1, "float32"), (2, "float32"), (4, "float32"), (1, "bfloat16")):
            if each := _auc(report, optimizer, number, wire):
                texts = ", ".join(f"{auc:.4f}" for auc in each)
                found.append(f"| {optimizer} | {number} | {wire} | {texts} | {np.mean(each):.4f} |")
    return found
