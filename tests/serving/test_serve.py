"""The example server, in a process of its own: scores are the scorer's, bad requests are told why, swaps drop none."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import deepfm_ops
from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat, deepctr, scorer

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SWITCHES = ["--max-batch", "50", "--max-body", "60000", "--reload-seconds", "0.05"]


class Server:
    def __init__(self, path, log, command=(EXAMPLES / "serve.py",), switches=()):
        self.path, self.log = path, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, *command, path, "--port", self.port, *SWITCHES, *switches]
        with open(log, "wb") as output:
            self.process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while "Uvicorn running" not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def call(self, method, route, body=None, **options):
        """(status, answer)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, route, body if body is None or options else as_json(body), **options)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def score(self, body):
        return self.call("POST", "/score", body)

    def version(self):
        return self.call("GET", "/version")[1]["version"]

    def wait_for(self, condition):
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def stop(self):
        self.process.terminate()
        return self.process.wait(20)


def as_json(body):
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@contextlib.contextmanager
def serving(folder, path, **options):
    server = Server(path, folder / "log", **options)
    try:
        yield server
    finally:
        server.stop()


def replace(path, other):
    shutil.copyfile(other, f"{path}.new")
    os.replace(f"{path}.new", path)


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory):
    """{name: path}."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        deepfm_ops.export_scorer(DeepFM(100, 3, 8, (16,), seed=seed), folder / name)
    table = pd.DataFrame({"user": ["ann", "bob", None], "age": [0.3, 0.5, None], "genres": ["war|drama", "war", None]})
    features = FeatureDictionary().fit(table, categorical=["user"], numeric=["age"], multivalued=["genres"])
    model = DeepFM(features.num_features, 3, 4, (5,), field_sizes=features.field_sizes, seed=3)
    deepfm_ops.export_scorer(model, folder / "features", features=features)
    columns = [
        SparseFeat("id", 10, 4),
        SparseFeat("city", 50, 4, use_hash=True, dtype="string"),
        VarLenSparseFeat(SparseFeat("tags", 20, 4), maxlen=2),
        DenseFeat("age", 1),
    ]
    deepfm_ops.export_scorer(deepctr.DeepFM(columns, columns, dnn_hidden_units=(5,)), folder / "columns")
    task = {"click": "binary", "genre": ("multiclass", 3)}
    deepfm_ops.export_scorer(DeepFM(100, 3, 8, (16,), task=task, seed=4), folder / "heads")
    broken = DeepFM(100, 3, 8, use_deep=False)
    broken.get_layer("fm").w[0].assign([np.nan])
    deepfm_ops.export_scorer(broken, folder / "nan")
    loaded = scorer.Scorer.load(folder / "features")
    films = {"genres": [["war"], ["drama", "war"], [], ["war"]], "sku": list("wxyz")}
    loaded.items(films, "sku").save(folder / "items")
    loaded.items({"genres": films["genres"]}).save(folder / "without keys")
    task = {"click": "binary", "mood": ("multiclass", 3)}
    other = DeepFM(features.num_features, 3, 4, (5,), field_sizes=features.field_sizes, seed=4, task=task)
    deepfm_ops.export_scorer(other, folder / "other", features=features)
    scorer.Scorer.load(folder / "other").items(films, "sku").save(folder / "other items")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module", name="server")
def _server(models, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), models["a"]) as server:
        yield server


@pytest.fixture(scope="module", name="raw")
def _raw(models, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("raw"), models["features"]) as server:
        yield server


@pytest.fixture(scope="module", name="columns")
def _columns(models, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("columns"), models["columns"]) as server:
        yield server


def test_health_and_version(server, models):
    loaded = scorer.Scorer.load(models["a"])
    assert server.call("GET", "/health") == (200, {"status": "ok"})
    expected = {"version": loaded.digest, "model": loaded.info, "deepfm_ops": deepfm_ops.__version__}
    assert server.call("GET", "/version") == (200, expected)


def check(server, path, body, *arguments):
    status, answer = server.score(body)
    assert status == 200, answer
    loaded = scorer.Scorer.load(path)
    np.testing.assert_array_equal(np.float32(answer["scores"]), loaded.score(*arguments))
    assert answer.keys() == {"scores", "version"} and answer["version"] == loaded.digest


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_scores_of_matrices(server, models, rng, batch):
    indices, values = rng.integers(0, 100, (batch, 3)), rng.normal(size=(batch, 3)).astype("f")
    check(server, models["a"], {"indices": indices.tolist()}, indices)
    check(server, models["a"], {"indices": indices.tolist(), "values": values.tolist()}, indices, values)
    long = as_json({"indices": indices.tolist(), "values": values.tolist()}).ljust(40_000)  # scored in a thread
    check(server, models["a"], long, indices, values)


def test_scores_of_raw_features(raw, columns, models):
    inputs = {"user": ["ann", None, "eve"], "age": [1, None, 0.25], "genres": [["war"], "drama|war", None]}
    known = {**inputs, "age": [1, float("nan"), 0.25]}  # in JSON, a missing number is null
    check(raw, models["features"], {"inputs": inputs}, known)
    check(raw, models["features"], {"indices": [[0, 1, 2, 3]]}, [[0, 1, 2, 3]])
    inputs = {"id": [1, 9], "city": ["Rome", "東京"], "tags": [[1, 0], [19, 3]], "age": [0.5, 3]}
    check(columns, models["columns"], {"inputs": inputs}, inputs)


GOOD = [[1, 2, 3]]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "the body is not JSON"),
        (b'{"indices": [[1, 2, NaN]]}', 400, "the body is not JSON: .* line 1 column 21"),
        (b'"\xff"', 400, "the body is not JSON"),
        (b"[" * 5000, 400, "the body is not JSON"),
        ([1], 422, "the body must be a JSON object"),
        ({}, 422, r"must hold indices and maybe values, or inputs alone; got \[\]"),
        ({"indices": GOOD, "value": GOOD}, 422, r"got \['indices', 'value'\]"),
        ({"indices": GOOD, "inputs": {}}, 422, "or inputs alone"),
        ({"values": GOOD}, 422, "must hold indices"),
        ({"inputs": {"user": ["ann"]}}, 422, "this model takes indices and values, no inputs"),
        ({"indices": 1}, 422, "indices must be a list of lists of 3 numbers each"),
        ({"indices": [1, 2, 3]}, 422, "indices must be a list of lists"),
        ({"indices": [[1, 2]]}, 422, "indices must be a list of lists of 3 numbers"),
        ({"indices": [*GOOD, [1, 2, 3, 4]]}, 422, "indices must be a list of lists of 3 numbers"),
        ({"indices": [[1, 2, [3]]]}, 422, "indices must hold integers, got lists"),
        ({"indices": [[1, 2.0, "3"]]}, 422, "indices must hold integers, got fractions and text"),
        ({"indices": [[1, 2, True]]}, 422, "indices must hold integers, got true or false"),
        ({"indices": [[1, 2, None]]}, 422, "indices must hold integers, got null"),
        ({"indices": [[1, 2, 2**63]]}, 422, "indices holds a number that int64 cannot"),
        ({"indices": [[1, 2, 100]]}, 422, r"indices\[0,2\] = 100 is not in \[0, 100\)"),
        ({"indices": [[1, 2, -1]]}, 422, r"indices\[0,2\] = -1 is not in"),
        ({"indices": []}, 422, "the batch is empty"),
        ({"indices": GOOD, "values": None}, 422, "values must be a list of lists of 3 numbers"),
        ({"indices": GOOD, "values": [[1, 2, "3"]]}, 422, "values must hold numbers, got text"),
        ({"indices": GOOD, "values": [[1, 2, 1e39]]}, 422, "values holds a number that float32 cannot"),
        ({"indices": GOOD, "values": GOOD * 2}, 422, "indices and values must be equally long, got 1 and 2"),
        ({"indices": GOOD * 51}, 413, "the batch has 51 samples, at most 50 are allowed"),
        (b" " * 60_001, 413, "the body has more than 60000 bytes"),
        (b" " * 2_000_000, 413, None),  # not read to its end: the connection is closed
    ],
)
def test_bad_matrices(server, body, status, text):
    try:
        found, answer = server.score(body)
    except ConnectionError:
        assert text is None
    else:
        assert found == status
        assert re.search(text or "the body has more", answer["detail"])
    assert server.score({"indices": GOOD})[0] == 200


def test_bad_inputs(raw, columns):
    good = {"user": ["ann"], "age": [1], "genres": ["war"]}
    for inputs, text in [
        (good, None),
        ([], "inputs must be an object with the columns"),
        ({**good, "city": ["Rome"]}, r"unknown columns \['city'\]"),
        ({"user": ["ann"]}, r"inputs is missing the columns \['age', 'genres'\]"),
        ({**good, "age": 1}, "input 'age' must be a list with an entry per sample"),
        ({**good, "age": [1, 2]}, "inputs must be equally long, got {'user': 1, 'age': 2, 'genres': 1}"),
        ({**good, "age": ["0.5"]}, "input 'age' must not hold text"),
        ({**good, "age": [[0.5, 1]]}, "input 'age' must not hold lists"),
        ({**good, "genres": [3]}, "'genres': an entry must be a list or a string"),
        ({**good, "user": [{}]}, "input 'user' must not hold objects"),
        ({**good, "user": [["ann"]]}, "input 'user' must not hold lists"),
        ({**good, "genres": [[["war"]]]}, "input 'genres' must not hold lists there"),
        ({name: [] for name in good}, "the batch is empty"),
    ]:
        status, answer = raw.score({"inputs": inputs})
        assert status == 200 if text is None else status == 422 and re.search(text, answer["detail"]), answer
    assert raw.score({"inputs": {name: column * 51 for name, column in good.items()}})[0] == 413

    good = {"id": [1, 9], "city": ["Rome", "x" * 10_000], "tags": [[1, 0], [19, 3]], "age": [0.5, 3]}
    for inputs, text in [
        (good, None),
        ({**good, "id": [1, 10]}, r"id: index in row 1 = 10 is not in \[0, 10\)"),
        ({**good, "id": [1, "2"]}, None),
        ({**good, "id": [1, "x"]}, "input 'id' must hold numbers, got dtype <U1: 'x' in row 1"),
        ({**good, "id": [1, 1e30]}, "input 'id' must hold integers of at most 64 bits"),
        ({**good, "age": [1, None]}, "input 'age' must not hold null"),
        ({**good, "tags": [[1], [19, 3]]}, None),
        ({**good, "tags": [[1], 19]}, "input 'tags' must hold equally long lists"),
        ({**good, "tags": [[1, 2, 3]] * 2}, r"input 'tags' must have shape \('B', 2\)"),
    ]:
        status, answer = columns.score({"inputs": inputs})
        assert status == 200 if text is None else status == 422 and re.search(text, answer["detail"]), answer
    assert "this model takes inputs" in columns.score({"indices": GOOD})[1]["detail"]


def test_routes_that_are_none(server):
    assert server.call("GET", "/") == (404, {"detail": "Not Found"})
    assert server.call("GET", "/score")[0] == 405


def test_bodies_without_a_length(server, models):
    def call(body, pieces):
        size = -(-len(body) // pieces)
        chunks = [body[start : start + size] for start in range(0, len(body), size)]
        headers = {"Transfer-Encoding": "chunked"}
        return server.call("POST", "/score", iter(chunks), encode_chunked=True, headers=headers)

    status, answer = call(as_json({"indices": GOOD}), 5)
    assert status == 200
    np.testing.assert_array_equal(np.float32(answer["scores"]), scorer.Scorer.load(models["a"]).score(GOOD))
    assert call(b" " * 60_001, 30) == (413, {"detail": "the body has more than 60000 bytes"})


# Clients that send slowly, or nothing.

HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


@contextlib.contextmanager
def connections(server, number, content):
    """Sockets over which something was sent, and nothing more will be."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            found.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)))
            found[-1].sendall(content)
        yield found


def until_closed(connection):
    """All that the server says before it closes the connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            answer += part
    return answer


@pytest.fixture(scope="module", name="impatient")
def _impatient(models, tmp_path_factory):
    switches = ["--body-seconds", "0.5", "--max-body", "4000000", "--max-bodies", "1000000"]
    with serving(tmp_path_factory.mktemp("impatient"), models["a"], switches=switches) as server:
        yield server


@pytest.mark.parametrize(
    "content",
    [
        HEAD % 100,
        HEAD % 100 + b'{"indices',
        b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"POST /sc",
        b"GET /health HTTP/1.1\r\nHost: a\r\nMore: ",
    ],
)
def test_requests_that_never_arrive(impatient, content):
    with connections(impatient, 1, content) as (connection,):
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n") and b"Connection: close" in answer
    assert answer.endswith(b'\r\n\r\n{"detail":"the request took more than 0.5 s to arrive"}')
    assert impatient.score({"indices": GOOD})[0] == 200
    assert "Traceback" not in impatient.log.read_text()


def test_bytes_now_and_then_are_no_request(impatient):
    with connections(impatient, 1, HEAD % 10_000) as (connection,):
        connection.setblocking(False)
        for _ in range(200):
            try:
                connection.send(b" ")
                answer = connection.recv(100)
                break
            except BlockingIOError:
                time.sleep(0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_connections_that_say_nothing_are_closed(impatient):
    with connections(impatient, 1, b"") as (connection,):
        assert until_closed(connection) == b""


def test_the_second_request_of_a_connection_is_waited_for_no_longer(impatient):
    body = as_json({"indices": GOOD})
    with connections(impatient, 1, HEAD % len(body) + body) as (connection,):
        answer = b""
        while b'"version"' not in answer:
            answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(HEAD % 100 + b"{")
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("method", "route", "status"), [("POST", "/nowhere", 404), ("POST", "/health", 405)])
@pytest.mark.parametrize("size", [100_000, 1_000_000, 5_000_000])
def test_a_body_that_nobody_read_is_no_part_of_the_next_request(server, method, route, status, size):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request(method, route, b" " * size)
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, True)
            connection.request("POST", "/score", as_json({"indices": GOOD}))
            answer = connection.getresponse()
            assert answer.status == 200 and b"scores" in answer.read()


def test_an_answered_request_whose_body_never_comes_is_closed(impatient):
    with connections(impatient, 1, b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\nxx") as (
        connection,
    ):
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 404 ") and answer.count(b"HTTP/1.1") == 1


def test_headers_without_end(impatient):
    with connections(impatient, 1, b"GET /health HTTP/1.1\r\n") as (connection,):
        with contextlib.suppress(ConnectionError):
            for i in range(20_000):
                connection.sendall(b"header-%d: value\r\n" % i)
        answer = until_closed(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert impatient.call("GET", "/health")[0] == 200


def test_bodies_find_no_more_memory_than_there_is(impatient):
    """Of a million bytes five bodies of 180,000 are waited for, the next has to come again, a short one has not."""
    with connections(impatient, 5, HEAD % 200_000 + b" " * 180_000):
        codes = set()
        deadline = time.monotonic() + 20
        while 503 not in codes and time.monotonic() < deadline:
            with connections(impatient, 2, HEAD % 200_000 + b" " * 180_000) as more:
                codes |= {int(answer[9:12]) for answer in map(until_closed, more) if answer}
            assert impatient.score({"indices": GOOD})[0] == 200
    assert 503 in codes
    deadline = time.monotonic() + 20
    while impatient.call("POST", "/score", as_json({"indices": GOOD}).ljust(900_000))[0] != 200:
        assert time.monotonic() < deadline  # what the others held is given back
        time.sleep(0.05)


def test_health_while_clients_hang(models, tmp_path):
    switches = ["--body-seconds", "60"]
    contents = [HEAD % 1000 + b"{", b"POST /sc", b""]
    with serving(tmp_path, models["a"], switches=switches) as server, contextlib.ExitStack() as stack:
        for content in contents:
            stack.enter_context(connections(server, 70, content))
        for _ in range(20):
            assert server.call("GET", "/health") == (200, {"status": "ok"})
            assert server.score({"indices": GOOD})[0] == 200


def test_scores_that_are_no_numbers_are_null(models, tmp_path):
    with serving(tmp_path, models["nan"]) as server:
        status, answer = server.score({"indices": [[0, 1, 2], [1, 2, 3]]})
    assert status == 200
    assert answer["scores"][0] is None and 0 < answer["scores"][1] < 1


@pytest.fixture(scope="module", name="ranking")
def _ranking(models, tmp_path_factory):
    with serving(
        tmp_path_factory.mktemp("ranking"), models["features"], switches=["--items", models["items"]]
    ) as server:
        yield server


def test_ranks(ranking, models):
    loaded = scorer.Scorer.load(models["features"])
    items = scorer.Items.load(models["items"], loaded)
    for user in ({"user": "ann", "age": 0.5}, {"user": None, "age": None}):
        for options in ({}, {"among": [3, 0, 1]}, {"among": []}, {"shortlist": 3}, {"shortlist": 1, "among": [2]}):
            status, answer = ranking.call("POST", "/rank", {"user": user, "k": 3} | options)
            positions, scores = loaded.rank(user, items, 3, **options)
            assert status == 200 and answer["positions"] == positions.tolist(), answer
            np.testing.assert_allclose(np.float32(answer["scores"]), scores, rtol=0, atol=1e-6)
            assert answer["keys"] == ["wxyz"[n] for n in positions] and answer["version"] == loaded.digest
    assert ranking.call("POST", "/rank", {"user": user, "k": 50})[1]["positions"][3:] != []
    assert ranking.score({"inputs": {"user": ["ann"], "age": [1], "genres": ["war"]}})[0] == 200


ANN = {"user": "ann", "age": 0.5}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "the body is not JSON"),
        (b" " * 60_001, 413, "the body has more than 60000 bytes"),
        ([1], 422, "the body must be a JSON object"),
        ({}, 422, r"must hold user and k, and maybe among, shortlist and head; got \[\]"),
        ({"user": ANN, "k": 3, "n": 1}, 422, r"got \['k', 'n', 'user'\]"),
        ({"user": ["ann"], "k": 3}, 422, "user must be an object with an input's value each"),
        ({"user": ANN, "k": 51}, 413, "k is 51, at most 50 are allowed"),
        ({"user": ANN, "k": 2**70}, 422, "k and shortlist must be integers"),
        ({"user": ANN, "k": 0}, 422, "k must be a whole number from 1 on, got 0"),
        ({"user": ANN, "k": 1.5}, 422, "k and shortlist must be integers"),
        ({"user": ANN, "k": True}, 422, "k and shortlist must be integers"),
        ({"user": ANN, "k": 3, "shortlist": "9"}, 422, "k and shortlist must be integers"),
        ({"user": ANN, "k": 3, "shortlist": -1}, 422, "shortlist must be a whole number from 1 on, got -1"),
        ({"user": ANN, "k": 3, "head": {"a": []}}, 422, r"head must be None, got {'a': \[\]}"),
        ({"user": ANN, "k": 3, "among": 1}, 422, "among must be a list of positions"),
        ({"user": ANN, "k": 3, "among": [1, 2.0]}, 422, "among must be a list of positions"),
        ({"user": ANN, "k": 3, "among": [True]}, 422, "among must be a list of positions"),
        ({"user": ANN, "k": 3, "among": [4]}, 422, r"among has position 4, which is not in \[0, 4\)"),
        ({"user": ANN, "k": 3, "among": [2**63]}, 422, "among has a position that no item has"),
        ({"user": {"user": "ann"}, "k": 3}, 422, r"user is missing the columns \['age'\]"),
        (
            {"user": ANN | {"genres": "war"}, "k": 3},
            422,
            r"unknown columns \['genres'\]; of the user the model has \['user', 'age'\]",
        ),
        ({"user": ANN | {"age": [1]}, "k": 3}, 422, "input 'age' must not hold lists"),
        ({"user": ANN | {"age": {}}, "k": 3}, 422, "input 'age' must not hold objects"),
        ({"user": ANN | {"age": 1e30}, "k": 3}, 422, "column 'age', row 0: 1e"),
    ],
)
def test_bad_requests_for_ranks(ranking, body, status, text):
    found, answer = ranking.call("POST", "/rank", body)
    assert found == status and re.search(text, answer["detail"]), answer


def test_a_server_without_items(server):
    assert server.call("POST", "/rank", {"user": ANN, "k": 3}) == (
        404,
        {"detail": "this server ranks no items: start it with --items"},
    )


def test_reload_of_a_model_and_its_items(models, tmp_path):
    """Whichever comes first, the old pair stays until both are there. The new one has heads, of which one is meant."""
    path, items = tmp_path / "served", tmp_path / "served items"
    pairs = [("features", "items"), ("other", "other items")]
    digests = [scorer.Scorer.load(models[name]).digest for name, _ in pairs]
    replace(path, models["features"])
    replace(items, models["without keys"])
    body = {"user": ANN, "k": 3}
    with serving(tmp_path, path, switches=["--items", items]) as server:
        ranked = lambda **options: server.call("POST", "/rank", body | options)[1]  # noqa: E731
        assert ranked().keys() == {"positions", "scores", "version"}
        replace(items, models["items"])  # of the same model
        server.wait_for(lambda: "keys" in ranked())
        replace(path, models["other"])
        server.wait_for(lambda: "the old model stays: " in server.log.read_text())
        assert ranked()["version"] == server.version() == digests[0]
        replace(items, models["other items"])
        server.wait_for(lambda: ranked(head="click").get("version") == digests[1])
        loaded = scorer.Scorer.load(models["other"])
        for head in ("click", ["mood", 2]):
            found = loaded.rank(ANN, scorer.Items.load(models["other items"], loaded), 3, head=head)
            answer = ranked(head=head)
            assert answer["positions"] == found[0].tolist()
            np.testing.assert_allclose(np.float32(answer["scores"]), found[1], rtol=0, atol=1e-6)
        status, answer = server.call("POST", "/rank", body)
        assert (status, answer["detail"]) == (422, "head must be 'click', ('mood', 0) to ('mood', 2), got None")
        replace(items, models["items"])
        server.wait_for(lambda: server.log.read_text().count("the old model stays: ") == 2)
        replace(path, models["features"])
        server.wait_for(lambda: ranked().get("version") == server.version() == digests[0])


def test_reload(models, tmp_path):
    path = tmp_path / "served"
    shutil.copyfile(models["a"], path)
    digests = {name: scorer.Scorer.load(models[name]).digest for name in "ab"}
    with serving(tmp_path, path) as server:
        assert server.version() == digests["a"]
        replace(path, models["b"])
        server.wait_for(lambda: server.version() == digests["b"])
        check(server, models["b"], {"indices": GOOD}, GOOD)

        cut = tmp_path / "cut"
        cut.write_bytes(models["a"].read_bytes()[:-50])
        replace(path, cut)
        server.wait_for(lambda: "the old model stays:" in server.log.read_text())
        path.unlink()
        server.wait_for(lambda: "the old model stays for now: FileNotFoundError" in server.log.read_text())
        check(server, models["b"], {"indices": GOOD}, GOOD)

        replace(path, models["a"])  # and after all that it still looks
        server.wait_for(lambda: server.version() == digests["a"])
        assert server.log.read_text().count("is damaged") == 1  # one line per file, not one per look
        assert server.stop() in (0, -15)
        assert "Application shutdown complete" in server.log.read_text()


@pytest.mark.parametrize("content", [None, b"something else"])
def test_nothing_to_serve(tmp_path, content):
    path = tmp_path / "m"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert ("No such file" if content is None else "is not a scorer file") in done.stderr
    assert "Traceback" not in done.stderr


def test_load_while_the_model_is_swapped(models):
    both = [str(models[name]) for name in "ab"]
    command = [sys.executable, str(EXAMPLES / "load_test.py"), "--serve", both[0], "--swap", *both]
    done = subprocess.run([*command, "--seconds", "2.5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"([\d,]+) answers, 0 failed or dropped\n.* replaced (\d+) times; .* change (\d+) times", done.stdout
    )
    answers, swaps, changes = (int(number.replace(",", "")) for number in found.groups())
    assert answers > 100 and swaps >= 3 and changes >= 2


def test_the_load_test_sees_failures(server, models, tmp_path):
    body = tmp_path / "body"
    body.write_bytes(as_json({"indices": [[1, 2, 1000]]}))
    command = [sys.executable, str(EXAMPLES / "load_test.py"), "--url", f"http://127.0.0.1:{server.port}"]
    done = subprocess.run([*command, "--body", str(body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "422" in done.stderr


def test_the_server_imports_no_tensorflow(models, tmp_path):
    """Nor Keras and pandas: it starts and scores where none of them can be imported."""
    script = tmp_path / "without.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['tensorflow', 'keras', 'pandas']))\n"
        f"sys.argv[0] = {str(EXAMPLES / 'serve.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    inputs = {"user": ["ann"], "age": [1], "genres": ["war"]}
    with serving(tmp_path, models["features"], command=(script,)) as server:
        assert server.score({"inputs": inputs})[0] == 200


def test_several_heads(models, tmp_path):
    """Scores are an object of lists, by head; of classes a list of their probabilities each."""
    request = {"indices": [[1, 2, 3], [4, 5, 6]]}
    with serving(tmp_path, models["heads"]) as server:
        status, answer = server.score(request)
    assert status == 200 and list(answer["scores"]) == ["click", "genre"]
    wanted = scorer.Scorer.load(models["heads"]).score(np.array(request["indices"]))
    for name, scores in answer["scores"].items():
        np.testing.assert_array_equal(np.array(scores, np.float32), wanted[name])
