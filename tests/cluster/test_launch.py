"""Real processes on loopback: how a job starts, what it survives, and that nothing of it is left."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from testing import LIGHT, REFERENCE_MODE

from deepfm_ops.cluster.config import device
from deepfm_ops.cluster.launch import free_ports

LIMIT = 180  # seconds, for what takes ten on a machine that has nothing else to do
needs_op = pytest.mark.skipif(REFERENCE_MODE, reason="a cluster needs the native op")

# Without TensorFlow: what the launcher does with any script.
PLAIN = """
CHILD = ["sleep", "1000"]
import json, os, subprocess, sys, time
task = json.loads(os.environ["TF_CONFIG"])["task"]
child = subprocess.Popen(CHILD)
print("processes", os.getpid(), child.pid)
print("arguments", *sys.argv[1:])
print("threads", os.environ.get("TF_NUM_INTRAOP_THREADS"), file=sys.stderr)
"""
START = "from deepfm_ops import cluster\ncluster.serve_or_continue(wait=120)\n"


def environment(**changes):
    return {**os.environ, **LIGHT, "TF_CPP_MIN_LOG_LEVEL": "3", **changes}


class Launched:
    """The launch command, run; `wait_for` and `end` give up after LIMIT seconds, and leaving ends what is left."""

    def __init__(self, folder, script, *options, arguments=()):
        path, self.log = folder / "script.py", folder / "log"
        path.write_text(script)
        command = [sys.executable, "-m", "deepfm_ops.cluster", "launch", *options, str(path), *arguments]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.process.kill()
        self.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """The numbers of all processes that the log tells of."""
        return [int(pid) for line in re.findall(r"processe?s? ([\d ]+)", self.log.read_text()) for pid in line.split()]

    def wait_for(self, pattern, count=1):
        """The matches of a pattern in the log, once there are so many."""
        deadline = time.monotonic() + LIMIT
        while len(found := re.findall(pattern, self.log.read_text(), re.MULTILINE)) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return found

    def end(self):
        """The exit code, when it has ended, and the log."""
        try:
            return self.process.wait(LIMIT), self.log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log.read_text()) from None

    def nothing_is_left(self):
        """Within some seconds: whom the system kills is gone when it is collected."""
        deadline = time.monotonic() + 30
        while left := [pid for pid in self.processes() if runs(pid)]:
            assert time.monotonic() < deadline, (left, self.log.read_text())
            time.sleep(0.1)


def runs(pid):
    """Whether a process is there, and no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_lines_arguments_and_exit_code(tmp_path):
    """A chief that is done ends all, what they have started too; so does one that fails, with its code."""
    script = PLAIN + "time.sleep(1.5 if task['type'] == 'chief' else 1000)\nsys.exit(int(sys.argv[1]))\n"
    options = ("--ps", "2", "--workers", "1", "--threads", "3")
    for code in (0, 7):
        with Launched(tmp_path, script, *options, arguments=(str(code), "--ps", "x y")) as job:
            found, log = job.end()
            assert found == code
            assert len(job.processes()) == 8
            job.nothing_is_left()
        for who in ("chief", "ps 0", "ps 1", "worker 0"):
            assert f"{who} | arguments {code} --ps x y\n" in log
            assert f"{who} | threads {None if who == 'chief' else 3}\n" in log
        assert all(re.match(r"(chief|ps [01]|worker 0) \| ", line) for line in log.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all(tmp_path, number):
    """Those of Ctrl-C and of `kill`; and the death of the launcher itself.

    The system tells of that no one but the launcher's own children, so what these have started is not looked at.
    """
    script = PLAIN.replace('"sleep"', '"true"') if number == signal.SIGKILL else PLAIN
    script += "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(1000)\n"
    with Launched(tmp_path, script) as job:
        job.wait_for("threads", 3)
        job.process.send_signal(number)
        code, _ = job.end()
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
        job.nothing_is_left()


def test_one_that_does_not_listen_is_killed(tmp_path):
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PLAIN + "time.sleep(1000)\n"
    with Launched(tmp_path, script) as job:
        job.wait_for("threads", 3)
        job.process.terminate()
        assert job.end()[0] == 128 + signal.SIGTERM
        job.nothing_is_left()


def test_what_dies_is_started_again(tmp_path):
    """A worker ten times, and the job so often as it may be; of a server's death the chief is to end."""
    script = PLAIN + "sys.exit(3) if task['type'] == 'worker' else time.sleep(1000)\n"
    with Launched(tmp_path, script.replace('"sleep"', '"true"')) as job:
        job.wait_for(r"launch \| worker 0 ended with code 3 and starts again, 10 of 10")
        job.wait_for(r"launch \| worker 0 ended with code 3; the job ends within 20 seconds")
    script = PLAIN + "if task['type'] == 'chief': os.kill(os.getpid(), 9)\ntime.sleep(1000)\n"
    with Launched(tmp_path, script, "--restarts", "2") as job:
        code, log = job.end()
        assert code == 128 + 9
        assert re.findall(r"launch \| (.*)", log) == [
            f"the job ended with code 137 and starts again, {run} of 2" for run in (1, 2)
        ]
        assert log.count("chief | arguments") == 3
        job.nothing_is_left()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required: script"),
        (["none.py"], "the script none.py is no file"),
        (["--ps", "0", "script.py"], "argument --ps: 0 is less than 1"),
        (["--workers", "x", "script.py"], "argument --workers: invalid whole_number value: 'x'"),
        (["--restarts", "-1", "script.py"], "argument --restarts: -1 is less than 0"),
        (["--processes", "2", "script.py"], "unrecognized arguments: --processes"),
    ],
)
def test_bad_arguments(tmp_path, options, said):
    (tmp_path / "script.py").write_text("")
    command = [sys.executable, "-m", "deepfm_ops.cluster", "launch", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2 and said in done.stderr


CONNECTED = (
    START
    + """
import os, sys, time
from deepfm_ops.cluster import coordinator
import tensorflow as tf

chief = coordinator.current()
with tf.device(chief.servers[0]):
    count = tf.Variable(0)

@tf.function
def step():
    return count.assign_add(1)

def run(steps):
    for _ in range(steps):
        chief.coordinator.schedule(step)
    deadline = time.monotonic() + 120
    try:
        while not chief.coordinator.done():
            chief.check()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int(count.numpy())
    except tf.errors.OpError as error:
        chief.check(error)
        raise

print("servers", chief.servers, "workers", chief.workers, flush=True)
print("counted", run(10), flush=True)
"""
)


@needs_op
def test_a_worker_that_is_killed_is_taken_back(tmp_path):
    """With a single one, so that what is counted then is by the one that came back; and all end with code 0."""
    script = (
        CONNECTED
        + """
@tf.function
def fail():
    with tf.device(chief.servers[0]):
        tf.debugging.Assert(count < 0, ["no loss of a server"])

for attempt in (lambda: chief.coordinator.schedule(fail), fail):
    try:
        attempt()
        chief.coordinator.join()
    except tf.errors.InvalidArgumentError as error:
        chief.check(error)
        print("failed", error.message.splitlines()[0], flush=True)
while not os.path.exists("killed"):
    time.sleep(0.1)
print("more", run(10), flush=True)
"""
    )
    with Launched(tmp_path, script) as job:
        assert len(job.wait_for("chief . failed ", 2)) == 2
        (pid,) = job.wait_for(r"worker 0 \| worker 0 serves at \S+, process (\d+)")
        os.kill(int(pid), signal.SIGKILL)
        job.wait_for("worker 0 ended with code 137 and starts again, 1 of 10")
        (tmp_path / "killed").touch()
        code, log = job.end()
        assert code == 0, log
        assert int(re.search(r"chief \| more (\d+)", log)[1]) in (20, 21)  # a step in flight is run again
        assert f"servers {[device('ps', 0)]} workers {[device('worker', 0)]}" in log
        assert log.count("launch |") == 1 and "deepfm_ops.cluster:" not in log
        assert re.search("^chief .*worker 0 is lost; until it is back its steps run on other workers$", log, re.M)
        assert "ERROR:tensorflow" not in log and "Traceback" not in log
        job.nothing_is_left()


@needs_op
def test_a_lost_server_ends_the_job_with_one_line(tmp_path):
    """Whether the chief looks, hears it from TensorFlow, or does something else; started again, it is a new job."""
    script = (
        CONNECTED
        + """
coordinator.END = 3.0
life = len(os.listdir("lives"))
open(f"lives/{life}", "w").close()
print("busy", life, flush=True)
while life == 0:
    run(100)
while life == 1:
    count.assign_add(1)
time.sleep(1000)
"""
    )
    (tmp_path / "lives").mkdir()
    with Launched(tmp_path, script, "--restarts", "2") as job:
        for life in range(3):
            job.wait_for(rf"chief \| busy {life}")
            pid = job.wait_for(r"ps 0 serves at \S+, process (\d+)", life + 1)[-1]
            os.kill(int(pid), signal.SIGKILL)
        code, log = job.end()
        assert code == 1, log
        lives = re.split(r"the job ended with code 1 and starts again, \d of 2", log)
        for life in lives:
            (line,) = re.findall(r"chief \| deepfm_ops.cluster: (.*)", life)
            assert re.fullmatch(r"ps 0 \(127.0.0.1:\d+\) is lost, .*; start the job again, .*", line)
            assert "ps 0 ended with code 137; the job ends within 20 seconds" in life
            assert "counted 10" in life and "Traceback" not in life
        assert len(lives) == 3
        job.nothing_is_left()


OTHER_VERSION = """
import deepfm_ops._version
deepfm_ops._version.__version__ = "0.0.1"
"""
PLAIN_SERVER = """
import json, os
import tensorflow as tf
config = json.loads(os.environ["TF_CONFIG"])
spec, task = tf.train.ClusterSpec(config["cluster"]), config["task"]
tf.distribute.Server(spec, task["type"], task["index"], protocol="grpc").join()
"""
# What is wrong is said once by the error; the chief then dies without a word to the servers.
DIES = """
import os, signal, sys
from deepfm_ops import cluster
try:
    cluster.serve_or_continue(wait=120)
except cluster.ClusterError as error:
    print(error, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_op
def test_processes_that_are_others_than_the_chief_believes(tmp_path):
    """Of another version, without this package, under another's name: all are named; and without a chief they end."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
    cluster = {"chief": addresses[:1], "ps": addresses[1:2], "worker": addresses[2:]}
    larger = {**cluster, "worker": [addresses[2], "127.0.0.1:9", addresses[3]]}
    scripts = {
        ("ps", 0): (OTHER_VERSION + START, cluster, 0),
        ("worker", 0): (PLAIN_SERVER, cluster, 0),
        ("worker", 1): (START, larger, 2),
        ("chief", 0): (DIES, cluster, 0),
    }
    started = {}
    try:
        for (role, number), (script, known, index) in scripts.items():
            config = json.dumps({"cluster": known, "task": {"type": role, "index": index}})
            started[role, number] = subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=tmp_path,
                env=environment(TF_CONFIG=config),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        _, said = started["chief", 0].communicate(timeout=LIMIT)
        assert re.search(
            rf"^ps 0 \({addresses[1]}\) has deepfm_ops 0.0.1, the chief has [\d.]+: install one", said, re.M
        )
        assert f"; worker 0 ({addresses[2]}) serves without deepfm_ops: call cluster.serve_or_continue()" in said
        assert f"; worker 1 ({addresses[3]}) takes itself for worker 2: start every process with one" in said
        for task, who in ((("ps", 0), "ps 0"), (("worker", 1), "worker 2")):
            _, said = started[task].communicate(timeout=LIMIT)
            assert started[task].returncode == 1
            assert re.search(rf"^deepfm_ops.cluster: {who} ends: the chief at \S+ is lost; start", said, re.M)
    finally:
        for process in started.values():
            process.kill()
            process.wait()
            process.stderr.close()
