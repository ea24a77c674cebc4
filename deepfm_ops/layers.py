"""Keras layers on top of the op."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import _library, arguments, ops, reference, replicas
from deepfm_ops.features import counts

SOFTNESS = 10.0  # of the priors in the first pass
NOT_COUNTED = -1


def positive(name, number):
    """The number as int, if it is a whole one and at least 1."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    return int(number)


def _pairs(inputs, table_dtype):
    """(table rows to read, values) from a layer's inputs: indices, or (indices, values)."""
    indices, values = inputs if isinstance(inputs, list | tuple) else (inputs, None)
    if values is not None:
        dtype = arguments.accumulation_dtype(tf.as_dtype(table_dtype))
        if isinstance(values, tf.RaggedTensor | tf.SparseTensor):
            values = tf.cast(values, dtype)
        else:
            values = tf.cast(tf.convert_to_tensor(values), dtype)
    return indices, values


def _with_columns(indices, columns):
    """The indices [B, P], once P is known to be `columns`; a retraced function may have forgotten it."""
    text = "indices must have {} columns, got {}"
    if indices.shape.rank is not None and indices.shape[1] is not None:
        if indices.shape[1] != columns:
            raise ValueError(text.format(columns, f"shape {indices.shape}"))
        return indices
    got = tf.shape(indices)[-1]
    with tf.control_dependencies(arguments.require(tf.equal(got, columns), text, lambda: (tf.constant(columns), got))):
        indices = tf.identity(indices)
    return tf.ensure_shape(indices, (None, columns))


def samples_at_start(feature_counts, num_samples):
    """[samples seen, samples counted] before training: what a weight `samples` of int64 starts as."""
    return [0, (num_samples or 0) if feature_counts.any() else NOT_COUNTED]


def first_pass_of(samples):
    """(1.0 or, where features are not counted yet, 0.0; share of the first pass that is done) of a weight `samples`."""
    seen, counted = tf.unstack(tf.cast(tf.convert_to_tensor(samples), tf.float32))
    is_counted = tf.cast(tf.not_equal(counted, NOT_COUNTED), tf.float32)
    return is_counted, tf.where(seen < counted, seen / tf.maximum(counted, 1), 1)


class _SparseLayer(keras.layers.Layer):
    """What the layers share: the backend, one interaction, a prior that counts, no autocast, no XLA."""

    def __init__(self, num_features, field_sizes=None, backend="auto", feature_counts=None, num_samples=None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        if backend not in _library.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_library.BACKENDS)}, got {backend!r}")
        self.num_features = positive("num_features", num_features)
        self.field_sizes = None if field_sizes is None else [positive("a field size", size) for size in field_sizes]
        self.backend = backend
        self.supports_jit = False
        self.num_samples = None if num_samples is None else positive("num_samples", num_samples)
        self._counts = None if feature_counts is None else counts.checked(feature_counts, self.num_features)
        self.feature_counts = self.samples = None

    def build(self, input_shape=None):
        if self._counts is None:
            return
        start = samples_at_start(self._counts, self.num_samples)
        # Weights, as they belong to what was learned: a model that is trained further goes on counting.
        self.feature_counts = self.add_weight(
            name="feature_counts",
            shape=(self.num_features,),
            dtype="int32",
            initializer=lambda shape, dtype: tf.constant(self._counts),
            trainable=False,
        )
        self.samples = self.add_weight(
            name="samples",  # seen in training, and counted (0: not known how many; NOT_COUNTED: no counts yet)
            shape=(2,),
            dtype="int64",
            initializer=lambda shape, dtype: tf.constant(start, dtype),
            trainable=False,
        )

    def is_counted(self):
        """Whether the layer has counts other than the zeros that it may be made with, to be counted later."""
        return self.samples is not None and int(self.samples.numpy()[1]) != NOT_COUNTED

    def set_feature_counts(self, feature_counts, num_samples=None):
        """Changes the counts of a layer that was made with some, or with zeros; see its arguments."""
        num_samples = None if num_samples is None else positive("num_samples", num_samples)
        if self.feature_counts is None or self.samples is None:
            raise ValueError(f"layer {self.name!r} was made without feature_counts")
        self.feature_counts.assign(counts.checked(feature_counts, self.num_features))
        self.samples.assign([self.samples.numpy()[0] if self.is_counted() else 0, num_samples or 0])

    def _add_table(self, name, columns, initializer, regularizer):
        table = self.add_weight(
            name=name,
            shape=(self.num_features, columns),
            initializer=initializer,
            regularizer=regularizer,
            autocast=False,
        )
        table.row_counts = self._row_counts  # that marks it as a table: optimizers ask
        return table

    def tables(self):
        """(weight, its initializer) of each table [V, n]."""
        pairs = ("embeddings", "embeddings_initializer"), ("w", "linear_initializer"), ("w", "weights_initializer")
        found = [(getattr(self, table, None), getattr(self, initializer, None)) for table, initializer in pairs]
        return [(table, initializer) for table, initializer in found if table is not None and initializer is not None]

    def _row_counts(self):
        """(counts, 1.0 or, where they are not counted yet, 0.0, share of the first pass that is done), or None."""
        if self.feature_counts is None or self.samples is None:
            return None
        return tf.convert_to_tensor(self.feature_counts.value), *first_pass_of(self.samples.value)

    def _penalty(self, samples, training, l2, l2_linear, prior, prior_linear, counts_samples=True):
        """The penalty of a call, and by what a replica multiplies it, or None; counts the call's samples, if told."""
        row_counts = None if _library.is_export() else self._row_counts()
        if row_counts is None:
            return reference.Penalty(l2, l2_linear), None
        table, is_counted, first_pass = row_counts
        softness = tf.where(first_pass < 1, SOFTNESS, 0.0)
        priors = tf.stack([_precision(prior) * is_counted, _precision(prior_linear) * is_counted, softness])
        weight = None
        if training and isinstance(self.samples.value, tf.Variable):  # and not what a keras.StatelessScope has for it
            everyones = replicas.total(samples)
            if counts_samples:
                self.samples.value.assign_add([everyones, 0])
            if replicas.others() is not None:  # the op divides by the samples of this replica
                weight = replicas.share(samples, everyones, arguments.accumulation_dtype(tf.as_dtype(self.dtype)))
        return reference.Penalty(l2, l2_linear, table, priors), weight

    def _interaction(
        self, table, inputs, output, training, penalties, return_embeddings=False, counts_samples=True, **options
    ):
        indices, values = _pairs(inputs, table.dtype)
        table, pairs = arguments.parse(table, indices, values, None, "vector")
        splits = ()
        if self.field_sizes is not None:
            if pairs.row_splits is not None:
                raise ValueError(f"field_sizes need dense indices [B, P], got a {type(indices).__name__}")
            splits = (0, *itertools.accumulate(self.field_sizes))
            pairs = pairs._replace(indices=_with_columns(pairs.indices, splits[-1]))
            splits = () if splits == tuple(range(len(splits))) else splits
        elif options.get("field_weights") is not None:
            if pairs.row_splits is not None:
                raise ValueError(f"field_weights need dense indices [B, F], got a {type(indices).__name__}")
            pairs = pairs._replace(indices=_with_columns(pairs.indices, self._num_fields))
        samples = tf.shape(pairs.indices)[0] if pairs.row_splits is None else tf.size(pairs.row_splits) - 1
        l2, l2_linear, *priors = penalties
        is_shared = training and bool(l2 or l2_linear) and replicas.others() is not None
        strengths = (0.0, 0.0) if is_shared else (l2, l2_linear)
        penalty, weight = self._penalty(samples, training, *strengths, *priors, counts_samples=counts_samples)
        result, embeddings, linear, silent = ops.interaction(
            table,
            pairs,
            output,
            field_splits=splits,
            return_embeddings=return_embeddings,
            penalty=penalty,
            backend=self.backend,
            **options,
        )
        if return_embeddings:
            embeddings = tf.cast(embeddings, self.compute_dtype)
            if pairs.row_splits is not None:
                embeddings = tf.RaggedTensor.from_row_splits(embeddings, pairs.row_splits)
        if silent is not None:
            self.add_loss(silent if weight is None else silent * weight)
        if is_shared:
            tables = [table] if options.get("weights") is None else [table, options["weights"]]
            with tf.control_dependencies([result]):  # which says what is wrong with an index
                self.add_loss(replicas.silent_l2(tables, tf.identity(pairs.indices), (l2, l2_linear)[: len(tables)]))
        linear = None if linear is None else tf.cast(linear, self.compute_dtype)
        return tf.cast(result, self.compute_dtype), embeddings, linear

    def _fields(self, inputs):
        """[B, F] of the inputs' static shape."""
        shape = inputs[0] if isinstance(inputs, list | tuple) and isinstance(inputs[0], list | tuple) else inputs
        return shape[0], shape[1] if self.field_sizes is None else len(self.field_sizes)

    def get_config(self):
        return {
            **super().get_config(),
            "num_features": self.num_features,
            "field_sizes": self.field_sizes,
            "backend": self.backend,
            "feature_counts": None if self._counts is None else counts.packed(self._counts),
            "num_samples": self.num_samples,
        }


def check_interaction(order, field_weights, use_fm=True):
    """Raises ValueError for options of an interaction that do not fit."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order!r}")
    if not isinstance(field_weights, bool):
        raise ValueError(f"field_weights must be True or False, got {field_weights!r}")
    if not use_fm and (order != 2 or field_weights):
        raise ValueError("order and field_weights are of the FM part: they need use_fm")
    if field_weights and order != 2:
        raise ValueError("field_weights weight pairs of fields: they need order=2, got order=3")


def add_field_weights(layer, num_fields):
    """The variable of a layer with the weight of each pair of its fields, [F (F - 1) / 2], ones at first."""
    return layer.add_weight(
        name="field_weights",
        shape=(num_fields * (num_fields - 1) // 2,),
        dtype=arguments.accumulation_dtype(tf.as_dtype(layer.variable_dtype)).name,
        initializer="ones",
        autocast=False,
    )


def deviation(name, number):
    """The number as a float, if it is one above 0; None stays None."""
    is_number = isinstance(number, int | float | np.number) and not isinstance(number, bool)
    if number is not None and not (is_number and 0 < number < np.inf):
        raise ValueError(f"{name} must be a number above 0, or None, got {number!r}")
    return None if number is None else float(number)


def _precision(deviation):
    return 0.0 if deviation is None else deviation**-2


def _strength(name, strength):
    if not isinstance(strength, int | float | np.number) or not 0 <= strength < np.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {strength!r}")
    return float(strength)


@keras.saving.register_keras_serializable("deepfm_ops")
class FirstOrder(_SparseLayer):
    """The first-order term of a factorization machine: a weight per feature, times its value, summed.

        y[b] = sum over f of values[b,f] * w[indices[b,f]]

    Args:
        num_features: number of features, V; indices are in [0, V).
        units: H, how many such sums there are, each of weights of its own.
        weights_initializer, weights_regularizer: of w [V, H]. A regularizer acts on all of w, so that its
            gradient is dense.
        l2: strength of a penalty on the rows that a batch uses, as for `FMInteraction`.
        feature_counts, num_samples, prior: a prior on w, as for `FMInteraction`.
        backend: "auto", "native" or "reference".

    Call arguments:
        inputs: as for `FMInteraction`.

    Returns:
        [B, H].

    """

    def __init__(
        self,
        num_features,
        *,
        units=1,
        weights_initializer="zeros",
        weights_regularizer=None,
        l2=0.0,
        prior=None,
        field_sizes=None,
        **kwargs,
    ):
        super().__init__(num_features, field_sizes, **kwargs)
        self.units = positive("units", units)
        self.l2, self.prior = _strength("l2", l2), deviation("prior", prior)
        self.weights_initializer = keras.initializers.get(weights_initializer)
        self.weights_regularizer = keras.regularizers.get(weights_regularizer)

    def build(self, input_shape=None):
        super().build(input_shape)
        self.w = self._add_table("w", self.units, self.weights_initializer, self.weights_regularizer)

    def call(self, inputs, training=False):
        return self._interaction(self.w, inputs, "sum", training, (self.l2, 0.0, self.prior, None))[0]

    def compute_output_shape(self, input_shape):
        return (self._fields(input_shape)[0], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "weights_initializer": keras.initializers.serialize(self.weights_initializer),
            "weights_regularizer": keras.regularizers.serialize(self.weights_regularizer),
            "l2": self.l2,
            "prior": self.prior,
        }


@keras.saving.register_keras_serializable("deepfm_ops")
class FMInteraction(_SparseLayer):
    """The second-order term of a factorization machine over an embedding table that the layer owns.

    With e[b,f,:] = values[b,f] * embeddings[indices[b,f], :]:

        vector[b,:] = 1/2 * ((sum over f of e[b,f,:])^2 - sum over f of e[b,f,:]^2)
        scalar[b]   = sum over k of vector[b,k]

    With order=3 what is added up over triples of fields is added to vector, of the same table:

        vector[b,:] += sum over f < h < i of e[b,f,:] * e[b,h,:] * e[b,i,:]

    With field_weights every pair of fields has a trained weight, r[f,h], which starts as one:

        vector[b,:] = sum over f < h of r[f,h] * e[b,f,:] * e[b,h,:]

    For a sample of F fields these are O(F K) and O(F^2 K), with one read of its rows. Their gradient is that of rows
    in the call, as with return_embeddings.

    With return_embeddings the gradient of the table is that of its rows in the call, whatever is assigned to it before
    the gradient is taken. Without, and for penalties, the gradient of values and second derivatives, the rows are read
    again, as they are when the gradient is taken: take it before the table changes.

    Args:
        num_features: rows of the table, V; indices are in [0, V).
        embedding_dim: columns of the table, K.
        use_linear: add the first-order term, sum over f of values[b,f] * w[indices[b,f]], to the scalar;
            the same op computes it.
        output: "scalar" or "vector".
        order: 2, or 3 for triples too.
        field_weights: weight the pairs of fields. The weights are one vector, [F * (F - 1) / 2], that of fields f > h
            (counted from 0) at f * (f - 1) / 2 + h. Needs an order of 2, and F fields in every sample: field_sizes, or
            dense indices of a known width when the layer is built.
        return_embeddings: also return the e[b,f,:], for a deep part that shares the table.
        embeddings_initializer, embeddings_regularizer: of the table [V, K]. A regularizer acts on the
            whole table, so that its gradient is dense.
        linear_initializer, linear_regularizer: of w [V, H].
        linear_apart: return the first order by itself, [B, H], after the interaction, instead of adding it.
        linear_units: H, as `FirstOrder` has units; with more than one a call of the op of its own computes them.
        l2, l2_linear: strengths of a penalty, l2 * sum of row^2 over the rows that a call uses, each once. It
            is among the layer's `losses` and leaves the gradient sparse; its value there is zero, only its
            gradient is that of the penalty.
        feature_counts: int [V], how many pairs with a value other than zero each feature has in the training rows;
            zero counts as one; all zeros are counts that come later, by `set_feature_counts`. They turn the priors on:
            every occurrence of a feature in a batch of B adds row / (count * deviation^2 * B) to the row's gradient,
            so that a pass over the training rows is maximum a posteriori with a normal prior of this deviation on
            every row, rare or frequent, where the loss is the mean
            over the batch. Silent and sparse, as l2 is.
        num_samples: training rows that were counted. What the first of them show is new, and the prior is in where the
            rows start: until so many were trained on, an occurrence carries only 10 / (10 + count) of its share, much
            for rare rows and nearly nothing for frequent ones. From then on the prior balances what is seen again.
            None: it does so at once.
        embedding_prior, linear_prior: deviations, of the table's elements and of w; None: no prior.
        field_sizes: how many columns of `indices` each field has: the columns of a multi-valued field are
            summed before they interact. None: every column is a field.
        backend: "auto" (the native op where it loads and can use the table), "native" (an error where it cannot) or
            "reference". A portable export is made of standard ops whatever it is.

    Call arguments:
        inputs: `(indices, values)`, or `indices` alone where all values are one. indices: int32 or int64
            [B, F], or tf.RaggedTensor or tf.SparseTensor of rank 2. values: the same form; numbers.

    Returns:
        The interaction, [B, 1] or [B, K]; with return_embeddings, (embeddings [B, F, K], interaction),
        where ragged and sparse indices give a RaggedTensor [B, None, K].

    Raises:
        ValueError, TypeError: arguments or inputs that do not fit.
        InvalidArgumentError: an index outside [0, V).

    Example:
        >>> import numpy as np
        >>> layer = FMInteraction(num_features=1000, embedding_dim=8)
        >>> layer(np.array([[1, 20, 300], [4, 50, 600]])).shape
        TensorShape([2, 1])

    References:
        Rendle, "Factorization Machines", ICDM 2010. Guo et al., "DeepFM", IJCAI 2017. Order 3: Blondel et al.,
        "Higher-Order Factorization Machines", NIPS 2016, with one table for all orders. Field weights: Pan et al.,
        "Field-weighted Factorization Machines for Click-Through Rate Prediction in Display Advertising", WWW 2018.

    """

    def __init__(
        self,
        num_features,
        embedding_dim,
        *,
        use_linear=False,
        output="scalar",
        order=2,
        field_weights=False,
        return_embeddings=False,
        embeddings_initializer=None,
        embeddings_regularizer=None,
        linear_initializer="zeros",
        linear_regularizer=None,
        linear_apart=False,
        linear_units=1,
        l2=0.0,
        l2_linear=0.0,
        feature_counts=None,
        num_samples=None,
        embedding_prior=None,
        linear_prior=None,
        field_sizes=None,
        backend="auto",
        **kwargs,
    ):
        super().__init__(num_features, field_sizes, backend, feature_counts, num_samples, **kwargs)
        if output not in arguments.OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(arguments.OUTPUTS)}, got {output!r}")
        if linear_apart and not use_linear:
            raise ValueError("linear_apart needs use_linear")
        self.linear_units = positive("linear_units", linear_units)
        if self.linear_units > 1 and not linear_apart:
            raise ValueError(f"linear_units must be 1 without linear_apart, got {linear_units}")
        if use_linear and not linear_apart and output != "scalar":
            raise ValueError(f"use_linear adds the first order to the scalar; output must be 'scalar', got {output!r}")
        check_interaction(order, field_weights)
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.output_kind, self.order, self.has_field_weights = output, order, field_weights
        self.return_embeddings = return_embeddings
        self.use_linear = use_linear
        self.linear_apart = linear_apart
        if embeddings_initializer is None:
            embeddings_initializer = keras.initializers.RandomNormal(stddev=0.01)
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.embeddings_regularizer = keras.regularizers.get(embeddings_regularizer)
        self.linear_initializer = keras.initializers.get(linear_initializer)
        self.linear_regularizer = keras.regularizers.get(linear_regularizer)
        self.l2, self.l2_linear = _strength("l2", l2), _strength("l2_linear", l2_linear)
        self.embedding_prior = deviation("embedding_prior", embedding_prior)
        self.linear_prior = deviation("linear_prior", linear_prior)
        self.w = self.field_weights = None

    def build(self, input_shape=None):
        super().build(input_shape)
        columns = self.embedding_dim
        self.embeddings = self._add_table(
            "embeddings", columns, self.embeddings_initializer, self.embeddings_regularizer
        )
        if self.use_linear:
            self.w = self._add_table("w", self.linear_units, self.linear_initializer, self.linear_regularizer)
        if self.has_field_weights:
            self._num_fields = self._fields(input_shape or (None, None))[1]
            if self._num_fields is None:
                raise ValueError(
                    "field_weights need a fixed number of fields: give field_sizes, or indices [B, F] with a known F"
                )
            self.field_weights = add_field_weights(self, self._num_fields)

    def call(self, inputs, training=False):
        weights, apart = None if self.w is None else self.w.value, None
        if self.w is not None and self.linear_units > 1:
            strengths = self.l2_linear, 0.0, self.linear_prior, None
            apart = self._interaction(self.w, inputs, "sum", training, strengths, counts_samples=False)[0]
            weights = None
        result, embeddings, linear = self._interaction(
            self.embeddings,
            inputs,
            self.output_kind,
            training,
            (self.l2, self.l2_linear, self.embedding_prior, self.linear_prior),
            self.return_embeddings,
            weights=weights,
            order=self.order,
            field_weights=None if self.field_weights is None else tf.convert_to_tensor(self.field_weights.value),
        )
        linear = linear if apart is None else apart
        if self.use_linear and not self.linear_apart:
            result = result + linear
        return self._outputs(embeddings, result, linear)

    def _outputs(self, embeddings, result, linear):
        found = [*([embeddings] if self.return_embeddings else []), result, *([linear] if self.linear_apart else [])]
        return tuple(found) if len(found) > 1 else result

    def compute_output_shape(self, input_shape):
        batch, fields = self._fields(input_shape)
        result = (batch, 1 if self.output_kind == "scalar" else self.embedding_dim)
        return self._outputs((batch, fields, self.embedding_dim), result, (batch, self.linear_units))

    def get_config(self):
        return {
            **super().get_config(),
            "embedding_dim": self.embedding_dim,
            "use_linear": self.use_linear,
            "output": self.output_kind,
            "order": self.order,
            "field_weights": self.has_field_weights,
            "return_embeddings": self.return_embeddings,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
            "embeddings_regularizer": keras.regularizers.serialize(self.embeddings_regularizer),
            "linear_initializer": keras.initializers.serialize(self.linear_initializer),
            "linear_regularizer": keras.regularizers.serialize(self.linear_regularizer),
            "linear_apart": self.linear_apart,
            "linear_units": self.linear_units,
            "l2": self.l2,
            "l2_linear": self.l2_linear,
            "embedding_prior": self.embedding_prior,
            "linear_prior": self.linear_prior,
        }
