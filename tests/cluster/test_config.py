"""TF_CONFIG, read and checked; and what the processes do with it before TensorFlow comes into it."""

import json
import socket
import threading

import pytest
from testing import REFERENCE_MODE, run_python

from deepfm_ops import cluster
from deepfm_ops.cluster import config, coordinator, server
from deepfm_ops.cluster.launch import free_ports

needs_op = pytest.mark.skipif(REFERENCE_MODE, reason="a cluster needs the native op")

CLUSTER = {"chief": ["a:1"], "ps": ["b:1", "[::1]:2"], "worker": ["c:1"]}


def text(task=("ps", 0), **changes):
    """A TF_CONFIG; a role that is changed to None is left out."""
    roles = {role: addresses for role, addresses in {**CLUSTER, **changes}.items() if addresses is not None}
    return json.dumps({"cluster": roles, "task": {"type": task[0], "index": task[1]}})


def read(found):
    return config.read({"TF_CONFIG": found})


def test_what_it_says():
    found = read(text(("ps", 1)))
    assert found == config.Config(CLUSTER, "ps", 1) and found.name == "ps 1"
    assert found.tasks() == [("chief", 0), ("ps", 0), ("ps", 1), ("worker", 0)]
    assert found.tasks("worker", "chief") == [("worker", 0), ("chief", 0)]
    assert found.address("ps", 1) == ("::1", 2) and found.address("chief") == ("a", 1)
    assert read(text(("worker", "0"))).index == 0  # as templates of other launchers write it
    assert read(text(("chief", 0))).name == "chief"
    assert config.read({}) is None and read("") is None
    assert config.device("ps", 1) == "/job:ps/replica:0/task:1/device:CPU:0"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("{", "TF_CONFIG is no JSON (Expecting"),
        ("[" * 100_000, "TF_CONFIG is no JSON"),
        ("[1]", 'TF_CONFIG lacks "cluster": set it to {"cluster"'),
        ("{}", 'TF_CONFIG lacks "cluster"'),
        ('{"cluster": "a:1", "task": {}}', 'TF_CONFIG lacks "cluster"'),
        ('{"cluster": {}}', 'TF_CONFIG lacks "task"'),
        ('{"cluster": {}, "task": {"index": 0}}', 'TF_CONFIG\'s task lacks "type"'),
        ('{"cluster": {}, "task": {"type": "ps"}}', 'TF_CONFIG\'s task lacks "index"'),
        (text(("master", 0)), "names the role 'master': it must be one of chief, ps, worker"),
        (text(([], 0)), "names the role []"),
        (text(gateway=["d:1"]), "names the role 'gateway'"),
        (text(("evaluator", 0)), "names an evaluator: leave it out"),
        (text(evaluator=["d:1"]), "names an evaluator"),
        (text(("ps", 2)), "task is ps 2: its index must be in [0, 2)"),
        (text(("ps", -1)), "task is ps -1"),
        (text(("ps", None)), "task is ps None"),
        (text(("ps", True)), "task is ps True"),
        (text(("ps", 0.5)), "task is ps 0.5"),
        (text(chief=None), 'cluster has no chief: give it at least one address, "chief": ["host:port"]'),
        (text(ps=None), "cluster has no ps"),
        (text(ps={"0": "b:1"}), "cluster has no ps"),
        (text(worker=[]), "cluster has no worker"),
        (text(chief=["a:1", "a:2"]), "cluster has 2 chiefs: name one"),
        (text(ps=["b:1", "a:1"]), "gives chief and ps 1 one address, a:1: give each its own"),
        (text(worker=["c:1", "c:1"]), "gives worker 0 and worker 1 one address"),
        (text(ps=["b"]), "address of ps 0 is 'b': it must be host:port"),
        (text(ps=["b:1", "b:"]), "address of ps 1 is 'b:'"),
        (text(ps=[":7"]), "address of ps 0 is ':7'"),
        (text(ps=["b:0"]), "address of ps 0 is 'b:0'"),
        (text(ps=["b:65536"]), "address of ps 0 is 'b:65536'"),
        (text(ps=["b:²"]), "address of ps 0 is 'b:²'"),
        (text(ps=[7]), "address of ps 0 is 7"),
    ],
)
def test_what_is_wrong_with_it(found, said):
    with pytest.raises(cluster.ClusterError) as error:
        read(found)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_without_tensorflow():
    """Importing imports none, nor does the call without TF_CONFIG; an error is one line, and the exit code 1."""
    code = """
import os, sys
from deepfm_ops import cluster
cluster.serve_or_continue()
os.environ["TF_CONFIG"] = "{"
before = sys.excepthook
try:
    cluster.serve_or_continue()
except cluster.ClusterError as error:
    sys.excepthook(type(error), error, error.__traceback__)
assert before is sys.excepthook
assert "tensorflow" not in sys.modules
sys.stderr = sys.stdout
raise_ = lambda: [][0]
try:
    raise_()
except IndexError as error:
    sys.excepthook(type(error), error, error.__traceback__)
"""
    printed = run_python("import sys; sys.stderr = sys.stdout" + code, TF_CONFIG="")
    assert printed.startswith("deepfm_ops.cluster: TF_CONFIG is no JSON")
    assert printed.splitlines()[1].startswith("Traceback") and printed.splitlines()[-1].startswith("IndexError")


@pytest.fixture(name="here")
def _here(monkeypatch):
    """Sets TF_CONFIG to a task of a cluster of three on free ports, and forgets what this process is."""

    def set_task(role, index=0):
        ports = free_ports(3)
        roles = {role: [f"127.0.0.1:{port}"] for role, port in zip(config.ROLES, ports, strict=True)}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": roles, "task": {"type": role, "index": index}}))
        return dict(zip(config.ROLES, ports, strict=True))

    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(coordinator, "_current", None)
    monkeypatch.setenv("GRPC_FAIL_FAST", "use_caller")
    return set_task


def test_a_process_by_itself(here):
    assert coordinator.current() is None
    cluster.serve_or_continue()
    chief = coordinator.connect()
    assert chief is coordinator.connect() is coordinator.current()
    assert chief.servers == chief.workers == ["/job:localhost/replica:0/task:0/device:CPU:0"]
    assert chief.coordinator is None
    chief.check(ValueError())
    chief.finish()


@needs_op
def test_processes_that_do_not_come_are_named(here):
    ports = here("chief")
    with socket.create_server(("127.0.0.1", ports["worker"])), pytest.raises(cluster.ClusterError) as error:
        cluster.serve_or_continue(wait=0)
    assert str(error.value).startswith(
        f"after 0 seconds nothing listens at ps 0 (127.0.0.1:{ports['ps']}): start what is missing, "
    )
    assert coordinator.current() is None


@needs_op
@pytest.mark.parametrize("role", config.ROLES)
def test_a_port_in_use(here, role):
    port = here(role)[role]
    who = config.name(role, 0)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(
            cluster.ClusterError, match=rf"{who} cannot have port {port} \(Address already in use\): end "
        ):
            cluster.serve_or_continue()


def test_only_a_chief_connects(here):
    here("worker")
    with pytest.raises(cluster.ClusterError, match="worker 0 is no chief: call cluster.serve_or_continue"):
        coordinator.connect()


def test_a_server_waits_for_its_chief(monkeypatch):
    monkeypatch.setattr(server, "GONE", 1.0)
    (port,) = free_ports(1)
    chief, met, finished = ("127.0.0.1", port), threading.Event(), threading.Event()
    assert server.stay(chief, 0, met, finished) == (
        f"no chief came to 127.0.0.1:{port} within 0 seconds; start one, with the same TF_CONFIG cluster"
    )
    listener = socket.create_server(chief)
    threading.Timer(1.5, listener.close).start()
    lost = f"the chief at 127.0.0.1:{port} is lost; start the job again, it goes on from its last checkpoint"
    assert server.stay(chief, 60, met, finished) == lost
    met.set()  # a chief that dies as soon as it is there is one too
    assert server.stay(chief, 60, met, finished) == lost
    finished.set()
    assert server.stay(chief, 0, met, finished) is None


def test_nothing_answers_where_nothing_listens():
    """Not even the connection itself, which a free port among those for outgoing ones can reach."""
    first, last = (int(number) for number in open("/proc/sys/net/ipv4/ip_local_port_range").read().split())
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    assert first <= port <= last
    for _ in range(100):
        assert config.answers(("127.0.0.1", port), 5.0) is None
    assert config.answers(("there.is.no.such.host.invalid", 1), 5.0) is None


def test_free_ports_are_not_those_of_outgoing_connections():
    ports = free_ports(50)
    assert len(set(ports)) == 50
    first = int(open("/proc/sys/net/ipv4/ip_local_port_range").read().split()[0])
    assert max(ports) < (first if first > 20_000 else 32_768)
