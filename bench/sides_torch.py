"""PyTorch's formula, eager and compiled, and FBGEMM's CPU table-batched embedding."""

import numpy as np
import torch


def formula(rows, values):
    """The same formula, from the rows."""
    e = rows.float() * values[..., None]
    s = e.sum(1)
    return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)


def fbgemm(case, table, sets, values):
    """One table that all fields look up in; a gradient is a whole step of its fused SGD, in place."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(case.rows, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        feature_table_map=[0] * case.fields,
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=1.0,
    )
    module.split_embedding_weights()[0].copy_(table)
    by_field = [i.T.contiguous().view(-1) for i in sets]
    weights = values.T.contiguous().view(-1)
    offsets = torch.arange(case.batch * case.fields + 1)

    def lookup(n):
        return module(by_field[n], offsets, per_sample_weights=weights)

    def interaction(n):
        e = lookup(n).view(case.batch, case.fields, case.dim)
        s = e.sum(1)
        return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)

    state = {"checked": False}

    def step(n):
        if state["checked"]:
            interaction(n).sum().backward()
            return None
        state["checked"] = True
        weight = module.split_embedding_weights()[0]
        before = weight.clone()
        interaction(n).sum().backward()
        rows = torch.unique(sets[n])
        gradient = before[rows] - weight[rows]
        weight.copy_(before)
        module.set_learning_rate(0.0)
        return rows, gradient

    return {
        "FBGEMM lookup alone": {"forward": lookup},
        "FBGEMM lookup, formula": {"forward": interaction, "gradient": step},
    }


def sides(case, table, indices, values):
    torch.set_num_threads(2)
    table = torch.from_numpy(table)
    table = table if case.dtype == "float32" else table.bfloat16()
    sets, x = [torch.from_numpy(i) for i in indices], torch.from_numpy(values)
    compiled = torch.compile(formula)

    def make(function, lookup):
        def forward(n):
            with torch.no_grad():
                return function(lookup(n), x)

        def gradient(n):
            rows = lookup(n).requires_grad_()
            (d,) = torch.autograd.grad(function(rows, x).sum(), rows)
            return sets[n].view(-1), d.view(-1, case.dim)

        return {"forward": forward, "gradient": gradient}

    made = {
        "PyTorch eager": make(formula, lambda n: torch.nn.functional.embedding(sets[n], table)),
        "PyTorch compiled": make(compiled, lambda n: torch.nn.functional.embedding(sets[n], table)),
    }
    if case.dtype == "float32" and case.dim % 4 == 0:
        made.update(fbgemm(case, table, sets, x))
    return made


def result(kind, value):
    arrays = value if kind == "gradient" else [value]
    return [np.asarray(a.detach().float() if a.is_floating_point() else a) for a in arrays]
