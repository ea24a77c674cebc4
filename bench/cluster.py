"""Steps of ShardedDeepFM over servers and workers of this machine, in networks of their own: `make bench-cluster`.

Bytes are counted where they leave a process, beside the formula of docs/scaling.md; times are of this machine's
cores, which all processes share. Takes root, for `ip netns` and `tc`.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from common import machine

from deepfm_ops.data.synthetic import ClickLog

HERE = pathlib.Path(__file__).parent
B, F, K, V = 4096, 39, 16, 1_000_000
FM = {"num_features": V, "num_fields": F, "embedding_dim": K, "use_deep": False, "seed": 0}
DEEP = {**FM, "use_deep": True, "hidden_units": [400, 400, 400]}
PARTS = ("bytes", "time", "workers", "faults", "quality")
LIMIT = 3000  # seconds, of one job
UNUSED = itertools.count()


def command(*words):
    subprocess.run(list(map(str, words)), check=True)


@contextlib.contextmanager
def networks(number, megabits=None):
    """Names of so many networks on one bridge; megabits per second of each, both ways, or None."""
    bridge, *names = (f"deepfm{next(UNUSED)}" for _ in range(number + 1))  # a deleted one's links live on for a while
    try:
        command("ip", "link", "add", bridge, "type", "bridge")
        command("ip", "link", "set", bridge, "up")
        for index, name in enumerate(names):
            command("ip", "netns", "add", name)
            command("ip", "link", "add", f"{name}o", "type", "veth", "peer", "name", f"{name}i", "netns", name)
            command("ip", "link", "set", f"{name}o", "master", bridge, "up")
            inside = ["ip", "-n", name]
            command(*inside, "addr", "add", f"10.77.0.{index + 1}/24", "dev", f"{name}i")
            command(*inside, "link", "set", f"{name}i", "up")
            command(*inside, "link", "set", "lo", "up")
            if megabits and megabits[index]:
                rate = ["root", "tbf", "rate", f"{megabits[index]}mbit", "burst", "256k", "latency", "400ms"]
                command("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", f"{name}i", *rate)
                command("tc", "qdisc", "add", "dev", f"{name}o", *rate)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def run_alone(servers, workers, job):
    """What `cluster_job.py` found, of a job whose processes share a loopback of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.json"
        launch = [sys.executable, "-m", "deepfm_ops.cluster", "launch", "--ps", str(servers), "--workers", str(workers)]
        words = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *launch]
        words += [str(HERE / "cluster_job.py"), json.dumps(job), str(out)]
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, env=env)
        if not out.exists():
            sys.exit((done.stdout + done.stderr)[-3000:])
        return json.loads(out.read_text())


class Apart:
    """A job's processes, each in a network of its own; a worker's is as slow as is said."""

    def __init__(self, folder, names, tasks, job, threads=None):
        self.folder, self.out, self.job, self.threads = folder, folder / "out.json", job, threads
        self.names, self.processes = dict(zip(tasks, names, strict=True)), {}
        self.cluster = {"chief": [], "ps": [], "worker": []}
        for index, (role, _) in enumerate(tasks):
            self.cluster[role].append(f"10.77.0.{index + 1}:2222")
        for task in tasks:
            self.start(*task)

    def start(self, role, index):
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        env["TF_CONFIG"] = json.dumps({"cluster": self.cluster, "task": {"type": role, "index": index}})
        if self.threads:
            env |= {"TF_NUM_INTRAOP_THREADS": str(self.threads), "TF_NUM_INTEROP_THREADS": str(self.threads + 1)}
        words = ["ip", "netns", "exec", self.names[role, index], sys.executable, str(HERE / "cluster_job.py")]
        log = open(self.folder / f"{role}{index}.log", "a")
        words += [json.dumps(self.job), str(self.out)]
        self.processes[role, index] = subprocess.Popen(words, env=env, stdout=log, stderr=log)

    def kill(self, role, index):
        """Returns the time, monotonic seconds."""
        self.processes[role, index].kill()
        self.processes[role, index].wait()
        return time.monotonic()

    def wait(self):
        """What the chief found."""
        self.processes["chief", 0].wait(LIMIT)
        if not self.out.exists():
            sys.exit((self.folder / "chief0.log").read_text()[-3000:])
        return json.loads(self.out.read_text())

    def steps(self):
        """When the steps of a job with `log_steps` ended, monotonic seconds; of all its lives."""
        file = pathlib.Path(self.job["log_steps"])
        return np.array(file.read_text().split(), float) if file.exists() else np.zeros(0)

    def wait_for_steps(self, number):
        deadline = time.monotonic() + LIMIT
        while len(self.steps()) < number:
            if self.processes["chief", 0].poll() is not None or time.monotonic() > deadline:
                sys.exit((self.folder / "chief0.log").read_text()[-3000:])
            time.sleep(0.1)

    def end(self):
        for process in self.processes.values():
            process.terminate()
        time.sleep(0.5)
        for process in self.processes.values():
            process.kill()


@contextlib.contextmanager
def apart(servers, workers, job, megabits=None, threads=None):
    """The processes of a job, over networks."""
    tasks = [("chief", 0), *(("ps", i) for i in range(servers)), *(("worker", i) for i in range(workers))]
    slow = [megabits if role == "worker" else None for role, _ in tasks] if megabits else None
    with networks(len(tasks), slow) as names, tempfile.TemporaryDirectory() as folder:
        run = Apart(pathlib.Path(folder), names, tasks, job, threads)
        try:
            yield run
        finally:
            run.end()


def worker_killed(workers=4, window=3.0, enough=0.9):
    """Seconds until the rate is back after a worker was killed, and after it was started again.

    The rate is that of the next `window` seconds, and back when it is `enough` of what the workers that live had
    before.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": DEEP, "batch_size": B, "batches": 600, "turns": [{}], "log_steps": f"{folder}/steps"}
        with apart(2, workers, job, megabits=200, threads=1) as run:
            run.wait_for_steps(100)
            killed = run.kill("worker", workers - 1)
            time.sleep(15)
            started = time.monotonic()
            run.start("worker", workers - 1)
            run.wait()
            ends = run.steps()

    def mean(start, stop):
        return float(np.sum((ends > start) & (ends <= stop)) / (stop - start))

    before = mean(killed - 10, killed)
    rates = {"before": before, "without": mean(killed + 5, started), "after": mean(started + 10, started + 25)}

    def back(start, wanted):
        times = np.arange(start, ends[-1] - window, 0.1)
        return next((float(t - start) for t in times if mean(t, t + window) >= enough * wanted), None)

    least = before * (workers - 1) / workers
    return {"workers": workers, "killed": back(killed, least), "back": back(started, before), "steps per second": rates}


def server_killed():
    """Seconds from a server's death to the chief's end, and from a new start to the first step after the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": DEEP, "batch_size": B, "batches": 120, "turns": [{}], "log_steps": f"{folder}/steps"}
        job["checkpoint"] = f"{folder}/checkpoint"
        with apart(2, 2, job) as run:
            run.wait_for_steps(60)
            killed = run.kill("ps", 1)
            code = run.processes["chief", 0].wait(LIMIT)
            detected = time.monotonic()
            line = (run.folder / "chief0.log").read_text().splitlines()[-1]
            run.end()
            before, started = len(run.steps()), time.monotonic()
            for task in run.names:
                run.start(*task)
            run.wait_for_steps(before + 1)
            again = float(run.steps()[before])
    return {"detected": detected - killed, "running again": again - started, "code": code, "line": line}


def per_step(found, skip=4):
    """(median ms, MB sent by all processes) of a step."""
    seconds, bytes_ = np.array(found["seconds"]), np.array(found["bytes"])
    return float(np.median(np.diff(seconds)[skip:])) * 1e3, float(np.mean(np.diff(bytes_)[skip:])) / 1e6


def rate(found, skip=12):
    """Steps per second of all workers together, without the first ones."""
    seconds = found["seconds"][skip:]
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the times")
    parser.add_argument("--rows", type=int, default=400_000, help="of the log that quality is measured on")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "cluster.json")
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    report = known | {"machine": machine()}
    base = {"batch_size": B}
    if "bytes" in arguments.parts:
        report["bytes"] = []
        turns = [{"in_flight": 1}, {"in_flight": 1, "wire": "bfloat16"}]
        for name, model in (("FM", FM), ("DeepFM 3x400", DEEP)):
            for servers in (1, 2, 4):
                for found in run_alone(servers, 1, {**base, "model": model, "batches": 16, "turns": turns}):
                    _, megabytes = per_step(found)
                    row = {"model": name, "servers": servers, "wire": found["turn"].get("wire", "float32")}
                    report["bytes"].append(row | {"megabytes": megabytes, "formula": found["formula"] / 1e6})
                    print(report["bytes"][-1], flush=True)
        for servers in (2, 4, 8):
            (found,) = run_alone(servers, 2, {**base, "model": FM, "batches": 24, "turns": [{}]})
            row = {"model": "FM, sums", "servers": servers, "wire": "float32", "megabytes": per_step(found)[1]}
            report["bytes"].append(row | {"formula": found["formula"] / 1e6})
            print(report["bytes"][-1], flush=True)
    if "time" in arguments.parts:
        report["time"] = []
        for _ in range(arguments.rounds):
            for name, model in (("FM", FM), ("DeepFM 3x400", DEEP)):
                job = {**base, "model": model, "batches": 40, "local": True, "turns": [{}, {"prefetch": True}]}
                plain, ahead, local = (per_step(found)[0] for found in run_alone(1, 1, job))
                report["time"].append({"model": name, "cluster": plain, "prefetch": ahead, "local": local})
                print(report["time"][-1], flush=True)
    if "workers" in arguments.parts:
        report["workers"] = []
        for _ in range(arguments.rounds):
            for workers in (1, 2, 4):
                job = {**base, "model": DEEP, "batches": 16 + 14 * workers, "turns": [{}]}
                with apart(2, workers, job, megabits=200, threads=1) as run:
                    (found,) = run.wait()
                report["workers"].append({"workers": workers, "megabits": 200, "steps per second": rate(found)})
                print(report["workers"][-1], flush=True)
    if "faults" in arguments.parts:
        report["faults"] = {}
        for name, measure in (("worker", worker_killed), ("server", server_killed)):
            report["faults"][name] = measure()
            print(report["faults"][name], flush=True)
    if "quality" in arguments.parts:
        report["quality"] = []
        with tempfile.TemporaryDirectory() as log:
            ClickLog().write(log, range(4), arguments.rows // 4, 2, format="tsv")
            for optimizer in ("LazyAdam", "recommended"):
                turns = [{"optimizer": optimizer, "in_flight": number} for number in (1, 2, 4)]
                turns += [{"optimizer": optimizer, "in_flight": 1, "wire": "bfloat16"}]
                job = {"log": log, "seeds": [0, 1, 2], "turns": turns}
                report["quality"] += run_alone(2, 4, job)
                print(*report["quality"][-12:], sep="\n", flush=True)
                arguments.json.write_text(json.dumps(report, indent=1))
    arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
