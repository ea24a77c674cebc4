"""Training steps of PyTorch, with a dense and with a sparse Adam, and of FBGEMM's fused row-wise Adagrad."""

import torch
from train import B, F, K


def deepfm(rows, sparse):
    v, w = torch.nn.Embedding(rows, K, sparse=sparse), torch.nn.Embedding(rows, 1, sparse=sparse)
    torch.nn.init.normal_(v.weight, std=0.01)
    torch.nn.init.zeros_(w.weight)
    layers = []
    for i, o in ((F * K, 400), (400, 400), (400, 400)):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    mlp = torch.nn.Sequential(*layers, torch.nn.Linear(400, 1))

    def logits(indices):
        e = v(indices)
        s = e.sum(1)
        second = 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)
        return w(indices).sum(1) + second + mlp(e.flatten(1))

    if sparse:
        both = [torch.optim.SparseAdam([v.weight, w.weight], 1e-3), torch.optim.Adam(mlp.parameters(), 1e-3)]
    else:
        both = [torch.optim.Adam([v.weight, w.weight, *mlp.parameters()], 1e-3)]
    return logits, both


def fbgemm(rows):
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, K, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        feature_table_map=[0] * F,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.02,
    )
    torch.nn.init.normal_(module.split_embedding_weights()[0], std=0.01)
    offsets = torch.arange(B * F + 1)

    def logits(by_field):
        e = module(by_field, offsets).view(B, F, K)
        s = e.sum(1)
        return 0.5 * (s * s - (e * e).sum(1)).sum(1, keepdim=True)

    return logits, []  # the backward is the step


def step(side, rows, indices, labels):
    torch.manual_seed(1)
    torch.set_num_threads(2)
    indices, labels = [torch.from_numpy(i) for i in indices], [torch.from_numpy(y) for y in labels]
    if "FBGEMM" in side:
        indices = [i.T.contiguous().view(-1) for i in indices]
    logits, optimizers = fbgemm(rows) if "FBGEMM" in side else deepfm(rows, "Sparse" in side)

    def run(n):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(indices[n]), labels[n])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return run
