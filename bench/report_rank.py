"""The part of bench/RESULTS.md about ranking, from what bench/rank.py measured."""

from common import target_table

JOINED, LISTED = "score of the joined matrix", "rank, shortlist 1000"


def _over(case, slow, fast):
    return case["times"][slow][0] / case["times"][fast][0]


def targets(report):
    """(what, target, measured or None, whether less is better)."""
    fm, deep, recalls = report["FM"], report["DeepFM"], report["demo"]
    yield f"rank, FM, {fm['items']:,} items, over one pass over their rows", 1.5, _over(fm, "rank", "one pass"), True
    what = f"rank, DeepFM 3x400, {deep['items']:,} items: the joined matrix over"
    yield f"{what} all of them", 1.5, _over(deep, JOINED, "rank"), False
    yield f"{what} a shortlist of 1,000", 10, _over(deep, JOINED, LISTED), False
    for name, found in recalls.items():
        recall = found["recall"]["1000"]
        yield f"recall@100 of that shortlist, the demo's {name}, {found['items']:,} items", 0.95, recall, False


def lines(report):
    """The lines of the report."""
    yield from ["", "## Ranking", "", f"Machine: {report['machine']}. Command: `{report['command']}`.", ""]
    yield from target_table(targets(report))
    yield from ["", "| model | side | ms, of one call |", "|---|---|---|"]
    for name in ("FM", "DeepFM"):
        for side, (median, low, high) in report[name]["times"].items():
            yield f"| {name}, {report[name]['items']:,} items | {side} | {median:.2f} [{low:.2f}, {high:.2f}] |"
    fm = report["FM"]
    yield from ["", f"Encoding the FM's items takes {fm['encoding']:.1f} s, their rows {fm['bytes'] / 1e6:.0f} MB."]
    yield from ["", "| the demo's model | shortlist | recall@100 |", "|---|---|---|"]
    for name, found in report["demo"].items():
        for shortlist, recall in found["recall"].items():
            yield f"| {name}, {found['items']:,} items, {found['users']:,} users | {shortlist} | {recall:.4f} |"
