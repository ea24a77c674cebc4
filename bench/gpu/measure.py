"""Measures the kernels on a GPU against PyTorch: `python bench/gpu/measure.py --json FILE`; run.sh builds them first.

Every side is checked against float64 before it is timed. Times are of CUDA events, in milliseconds; the sides take
turns, with another set of indices at every turn, and figures are medians and quartiles over the rounds. The file is
written after every part, so that what was measured stays if time runs out.

With --emulated the kernels run on the CPU through the tests' emulation, on small shapes: that shows that this program
runs, and no time of it means anything.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from deepfm_ops import kernels
from deepfm_ops.kernels import Update

HERE = pathlib.Path(__file__).resolve().parent
SETS = 4  # of indices
RATE, EPSILON = 0.01, 1e-7
UPDATES = {
    "SGD": ("sgd", (0.0, RATE)),
    "Adagrad": ("adagrad", (0.0, RATE, EPSILON)),
    "LazyAdam": ("lazy_adam", (0.0, RATE, 0.1, 0.001, EPSILON)),
}
SLOTS = {"SGD": 0, "Adagrad": 1, "LazyAdam": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: batch, fields, width of the embedding, rows of the table, dtype of the table."""

    batch: int = 65536
    fields: int = 39
    dim: int = 16
    rows: int = 10_000_000
    dtype: str = "float32"


class Machine:
    """Where it runs: a GPU, or the emulation."""

    def __init__(self, emulated):
        self.emulated, self.device = emulated, "cpu" if emulated else "cuda"
        self.rounds = 2 if emulated else 30
        if emulated:
            sys.path.insert(0, str(HERE.parents[1] / "tests" / "cuda"))
            import emulated_module

            self.module = emulated_module.load()
            for name in ("fm_forward", "fm_gradient", "sparse_update", "fm_update"):
                setattr(self, name, functools.partial(kernels.call_on_gpu, self.module, name))
        else:
            for name in ("fm_forward", "fm_gradient", "sparse_update", "fm_update"):
                setattr(self, name, getattr(kernels, name))

    def report(self, table):
        return kernels.Report(table, self.module if self.emulated else None)

    def case(self, case):
        return dataclasses.replace(case, batch=32, rows=500) if self.emulated else case

    def line(self):
        """The machine, in words."""
        about = f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
        if self.emulated:
            return f"no GPU: emulated on a CPU, {about}"
        driver = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        gpu = subprocess.run(driver, capture_output=True, text=True).stdout.splitlines()[0]
        return f"{gpu}, CUDA {torch.version.cuda}, {about}"

    def time(self, function, turn):
        """Milliseconds of a call."""
        if self.emulated:
            start = time.perf_counter()
            function(turn % SETS)
            return (time.perf_counter() - start) * 1e3
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function(turn % SETS)
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    def take_turns(self, sides):
        """{name: [median, quartiles]}; a side that fails is left out, with a line that says why."""
        times, turn = {}, 0
        for name, function in list(sides.items()):
            try:
                for n in range(SETS if self.emulated else 2 * SETS):
                    function(n % SETS)
                times[name] = []
            except Exception as error:
                print(f"{name} does not run here: {str(error).splitlines()[0] if str(error) else error!r}", flush=True)
        for _ in range(self.rounds):
            for name in times:
                times[name].append(self.time(sides[name], turn))
                turn += 1
        return {name: [float(x) for x in np.percentile(all_, [50, 25, 75])] for name, all_ in times.items()}


class Data:
    """Tensors of a case, on the device."""

    def __init__(self, machine, case):
        draw = torch.Generator(machine.device).manual_seed(1)
        on = {"device": machine.device, "generator": draw}
        self.case = case
        self.table = torch.randn(case.rows, case.dim, **on).mul_(0.1).to(getattr(torch, case.dtype))
        self.weights = torch.randn(case.rows, 1, **on).mul_(0.1).to(self.table.dtype)
        self.indices = [torch.randint(0, case.rows, (case.batch, case.fields), **on) for _ in range(SETS)]
        self.values = torch.rand(case.batch, case.fields, **on)


def torch_forward(table, indices, values):
    e = F.embedding(indices, table).float() * values[:, :, None]
    s = e.sum(1)
    return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)


def reader():
    """The kernel that only reads the rows, compiled; None: that failed."""
    folder = HERE.parents[1] / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    library, source = folder / "read_rows.so", HERE / "read_rows.cu"
    if torch.cuda.is_available():
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        major, minor = torch.cuda.get_device_capability()
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", "-shared"]
    else:
        command = ["c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-x", "c++"]
    subprocess.run([*command, source, "-o", library], check=True, timeout=120)
    function = ctypes.CDLL(str(library)).read_rows
    function.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 2]
    function.restype = None
    return function


def check(name, got, want, bound):
    error = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not error <= bound:
        raise AssertionError(f"{name} is off by {error:.2g} of the largest, more than {bound:g}")
    return error


def copying(machine):
    """Bytes per second of a copy, read and written."""
    a = torch.empty(1000 if machine.emulated else 2**28, device=machine.device)
    b = torch.empty_like(a)
    times = machine.take_turns({"copy": lambda n: b.copy_(a)})
    return {"times": times, "TB/s": 2 * a.nbytes / times["copy"][0] / 1e9}


def forward(machine, case):
    data, stream = Data(machine, case), 0 if machine.emulated else torch.cuda.current_stream().cuda_stream
    table, values, report = data.table, data.values, machine.report(data.table)
    wide = torch_forward(table.double(), data.indices[0][:4096], values[:4096].double())
    y = machine.fm_forward(table, data.indices[0], values)[0]
    error = check("forward", y[:4096], wide, 1e-5 if case.dtype == "float32" else 1e-2)
    again = machine.fm_forward(table, data.indices[0], values)[0]
    if not torch.equal(y, again):
        raise AssertionError("two calls gave different bits")
    del wide
    compiled = torch.compile(torch_forward)
    bag = functools.partial(F.embedding_bag, mode="sum", per_sample_weights=values.to(table.dtype))
    sides = {
        "ours": lambda n: machine.fm_forward(table, data.indices[n], values, report=report),
        "ours, embeddings too": lambda n: machine.fm_forward(
            table, data.indices[n], values, return_embeddings=True, report=report
        ),
        "ours, waiting": lambda n: machine.fm_forward(table, data.indices[n], values),
        "PyTorch eager": lambda n: torch_forward(table, data.indices[n], values),
        "torch.compile": lambda n: compiled(table, data.indices[n], values),
        "EmbeddingBag (the sums alone)": lambda n: bag(data.indices[n], table),
    }
    pieces = case.dim * table.element_size() // 16
    try:
        read, seen = reader(), torch.zeros(1, device=machine.device)
        count = case.batch * case.fields
        sides["reading the rows"] = lambda n: read(
            table.data_ptr(), data.indices[n].data_ptr(), count, pieces, seen.data_ptr(), stream
        )
    except Exception as error_:
        print(f"the kernel that only reads could not be built: {error_}", flush=True)
    times = machine.take_turns(sides)
    report.check()
    return {"case": dataclasses.asdict(case), "error": error, "times": times}


def slots_of(table, count):
    return tuple(torch.full_like(table, 0.1) for _ in range(count))


def gradient(machine, case):
    data = Data(machine, case)
    table, values = data.table, data.values
    ys, sums = zip(*(machine.fm_forward(table, i, values)[:2] for i in data.indices), strict=True)
    g = torch.ones_like(ys[0])
    unique, rows, _ = machine.fm_gradient(table, data.indices[0], values, sums[0], g)

    leaf = table.detach().requires_grad_()

    def backward(n):  # from the forward's own results, as autograd keeps them
        y = graphs[n]
        (d,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
        return d.coalesce()

    def graph(n):
        e = F.embedding(data.indices[n], leaf, sparse=True) * values[:, :, None]
        s = e.sum(1)
        return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)

    graphs = [graph(n) for n in range(SETS)]
    theirs = backward(0)
    if not torch.equal(theirs.indices()[0], unique):
        raise AssertionError("PyTorch's gradient has other rows")
    error = check("gradient", rows, theirs.values().double(), 1e-4)
    gradients = [machine.fm_gradient(table, data.indices[n], values, sums[n], g)[:2] for n in range(SETS)]
    coalesced = [backward(n) for n in range(SETS)]
    sides = {
        "gradient, ours": lambda n: machine.fm_gradient(table, data.indices[n], values, sums[n], g),
        "gradient, PyTorch and coalesce": backward,
    }
    times = machine.take_turns(sides)
    graphs.clear()
    for name, (rule, hyper) in UPDATES.items():
        mine = table.clone()
        slots = slots_of(mine, SLOTS[name])
        # The numbers as an array on the device, as they would be in a captured step; the rows differ per set.
        update = Update(rule, torch.tensor(hyper, device=machine.device), slots)
        reports = [machine.report(table) for _ in range(SETS)]
        fused_reports = [machine.report(table) for _ in range(SETS)]

        def apply(n, mine=mine, update=update, reports=reports):
            machine.sparse_update(mine, *gradients[n], update, report=reports[n])

        def fused(n, mine=mine, update=update, reports=fused_reports):
            machine.fm_update(mine, data.indices[n], values, sums[n], g, update, report=reports[n])

        def both(n, mine=mine, update=update, reports=reports):
            found = machine.fm_gradient(mine, data.indices[n], values, sums[n], g)[:2]
            machine.sparse_update(mine, *found, update, report=reports[n])

        parameter = torch.nn.Parameter(table.clone())
        made = {
            "SGD": lambda p: torch.optim.SGD([p], RATE),
            "Adagrad": lambda p: torch.optim.Adagrad([p], RATE),
            "LazyAdam": lambda p: torch.optim.SparseAdam([p], RATE),
        }
        optimizer = made[name](parameter)

        def step(n, parameter=parameter, optimizer=optimizer):
            parameter.grad = coalesced[n]
            optimizer.step()

        times |= machine.take_turns(
            {
                f"{name} of unique rows, ours": apply,
                f"{name} of unique rows, PyTorch": step,
                f"gradient and {name}, ours": both,
                f"gradient and {name} fused, ours": fused,
            }
        )
        for report in (*reports, *fused_reports):
            report.check()
        del mine, slots, update, parameter, optimizer
    return {"case": dataclasses.asdict(case), "error": error, "rows": len(unique), "times": times}


def deep_part(case, device):
    layers, width = [], case.fields * case.dim
    hidden = 400 if device == "cuda" else 8
    for _ in range(3):
        layers += [torch.nn.Linear(width, hidden), torch.nn.ReLU()]
        width = hidden
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1)).to(device)


def interaction_of(machine, table, weights, update, weights_update):
    """FM and embeddings of a table that the backward updates in place."""

    class Interaction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor, indices, values, report):
            y, sums, e, linear = machine.fm_forward(
                table, indices, values, weights=weights, return_embeddings=True, report=report
            )
            ctx.save_for_backward(indices, values, sums)
            ctx.report = report
            return y, e, linear

        @staticmethod
        def backward(ctx, dy, de, dl):
            indices, values, sums = ctx.saved_tensors
            more = {"d_embeddings": de.contiguous(), "weights": weights, "d_linear": dl.contiguous()}
            more |= {"weights_update": weights_update, "report": ctx.report}
            machine.fm_update(table, indices, values, sums, dy.contiguous(), update, **more)
            return None, None, None, None

    return Interaction.apply


def deepfm(machine, case):
    """A training step: forward, backward, LazyAdam on the tables, Adam on the MLP."""
    data, labels = Data(machine, case), None
    labels = (torch.rand(case.batch, 1, device=machine.device) < 0.3).float()
    rule, hyper = UPDATES["LazyAdam"]
    hyper = torch.tensor(hyper, device=machine.device)
    table, weights = data.table.clone(), data.weights.clone()
    interaction = interaction_of(
        machine,
        table,
        weights,
        Update(rule, hyper, tuple(map(torch.zeros_like, [table] * 2))),
        Update(rule, hyper, tuple(map(torch.zeros_like, [weights] * 2))),
    )
    deep, anchor = deep_part(case, machine.device), torch.zeros((), device=machine.device, requires_grad=True)
    dense = torch.optim.Adam(deep.parameters(), 1e-3, fused=not machine.emulated)
    reports = [machine.report(table) for _ in range(SETS)]
    losses = {}

    def ours(n):
        dense.zero_grad()
        y, e, linear = interaction(anchor, data.indices[n], data.values, reports[n])
        loss = F.binary_cross_entropy_with_logits(y + linear + deep(e.flatten(1)), labels)
        loss.backward()
        dense.step()
        losses["ours"] = loss.detach()

    def of_torch(wrap):
        tables = [torch.nn.Parameter(x.clone()) for x in (data.table, data.weights)]
        mlp = deep_part(case, machine.device)
        sparse = torch.optim.SparseAdam(tables, RATE)
        adam = torch.optim.Adam(mlp.parameters(), 1e-3, fused=not machine.emulated)

        @wrap
        def head(e, w, values):
            e = e * values[:, :, None]
            s = e.sum(1)
            y = 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)
            linear = (w[:, :, 0] * values).sum(1, keepdim=True)
            return F.binary_cross_entropy_with_logits(y + linear + mlp(e.flatten(1)), labels)

        def step(n):
            sparse.zero_grad()
            adam.zero_grad()
            e, w = (F.embedding(data.indices[n], x, sparse=True) for x in tables)
            loss = head(e, w, data.values)
            loss.backward()
            sparse.step()
            adam.step()
            losses["theirs"] = loss.detach()

        return step

    alone = deep_part(case, machine.device)
    of_alone = torch.optim.Adam(alone.parameters(), 1e-3, fused=not machine.emulated)

    def mlp_alone(n):
        of_alone.zero_grad()
        F.binary_cross_entropy_with_logits(alone(inputs), labels).backward()
        of_alone.step()

    inputs = torch.randn(case.batch, case.fields * case.dim, device=machine.device)
    times = machine.take_turns(
        {
            "ours": ours,
            "PyTorch eager": of_torch(lambda f: f),
            "PyTorch, MLP and FM compiled": of_torch(torch.compile),
            "the MLP alone": mlp_alone,
        }
    )
    for report in reports:
        report.check()
    result = {"case": dataclasses.asdict(case), "times": times}
    result["losses"] = {name: float(loss) for name, loss in losses.items()}
    return result


def fbgemm(machine, case):
    """FBGEMM's tables: rows of one feature each, then FM in PyTorch; its backward updates with row-wise Adagrad."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    data = Data(machine, case)
    on_host = machine.emulated
    place = EmbeddingLocation.HOST if on_host else EmbeddingLocation.DEVICE
    compute = training.ComputeDevice.CPU if on_host else training.ComputeDevice.CUDA
    tables = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(case.rows, case.dim, place, compute)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        pooling_mode=PoolingMode.NONE,
        output_dtype=training.SparseType.FP32,
    )
    offsets = torch.arange(case.batch * case.fields + 1, device=machine.device)
    values = data.values[:, :, None]

    def forward(n):
        e = tables(data.indices[n].flatten(), offsets).view(case.batch, case.fields, -1) * values
        s = e.sum(1)
        return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)

    mine, report = data.table, [machine.report(data.table) for _ in range(SETS)]
    update = Update("row_wise_adagrad", torch.tensor((0.0, RATE, 1e-8), device=machine.device), (mine[:, 0].clone(),))
    update.slots[0].fill_(0.1)

    def ours(n):
        y, sums, _, _ = machine.fm_forward(mine, data.indices[n], data.values, report=report[n])
        machine.fm_update(mine, data.indices[n], data.values, sums, torch.ones_like(y), update, report=report[n])

    sides = {
        "forward, FBGEMM": forward,
        "forward, backward and row-wise Adagrad, FBGEMM": lambda n: forward(n).sum().backward(),
        "forward, backward and row-wise Adagrad, ours": ours,
    }
    return {"case": dataclasses.asdict(case), "times": machine.take_turns(sides)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, default=HERE.parents[1] / "build" / "gpu" / "results.json")
    arguments = parser.parse_args()
    machine = Machine(arguments.emulated)
    results = {"machine": machine.line(), "emulated": arguments.emulated}
    parts = {"copy": functools.partial(copying, machine)}
    for dim in (16, 64):
        parts[f"forward K={dim}"] = functools.partial(forward, machine, machine.case(Case(dim=dim)))
        parts[f"gradient K={dim}"] = functools.partial(gradient, machine, machine.case(Case(dim=dim)))
    parts["DeepFM"] = functools.partial(deepfm, machine, machine.case(Case()))
    parts["forward K=16 bfloat16"] = functools.partial(forward, machine, machine.case(Case(dtype="bfloat16")))
    parts["FBGEMM"] = functools.partial(fbgemm, machine, machine.case(Case()))
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            results[name] = part()
        except Exception as error:
            results[name] = {"failed": (str(error) or repr(error)).splitlines()[0]}
        print(name, f"({time.perf_counter() - start:.1f} s)", json.dumps(results[name]), flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))
        if not arguments.emulated:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
