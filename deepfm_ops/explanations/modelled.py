"""The terms of a Keras model."""

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import arguments
from deepfm_ops.explanations import names
from deepfm_ops.explanations.scored import is_raw, labels_of, matrices_of
from deepfm_ops.explanations.terms import Side
from deepfm_ops.features import columns_tensorflow as encoding
from deepfm_ops.features.columns import input_specs
from deepfm_ops.models.base import ConfiguredModel, check_integers, fitting
from deepfm_ops.models.matrix import check_values
from deepfm_ops.scorer.scoring import as_matrices


class ModelSide(Side):
    """A DeepFM over matrices or feature columns, as `predict` has it: with averaged weights, and without dropout."""

    def __init__(self, model, features=None):
        if not isinstance(model, ConfiguredModel):
            what = f"the class {model.__name__}: make one" if isinstance(model, type) else type(model).__name__
            hint = ""
            if hasattr(model, "export_scorer"):
                hint = "; its tables are elsewhere: export_scorer it, and explain the Scorer"
            raise TypeError(f"model must be a deepfm_ops.DeepFM or a deepfm_ops.scorer.Scorer, got {what}{hint}")
        self.model, plan = model, model.plan
        self.plan, parts = plan, plan.tables
        model.show_averages()
        if plan.inputs is not None:
            if features is not None:
                self.require(features)
            self.encoders = [encoding.ColumnEncoder(columns) for columns in plan.encoders]
            sizes = [(column.name, column.dimension) for column in plan.linear_dense]
            self.names = names.ColumnNames([self.encoders[part.encoder].plan for part in parts], sizes)
            layouts, self.dense_fields = self.names.layouts, self.names.dense_fields
            self.num_features = self.names.num_features
            dense = {"linear": plan.linear_dense, "deep": plan.deep_dense}
            self._dense = {name: encoding.DenseColumns(columns) for name, columns in dense.items() if columns}
        else:
            if features is not None:
                self.require(features)
            features = model.features if features is None else features
            self.names = names.MatrixNames(features, parts[0].field_sizes)
            layouts, self.num_features = [self.names.layout] * len(parts), parts[0].source.num_features
        self.activation = keras.activations.get(plan.activation)
        pairs, first = list(zip(parts, layouts, strict=True)), len(plan.first_orders)
        self.first_orders, self.lookups = pairs[:first], pairs[first:]
        weights = [_array(layer.field_weights) for layer in plan.field_weights]
        projections = [_array(layer.kernel) for layer in plan.projections]
        self._arrange(plan.task, _array(plan.head.bias), plan.second_order, plan.order, weights, projections)

    def require(self, features):
        """Raises ValueError for a dictionary, or a stream's, that has not made the model's matrices."""
        if self.plan.inputs is not None:
            raise ValueError("this model takes the inputs of its columns, and not the matrices of a dictionary")
        fitting(self.model, features)

    def prepared(self, inputs):
        if self.plan.inputs is not None:
            return _Prepared(self, self.model._checked(inputs))
        if is_raw(inputs, False):
            if self.names.features is None:
                raise ValueError(
                    "this model does not know its features, so it takes indices and values: make it by "
                    "DeepFM.from_features, set model.features, or give features="
                )
            inputs = self.names.features.transform(inputs)
        indices, values = matrices_of(inputs)
        check_integers("indices", indices)
        indices, values = as_matrices(indices, values)
        values = np.ones(indices.shape, np.float32) if values is None else values
        columns = self.names.layout.bags[-1].stop
        if indices.ndim != 2 or indices.shape[1] != columns:
            raise ValueError(f"indices must have shape [B, {columns}], got {indices.shape}")
        if values.shape != indices.shape:
            raise ValueError(f"values must have the shape of indices, {indices.shape}, got {values.shape}")
        check_values(values)
        return _Prepared(self, {"indices": indices, "values": values})

    def pairs_of(self, prepared, rows):
        inputs = {name: x[rows] for name, x in prepared.inputs.items()}
        if self.plan.inputs is None:
            return [(inputs["indices"], inputs["values"], None)], inputs
        pairs = [encoder({name: inputs[name] for name in input_specs(encoder.columns)}) for encoder in self.encoders]
        return [tuple(x.numpy() for x in found) for found in pairs], inputs

    def rows(self, part, indices, values):
        source = part.source
        wrong = (indices < 0) | (indices >= source.num_features)
        if wrong.any():
            place = np.unravel_index(np.argmax(wrong), wrong.shape)
            raise IndexError(
                f"indices[{','.join(map(str, place))}] = {indices[place]} is not in [0, {source.num_features})"
            )
        table = getattr(source, "embeddings", None)  # of max pooling, a first order is one of one column
        table = source.w if table is None else table
        dtype = arguments.accumulation_dtype(tf.as_dtype(table.dtype)).as_numpy_dtype
        values = values.astype(dtype, copy=False)
        e = _gathered(table, indices, dtype) * values[..., np.newaxis]
        if not self.has_first_order(part):
            return e, None
        return e, _gathered(source.w, indices, dtype)[..., self.number.place] * values

    def has_first_order(self, part):
        return part.linear and getattr(part.source, "embeddings", None) is not None and part.source.w is not None

    def dense_terms(self, inputs):
        x = self._dense_of("linear", inputs).numpy()
        return x * _array(self.plan.linear_kernel(np.eye(x.shape[1], dtype=np.float32)))[:, self.number.place]

    def deep(self, embeddings, inputs):
        if self.plan.deep is None:
            return None
        dtype = self.plan.deep.compute_dtype
        flat = [tf.cast(e.reshape(len(e), e.shape[1] * e.shape[2]), dtype) for e in embeddings]
        if self.plan.deep_dense:
            flat.append(tf.cast(self._dense_of("deep", inputs), dtype))
        x = tf.concat(flat, axis=1)
        for layer, norm in self.plan.hidden:
            x = layer(x)
            x = self.activation(x if norm is None else norm(x, training=False))
        return _array(self.plan.deep(x))[:, self.number.place]

    def probabilities(self, pairs, inputs):
        found = self.model(inputs, training=False)
        head = self.number.head
        return (found if head.name is None else found[head.name]).numpy()[:, self.number.class_]

    def _dense_of(self, which, inputs):
        layer = self._dense[which]
        return tf.cast(layer({column.name: inputs[column.name] for column in layer.columns}), tf.float32)


class _Prepared:
    def __init__(self, side, inputs):
        self.side, self.inputs, self.size = side, inputs, next(iter(inputs.values())).shape[0]

    def __len__(self):
        return self.size

    def labels(self, row):
        """(names of the first order's terms, names of the fields) of a sample."""
        side = self.side
        pairs, inputs = side.pairs_of(self, slice(row, row + 1))
        if side.plan.inputs is None:
            found = side.names.of_row(pairs[0][0][0], pairs[0][1][0], None, row)
            return labels_of(side, lambda part: found, [])
        dense = side._dense_of("linear", inputs).numpy()[0].tolist() if side.dense_fields else []
        numbers = [names.named(field, f"{x:g}") for field, x in zip(side.dense_fields, dense, strict=True)]

        def of(part):
            _, values, mask = pairs[part.encoder]
            return side.names.of_row(side.encoders[part.encoder].plan.columns, self.inputs, values[0], mask[0], row)

        return labels_of(side, of, numbers)


def _array(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float64" if x.dtype == "float64" else "float32"))


def _gathered(table, indices, dtype):
    return tf.cast(tf.gather(table.value, indices), dtype).numpy()
