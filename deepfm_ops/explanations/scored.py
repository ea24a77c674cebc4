"""The terms of a scorer."""

import dataclasses
import math
from typing import Any

import numpy as np

from deepfm_ops.explanations import names
from deepfm_ops.explanations.terms import Side
from deepfm_ops.features.tables import is_table
from deepfm_ops.scorer.scoring import as_matrices


def side_of(scorer, features=None):
    """The side of a scorer as it is now, whatever `reload` does; without `features` it is made once."""
    model = scorer._model
    if features is not None:
        return ScorerSide(model, features)
    if model.side is None:
        model.side = ScorerSide(model)
    return model.side


class ScorerSide(Side):
    """The content of a scorer's file.

    The file has no texts: values of raw features are called as they were given, and without them by their numbers,
    unless `features` is given.
    """

    def __init__(self, model, features=None):
        self.model = model
        if model.inputs is not None:
            if features is not None:
                self.require(features)
            sizes = [(name, math.prod(model.inputs[name][0])) for name in model.linear_dense]
            parts = [*model.first_orders, *model.lookups]
            self.names = names.ColumnNames([model.encoders[part.encoder].plan for part in parts], sizes)
            layouts, self.dense_fields = self.names.layouts, self.names.dense_fields
            self.num_features = self.names.num_features
        else:
            parts = [*model.first_orders, *model.lookups]
            if features is not None:
                self.require(features)
            self.names = names.MatrixNames(features or model.features, parts[0].field_sizes)
            layouts, self.num_features = [self.names.layout] * len(parts), model.info["num_features"]
        pairs = list(zip(parts, layouts, strict=True))
        self.first_orders, self.lookups = pairs[: len(model.first_orders)], pairs[len(model.first_orders) :]
        order, weights = model.order, model.field_weights
        self._arrange(model.task, model.bias, model.second_order, order, weights, model.projections)

    def require(self, features):
        """Raises ValueError for a dictionary, or a stream's, that has not made the scorer's matrices."""
        model = self.model
        if model.inputs is not None:
            raise ValueError("this scorer takes the inputs of its columns, and not the matrices of a dictionary")
        expected = model.info["num_features"], [*model.first_orders, *model.lookups][0].field_sizes
        got = features.num_features, features.field_sizes
        if got != expected:
            raise ValueError(f"features have num_features and field_sizes {got}, but the scorer has {expected}")

    def prepared(self, inputs):
        model = self.model
        if is_raw(inputs, model.inputs is not None):
            features = self.names.features if model.inputs is None and model.features is None else None
            if features is not None:
                raw = dict(zip(("indices", "values"), features.transform(inputs), strict=True))
            else:
                raw = model.raw_inputs(inputs)
            return _Prepared(self, raw, len(next(iter(raw.values()))), inputs)
        if model.inputs is not None:
            raise TypeError(f"inputs must be a table or a dict of {list(model.inputs)}, got {type(inputs).__name__}")
        indices, values = matrices_of(inputs)
        indices, values = as_matrices(indices, values)
        model.pairs_of_matrix(indices, values)
        if values is not None and values.shape != indices.shape:
            raise ValueError(f"values must have the shape of indices, {indices.shape}, got {values.shape}")
        return _Prepared(self, {"indices": indices, "values": values}, len(indices))

    def pairs_of(self, prepared, rows):
        inputs = prepared.inputs
        if len(prepared) > rows.stop - rows.start:
            inputs = {name: None if x is None else x[rows] for name, x in inputs.items()}
        if self.model.inputs is None:
            return [(inputs["indices"], inputs["values"], None)], inputs
        return self.model.pairs(inputs), inputs

    def rows(self, part, indices, values):
        # Every pair is a sample here, so that the sum over it is its row, of any of the tables' dtypes.
        splits = np.arange(indices.size + 1)
        flat = None if values is None else values.reshape(-1)
        try:
            e, _, _, linear = part(indices.reshape(-1), flat, "sum", row_splits=splits)
        except IndexError:
            part(indices, values)  # says where
            raise
        linear = None if linear is None else linear[:, self.number.place].reshape(indices.shape)
        return e.reshape(*indices.shape, e.shape[1]), linear

    def has_first_order(self, part):
        return part.weights is not None or (part.numbers == 1 and part.table.dtype == np.uint8)

    def dense_terms(self, inputs):
        found = np.concatenate([inputs[name] for name in self.model.linear_dense], axis=1)
        return found.astype(np.float32, copy=False) * self.model.linear_kernel[:, self.number.place]

    def deep(self, embeddings, inputs):
        return None if self.model.deep is None else self.model.deep_part(embeddings, inputs)[:, self.number.place]

    def probabilities(self, pairs, inputs):
        found, head = self.model._scores(pairs, inputs, None), self.number.head
        return (found if head.name is None else found[head.name])[:, self.number.class_]


@dataclasses.dataclass
class _Prepared:
    side: ScorerSide
    inputs: dict
    size: int
    table: Any = None

    def __len__(self):
        return self.size

    def labels(self, row):
        """(names of the first order's terms, names of the fields) of a sample."""
        side = self.side
        pairs: Any
        pairs, inputs = side.pairs_of(self, slice(row, row + 1))
        if side.model.inputs is None:
            indices, values, _ = pairs[0]
            values = np.ones(indices.shape[1]) if values is None else values[0]
            found = side.names.of_row(indices[0], values, self.table, row)
            return labels_of(side, lambda part: found, [])
        dense = np.concatenate([inputs[name] for name in side.model.linear_dense] or [np.zeros((1, 0))], axis=1)
        numbers = [names.named(field, f"{x:g}") for field, x in zip(side.dense_fields, dense[0].tolist(), strict=True)]

        def of(part):
            _, values, mask = pairs[part.encoder]
            columns = side.model.encoders[part.encoder].plan.columns
            return side.names.of_row(columns, self.inputs, values[0], mask[0], row)

        return labels_of(side, of, numbers)


def labels_of(side, of, numbers):
    """The labels of a sample, of `of(part)`, what each column of a part holds, and the names of dense terms."""
    first, fields = [], []
    for part, layout in side.first_orders:
        first += list(map(names.named, layout.column_fields, of(part)))
    for part, layout in side.lookups:
        found = of(part)
        fields += names.by_field(layout, found)
        if side.has_first_order(part):
            first += list(map(names.named, layout.column_fields, found))
    return [*first, *numbers], fields


def is_raw(inputs, of_columns):
    """Whether inputs are a table of raw features, and not {"indices": ..., "values": ...} of a model over matrices."""
    return is_table(inputs) and (of_columns or not _is_matrices(inputs))


def _is_matrices(inputs):
    return isinstance(inputs, dict) and set(inputs) == {"indices", "values"}


def matrices_of(inputs):
    """(indices, values or None) of what may hold them."""
    if _is_matrices(inputs):
        return inputs["indices"], inputs["values"]
    if isinstance(inputs, tuple | list) and len(inputs) == 2 and not any(isinstance(x, tuple) for x in inputs):
        return inputs[0], inputs[1]
    if hasattr(inputs, "__array__"):
        return inputs, None
    raise TypeError(f"inputs must be (indices, values), got {type(inputs).__name__}")
