"""The part of bench/RESULTS.md about files, vocabularies and streams, from what bench/data.py measured."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from common import statistics, target_table
from data import FORMATS, OURS, SLOW

POLARS, SKLEARN = "polars Enum", "libsvm, scikit-learn"
STAGES = ("read", "fit", "transform", "vocabulary", "ids", "ids, shuffled")
STEPS = ("train_on_batch, tensors", "train_on_batch, arrays")
NAMES = {"tsv": "TSV", "parquet": "Parquet"}


def _seconds(result, *stages):
    """CPU seconds of each round, of stages together; None where one is missing."""
    runs = [result.get("stages", {}).get(stage, {}).get("cpu") for stage in stages]
    return None if None in runs else np.sum(runs, axis=0)


def _of(result, what):
    """CPU seconds from the file to a vocabulary or to ids, by those who read by themselves and those who do not."""
    found = _seconds(result, what)
    return _seconds(result, "read", {"vocabulary": "fit", "ids": "transform"}[what]) if found is None else found


def _cases(report):
    return {(case["rows"], case["format"]): case["sides"] for case in report.get("tables", [])}


def _over(sides, what, side=POLARS):
    """Their CPU seconds over ours."""
    ours, theirs = _of(sides.get(OURS, {}), what), _of(sides.get(side, {}), what)
    return None if ours is None or theirs is None else float(np.median(theirs) / np.median(ours))


def _median(values, *keys):
    return float(np.median([each[keys[-1]] for each in values])) if values else None


def targets(report):
    """(what, target, measured or None, whether less is better)."""
    cases = _cases(report)
    fewest = min((rows for rows, _ in cases), default=0)
    for (rows, form), sides in cases.items():
        if rows == fewest < max(rows for rows, _ in cases):
            continue  # there for the slow sides
        goal = {"tsv": 1.1, "parquet": 1.5}[form]
        size = f"{NAMES[form]}, {rows:,} rows"
        yield f"{size}: file to ids and values, over polars's read and Enum", goal, _over(sides, "ids"), False
        yield f"{size}: vocabulary from the file, over polars's read and unique", 1, _over(sides, "vocabulary"), False
    for row in report.get("memory", []):
        sizes = sorted(row["MB"], key=int)
        ratio = row["MB"][sizes[-1]][0] / row["MB"][sizes[0]][0]
        what = f"{_memory_name(row)}: memory, {int(sizes[-1]):,} rows over {int(sizes[0]):,}"
        yield what, 1.1, ratio if len(sizes) > 1 else None, True
    for model, found in report.get("fit", {}).items():
        goals = {"fit, Parquet": 0.8, "fit, TSV": 0.65} if model == "FM" else {"fit, TSV": 0.95}
        for kind, goal in goals.items():
            yield f"{model}: {kind}, over train_on_batch on ready tensors", goal, _share(found, kind), False
    values = sorted(report.get("vocabulary", {}), key=int)[-1:]
    for size in values:
        for kind in ("dictionary", "scorer"):
            starts = report["vocabulary"][size][kind]
            if kind == "dictionary":
                yield f"{int(size):,} values, dictionary: open, ms", 50, _median(starts, "open"), True
            ratio = float(np.median([each["first"] / each["later"] for each in starts]))
            yield f"{int(size):,} values, {kind}: first request over a later one", 2, ratio, True
    found = report.get("libsvm", {})
    for name in ("libsvm", "libffm"):
        both = name in found and SKLEARN in found
        ratio = float(np.median(found[name]["MB/s"]) / np.median(found[SKLEARN]["MB/s"])) if both else None
        yield f"{name}: MB per CPU second, over scikit-learn's of libsvm", 8, ratio, False


def _share(found, kind, of=STEPS[0]):
    """Median over the rounds of the share that a kind reaches of another's rows per second."""
    return float(np.median(np.divide(found["rates"][kind], found["rates"][of])))


def _losing(report):
    """Who was faster, or needed less memory."""
    found = {}
    for (rows, form), sides in _cases(report).items():
        mine = _above(sides.get(OURS, {}))
        for side, result in sides.items():
            if side.startswith(OURS):
                continue
            theirs = _above(result)
            ratios = {f"file to {what}, CPU time": _over(sides, what, side) for what in ("vocabulary", "ids")}
            ratios["memory"] = theirs / mine if mine and theirs else None
            for what, ratio in ratios.items():
                if ratio and ratio < 1:
                    found.setdefault((side, form, what), []).append(f"{ratio:.2f} of ours at {rows:,} rows")
    for (side, form, what), cases in sorted(found.items()):
        yield f"- {side}, {NAMES[form]}, {what}: {', '.join(cases)}"


def _above(result):
    """Peak of all stages, MB above the start."""
    return max((float(np.median(stage["above"])) for stage in result.get("stages", {}).values()), default=None)


def _case_table(rows, sides):
    yield "| side | " + " | ".join((*STAGES, "file to vocabulary", "file to ids", "MB")) + " |"
    yield "|" + "---|" * (len(STAGES) + 4)
    for side, result in sides.items():
        if "error" in result:
            yield f"| {side} | failed: {result['error'].splitlines()[0]} |" + " |" * (len(STAGES) + 2)
            continue
        found = [_seconds(result, stage) for stage in STAGES]
        cells = ["" if seconds is None else f"{rows / np.median(seconds) / 1e3:,.0f}" for seconds in found]
        for what in ("vocabulary", "ids"):
            median, low, high = statistics(rows / _of(result, what) / 1e3)
            over = "" if side == OURS or OURS not in sides else f", {_over(sides, what, side):.2f} x"
            cells.append(f"{median:,.0f} [{low:,.0f}, {high:,.0f}]{over}")
        yield f"| {side} | {' | '.join(cells)} | {_above(result):,.0f} |"


def _memory_name(row):
    names = {"stream": "stream", "shuffled": "shuffled stream", "fit_small": "fit, columns of few values"}
    return f"{NAMES[row['format']]}, {names[row['what']]}"


def _memory_table(memory):
    sizes = sorted(memory[0]["MB"], key=int)
    yield "| what | " + " | ".join(f"{int(size):,} rows, MB" for size in sizes) + " |"
    yield "|" + "---|" * (1 + len(sizes))
    for row in memory:
        cells = [f"{row['MB'][size][0]:,.0f} [{row['MB'][size][1]:,.0f}, {row['MB'][size][2]:,.0f}]" for size in sizes]
        yield f"| {_memory_name(row)} | {' | '.join(cells)} |"


def _fit_table(fit):
    yield "| model | kind | rows/s | over train_on_batch, tensors | over that on arrays | rows per CPU second |"
    yield "|---|---|---|---|---|---|"
    for model, found in fit.items():
        for kind, rates in found["rates"].items():
            median, low, high = statistics(rates)
            shares = [f"{_share(found, kind, of):.2f}" for of in STEPS]
            shares.append(f"{np.median(found['CPU rates'][kind]):,.0f}")
            yield f"| {model} | {kind} | {median:,.0f} [{low:,.0f}, {high:,.0f}] | {' | '.join(shares)} |"


def _vocabulary_table(vocabulary):
    keys = ("open", "first", "second", "later", "worst")
    yield f"| values | file | MB | {' | '.join(f'{key}, ms' for key in keys)} |"
    yield "|" + "---|" * (3 + len(keys))
    for size, found in vocabulary.items():
        for kind, megabytes in zip(("dictionary", "scorer"), found["made"]["MB"], strict=True):
            cells = []
            for key in keys:
                median, low, high = statistics([each[key] for each in found[kind]])
                cells.append(f"{median:.2f} [{low:.2f}, {high:.2f}]")
            yield f"| {int(size):,} | {kind} | {megabytes:,.0f} | {' | '.join(cells)} |"


def _libsvm_table(found):
    yield "| side | file, MB | MB per CPU second | matrices too | MB of memory |"
    yield "|---|---|---|---|---|"
    for side, kept in found.items():
        median, low, high = statistics(kept["MB/s"])
        matrices = f"{np.median(kept['with matrices']):.0f}" if kept["with matrices"] else ""
        speed = f"{median:.0f} [{low:.0f}, {high:.0f}]"
        yield f"| {side} | {kept['MB']:.0f} | {speed} | {matrices} | {np.median(kept['above']):,.0f} |"


def draw(report, path):
    """Rows per CPU second where all sides ran, and memory over rows."""
    cases = _cases(report)
    fewest = min(rows for rows, _ in cases)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    sides = list(cases[fewest, FORMATS[0]])
    for axis, form in zip(axes, FORMATS, strict=False):
        for number, (what, label) in enumerate((("vocabulary", "file to vocabulary"), ("ids", "file to ids"))):
            found = [_of(cases[fewest, form][side], what) for side in sides]
            speeds = [0 if seconds is None else fewest / np.median(seconds) / 1e3 for seconds in found]
            axis.barh(np.arange(len(sides)) + (number - 0.5) * 0.4, speeds, 0.4, label=label)
        axis.set_yticks(range(len(sides)), sides if axis is axes[0] else [""] * len(sides))
        axis.invert_yaxis()
        axis.set(xlabel="thousand rows per CPU second", title=f"{NAMES[form]}, {fewest:,} rows")
    axes[0].legend(fontsize=8)
    for number, side in enumerate(sides):
        points = [(rows, _above(cases[rows, "tsv"].get(side, {}))) for rows, form in cases if form == "tsv"]
        points = [point for point in points if point[1]]
        if points:
            color = plt.get_cmap("tab10")(number)
            axes[2].plot(*zip(*points, strict=True), marker="o", color=color, label=side)
    axes[2].set(xscale="log", yscale="log", xlabel="rows", ylabel="peak memory, MB", title="TSV, vocabulary included")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def lines(report, folder):
    """The lines of the section; draws its picture."""
    cases = _cases(report)
    found = [
        "",
        "## Files to batches",
        "",
        f"Machine: {report['machine']}. Command: `{report['command']}`.",
        "A click log of Criteo's form: 13 numbers and 26 columns of categories with as many values as there. Every",
        "measurement is a process of its own; speeds are thousands of rows per CPU second, of all its threads; memory",
        "is the peak above the start, pages of mapped files included. Ours reads 39 columns and gives labels and the",
        "stacked matrices: ids of one numbering, in the order of counts, and numbers after log1p. The others read the",
        "same columns and give one array of ids for each of the 26, and no numbers. FuxiCTR is not installed: its",
        "method was written anew, without its second process. x: their CPU time over ours, from the file on.",
        f"{', '.join(SLOW)} ran on the smallest file only.",
        "",
        *target_table(targets(report)),
        "",
        "### Who needs less than we do, from the file on",
        "",
        *(list(_losing(report)) or ["- nobody"]),
    ]
    if cases:
        draw(report, folder / "data.png")
        found += ["", "![speeds and memory](results/data.png)"]
    for (rows, form), sides in cases.items():
        found += ["", f"### {NAMES[form]}, {rows:,} rows", "", *_case_table(rows, sides)]
    if "memory" in report:
        text = (
            "Streams with one and the same dictionary; fits of the columns of fewer than 20,000 values and of numbers."
        )
        found += ["", "### Memory over rows, the vocabulary aside", "", text, "", *_memory_table(report["memory"])]
    if "fit" in report:
        found += [
            "",
            "### Training from files",
            "",
            "Rows per second on the wall, both cores, B=4096, K=16; kinds take turns in one process. FM: with",
            "RowWiseAdagrad; DeepFM: with LazyAdam. Ready batches lie in memory, as tensors or as arrays; the dataset",
            "alone trains nothing.",
            *(f"{model}: {each['rows']:,} rows, V={each['features']:,}." for model, each in report["fit"].items()),
            "",
            *_fit_table(report["fit"]),
        ]
    if "vocabulary" in report:
        found += [
            "",
            "### A large vocabulary",
            "",
            "Fresh processes, the files in the page cache. A request is a record of 26 categories, another one each",
            "time; later is the median of 200, worst the slowest of them. The scorer is that of an FM, K=4.",
            "",
            *_vocabulary_table(report["vocabulary"]),
        ]
    if "libsvm" in report:
        text = "scikit-learn has a sparse matrix in the end, and cannot read libffm; ours has flat arrays."
        found += ["", "### libsvm and libffm", "", text, "", *_libsvm_table(report["libsvm"])]
    return found
