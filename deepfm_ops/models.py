"""DeepFM as a Keras model, over index and value matrices or over feature columns."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import columns as _columns
from deepfm_ops.features import DEFAULT_GROUP_NAME, DenseFeat, VarLenSparseFeat, input_specs
from deepfm_ops.layers import FirstOrder, FMInteraction, positive

TASKS = ("binary", "regression")
SCOPES = ("batch", "table")


@keras.saving.register_keras_serializable("deepfm_ops")
class Head(keras.layers.Layer):
    """Adds the parts of a model to a bias and, for "binary", applies the sigmoid, in float32.

    Args:
        task: "binary" or "regression".

    Call arguments:
        inputs: list of [B, 1].

    Returns:
        [B, 1] float32: a probability, or the plain sum.

    """

    def __init__(self, task="binary", **kwargs):
        super().__init__(autocast=False, **kwargs)
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.task = task

    def build(self, input_shape=None):
        self.bias = self.add_weight(name="bias", shape=(1,), initializer="zeros", autocast=False)

    def call(self, inputs):
        logits = tf.add_n([tf.cast(x, tf.float32) for x in inputs]) + tf.cast(self.bias, tf.float32)
        # Keras's cross-entropy takes the logits back from this sigmoid, so nothing may follow it.
        return keras.activations.sigmoid(logits) if self.task == "binary" else logits

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((inputs[0].shape[0], 1), "float32")

    def get_config(self):
        return {**super().get_config(), "task": self.task}


@keras.saving.register_keras_serializable("deepfm_ops")
class BiInteraction(keras.layers.Layer):
    """The second-order term of embeddings that are there already.

    Call arguments:
        embeddings: [B, F, K].

    Returns:
        [B, 1], the sum over pairs of fields of their inner products.

    """

    def build(self, input_shape=None):
        pass

    def call(self, embeddings):
        pairs = tf.square(tf.reduce_sum(embeddings, axis=1)) - tf.reduce_sum(tf.square(embeddings), axis=1)
        return 0.5 * tf.reduce_sum(pairs, axis=1, keepdims=True)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)


def _l2(strength):
    return keras.regularizers.L2(strength) if strength else None


def _weights_l2(scope, strength):
    """The arguments of a `FirstOrder` for an L2 penalty of this scope."""
    if scope not in SCOPES:
        raise ValueError(f"l2_scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    return {"l2": strength} if scope == "batch" else {"weights_regularizer": _l2(strength)}


def _table_l2(scope, strength, linear_strength=0.0):
    """The arguments of an `FMInteraction`, likewise."""
    _weights_l2(scope, strength)
    if scope == "batch":
        return {"l2": strength, "l2_linear": linear_strength}
    return {"embeddings_regularizer": _l2(strength), "linear_regularizer": _l2(linear_strength)}


def _seed(seed, offset):
    """A seed per weight, so that no two weights start equal."""
    return None if seed is None else seed + offset


def _mlp(x, hidden_units, activation, dropout, batch_norm, l2, seed):
    """The deep part: [B, n] to [B, 1]."""
    for i, units in enumerate(hidden_units):
        initializer = keras.initializers.GlorotNormal(_seed(seed, 10 + i))
        x = keras.layers.Dense(units, kernel_initializer=initializer, kernel_regularizer=_l2(l2), name=f"hidden_{i}")(x)
        if batch_norm:
            x = keras.layers.BatchNormalization(name=f"batch_norm_{i}")(x)
        x = keras.layers.Activation(activation, name=f"activation_{i}")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, seed=_seed(seed, 100 + i), name=f"dropout_{i}")(x)
    last = keras.initializers.GlorotNormal(_seed(seed, 10 + len(hidden_units)))
    return keras.layers.Dense(1, use_bias=False, kernel_initializer=last, name="deep")(x)


class _ConfiguredModel(keras.Model):
    """A functional model that is saved as the arguments it was made with."""

    def _finish(self, config, inputs, outputs, name, trainable, frozen):
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        self._config = config
        self._index_inputs = [tensor.name for tensor in self.inputs if tensor.dtype == "int64"]
        self.trainable = trainable
        for layer in frozen:
            self.get_layer(layer).trainable = False

    def get_config(self):
        return {
            **self._config,
            "name": self.name,
            "trainable": self.trainable,
            "frozen": [layer.name for layer in self.layers if self.trainable and not layer.trainable],
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    def __call__(self, inputs, *args, **kwargs):
        if hasattr(self, "_index_inputs"):  # Keras calls the model while it is being made, too
            inputs = self._checked(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Keras's `predict`; no samples give no scores, [0, 1], instead of an error."""
        arrays = keras.tree.flatten(x) if isinstance(x, dict | list | tuple) else []
        if arrays and all(getattr(array, "shape", None) and array.shape[0] == 0 for array in arrays):
            return np.zeros((0, 1), np.float32)
        return super().predict(x, *args, **kwargs)


def _check_integers(name, x):
    """Raises where Keras would cast numbers to integers silently."""
    dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
    if "int" not in str(getattr(dtype, "name", dtype)):
        raise TypeError(f"{name} must be int32 or int64, got {getattr(dtype, 'name', dtype)}")


@keras.saving.register_keras_serializable("deepfm_ops")
class DeepFM(_ConfiguredModel):
    """DeepFM: y = sigmoid(w0 + first order + second order + MLP), on one shared embedding table.

    Without the deep part it is a factorization machine (FM); without the second order too, logistic
    regression (LR); with the deep part alone, a plain deep network on embeddings (DNN).

    Args:
        num_features: number of features, V; indices are in [0, V).
        num_fields: fields of a sample, F.
        embedding_dim: width of the embeddings, K.
        hidden_units: widths of the MLP's layers.
        use_linear, use_fm, use_deep: which parts there are.
        dropout: rate after each hidden layer.
        activation: of the hidden layers.
        batch_norm: normalize before each activation.
        task: "binary" (a probability) or "regression" (the plain sum).
        seed: int for repeatable initial weights and dropout, or None.
        embeddings_initializer: of the table; None: normal with a deviation of 0.01.
        l2_linear, l2_embedding, l2_deep: strengths of L2 penalties on the first-order weights, the table
            and the MLP's kernels.
        l2_scope: what the first two act on. "batch": the rows that a batch uses; each gets 2 * l2 * row added
            to its gradient, which stays sparse, and the reported loss does not hold the penalty. "table": whole
            tables at every step, as in Keras and DeepCTR; the gradient is then dense.
        field_sizes: columns of the matrices per field, P in all; a field's columns are summed
            (`FeatureDictionary.field_sizes`). None: one each, P = F.
        backend: "auto", "native" or "reference".

    Call arguments:
        inputs: (indices int64 [B, P], values float32 [B, P]).

    Returns:
        [B, 1] float32.

    Raises:
        ValueError: arguments that do not fit.
        InvalidArgumentError: an index outside [0, V).

    Example:
        >>> import numpy as np
        >>> model = DeepFM(num_features=1000, num_fields=3, embedding_dim=8, hidden_units=(32,))
        >>> model.compile(optimizer="adam", loss="binary_crossentropy")
        >>> indices, values = np.array([[1, 20, 300], [4, 50, 600]]), np.ones((2, 3))
        >>> history = model.fit((indices, values), np.array([1, 0]), verbose=0)
        >>> model.predict((indices, values), verbose=0).shape
        (2, 1)

    References:
        Guo, Tang, Ye, Li and He, "DeepFM: A Factorization-Machine based Neural Network for CTR
        Prediction", IJCAI 2017, equations (1) to (4).

    """

    def __init__(
        self,
        num_features,
        num_fields,
        embedding_dim=16,
        hidden_units=(400, 400, 400),
        *,
        use_linear=True,
        use_fm=True,
        use_deep=True,
        dropout=0.0,
        activation="relu",
        batch_norm=False,
        task="binary",
        seed=None,
        embeddings_initializer=None,
        l2_linear=0.0,
        l2_embedding=0.0,
        l2_deep=0.0,
        l2_scope="batch",
        field_sizes=None,
        backend="auto",
        name=None,
        trainable=True,
        frozen=(),
        dtype=None,
    ):
        if not (use_linear or use_fm or use_deep):
            raise ValueError("at least one of use_linear, use_fm and use_deep must be True")
        num_fields = positive("num_fields", num_fields)
        if field_sizes is not None and len(field_sizes) != num_fields:
            raise ValueError(f"field_sizes must have num_fields = {num_fields} entries, got {len(field_sizes)}")
        if embeddings_initializer is None:
            embeddings_initializer = keras.initializers.RandomNormal(stddev=0.01, seed=_seed(seed, 0))
        config = {
            "num_features": num_features,
            "num_fields": num_fields,
            "embedding_dim": embedding_dim,
            "hidden_units": [positive("a hidden width", units) for units in hidden_units],
            "use_linear": use_linear,
            "use_fm": use_fm,
            "use_deep": use_deep,
            "dropout": dropout,
            "activation": activation if isinstance(activation, str) else keras.activations.serialize(activation),
            "batch_norm": batch_norm,
            "task": task,
            "seed": seed,
            "embeddings_initializer": keras.initializers.serialize(keras.initializers.get(embeddings_initializer)),
            "l2_linear": l2_linear,
            "l2_embedding": l2_embedding,
            "l2_deep": l2_deep,
            "l2_scope": l2_scope,
            "field_sizes": None if field_sizes is None else list(field_sizes),
            "backend": backend,
        }
        with _dtype_policy(dtype):
            num_columns = num_fields if field_sizes is None else sum(field_sizes)
            inputs = (
                keras.Input((num_columns,), dtype="int64", name="indices"),
                keras.Input((num_columns,), dtype="float32", name="values"),
            )
            shared = {"field_sizes": field_sizes or [1] * num_fields, "backend": backend}
            parts = []
            if use_fm or use_deep:
                embeddings, second_order, *linear = FMInteraction(
                    num_features,
                    embedding_dim,
                    use_linear=use_linear,
                    linear_apart=use_linear,
                    return_embeddings=True,
                    embeddings_initializer=embeddings_initializer,
                    **_table_l2(l2_scope, l2_embedding, l2_linear),
                    name="fm",
                    **shared,
                )(inputs)
                parts += [*linear, second_order] if use_fm else linear
            else:
                first_order = FirstOrder(num_features, **_weights_l2(l2_scope, l2_linear), name="first_order", **shared)
                parts.append(first_order(inputs))
            if use_deep:
                flat = keras.layers.Flatten(name="flatten")(embeddings)
                parts.append(_mlp(flat, config["hidden_units"], activation, dropout, batch_norm, l2_deep, seed))
            self._finish(config, inputs, Head(task, name="head")(parts), name, trainable, frozen)

    def _checked(self, inputs):
        if isinstance(inputs, list | tuple) and len(inputs) == 2:
            _check_integers("indices", inputs[0])
        return inputs

    @classmethod
    def from_columns(
        cls,
        linear_feature_columns,
        dnn_feature_columns,
        fm_group=(DEFAULT_GROUP_NAME,),
        dnn_hidden_units=(256, 128, 64),
        l2_reg_linear=0.00001,
        l2_reg_embedding=0.00001,
        l2_reg_dnn=0,
        seed=1024,
        dnn_dropout=0,
        dnn_activation="relu",
        dnn_use_bn=False,
        task="binary",
        **flags,
    ):
        """A DeepFM over a dict of named inputs; DeepCTR's arguments, names and defaults.

        The columns of one width share one table, so that one op call looks all of them up.

        Args:
            linear_feature_columns: columns of the first order.
            dnn_feature_columns: columns of the second order and the deep part.
            fm_group: names of the groups whose columns interact, each group within itself.
            dnn_hidden_units: widths of the MLP's layers.
            l2_reg_linear: L2 strength on the first order.
            l2_reg_embedding: L2 strength on the embeddings.
            l2_reg_dnn: L2 strength on the MLP's kernels.
            seed: int for repeatable initial weights and dropout, or None.
            dnn_dropout: rate after each hidden layer.
            dnn_activation: of the hidden layers.
            dnn_use_bn: normalize before each activation.
            task: "binary" or "regression".
            **flags: use_linear, use_fm, use_deep (all True), backend ("auto"), and l2_scope: "batch", or
                "table" for penalties on whole tables as in DeepCTR; see `DeepFM`.

        Returns:
            A keras.Model over a dict of inputs [B, 1] or [B], [B, maxlen] and [B, dimension]; keys that it
            does not need are ignored.

        Raises:
            ValueError, TypeError: columns or arguments that do not fit.
            KeyError: when called, a missing input.

        """
        return ColumnDeepFM(
            linear_feature_columns,
            dnn_feature_columns,
            fm_group,
            dnn_hidden_units,
            l2_reg_linear,
            l2_reg_embedding,
            l2_reg_dnn,
            seed,
            dnn_dropout,
            dnn_activation,
            dnn_use_bn,
            task,
            **flags,
        )


@keras.saving.register_keras_serializable("deepfm_ops")
class ColumnDeepFM(_ConfiguredModel):
    """What `DeepFM.from_columns` returns, and documents."""

    def __init__(
        self,
        linear_feature_columns,
        dnn_feature_columns,
        fm_group=(DEFAULT_GROUP_NAME,),
        dnn_hidden_units=(256, 128, 64),
        l2_reg_linear=0.00001,
        l2_reg_embedding=0.00001,
        l2_reg_dnn=0,
        seed=1024,
        dnn_dropout=0,
        dnn_activation="relu",
        dnn_use_bn=False,
        task="binary",
        *,
        use_linear=True,
        use_fm=True,
        use_deep=True,
        l2_scope="batch",
        backend="auto",
        name=None,
        trainable=True,
        frozen=(),
        dtype=None,
    ):
        linear = [_columns.column_from_config(column) for column in linear_feature_columns]
        dnn = [_columns.column_from_config(column) for column in dnn_feature_columns]
        linear, dnn = linear if use_linear else [], dnn if use_fm or use_deep else []
        specs = input_specs([*linear, *dnn])
        # Indices come in as int64 whatever the column says: a cast to fewer bits would wrap them round.
        kinds = {name: kind if kind == "string" or "float" in kind else "int64" for name, (_, kind) in specs.items()}
        fm_group = [fm_group] if isinstance(fm_group, str) else list(fm_group)
        for columns in (linear, dnn):
            _columns.check_shared(columns)
        if not specs:
            raise ValueError("the model needs at least one feature column in a part that is in use")
        config = {
            "linear_feature_columns": [_columns.column_to_config(column) for column in linear],
            "dnn_feature_columns": [_columns.column_to_config(column) for column in dnn],
            "fm_group": fm_group,
            "dnn_hidden_units": [positive("a hidden width", units) for units in dnn_hidden_units],
            "l2_reg_linear": l2_reg_linear,
            "l2_reg_embedding": l2_reg_embedding,
            "l2_reg_dnn": l2_reg_dnn,
            "seed": seed,
            "dnn_dropout": dnn_dropout,
            "dnn_activation": dnn_activation
            if isinstance(dnn_activation, str)
            else keras.activations.serialize(dnn_activation),
            "dnn_use_bn": dnn_use_bn,
            "task": task,
            "use_linear": use_linear,
            "use_fm": use_fm,
            "use_deep": use_deep,
            "l2_scope": l2_scope,
            "backend": backend,
        }
        with _dtype_policy(dtype):
            inputs = {key: keras.Input(shape, dtype=kinds[key], name=key) for key, (shape, _) in specs.items()}
            encoders = []
            strengths = (l2_scope, l2_reg_embedding, l2_reg_linear)
            fused = _fused(linear, dnn)
            parts = _linear_parts(inputs, linear, fused, strengths, seed, backend, encoders)
            embeddings, groups, first_orders = _embeddings(inputs, dnn, fused, strengths, seed, backend, encoders)
            parts += first_orders
            if use_fm:
                parts += _second_order(embeddings, groups, fm_group)
            dense = [column for column in dnn if isinstance(column, DenseFeat)]
            if use_deep and dnn:
                deep = [keras.layers.Flatten()(tensor) for tensor, _ in embeddings]
                if dense:
                    deep.append(_columns.DenseColumns(dense, name="deep_dense")(_needed(inputs, dense)))
                x = keras.layers.Concatenate(name="deep_input")(deep) if len(deep) > 1 else deep[0]
                parts.append(
                    _mlp(x, config["dnn_hidden_units"], dnn_activation, dnn_dropout, dnn_use_bn, l2_reg_dnn, seed)
                )
            if not parts:
                raise ValueError(
                    "no part of the model is left: no linear columns, no interacting columns, no deep part"
                )
            self._finish(config, inputs, Head(task, name="head")(parts), name, trainable, frozen)
        self._input_names = list(specs)
        self._input_specs = {name: (shape, kinds[name]) for name, (shape, _) in specs.items()}

    def _checked(self, inputs):
        if not hasattr(self, "_input_names"):
            return inputs
        inputs = self._select(inputs)
        for name in self._index_inputs:
            _check_integers(f"input {name!r}", inputs[name])
        return inputs

    def _select(self, inputs):
        """The inputs this model needs, from a dict, or from a list in the order of get_feature_names."""
        if not isinstance(inputs, dict):
            if not isinstance(inputs, list | tuple) or len(inputs) != len(self._input_names):
                raise ValueError(f"inputs must be a dict, or a list in this order: {self._input_names}")
            inputs = dict(zip(self._input_names, inputs, strict=True))
        missing = [name for name in self._input_names if name not in inputs]
        if missing:
            raise KeyError(f"inputs are missing {missing}; got {sorted(inputs)}")
        return {name: inputs[name] for name in self._input_names}

    def _arrays(self, x):
        """What Keras can slice, from a dict or list of arrays and pandas Series; anything else as it is."""
        if not isinstance(x, dict | list | tuple):
            return x
        arrays = {name: self._array(name, column) for name, column in self._select(x).items()}
        lengths = {name: array.shape[0] if len(array.shape) else None for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"inputs must be equally long, got {lengths}")
        return arrays

    def _array(self, name, column):
        """One input in the shape and kind that the model has for it."""
        shape, kind = self._input_specs[name]
        if not tf.is_tensor(column):
            column = np.asarray(column, dtype=object if kind == "string" else None)
            if kind == "string":
                column = np.vectorize(_text, otypes=[object])(column) if column.size else column
            elif column.dtype.kind not in "iufb":
                raise TypeError(f"input {name!r} must hold numbers, got dtype {column.dtype}")
            elif kind == "int64" and column.dtype.kind == "f":
                if not (np.isfinite(column) & (column == np.floor(column))).all():
                    raise TypeError(f"input {name!r} must hold integers, got {column.dtype} with fractions or NaN")
                column = column.astype(np.int64)
        batch = column.shape[0] if len(column.shape) else 1
        if tuple(column.shape[1:]) != shape:
            if int(np.prod(column.shape[1:])) != int(np.prod(shape)):
                raise ValueError(f"input {name!r} must have shape {('B', *shape)}, got {tuple(column.shape)}")
            reshape = tf.reshape if tf.is_tensor(column) else np.reshape
            column = reshape(column, (batch, *shape))
        # Keras slices no NumPy array of text.
        return (
            tf.constant(column, tf.string, shape=column.shape)
            if kind == "string" and not tf.is_tensor(column)
            else column
        )

    # Keras asks these for arrays, or for something it can iterate over.

    def fit(self, x=None, y=None, *args, validation_data=None, **kwargs):
        if isinstance(validation_data, list | tuple):
            x_validation, y_validation, *rest = validation_data
            validation_data = (self._arrays(x_validation), _targets(y_validation), *rest)
        return super().fit(self._arrays(x), _targets(y), *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        return super().evaluate(self._arrays(x), _targets(y), *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        return super().predict(self._arrays(x), *args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        return super().train_on_batch(self._arrays(x), _targets(y), *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        return super().test_on_batch(self._arrays(x), _targets(y), *args, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self._arrays(x))


def _targets(y):
    """[B] as [B, 1], the shape of the predictions: some of Keras's metrics insist on it."""
    if y is None or tf.is_tensor(y):
        return y
    y = np.asarray(y)
    return y.reshape(-1, 1) if y.ndim == 1 else y


def _text(value):
    """A cell as text; a missing one is the empty string."""
    if value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value):
        return ""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


class _dtype_policy:
    """The dtype policy of a saved model while its layers are made again; None: the policy in force."""

    def __init__(self, dtype):
        self.policy = None if dtype is None else keras.dtype_policies.get(dtype)

    def __enter__(self):
        self.before = keras.config.dtype_policy()
        if self.policy is not None:
            keras.config.set_dtype_policy(self.policy)

    def __exit__(self, *_):
        keras.config.set_dtype_policy(self.before)


def _needed(inputs, columns):
    return {name: inputs[name] for name in input_specs(columns)}


def _tables(columns, width):
    """The columns with an embedding, in lists that can share one table: same width, same trainable."""
    key = lambda column: (width(column), getattr(column, "trainable", True))  # noqa: E731
    with_rows = [c for c in columns if not isinstance(c, DenseFeat) or c.embedding_dim is not None]
    return [(k, list(group)) for k, group in itertools.groupby(sorted(with_rows, key=key), key)]


def _encoded(inputs, columns, encoders):
    """The pairs of these columns; made once for all parts that have the same columns."""
    wanted = [_columns.encoding(column) for column in columns]
    for encodings, pairs in encoders:
        if encodings == wanted:
            return pairs
    pairs = _columns.ColumnEncoder(columns, name=f"encode_{len(encoders)}")(_needed(inputs, columns))
    encoders.append((wanted, pairs))
    return pairs


def _is_max(column):
    return isinstance(column, VarLenSparseFeat) and column.combiner == "max"


def _pooled(embeddings, mask, columns, plan):
    if not any(map(_is_max, columns)):
        return embeddings
    spans = [
        (column.maxlen, True) if _is_max(column) else (getattr(column, "dimension", 1), False) for column in columns
    ]
    first_columns = [0, *itertools.accumulate(plan.field_sizes[:-1])]  # a max-pooled field is one column
    return _columns.PoolMax(spans)((embeddings, keras.ops.take(mask, first_columns, axis=1)))


def _linear_tables(columns):
    return _tables([column for column in columns if not isinstance(column, DenseFeat)], lambda column: 1)


def _fused(linear, dnn):
    """{number of an embedding table: number of the first-order table that the same op call looks up}.

    Those whose rows are the same columns', in the same order; max pooling needs each weight by itself.
    """
    fused = {}
    for number, ((_, trainable), members) in enumerate(_tables(dnn, lambda column: column.embedding_dim)):
        wanted = [_columns.encoding(column) for column in members]
        for candidate, ((_, its_trainable), others) in enumerate(_linear_tables(linear)):
            same = wanted == [_columns.encoding(column) for column in others] and trainable == its_trainable
            if same and candidate not in fused.values() and not any(map(_is_max, [*members, *others])):
                fused[number] = candidate
                break
    return fused


def _linear_parts(inputs, columns, fused, strengths, seed, backend, encoders):
    """The first order: sparse columns with a weight per row, dense columns with a kernel."""
    scope, _, l2 = strengths
    parts = []
    for number, ((_, trainable), members) in enumerate(_linear_tables(columns)):
        if number in fused.values():
            continue
        plan = _columns.TablePlan(members, keras.initializers.Zeros())
        indices, values, mask = _encoded(inputs, members, encoders)
        shared = {"field_sizes": plan.field_sizes, "backend": backend, "trainable": trainable}
        shared["name"] = f"first_order_{number}"
        if any(map(_is_max, members)):
            weights, _ = FMInteraction(
                plan.num_rows,
                1,
                return_embeddings=True,
                embeddings_initializer="zeros",
                **_table_l2(scope, l2),
                **shared,
            )((indices, values))
            parts.append(keras.ops.sum(_pooled(weights, mask, members, plan), axis=1))
        else:
            parts.append(FirstOrder(plan.num_rows, **_weights_l2(scope, l2), **shared)((indices, values)))
    dense = [column for column in columns if isinstance(column, DenseFeat)]
    if dense:
        numbers = _columns.DenseColumns(dense, name="linear_dense")(_needed(inputs, dense))
        initializer = keras.initializers.GlorotNormal(_seed(seed, 5))
        kernel = keras.layers.Dense(
            1, use_bias=False, kernel_initializer=initializer, kernel_regularizer=_l2(l2), name="linear_kernel"
        )
        parts.append(kernel(numbers))
    return parts


def _embeddings(inputs, columns, fused, strengths, seed, backend, encoders):
    """The lookups.

    Returns:
        [(embeddings [B, F, K], interaction [B, 1] of all of them or None)], {group: [(table, field)]} and the
        first orders [B, 1] of the tables in `fused`.

    """
    scope, l2, l2_linear = strengths
    found, groups, first_orders = [], {}, []
    for number, ((dim, trainable), members) in enumerate(_tables(columns, lambda column: column.embedding_dim)):
        initializer = keras.initializers.RandomNormal(stddev=0.0001, seed=_seed(seed, number))
        plan = _columns.TablePlan(members, initializer)
        indices, values, mask = _encoded(inputs, members, encoders)
        use_linear = number in fused
        embeddings, interaction, *linear = FMInteraction(
            plan.num_rows,
            dim,
            use_linear=use_linear,
            linear_apart=use_linear,
            return_embeddings=True,
            embeddings_initializer=plan.initializer,
            **_table_l2(scope, l2, l2_linear if use_linear else 0.0),
            field_sizes=plan.field_sizes,
            backend=backend,
            trainable=trainable,
            name=f"fm_{number}",
        )((indices, values))
        field = 0
        for column in members:
            for _ in range(getattr(column, "dimension", 1)):
                groups.setdefault(column.group_name, []).append((number, field))
                field += 1
        first_orders += linear
        has_max = any(map(_is_max, members))
        found.append((_pooled(embeddings, mask, members, plan), None if has_max else interaction))
    return found, groups, first_orders


def _second_order(embeddings, groups, fm_group):
    """The second order of each group: from the op where the group is a whole table, else from the embeddings."""
    parts = []
    unknown = [group for group in fm_group if group not in groups and group != DEFAULT_GROUP_NAME]
    if unknown:
        raise ValueError(f"fm_group names {unknown}, but the columns' groups are {sorted(groups)}")
    for group in fm_group:
        members = groups.get(group, [])
        tables = sorted({table for table, _ in members})
        widths = {embeddings[table][0].shape[-1] for table in tables}
        if len(widths) > 1:
            raise ValueError(f"columns of FM group {group!r} must have one embedding_dim, got {sorted(widths)}")
        if len(tables) == 1:
            tensor, interaction = embeddings[tables[0]]
            if interaction is not None and len(members) == tensor.shape[1]:
                parts.append(interaction)
                continue
        if len(members) > 1:
            chosen = [
                keras.ops.take(embeddings[table][0], [f for t, f in members if t == table], axis=1) for table in tables
            ]
            tensor = keras.layers.Concatenate(axis=1)(chosen) if len(chosen) > 1 else chosen[0]
            parts.append(BiInteraction()(tensor))
    return parts
