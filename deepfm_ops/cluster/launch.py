"""All processes of a cluster on this machine: `python -m deepfm_ops.cluster launch`. Imports no TensorFlow."""

import argparse
import collections
import contextlib
import ctypes
import json
import os
import pathlib
import re
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time

from deepfm_ops.cluster.config import FOLLOWED, name

DEATHS = 10  # of one worker, after which the job ends
LAST = 20.0  # seconds that the chief has to end once a server has
POLITE, TERM, KILL = 5.0, 4.0, 4.0  # seconds to end by themselves, on SIGTERM, on SIGKILL
COLORS = (36, 33, 35, 32, 34, 31)  # ANSI
NOISE = re.compile(
    "All log messages before absl::InitializeLog|oneDNN custom operations are on"
)  # in each process, twice
PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None)


def free_ports(count):
    """Ports that nothing listens at, below those that the system takes for outgoing connections, lest it takes one."""
    file = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(file.read_text().split()[0]) if file.exists() else 0
    top, ports = first if first > 20_000 else 32_768, []
    while len(ports) < count:
        port = 10_000 + secrets.randbelow(top - 10_000)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


class _Output:
    """Writes the lines of many processes, each with the name of its process in front, colored on a terminal."""

    def __init__(self):
        self._selector = selectors.DefaultSelector()
        self._colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._names = []

    def say(self, who, text):
        if who not in self._names:
            self._names.append(who)
        color = COLORS[self._names.index(who) % len(COLORS)]
        front = f"\x1b[{color}m{who} |\x1b[0m " if self._colored else f"{who} | "
        try:
            print(front + text, flush=True)
        except OSError:  # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def add(self, who, pipe):
        os.set_blocking(pipe.fileno(), False)
        self._selector.register(pipe, selectors.EVENT_READ, (who, bytearray()))

    def forward(self, seconds):
        """Writes what has come, or comes within so many seconds; whether anything has."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            who, begun = key.data
            block = os.read(key.fd, 65536)
            begun += block
            *lines, rest = begun.split(b"\n")
            begun[:] = rest
            if not block:
                lines += [rest] if rest else []
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
            for line in lines:
                last = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # of a bar, its last state
                if not NOISE.search(last):
                    self.say(who, last)
        return bool(ready)


class _Process:
    """A process of the job, in a group of its own with what it starts; it does not outlive this one."""

    def __init__(self, task, command, environment, output):
        self.name = name(*task)
        self.code = None
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with(os.getpid()),
        )
        output.add(self.name, self._popen.stdout)

    def ended(self):
        """Whether it has; what it has started ends then too. Its exit code is in `code`."""
        if self.code is None and os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.signal(signal.SIGKILL)  # the group has its number until wait
            code = self._popen.wait()
            self.code = code if code >= 0 else 128 - code
        return self.code is not None

    def signal(self, number):
        if self.code is None:
            os.killpg(self._popen.pid, number)


def _end_with(parent):
    """What a child does before it runs: the system kills it when `parent`, which has no other threads, ends."""

    def in_child():
        _LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


def launch(command, ps, workers, restarts=0, threads=None):
    """Runs one chief, servers and workers of a script on this machine until the chief ends.

    Args:
        command: the script and its arguments.
        ps: how many parameter servers.
        workers: how many workers.
        restarts: how often a job that failed is started again.
        threads: of TensorFlow in each server and worker; None: as many as there are cores.

    Returns:
        The chief's exit code; 128 and the signal's number where a signal ended it or this.

    """
    output, signals = _Output(), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: signals.append(number))
    for run in range(restarts + 1):
        code = _run(command, ps, workers, threads, output, signals)
        if signals:
            return 128 + signals[0]
        if code == 0:
            break
        if run < restarts:
            output.say("launch", f"the job ended with code {code} and starts again, {run + 1} of {restarts}")
    return code


def _run(command, ps, workers, threads, output, signals):
    """One life of the job; the chief's exit code."""
    tasks = [*(("ps", i) for i in range(ps)), *(("worker", i) for i in range(workers)), ("chief", 0)]
    cluster = {"chief": [], "ps": [], "worker": []}
    for (role, _), port in zip(tasks, free_ports(len(tasks)), strict=True):
        cluster[role].append(f"127.0.0.1:{port}")

    def start(task):
        role, index = task
        config = {"cluster": cluster, "task": {"type": role, "index": index}}
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "TF_CONFIG": json.dumps(config),
        }
        if threads is not None and role != "chief":
            environment["TF_NUM_INTRAOP_THREADS"] = str(threads)
            environment["TF_NUM_INTEROP_THREADS"] = str(max(4, threads))  # some of them wait
        processes[task] = _Process(task, [sys.executable, *command], environment, output)

    processes, deaths, deadline = {}, collections.Counter(), None
    try:
        for task in tasks:
            start(task)
        chief = processes["chief", 0]
        while not chief.ended() and not signals:
            output.forward(0.2)
            for task in tasks[:-1]:
                process = processes[task]
                if process.code is not None or not process.ended() or process.code in (0, FOLLOWED):
                    continue
                output.forward(0.0)  # its last lines
                deaths[task] += 1
                text = f"{process.name} ended with code {process.code}"
                if task[0] == "worker" and deaths[task] <= DEATHS:
                    output.say("launch", f"{text} and starts again, {deaths[task]} of {DEATHS}")
                    start(task)
                elif deadline is None:
                    output.say("launch", f"{text}; the job ends within {LAST:g} seconds")
                    deadline = time.monotonic() + LAST
            if deadline is not None and time.monotonic() > deadline:
                return 1
    finally:
        _end(processes.values(), output)
    return chief.code


def _end(processes, output):
    """Ends them all: what does not end by itself, if the chief is done, by SIGTERM, then by SIGKILL."""
    done = any(process.name == "chief" and process.code == 0 for process in processes)
    for number, seconds in ((None, POLITE if done else 0.0), (signal.SIGTERM, TERM), (signal.SIGKILL, KILL)):
        for process in processes:
            if number is not None and not process.ended():
                process.signal(number)
        deadline = time.monotonic() + seconds
        while not all([process.ended() for process in processes]) and time.monotonic() < deadline:
            output.forward(0.1)
    deadline = time.monotonic() + 1.0
    while (
        output.forward(0.0) and time.monotonic() < deadline
    ):  # what a process with another session writes is not waited for
        pass


def _at_least(least):
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return whole_number


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deepfm_ops.cluster", description="Trains over many processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "start servers, workers and a chief of a script on this machine"
    run = commands.add_parser("launch", help=text, description=text)
    run.add_argument("--ps", type=_at_least(1), default=1, help="parameter servers (1)")
    run.add_argument("--workers", type=_at_least(1), default=1, help="workers (1)")
    run.add_argument("--restarts", type=_at_least(0), default=0, help="how often a job that failed starts again (0)")
    run.add_argument("--threads", type=_at_least(1), help="of TensorFlow in each server and worker (the cores)")
    run.add_argument("script", help="calls deepfm_ops.cluster.serve_or_continue() at its top")
    run.add_argument("args", nargs=argparse.REMAINDER, help="of the script")
    given = parser.parse_args(arguments)
    if not pathlib.Path(given.script).is_file():
        run.error(f"the script {given.script} is no file")
    return launch([given.script, *given.args], given.ps, given.workers, given.restarts, given.threads)
