"""A scorer's file of tables that no process holds."""

import json
import os
import pathlib
import secrets

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops.cluster import remote
from deepfm_ops.cluster.config import ClusterError
from deepfm_ops.cluster.storage import explained, one_line
from deepfm_ops.cluster.tables import CHUNK, Sharded, chunks, on_each
from deepfm_ops.container import Rows
from deepfm_ops.placement import beside
from deepfm_ops.scorer import file, rows
from deepfm_ops.scorer.export import write_main, write_scorer


def export(steps, path, table, features, shards):
    """See `ShardedDeepFM.export_scorer`; steps: its `Steps`."""
    with _averaged(steps):
        if shards:
            digests = _write_shards(steps, path, table)
            write_main(steps.template, path, digests, table, features, steps.rows)
        else:
            found = {}
            for part in steps.tables:
                some = Sharded(part.name, [variable.value for variable in part.parts], part.rows)
                shape = (part.rows, *part.columns)
                found[part.name.split("/")[-1]] = Rows(
                    shape, np.float32, lambda some=some, of=part: chunks(some, lambda *place: _rows(steps, of, *place))
                )
            write_scorer(steps.template, path, table, features, found)


def _rows(steps, table, part, local):
    """Rows of a part as they predict, float32; on its server."""
    variable = table.parts[part]
    return tf.cast(steps.average(variable, tf.gather(variable.value, local), local), tf.float32)


def _averaged(steps):
    """Inside, dense weights are those that predict."""
    found = []
    for variable in steps.dense:
        with beside(variable):
            found.append((variable, steps.average(variable, tf.convert_to_tensor(variable.value))))
    return keras.StatelessScope(found)


def _write_shards(steps, path, table):
    """The digests of the shards, each written by the server that has its rows."""
    path, count = pathlib.Path(os.path.realpath(path)), len(steps.servers)
    drafts = [f"{path}.{secrets.token_hex(8)}-{part:05}.rows" for part in range(count)]
    own = {of.name.split("/")[-1]: of.columns[0] for of in steps.tables}

    def write(part, draft):
        try:
            return write_part(part, draft)
        except tf.errors.OpError as error:
            raise explained(steps.servers[part], error) from None

    def write_part(part, draft):
        for of in steps.tables:
            size = of.parts[part].shape[0]
            for begin in range(0, size, CHUNK):
                with beside(of.parts[part]):
                    local = tf.range(begin, min(begin + CHUNK, size), dtype=tf.int64)
                    _append(draft, _rows(steps, of, part, local))
        size = steps.tables[0].parts[part].shape[0]
        shape = {"name": steps.source.name, "tables": own, "rows": size, "index": part, "count": count, "table": table}
        with beside(steps.tables[0].parts[part]):
            digest = _seal(str(path), draft, json.dumps(shape))[0].numpy().decode()
        if not file.shard_path(path, part, count, digest).exists():
            raise ClusterError(
                f"server {part} wrote its shard of {path}, and the chief does not see it: take a folder that all share"
            )
        return digest

    return on_each(write, range(count), drafts)


@remote.function(tf.bool)
def _append(draft, some):
    with one_line(draft.decode()), open(draft.decode(), "ab") as out:
        out.write(some.tobytes())
    return np.True_


@remote.function(tf.string)
def _seal(path, draft, shape):
    """Makes rows that were appended, table after table, the shard of a scorer's file; returns its digest."""
    shape, draft = json.loads(shape), pathlib.Path(draft.decode())
    try:
        # A server has no row where there are fewer than servers.
        raw, start = np.memmap(draft, np.float32, "r") if shape["rows"] else np.zeros(0, np.float32), 0
        found = {"embeddings": None, "w": None}
        for name, columns in shape["tables"].items():
            stop = start + shape["rows"] * columns
            found[name] = Rows.of(raw[start:stop].reshape(-1, columns))
            start = stop
        index, count = shape["index"], shape["count"]
        arrays = rows.stored(shape["name"], found["embeddings"], found["w"], shape["table"], index, count)
        with one_line(path.decode()):
            return file.write_shard(path.decode(), index, count, arrays).encode()
    finally:
        draft.unlink(missing_ok=True)
