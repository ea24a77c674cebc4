"""Measures the way from files to batches: `python bench/data.py [--quick] [--parts NAME ...] [--json FILE]`.

A click log of Criteo's form (13 numbers, 26 columns of categories, as many values as there; TSV and Parquet) is made
once; --folder keeps it. Every measurement is a process of its own: CPU seconds are those of all its threads and
children, memory is its peak, above what it had when the clock started. Sides take turns; pages of the files are in
memory. scikit-learn runs in .venv-sklearn (`make bench-peers`). Parts:

tables      reading, vocabularies and ids, in rows per CPU second; slow sides on the smallest number of rows only
memory      peaks over the number of rows, where the vocabulary does not grow
fit         training from files beside the step alone, rows per second on the wall, all kinds in one process
vocabulary  milliseconds to open 10 million values, and of first and later requests, in fresh processes
libsvm      MB per CPU second of libsvm and libffm files
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from common import machine, statistics

HERE = pathlib.Path(__file__).parent
FORMATS = ("tsv", "parquet")
SKLEARN = HERE.parent / ".venv-sklearn" / "bin" / "python"
OURS, TABLE, SCIKIT = "deepfm_ops", "deepfm_ops, pyarrow's table", "scikit-learn OrdinalEncoder"
SIDES = {  # what runs, in turn; its results are those of one side
    OURS: ("data_ours.fit", "data_ours.stream", "data_ours.shuffled"),
    TABLE: ("data_ours.table",),
    "polars Enum": ("data_peers.polars",),
    "polars Enum, streaming": ("data_peers.polars_streaming",),
    "pyarrow index_in": ("data_peers.pyarrow",),
    "pandas get_indexer": ("data_peers.pandas",),
    SCIKIT: ("data_peers.sklearn",),
    "Keras StringLookup": ("data_peers.keras",),
    "FuxiCTR's method": ("data_peers.fuxictr",),
}
SLOW = (SCIKIT, "Keras StringLookup", "FuxiCTR's method")
MODELS = {"FM": "large", "DeepFM 256-128": "small", "DeepFM 3x400": "small"}
PARTS = ("tables", "memory", "fit", "vocabulary", "libsvm")


def run(what, python=sys.executable, **arguments):
    """{"stages": {name: {"cpu", "wall", "peak", "before"}}, "found"} of a process, or {"error"}."""
    command = [str(python), str(HERE / "data_worker.py"), *what.split("."), json.dumps(arguments, default=str)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # or first requests would compile modules
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE, env=environment
    )
    if not done.stdout:
        return {"error": f"the process ended, status {done.returncode}"}
    return json.loads(done.stdout)


def must(what, **arguments):
    """What a process found that has to succeed."""
    reply = run(what, **arguments)
    if "error" in reply:
        raise RuntimeError(f"{what}: {reply['error']}")
    return reply["found"]


class Data:
    """The files, and a dictionary of them."""

    def __init__(self, folder, rows):
        self.folder = folder / f"{rows}"
        self.rows, self.dictionary = rows, self.folder / "dictionary"
        self.paths = {form: self.folder / f"day-00-part-00.{form}" for form in FORMATS}
        if not all(path.exists() for path in self.paths.values()):
            print(f"writing {rows:,} rows", flush=True)
            must("data_ours.write", folder=self.folder, rows=rows)
        if not self.dictionary.exists():
            must("data_ours.fit", path=self.paths["tsv"], dictionary=self.dictionary)

    def warm(self, form):
        """Brings the pages of a file into memory."""
        with open(self.paths[form], "rb") as file:
            while file.read(1 << 24):
                pass


def measure_tables(data, form, names, rounds):
    """{side: {"stages": {stage: {"cpu": [...], "wall", "above"}}, "rows"} or {"error"}}."""
    found = {name: {"stages": {}} for name in names}
    data.warm(form)
    for _ in range(rounds):
        for name in names:
            for what in SIDES[name]:
                if "error" in found[name]:
                    continue
                options = {"path": data.paths[form]}
                if what == "data_ours.fit":
                    options["dictionary"] = data.folder / f"dictionary-{form}"
                elif what.startswith("data_ours.s"):
                    options["dictionary"] = data.dictionary
                reply = run(what, SKLEARN if name == SCIKIT else sys.executable, **options)
                if "error" in reply:
                    found[name] = {"error": reply["error"]}
                    continue
                if reply["found"]["rows"] != data.rows:
                    found[name] = {"error": f"it saw {reply['found']['rows']} rows"}
                    continue
                add(found[name]["stages"], reply["stages"])
    for name, result in found.items():
        cells = [
            f"{stage} {data.rows / np.median(runs['cpu']):,.0f}" for stage, runs in result.get("stages", {}).items()
        ]
        print(f"  {name:30s} {result.get('error') or ', '.join(cells)}", flush=True)
    return found


def add(stages, more):
    """Appends the figures of a process's stages."""
    start = next(iter(more.values()))["before"]
    for stage, figures in more.items():
        kept = stages.setdefault(stage, {"cpu": [], "wall": [], "above": []})
        kept["cpu"].append(figures["cpu"])
        kept["wall"].append(figures["wall"])
        kept["above"].append(figures["peak"] - start)


def measure_memory(all_data, rounds):
    """MB above the start, of streams and of fits whose vocabulary does not grow, for each number of rows."""
    found, dictionary = [], all_data[0].dictionary
    for form in FORMATS:
        for what in ("stream", "shuffled", "fit_small"):
            rows = {}
            for data in all_data:
                data.warm(form)
                options = {"path": data.paths[form]} | ({} if what == "fit_small" else {"dictionary": dictionary})
                replies = [run(f"data_ours.{what}", **options) for _ in range(rounds)]
                stages = [next(iter(reply["stages"].values())) for reply in replies]
                rows[data.rows] = statistics([stage["peak"] - stage["before"] for stage in stages])
            found.append({"what": what, "format": form, "MB": rows})
            print(f"  {what}, {form}: {', '.join(f'{n:,}: {mb[0]:.0f} MB' for n, mb in rows.items())}", flush=True)
    return found


def measure_fit(sizes, rounds):
    found = {}
    for model, size in MODELS.items():
        data = sizes[size]
        for form in FORMATS:
            data.warm(form)
        # All with the larger vocabulary.
        options = {"paths": data.paths, "dictionary": sizes["large"].dictionary, "rounds": rounds}
        found[model] = must("data_fit.measure", model=model, **options)
        print(f"  {model}, {data.rows:,} rows")
        for kind, rates in found[model]["rates"].items():
            print(f"    {kind:28s} {np.median(rates):10,.0f} rows/s", flush=True)
    return found


def measure_vocabulary(folder, sizes, starts):
    """Per number of values: what was made, and the milliseconds of each start."""
    found = {}
    for values in sizes:
        here = folder / f"vocabulary-{values}"
        here.mkdir(exist_ok=True)
        made = must("data_ours.write_vocabulary", folder=here, values=values)
        found[values] = {"made": made}
        for what in ("dictionary", "scorer"):
            starts_ = [must(f"data_ours.open_{what}", folder=here, values=values) for _ in range(starts + 1)][1:]
            found[values][what] = starts_  # the one before brought the pages
            cells = [f"{key} {np.median([each[key] for each in starts_]):.2f}" for key in starts_[0]]
            print(f"  {values:,} values, {what}: {', '.join(cells)} ms", flush=True)
    return found


def measure_libsvm(data, rounds):
    """{side: MB per CPU second of each round}."""
    folder = data.folder / "libsvm"
    if not (folder / "clicks.ffm").exists():
        must("data_ours.write_libsvm", path=data.paths["tsv"], dictionary=data.dictionary, folder=folder)
    sides = {"libsvm": ("data_ours.libsvm", "svm"), "libffm": ("data_ours.libsvm", "ffm")}
    if SKLEARN.exists():
        sides["libsvm, scikit-learn"] = ("data_peers.libsvm", "svm")
    found = {}
    for _ in range(rounds):
        for name, (what, suffix) in sides.items():
            python = SKLEARN if "peers" in what else sys.executable
            reply = run(what, python, path=folder / f"clicks.{suffix}")
            if "error" in reply:
                raise RuntimeError(f"{name}: {reply['error']}")
            megabytes, stages = reply["found"]["bytes"] / 1e6, reply["stages"]
            kept = found.setdefault(name, {"MB": megabytes, "MB/s": [], "with matrices": [], "above": []})
            kept["MB/s"].append(megabytes / stages["read"]["cpu"])
            kept["above"].append(stages["read"]["peak"] - stages["read"]["before"])
            if "matrices" in stages:
                kept["with matrices"].append(megabytes / (stages["read"]["cpu"] + stages["matrices"]["cpu"]))
    for name, kept in found.items():
        print(f"  {name:24s} {np.median(kept['MB/s']):8.1f} MB per CPU second", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[3e5, 1e6, 5e6], help="the first: of slow sides too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=9, help="fresh processes, for the large vocabulary")
    parser.add_argument("--values", type=float, nargs="+", default=[26e3, 1e7], help="of the large vocabulary")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=pathlib.Path, help="keep the files here, and use those that are here")
    parser.add_argument("--append", action="store_true", help="keep the other parts of the JSON file")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "data.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.starts, arguments.values = [2e4, 5e4], 1, 1, [26e3, 26e4]
    names = [name for name in arguments.sides if name != SCIKIT or SKLEARN.exists()]
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv)}
    if arguments.append and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        report = before | report | {"command": f"{before['command']}; {report['command']}"}
    print(report["machine"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or pathlib.Path(scratch)).absolute()
        folder.mkdir(exist_ok=True)
        all_data = [Data(folder, rows) for rows in sorted(map(int, arguments.rows))]
        sizes = {"small": all_data[0], "large": all_data[min(1, len(all_data) - 1)]}
        for part in arguments.parts:
            print(part)
            if part == "tables":
                report["tables"] = []
                for data in all_data:
                    for form in FORMATS:
                        print(f" {data.rows:,} rows, {form}")
                        here = [name for name in names if data is all_data[0] or name not in SLOW]
                        found = measure_tables(data, form, here, arguments.rounds)
                        report["tables"].append({"rows": data.rows, "format": form, "sides": found})
            elif part == "memory":
                report["memory"] = measure_memory(all_data[1:] or all_data, arguments.rounds)
            elif part == "fit":
                report["fit"] = measure_fit(sizes, 2 * arguments.rounds - 1)
            elif part == "vocabulary":
                values = [int(each) for each in arguments.values]
                report["vocabulary"] = measure_vocabulary(folder, values, arguments.starts)
            else:
                report["libsvm"] = measure_libsvm(all_data[0], arguments.rounds)
            arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
