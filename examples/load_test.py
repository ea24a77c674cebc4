"""Loads examples/serve.py and reports requests per second, latencies and what was dropped. Exits 1 if anything was.

python examples/load_test.py --url http://127.0.0.1:8000 [--connections 8] [--seconds 10] [--batch 1]
python examples/load_test.py --serve MODEL [--swap MODEL_A MODEL_B]

--serve starts the server, on a free port and for a copy of the model. --swap replaces the served file by the two models
by turns, twice a second; with --url, --path says which file that is. The samples are made up: any indices, all values
one. A model of feature columns needs --body FILE, a request in JSON.

Every connection sends its next request when it has the answer to the last one. An answer must be the one that its
version gave to the same request before, to the byte: scores of another model than it names would be found.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

REQUESTS = 32  # different ones
SWAP_SECONDS = 0.5


class Load:
    """What the connections share, and what they found."""

    def __init__(self, requests):
        self.requests = requests
        self.running = True
        self.seconds, self.failures, self.answers = [], [], {}


class Connection(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, load, number):
        self.load, self.number = load, number
        self.versions = []  # that it saw, one after the other
        self.done = asyncio.get_running_loop().create_future()
        self.open = False  # a request has no answer yet

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        if not self.load.running:
            self.transport.close()
            return
        self.number = (self.number + 1) % len(self.load.requests)
        self.buffer, self.end, self.open = b"", None, True
        self.start = time.perf_counter()
        self.transport.write(self.load.requests[self.number])

    def data_received(self, data):
        self.buffer += data
        if self.end is None:
            head, found, _ = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            self.end = len(head) + 4 + int(length[1])
        if len(self.buffer) < self.end:
            return
        self.load.seconds.append(time.perf_counter() - self.start)
        self.open = False
        self.check()
        self.send()

    def check(self):
        head, _, body = self.buffer.partition(b"\r\n\r\n")
        version = re.search(rb'"version":"(\w+)"', body)
        if not head.startswith(b"HTTP/1.1 200 ") or not version:
            self.load.failures.append(f"{head.splitlines()[0].decode()}: {body[:200].decode()}")
        elif self.load.answers.setdefault((self.number, version[1]), body) != body:
            self.load.failures.append(f"not the scores of the version: {body[:200].decode()}")
        elif self.versions[-1:] != [version[1]]:
            self.versions.append(version[1])

    def connection_lost(self, error):
        if self.open:
            self.load.failures.append(f"dropped: {error or 'the server closed the connection'}")
        if not self.done.done():
            self.done.set_result(None)


async def connect(load, host, port, number):
    """Keeps a connection busy to the end; opens another one if the server drops it. Returns the versions it saw."""
    versions = []
    while load.running:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(load, number), host, port
            )
        except OSError as error:
            load.failures.append(f"no connection: {error}")
            await asyncio.sleep(0.1)
            continue
        await connection.done
        versions += connection.versions
    return versions


def replace(path, model):
    fresh = f"{path}.{os.getpid()}.new"
    shutil.copyfile(model, fresh)
    os.replace(fresh, path)


async def swap(path, models, load):
    """Replaces the file by turns. Returns how often."""
    count = 0
    while load.running:
        await asyncio.to_thread(replace, path, models[(count + 1) % 2])  # the first one is often being served
        count += 1
        await asyncio.sleep(SWAP_SECONDS)
    return count


async def run(load, address, arguments, path):
    """(seconds, swaps, versions that the first connection saw)."""
    start = time.perf_counter()
    tasks = [
        asyncio.create_task(connect(load, *address, number * REQUESTS // arguments.connections))
        for number in range(arguments.connections)
    ]
    swaps = asyncio.create_task(swap(path, arguments.swap, load)) if arguments.swap else None
    await asyncio.sleep(arguments.seconds)
    load.running = False
    seconds = time.perf_counter() - start
    _, late = await asyncio.wait(tasks, timeout=10)
    load.failures += ["dropped: no answer within ten seconds"] * len(late)
    versions = await tasks[0] if tasks[0] not in late else []
    return seconds, await swaps if swaps else 0, versions


def bodies(version, arguments):
    if arguments.body:
        return [pathlib.Path(arguments.body).read_bytes()]
    columns, rows = version["model"]["num_columns"], version["model"]["num_features"]
    if columns is None:
        sys.exit(f"this model takes the inputs {list(version['model']['kinds'])}: give a request, --body FILE")
    rng = random.Random(0)
    sample = lambda: [rng.randrange(rows) for _ in range(columns)]  # noqa: E731
    return [json.dumps({"indices": [sample() for _ in range(arguments.batch)]}).encode() for _ in range(REQUESTS)]


def call(url, body=None):
    """The answer, as text. Ends the program with what the server says if it is no good one."""
    try:
        with urllib.request.urlopen(url, body, timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code} {error.read().decode()}")
    except OSError as error:
        sys.exit(f"{url}: {error}")


@contextlib.contextmanager
def served(model):
    """Serves a copy of the model; gives (URL, path of the copy)."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.scorer"
        shutil.copyfile(model, path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, pathlib.Path(__file__).with_name("serve.py"), path, "--port", port]
        server = subprocess.Popen([*map(str, command), "--reload-seconds", "0.1"])
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                if server.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", path
        finally:
            server.terminate()
            server.wait(30)


def measure(url, path, arguments):
    """Loads the server and prints the figures. Returns whether nothing failed."""
    address = urllib.parse.urlsplit(url)
    address = address.hostname, address.port or 80
    samples = bodies(json.loads(call(f"{url}/version")), arguments)
    call(f"{url}/score", samples[0])
    head = "POST /score HTTP/1.1\r\nHost: {}:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    load = Load([head.format(*address, len(body)).encode() + body for body in samples])
    seconds, swaps, versions = asyncio.run(run(load, address, arguments, path))
    latencies = sorted(load.seconds) or [float("nan")]
    p50, p99 = (latencies[int(len(latencies) * share)] * 1e3 for share in (0.5, 0.99))
    print(
        f"{len(load.seconds) / seconds:,.0f} requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
        f"slowest {latencies[-1] * 1e3:.1f} ms; {len(load.seconds):,} answers, {len(load.failures)} failed or dropped"
    )
    if swaps:
        print(f"the file was replaced {swaps} times; one connection saw the version change {len(versions) - 1} times")
    for text in list(dict.fromkeys(load.failures))[:5]:
        print(f"  {text}", file=sys.stderr)
    return not load.failures


def main():
    parser = argparse.ArgumentParser(description="Loads examples/serve.py and reports figures.")
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--url", help="of a server that runs")
    server.add_argument("--serve", metavar="MODEL", help="start a server for a copy of this file")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch", type=int, default=1, help="samples per request")
    parser.add_argument("--body", metavar="FILE", help="send this JSON instead")
    parser.add_argument("--swap", nargs=2, metavar="MODEL", help="replace the served file by these, by turns")
    parser.add_argument("--path", help="the file that the server at --url serves, for --swap")
    arguments = parser.parse_args()
    if arguments.swap and arguments.url and not arguments.path:
        parser.error("--swap with --url needs --path, the file to replace")
    if arguments.url:
        good = measure(arguments.url.rstrip("/"), arguments.path, arguments)
    else:
        with served(arguments.serve) as (url, path):
            good = measure(url, path, arguments)
    sys.exit(not good)


if __name__ == "__main__":
    main()
