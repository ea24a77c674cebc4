"""What the bench's programs share: cases, their data, statistics, the machine line."""

import dataclasses
import os
import pathlib
import platform

import numpy as np

SETS = 3  # index sets that take turns, so that no call finds its rows in cache because of the one before


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: batch, fields, width of the embedding, rows of the table, distribution of indices, table dtype."""

    batch: int = 4096
    fields: int = 39
    dim: int = 16
    rows: int = 1_000_000
    distribution: str = "uniform"
    dtype: str = "float32"

    def __str__(self):
        return (
            f"B={self.batch} F={self.fields} K={self.dim} V={self.rows:.0e} {self.distribution} {self.dtype}".replace(
                "e+0", "e"
            )
        )

    @property
    def useful_bytes(self):
        """Bytes of the rows that a forward needs."""
        return self.batch * self.fields * self.dim * {"float32": 4, "bfloat16": 2}[self.dtype]


def make_indices(case, rng):
    """int64 [B, F]: uniform, or Zipf with exponent 1.05 over the rows."""
    shape = (case.batch, case.fields)
    if case.distribution == "uniform":
        return rng.integers(0, case.rows, shape)
    weights = np.cumsum(np.arange(1, case.rows + 1, dtype=np.float64) ** -1.05)
    ranks = np.searchsorted(weights, rng.random(shape) * weights[-1])
    return rng.permutation(case.rows)[ranks]  # popular rows lie anywhere in the table


def aligned(array):
    """A copy that starts at a line of the cache, as TensorFlow's tensors do and NumPy's arrays do not."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def make_data(case, seed=0):
    """(table [V, K] float32, indices [SETS, B, F], values [B, F] float32)."""
    rng = np.random.default_rng(seed)
    table = aligned(rng.standard_normal((case.rows, case.dim), np.float32))
    indices = np.stack([make_indices(case, rng) for _ in range(SETS)])
    return table, indices, rng.random((case.batch, case.fields), np.float32)


def expected(table, indices, values):
    """(forward [B, 1], unique rows, their gradient for a gradient of ones), in float64."""
    e = table[indices].astype(np.float64) * values[..., None]
    s = e.sum(axis=1)
    y = 0.5 * (s**2 - (e**2).sum(axis=1)).sum(axis=1, keepdims=True)
    d = (values[..., None] * (s[:, None] - e)).reshape(-1, table.shape[1])
    return y, *add_up(indices.ravel(), d)


def add_up(indices, rows):
    """Adds rows of equal index: (unique indices, sums)."""
    order = np.argsort(indices, kind="stable")
    unique, starts = np.unique(indices[order], return_index=True)
    return unique, np.add.reduceat(rows[order].astype(np.float64), starts, axis=0) if len(order) else rows


def statistics(times):
    """Median and quartiles."""
    return [float(x) for x in np.percentile(times, [50, 25, 75])]


def machine():
    """One line about where this runs."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = [line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def target_table(targets):
    """Lines of a table of (what, goal, measured or None, whether less is better)."""
    yield "| what | target | measured | |"
    yield "|---|---|---|---|"
    for what, goal, got, less in targets:
        met = "" if got is None else "met" if (got <= goal if less else got >= goal) else "**missed**"
        measured = "not measured" if got is None else f"{got:.3g}"
        yield f"| {what} | {'<=' if less else '>='} {goal:g} | {measured} | {met} |"
