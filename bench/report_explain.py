"""The part of bench/RESULTS.md about `explain`, from what bench/explain.py measured."""

from common import target_table


def targets(report):
    """(what, target, measured or None, whether less is better)."""
    for name, found in report["sides"].items():
        yield f"explain of one sample, {name}: microseconds", 100, found["microseconds"]["explain"][0], True


def lines(report):
    """The lines of the report."""
    yield from ["", "## Explaining", "", f"Machine: {report['machine']}. Command: `{report['command']}`.", ""]
    yield from ["F=39, K=16, V=1,000,000, by the scorer; a summary takes a batch of 1,024.", ""]
    yield from target_table(targets(report))
    yield from ["", "| model | score, us | explain, us | summary, samples/s | without pairs of features |"]
    yield "|---|---|---|---|---|"
    for name, found in report["sides"].items():
        cells = [f"{x:.1f} [{low:.1f}, {high:.1f}]" for x, low, high in found["microseconds"].values()]
        cells += [f"{rate:,.0f}" for rate in found["samples per second"].values()]
        yield f"| {name} | " + " | ".join(cells) + " |"
