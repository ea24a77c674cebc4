"""Writes RESULTS.md of what measure.py measured, beside targets and predictions; without a measurement, of these alone.

python bench/gpu/report.py [--json FILE] [--steps FILE] [--output FILE]
"""

import argparse
import json
import math
import pathlib

B, F, V = 65536, 39, 10_000_000
N = B * F
U = V * (1 - math.exp(-N / V))  # unique rows of uniform indices, expected
# TB/s of an H100 that the predictions take: of a copy, of rows of 64 and of 256 bytes at random places, of such rows in
# ascending order, and of CUB's radix sort by the bytes that its passes move. All of them are guesses but the first.
COPY, RANDOM, ASCENDING, SORT = 3.0, {16: 2.2, 64: 2.7}, 2.7, 1.95
LAUNCH, WAIT = 3.0, 25.0  # us of a launch in a chain, and of an answer to the host


def us(size, speed):
    return size / speed / 1e6


def predictions(dim):
    """{what: us} for float32, int64 indices, from the bytes that must move."""
    row = 4 * dim
    scalars = N * (8 + 4)  # indices and values
    reading = us(N * row, RANDOM[dim])
    forward = reading + us(scalars + B * (row + 4), COPY) + LAUNCH
    group = us(16 * N, COPY) + us(52 * N, SORT) + us(37e6, COPY) + 8 * LAUNCH
    reduce = us(U * row, ASCENDING) + us(U * row, COPY) + us(scalars + 4 * N, COPY) + 2 * LAUNCH
    adam = us(7 * U * row, ASCENDING) + LAUNCH
    return {
        "forward": forward,
        "reading the rows": reading + us(8 * N, COPY),
        "gradient": group + WAIT + reduce,
        "LazyAdam": adam,
        "SGD": us(3 * U * row, ASCENDING) + LAUNCH,
        "Adagrad": us(5 * U * row, ASCENDING) + LAUNCH,
        "gradient and LazyAdam": group + WAIT + reduce + group + adam,
        "gradient and LazyAdam fused": group + reduce + adam - us(U * row, COPY) - us(2 * U * row, ASCENDING),
    }


def median(results, part, side):
    """Milliseconds, or None: not measured."""
    return results.get(part, {}).get("times", {}).get(side, [None])[0]


def ratio(a, b):
    return None if a is None or b is None else a / b


def targets(results):
    """(what, target, predicted, measured, met or None)."""
    for dim in (16, 64):
        part, p = f"forward K={dim}", predictions(dim)
        ours = median(results, part, "ours")
        share = ratio(median(results, part, "reading the rows"), ours)
        yield (
            f"forward, share of the kernel that only reads the rows, K={dim}",
            ">= 80 %",
            f"{100 * p['reading the rows'] / p['forward']:.0f} %",
            share and f"{100 * share:.0f} %",
            share and share >= 0.8,
        )
        for side, least, guess in (("PyTorch eager", 4, "4 to 6x"), ("torch.compile", 1.2, "1.2 to 2x")):
            times = ratio(median(results, part, side), ours)
            yield (
                f"forward over {side}, K={dim}",
                f">= {least}x",
                guess,
                times and f"{times:.2f}x",
                times and times >= least,
            )
        part = f"gradient K={dim}"
        times = ratio(median(results, part, "gradient, PyTorch and coalesce"), median(results, part, "gradient, ours"))
        yield (
            f"gradient with unique rows over PyTorch's and coalesce, K={dim}",
            ">= 3x",
            "3x or more",
            times and f"{times:.2f}x",
            times and times >= 3,
        )
    for side in ("gradient and LazyAdam fused", "gradient and LazyAdam"):  # within 1.3 of 600 us
        both = median(results, "gradient K=16", f"{side}, ours")
        guess = f"{predictions(16)[side]:.0f} us"
        yield f"{side}, K=16", "<= 780 us", guess, both and f"{both * 1e3:.0f} us", both and both <= 0.78
    for part, bound in (("forward K=16", 1e-5), ("forward K=64", 1e-5), ("forward K=16 bfloat16", 1e-2)):
        error = results.get(part, {}).get("error")
        yield f"{part}, from float64", f"<= {bound:g}", "", error and f"{error:.1e}", error and error <= bound


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def lines(results, steps):
    measured = bool(results) and not results.get("emulated")
    yield "# On a GPU"
    yield ""
    if results.get("emulated"):
        yield "**A dry run: the kernels were emulated on a CPU, on small shapes. No time below means anything.**"
    elif measured:
        yield f"{results['machine']}."
        yield f"Medians of CUDA events; B={B}, F={F}, V=1e7, uniform int64 indices, float32 unless it says otherwise."
    else:
        yield "**No GPU has run this yet: every figure below is predicted.**"
        yield "`bash bench/gpu/run.sh` measures, and writes this file."
    yield ""
    if steps:
        yield from ["What `bench/gpu/run.sh` did:", "", *(f"- {line}" for line in steps), ""]
    yield "## Targets"
    yield ""
    rows = []
    for what, goal, guess, got, met in targets(results):
        rows.append([what, goal, guess, got or "not measured", {True: "met", False: "**missed**"}.get(met, "")])
        if results.get("emulated"):
            rows[-1][3:] = ["dry run", ""]
    yield from table(["what (H100)", "target", "predicted", "measured", ""], rows)
    yield "## Predictions"
    yield ""
    yield f"Microseconds on an H100, from the bytes that must move: {N:,} pairs, which use {U:,.0f} different rows."
    yield f"Taken: copies at {COPY} TB/s; random rows at {RANDOM[16]} (64 bytes) and {RANDOM[64]} TB/s (256 bytes);"
    yield f"ascending rows at {ASCENDING} TB/s; the sort's passes at {SORT} TB/s and 52 bytes a pair (24 bits);"
    yield f"{LAUNCH:.0f} us a launch in a chain of them and {WAIT:.0f} us for an answer to the host."
    yield "Only the first is more than a guess."
    yield ""
    rows = []
    for what in predictions(16):
        rows.append([what, *(f"{predictions(dim)[what]:.0f}" for dim in (16, 64))])
    yield from table(["step, predicted", "K=16", "K=64"], rows)
    for part, result in results.items():
        if not isinstance(result, dict):
            continue
        yield f"## {part}"
        yield ""
        if "failed" in result:
            yield from [f"Not measured: {result['failed']}", ""]
            continue
        rows = [[side, f"{m:.3f}", f"{low:.3f} to {high:.3f}"] for side, (m, low, high) in result["times"].items()]
        yield from table(["side", "ms, median", "quartiles"], rows)
        if "TB/s" in result:
            yield from [f"{result['TB/s']:.2f} TB/s, read and written.", ""]
        if "losses" in result:
            yield from [f"Losses at the end: {result['losses']}.", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--json", type=pathlib.Path, default=here.parents[1] / "build" / "gpu" / "results.json")
    parser.add_argument("--steps", type=pathlib.Path, default=here.parents[1] / "build" / "gpu" / "steps.txt")
    parser.add_argument("--output", type=pathlib.Path, default=here / "RESULTS.md")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    steps = arguments.steps.read_text().splitlines() if arguments.steps.exists() else []
    arguments.output.write_text("\n".join(lines(results, steps)))


if __name__ == "__main__":
    main()
