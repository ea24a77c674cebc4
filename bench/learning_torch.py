"""Learning with PyTorch: an FM and a DeepFM, Adam, and a penalty on the whole tables as Keras and DeepCTR have it."""

import copy
import time

import torch
from learning import BATCH, DIM, EPOCHS, HIDDEN, PATIENCE, RATE, logloss


class Model(torch.nn.Module):
    """FM, and with a dropout rate DeepFM."""

    def __init__(self, data, dropout=None):
        super().__init__()
        self.columns, self.mlp = data.columns.tolist(), None
        self.v, self.w = torch.nn.Embedding(data.num_features, DIM), torch.nn.Embedding(data.num_features, 1)
        torch.nn.init.normal_(self.v.weight, std=0.01)
        torch.nn.init.zeros_(self.w.weight)
        self.bias = torch.nn.Parameter(torch.zeros(1))
        if dropout is not None:
            layers, width = [], len(self.columns) * DIM
            for units in HIDDEN:
                layers += [torch.nn.Linear(width, units), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
                width = units
            self.mlp = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))
            for layer in self.mlp:
                if isinstance(layer, torch.nn.Linear):  # as Keras starts them
                    torch.nn.init.xavier_uniform_(layer.weight)
                    torch.nn.init.zeros_(layer.bias)

    def forward(self, indices, values):
        values = values.unsqueeze(2)
        e = self.v(indices) * values
        if len(self.columns) < e.shape[1]:  # a field's columns are summed
            e = torch.stack([field.sum(1) for field in e.split(self.columns, 1)], 1)
        s = e.sum(1)
        logits = self.bias + (self.w(indices) * values).sum((1, 2)) + 0.5 * (s * s - (e * e).sum(1)).sum(1)
        return logits if self.mlp is None else logits + self.mlp(e.flatten(1)).squeeze(1)


def fit(side, data, seed, l2, dropout=None, patience=PATIENCE):
    torch.manual_seed(seed)
    model, loss_of = Model(data, dropout), torch.nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    (indices, values), labels = data.of("train")
    train = [torch.from_numpy(x) for x in (indices, values, labels)]
    inputs, labels = data.of("validation")
    best, losses, seconds = None, [], []

    def predict(indices, values):
        model.eval()
        with torch.no_grad():
            parts = zip(*(torch.from_numpy(x).split(8192) for x in (indices, values)), strict=True)
            return torch.sigmoid(torch.cat([model(*part) for part in parts])).numpy()

    for _ in range(EPOCHS):
        model.train()
        start = time.perf_counter()
        for rows in torch.randperm(len(train[2])).split(BATCH):
            i, x, y = (part[rows] for part in train)
            loss = loss_of(model(i, x), y) + l2 * (model.v.weight.square().sum() + model.w.weight.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(logloss(labels, predict(*inputs)))
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
        elif len(losses) > losses.index(min(losses)) + patience:
            break
    model.load_state_dict(best)
    return predict, losses, seconds
