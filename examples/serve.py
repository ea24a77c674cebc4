"""Serves a file that `deepfm_ops.export_scorer` wrote over HTTP: JSON in, scores out, without TensorFlow.

pip install ".[serve]"
python examples/serve.py model.scorer [--items FILE] [--host NAME] [--port N] [--max-batch N] [--max-body BYTES]
                         [--max-bodies BYTES] [--body-seconds S] [--reload-seconds S]

    curl localhost:8000/score -d '{"indices": [[3, 20, 41]], "values": [[1, 1, 0.5]]}'
    {"scores":[0.53125],"version":"9b1c..."}

`values` may be left out: all ones. A model of raw features takes {"inputs": {"user": ["ann"], "age": [0.3]}}. A score
that is not a finite number is null. "version" is that of the model that computed the scores, whatever is loaded
meanwhile: replace the file as a whole (as export_scorer does), and the server scores with the new one from then on.
With --items, the file of `scorer.items(table, key).save(path)`, it ranks them for a user too:

    curl localhost:8000/rank -d '{"user": {"user": "ann", "age": 0.3}, "k": 2, "shortlist": 1000, "among": [3, 14, 15]}'
    {"positions":[14,3],"scores":[0.71875,0.5],"keys":["Z","M"],"version":"9b1c..."}

"shortlist" and "among" may be left out. A model of several heads is asked for one, {"head": "click"}, or for a class of
one, {"head": ["mood", 2]}. Items belong to one model: of a new pair of files, which may come in any order,
both are served from when the second is there.
What cannot be scored is answered by 400 (not JSON), 413 (too large) or 422, and {"detail": what is wrong}. A request
that takes too long to arrive is answered by 408, one whose body finds no memory left by 503, and its connection closed:
however many clients are slow, they hold no more than that, and the others are served.
"""

import os

# Requests run side by side: NumPy's own threads would get in their way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import logging
import resource
import sys
import threading
from asyncio import get_running_loop
from typing import NamedTuple

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import deepfm_ops
from deepfm_ops.scorer import Items, Scorer, ScorerFileError

# A request up to this size is answered on the event loop, a larger one in a thread, so that short ones do not wait for
# it: so many samples take a DeepFM with three layers of 400 about a millisecond, the way to a thread and back 0.1 ms.
INLINE_BYTES, INLINE_BATCH = 1 << 15, 64
LONGEST_HEAD = 1 << 16  # bytes of a request's line and headers
log = logging.getLogger("uvicorn.error")


class Patient(HttpToolsProtocol):
    """uvicorn's protocol, for clients that may never send what they began: it waits for a request so long, no longer.

    uvicorn itself waits for ever, but for the first byte after an answer. The time counts from the connection, or from
    a later request's first byte, to the last byte of the body.
    """

    seconds = 10.0

    def connection_made(self, transport):
        super().connection_made(transport)
        self._silent, self._in_head, self._is_whole = True, True, False
        self._head = 0  # bytes of a line and headers that have not come to their end
        self._start()

    def on_message_begin(self):
        super().on_message_begin()
        self._in_head, self._is_whole = True, False
        self._head = 0 if self.cycle is None else None

    def on_headers_complete(self):
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self):
        self._is_whole = True
        super().on_message_complete()

    def data_received(self, data):
        self._silent = False
        super().data_received(data)
        if self._in_head:  # what came with its first byte may be of the request before
            self._head = 0 if self._head is None else self._head + len(data)
        if self._in_head and self._head > LONGEST_HEAD:
            self._give_up("431 Request Header Fields Too Large", f"the headers have more than {LONGEST_HEAD} bytes")
        elif self._is_whole:
            self._stop()
        elif self._timer is None:
            self._start()

    def connection_lost(self, exc):
        self._stop()
        super().connection_lost(exc)
        self.cycle = None  # else both wait for the garbage collector, who holds everybody up

    def _start(self):
        what = f"the request took more than {self.seconds:g} s to arrive"
        self._timer = self.loop.call_later(self.seconds, self._give_up, "408 Request Timeout", what)

    def _stop(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, status, detail):
        """Answers, if something was asked and no answer has begun, and closes the connection."""
        self._stop()
        if self._in_head:
            is_free = self.cycle is None or self.cycle.response_complete  # of the request before
        else:
            is_free = not self.cycle.response_started
        if not self._silent and is_free and not self.transport.is_closing():
            body = f'{{"detail":"{detail}"}}'
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        self.transport.close()


def create_app(path, items=None, *, max_batch=1024, max_body=4 << 20, max_bodies=256 << 20, reload_seconds=1.0):
    """The ASGI application.

    Args:
        path: of the model.
        items: path of the items to rank, or None.
        max_batch: the most samples of a request, and the most items of an answer.
        max_body: the most bytes of a request's body.
        max_bodies: the most bytes of all bodies that are there at a time; short ones always find room.
        reload_seconds: how often to look whether the file is another one.

    Raises:
        FileNotFoundError, ScorerFileError: there is nothing to serve.

    """
    stamp = _stamp(path, items)  # before the files are read: what changes later is seen by the watch
    served = _Served.load(path, items)
    stopping = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "score")
    bodies = _Bodies(max_bodies)

    def watch():
        nonlocal served, stamp
        while not stopping.wait(reload_seconds):
            try:
                now = _stamp(path, items)
                if now == stamp:
                    continue
                # Another Scorer, not scorer.reload(): a request keeps the one that it started with, and its digest.
                fresh = _Served.load(path, items)
                if fresh.scorer.digest != served.scorer.digest:
                    log.info("now serving version %s", fresh.scorer.digest)
                served, stamp = fresh, now
            except ScorerFileError as error:
                log.error("the old model stays: %s", error)
                stamp = now
            except Exception as error:  # it may pass: no such file at the moment, out of memory
                log.error("the old model stays for now: %r", error)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        watcher = threading.Thread(target=watch, name="watch", daemon=True)
        watcher.start()
        yield
        stopping.set()
        watcher.join()
        pool.shutdown()

    app = FastAPI(title="deepfm_ops", version=deepfm_ops.__version__, lifespan=lifespan)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/version")
    async def version():
        current = served.scorer
        return {"version": current.digest, "model": current.info, "deepfm_ops": deepfm_ops.__version__}

    async def answer(request, of, is_short):
        """What `of` makes of the body: here, if `is_short` says so of what it holds, else in a thread."""
        body = bytearray()
        try:
            await _read(request, body, max_body, bodies)
            current, in_pool = served, get_running_loop().run_in_executor
            if len(body) > INLINE_BYTES:
                found = await in_pool(pool, lambda: of(current, _parse(body), max_batch))
            elif is_short(request_json := _parse(body)):
                found = of(current, request_json, max_batch)
            else:
                found = await in_pool(pool, of, current, request_json, max_batch)
        except ClientDisconnect:  # or the time was up: there is nobody to answer
            return Response(status_code=408)
        finally:
            bodies.held -= len(body)
        return Response(found, media_type="application/json")

    async def score(request: Request):
        return await answer(request, _scores, lambda body: _batch(body) <= INLINE_BATCH)

    async def rank(request: Request):
        return await answer(request, _ranks, lambda body: False)

    # Plain routes: FastAPI's own reading of parameters would make a short request a third dearer, for nothing.
    app.add_route("/score", score, methods=["POST"])
    app.add_route("/rank", rank, methods=["POST"])
    return app


class _Served(NamedTuple):
    """What requests are answered with; those that run keep theirs."""

    scorer: Scorer
    items: Items | None

    @classmethod
    def load(cls, path, items):
        scorer = Scorer.load(path)
        return cls(scorer, None if items is None else Items.load(items, scorer))


def _stamp(*paths):
    found = [os.stat(path) for path in paths if path is not None]
    return [(one.st_mtime_ns, one.st_ino, one.st_size) for one in found]


@dataclasses.dataclass
class _Bodies:
    """The bytes of all bodies that are there."""

    most: int
    held: int = 0


async def _read(request, body, most, bodies):
    """Appends the body, of at most so many bytes, whether its length was announced or not; counts them as held."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            body += chunk
            bodies.held += len(chunk)
            if bodies.held > bodies.most and size > INLINE_BYTES:
                again = {"Connection": "close", "Retry-After": "1"}
                raise HTTPException(503, f"all bodies have more than {bodies.most} bytes: try again", again)
            continue
        bodies.held -= len(body)
        body.clear()
        if size > 8 * most:
            break
    if size > most:
        # Many clients look for an answer only after they have sent everything, so that the rest of a body that is too
        # long is read and forgotten; not without an end, and then the connection cannot be used again.
        raise HTTPException(413, f"the body has more than {most} bytes", {"Connection": "close"})


def _parse(body):
    """The JSON object of a body."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise HTTPException(422, "the body must be a JSON object")
    return request


def _batch(request):
    """How many samples there are, more or less: what is wrong is found later."""
    inputs = request.get("inputs")
    parts = [request.get("indices"), *(inputs.values() if isinstance(inputs, dict) else [])]
    return max((len(part) for part in parts if isinstance(part, list)), default=0)


def _scores(served, request, max_batch):
    """The JSON answer to a request for scores."""
    scorer = served.scorer
    with _refusing():
        if request.keys() == {"inputs"}:
            scores = scorer.score(_columns(request["inputs"], scorer.info["kinds"], max_batch))
        elif request.keys() == {"indices"} or request.keys() == {"indices", "values"}:
            scores = scorer.score(*_matrices(request, scorer.info, max_batch))
        else:
            raise ValueError(f"the body must hold indices and maybe values, or inputs alone; got {sorted(request)}")
    return _json({"scores": scores, "version": scorer.digest})


def _ranks(served, request, max_batch):
    """The JSON answer to a request for the best items."""
    scorer, items = served
    if items is None:
        raise HTTPException(404, "this server ranks no items: start it with --items")
    with _refusing():
        names = ("user", "k", "among", "shortlist", "head")
        if not {"user", "k"} <= request.keys() <= set(names):
            raise ValueError(
                f"the body must hold user and k, and maybe among, shortlist and head; got {sorted(request)}"
            )
        user, k, among, shortlist, head = map(request.get, names)
        if type(user) is not dict:
            raise TypeError("user must be an object with an input's value each")
        if type(k) is not int or type(shortlist) not in (int, type(None)):
            raise TypeError("k and shortlist must be integers")
        if k > max_batch:
            raise HTTPException(413, f"k is {k}, at most {max_batch} are allowed")
        if among is not None:
            if type(among) is not list or set(map(type, among)) - {int}:
                raise TypeError("among must be a list of positions")
            try:
                among = np.array(among, np.int64)
            except OverflowError:
                raise IndexError("among has a position that no item has") from None
        kinds = {name: kind for name, kind in scorer.info["kinds"].items() if name not in map(str, items.inputs)}
        _check_names("user", user, kinds, "of the user the model has")
        columns = _columns({name: [value] for name, value in user.items()}, kinds, max_batch) if kinds else {}
        found = scorer.rank(columns, items, k, among=among, shortlist=shortlist, head=head)
    positions, scores = (x.reshape(-1) for x in found)
    answer = {"positions": positions, "scores": scores, "version": scorer.digest}
    return _json(answer if items.key is None else answer | {"keys": items.keys(positions)})


@contextlib.contextmanager
def _refusing():
    """Answers by 422 to what the scorer's documented errors say."""
    try:
        yield
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise HTTPException(422, str(error.args[0])[:1000]) from None


def _json(answer):
    # NumPy's float32 in its shortest form; NaN and infinities, which JSON lacks, become null.
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _check_batch(size, max_batch):
    if size == 0:
        raise ValueError("the batch is empty")
    if size > max_batch:
        raise HTTPException(413, f"the batch has {size} samples, at most {max_batch} are allowed")


def _matrices(request, info, max_batch):
    """(indices, values or None) as arrays."""
    columns = info["num_columns"]
    if columns is None:
        raise ValueError(f"this model takes inputs: {list(info['kinds'])}")
    indices = _matrix("indices", request["indices"], columns, max_batch, {int}, np.int64)
    if "values" not in request:
        return indices, None
    values = _matrix("values", request["values"], columns, max_batch, {int, float}, np.float32)
    if len(values) != len(indices):
        raise ValueError(f"indices and values must be equally long, got {len(indices)} and {len(values)}")
    return indices, values


def _matrix(name, rows, columns, max_batch, types, dtype):
    """A list of lists as an array.

    NumPy is told the dtype, and the types are checked here: left to itself, it makes text of numbers among texts, each
    as long as the longest, gigabytes from a small body.
    """
    if type(rows) is not list or set(map(type, rows)) - {list} or set(map(len, rows)) - {columns}:
        raise ValueError(f"{name} must be a list of lists of {columns} numbers each")
    _check_batch(len(rows), max_batch)
    flat = list(itertools.chain.from_iterable(rows))
    if wrong := set(map(type, flat)) - types:
        kind = "integers" if types == {int} else "numbers"
        raise TypeError(f"{name} must hold {kind}, got {_json_names(wrong)}")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype).reshape(len(rows), columns)
    except (OverflowError, FloatingPointError):
        raise ValueError(f"{name} holds a number that {dtype.__name__} cannot") from None


def _columns(inputs, kinds, max_batch):
    """Raw inputs as the scorer takes them: {name: a list, or an array}."""
    if not kinds:
        raise ValueError("this model takes indices and values, no inputs")
    if type(inputs) is not dict:
        raise TypeError(f"inputs must be an object with the columns {list(kinds)}")
    _check_names("inputs", inputs, kinds)
    for name, column in inputs.items():
        if type(column) is not list:
            raise TypeError(f"input {name!r} must be a list with an entry per sample")
        _check_batch(len(column), max_batch)
        _check_entries(name, column, kinds[name])
    lengths = {name: len(column) for name, column in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"inputs must be equally long, got {lengths}")
    return inputs


def _check_names(owner, given, kinds, has="the model has"):
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ValueError(f"{owner} has unknown columns {unknown}; {has} {list(kinds)}")
    if missing := [name for name in kinds if name not in given]:
        raise KeyError(f"{owner} is missing the columns {missing}")


NUMBERS = {int, float, bool}
SCALARS = NUMBERS | {str, type(None)}
# What may be in a column, by its kind; the kinds that are missing here are numbers of some dtype.
TYPES = {"numeric": NUMBERS | {type(None)}} | dict.fromkeys(["categorical", "multivalued", "string", "int64"], SCALARS)


def _check_entries(name, column, kind):
    """Raises for types that the column cannot have: NumPy would make text, or gigabytes of it, of some."""
    lists = {"categorical": 0, "numeric": 0, "multivalued": 1}.get(kind, 3)  # that may lie in each other
    for _ in range(lists):
        column = itertools.chain.from_iterable(entry if type(entry) is list else [entry] for entry in column)
    if wrong := set(map(type, column)) - TYPES.get(kind, NUMBERS):
        raise TypeError(f"input {name!r} must not hold {_json_names(wrong)}" + (" there" if lists else ""))


def _json_names(types):
    names = {str: "text", type(None): "null", bool: "true or false", float: "fractions", list: "lists", dict: "objects"}
    return " and ".join(sorted(names.get(kind, kind.__name__) for kind in types))


def main():
    parser = argparse.ArgumentParser(description="Serves a file that deepfm_ops.export_scorer wrote.")
    parser.add_argument("model", help="the file; replace it as a whole to serve another model")
    parser.add_argument("--items", help="the file of Items.save; it belongs to the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=1024, help="the most samples of a request, items of an answer")
    parser.add_argument("--max-body", type=int, default=4 << 20, help="the most bytes of a request")
    parser.add_argument("--max-bodies", type=int, default=256 << 20, help="the most bytes of all requests at a time")
    parser.add_argument("--body-seconds", type=float, default=10.0, help="how long a request may take to arrive")
    parser.add_argument("--reload-seconds", type=float, default=1.0, help="how often to look for a new file")
    arguments = parser.parse_args()
    try:
        app = create_app(
            arguments.model,
            arguments.items,
            max_batch=arguments.max_batch,
            max_body=arguments.max_body,
            max_bodies=arguments.max_bodies,
            reload_seconds=arguments.reload_seconds,
        )
    except (OSError, ScorerFileError) as error:
        sys.exit(f"{parser.prog}: {error}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every connection is a file
    Patient.seconds = arguments.body_seconds
    # A full collection goes over all connections there are, and holds everybody up. Young objects are still collected,
    # and a request leaves hardly any that only a full one would find.
    gc.set_threshold(*gc.get_threshold()[:2], 10_000)
    # A log line per request would make a short one a third dearer. SIGTERM: open requests have ten seconds to end.
    options = {"access_log": False, "timeout_graceful_shutdown": 10, "http": Patient}
    uvicorn.run(app, host=arguments.host, port=arguments.port, **options)


if __name__ == "__main__":
    main()
