"""The part of bench/RESULTS.md about order 3 and field weights, from what bench/kernels.py measured."""

from common import Case, target_table

GOALS = {"order 3": 1.5, "field weights": 2}


def targets(rows):
    """(what, target, measured or None, whether less is better)."""
    for row in rows:
        for kind, goal in GOALS.items():
            yield f"{kind}, forward, {Case(**row['case'])}, over the plain one", goal, row["over plain"][kind], True


def lines(rows, where):
    """The lines of the report; `where`: machine and command of the run."""
    yield from ["", "## Order three and field weights", ""]
    yield from [f"Machine: {where['machine']}. Command: `{where['command']}`. Kernels on NumPy.", ""]
    yield from target_table(targets(rows))
    yield from ["", "| case | interaction | ms | over plain |", "|---|---|---|---|"]
    for row in rows:
        for kind, (median, low, high) in row["times"].items():
            over = row["over plain"][kind]
            yield f"| {Case(**row['case'])} | {kind} | {median:.2f} [{low:.2f}, {high:.2f}] | {over:.2f} |"
