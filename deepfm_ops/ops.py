"""The op, its registered gradient, and the choice between the native library and the reference.

Importing this module loads the native library, so that a SavedModel that holds the op can be loaded.
"""

import contextlib
import itertools

import tensorflow as tf
from tensorflow.python.eager import execute, forwardprop, forwardprop_util
from tensorflow.python.framework import auto_control_deps_utils
from tensorflow.python.ops import resource_variable_ops

from deepfm_ops import _library, arguments, reference

try:
    _library.native_ops()
except (RuntimeError, ValueError):  # said again, to whom it concerns, when the op is called
    pass


def fm_interaction(table, indices, values=None, *, row_splits=None, output="scalar", name=None) -> tf.Tensor:
    """The second-order term of a factorization machine, from indices and values.

    With `e[b,f,:] = values[b,f] * table[indices[b,f], :]` and `s[b,:] = sum over f of e[b,f,:]`:

        vector[b,:] = 1/2 * (s[b,:]^2 - sum over f of e[b,f,:]^2)
        scalar[b]   = sum over k of vector[b,k] = sum over f < h of <e[b,f,:], e[b,h,:]>

    Each row is read once, no [B, F, K] tensor is made, and the gradient of the table is an
    `IndexedSlices` with unique, ascending int64 or index-dtype indices: Keras's optimizers are then
    exact on repeated indices. Gradients reach `values` too, and can be differentiated again, in forward mode as well.
    A gradient reads the rows again, as they are when it is taken: take it before the table changes.

    Args:
        table: [V, K] float32, float64, bfloat16 or float16: a tf.Variable or keras.Variable, which is
            read in place, or a Tensor.
        indices: int32 or int64, [B, F]; or [nnz] with row_splits; or tf.RaggedTensor [B, None]; or
            tf.SparseTensor [B, M], whose values are the indices and whose positions are in row-major order.
        values: what each row is multiplied with, in the form and shape of indices. float64 for a float64
            table, else float32; NumPy and Python numbers are converted. None: all ones.
        row_splits: int32 or int64 [B + 1]: sample b owns the pairs row_splits[b] to row_splits[b + 1] - 1.
        output: "scalar" or "vector".
        name: a name for the operation.

    Returns:
        [B, 1] for "scalar", [B, K] for "vector"; float64 for a float64 table, else float32 (narrow tables
        are summed in float32).

    Raises:
        TypeError, ValueError: a dtype, rank or static shape that does not fit; a table on another machine.
        InvalidArgumentError: an index outside [0, V): "indices[3,7] = 1000 is not in [0, 1000)" (for
            ragged and sparse indices, the position in the flat indices); row_splits that do not start
            at 0, decrease, or do not end at nnz; values whose shape is not that of indices.

    References:
        Rendle, "Factorization Machines", ICDM 2010, equation (5) and lemma 3.1. "vector" is the
        bi-interaction of He and Chua, "Neural Factorization Machines", SIGIR 2017.

    """
    table, pairs = arguments.parse(table, indices, values, row_splits, output)
    with tf.name_scope(name or "fm_interaction"):
        return interaction(table, pairs, output)[0]


def interaction(
    table,
    pairs,
    output,
    *,
    field_splits=(),
    return_embeddings=False,
    weights=None,
    penalty=reference.NO_PENALTY,
    order=2,
    field_weights=None,
    backend="auto",
):
    """`reference.interaction`, natively where that can be had; embeddings are None unless asked for.

    Args:
        table: tf.Variable or Tensor [V, K].
        pairs: `arguments.Pairs`.
        output: "scalar", "vector" or "sum".
        field_splits: see `reference.interaction`.
        return_embeddings: also return them.
        weights: first-order weights [V, 1], a variable if the table is one; None: no first order.
        penalty: `reference.Penalty`.
        order: 2 or 3, see `reference.interact`.
        field_weights: None, or those of an order of 2, of dense indices, of the dtype of the sums; see there.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, RuntimeError: see `native_for`.

    """
    weights = None if weights is None else arguments.on_this_machine("weights", weights)
    native = native_for(table, backend, is_plain=order == 2 and field_weights is None)
    if native is None:
        kind = {"order": order, "field_weights": field_weights}
        result, embeddings, linear, silent = reference.interaction(
            table, pairs, output, field_splits, weights, penalty, forward_only=_library.is_portable(), **kind
        )
        return result, embeddings if return_embeddings else None, linear, silent
    if isinstance(table, tf.Variable):
        # The handle, never the value: reading the value of a sparsely updated variable copies the table.
        # A tape watches variables that report an access.
        tables = [table] if weights is None else [table, weights]
        for variable in tables:
            resource_variable_ops.variable_accessed(variable)
        op, table_dtype = native.deepfm_ops_resource_fm_interaction, {"T": table.dtype}
        table_input, *weights_input = [variable.handle for variable in tables]
    else:
        op, table_input, table_dtype = native.deepfm_ops_fm_interaction, table, {}
        weights_input = [] if weights is None else [weights]
    with _placed(table_input):
        result, _, embeddings, linear, silent = op(
            table=table_input,
            indices=pairs.indices,
            values=[] if pairs.values is None else [pairs.values],
            row_splits=[] if pairs.row_splits is None else [pairs.row_splits],
            weights=weights_input,
            counts=[] if penalty.counts is None else [penalty.counts],
            priors=[] if penalty.counts is None else [penalty.priors],
            field_weights=[] if field_weights is None else [field_weights],
            order=order,
            l2=penalty.l2,
            l2_linear=penalty.l2_linear,
            Tacc=arguments.accumulation_dtype(table.dtype),
            output=output,
            field_splits=list(field_splits),
            # The gradient of a summed field needs the field's sum, which the pair alone does not give; those of an
            # order of 3 and with field weights need all fields.
            return_embeddings=return_embeddings
            or (output != "sum" and (len(field_splits) > 0 or order > 2 or field_weights is not None)),
            **table_dtype,
        )
    linear, silent = None if weights is None else linear, silent if penalty else None
    return result, embeddings if return_embeddings else None, linear, silent


def native_for(table, backend="auto", is_plain=True):
    """The native ops for this table, or None for the reference; is_plain: no order of 3 and no field weights.

    Raises:
        ValueError: backend is "native" and the table is one that the native ops cannot use; the text says why.
        RuntimeError: backend is "native" and there are no native ops.

    """
    native = _library.native_ops(backend)
    reason = None if native is None else _why_not(table, is_plain)
    if reason is None:
        return native
    if _library.resolve(backend) == "native":
        raise ValueError(f"backend must be 'auto' or 'reference' for this table, got 'native': {reason}")
    return None


def _why_not(table, is_plain):
    """The reason not to use a table natively, or None."""
    if not isinstance(table, tf.Variable):
        return None
    if not isinstance(table, resource_variable_ops.BaseResourceVariable):
        # A variable of several replicas has that of a replica, in whatever a replica runs.
        if not isinstance(table, tf.distribute.DistributedValues) or tf.distribute.get_replica_context() is None:
            return f"a {type(table).__name__} has no resource handle"
    if "GPU" in (table.device or "").upper():
        reason = _library.why_not_on_gpus()
        if reason is None and table.dtype == tf.float64:
            reason = "there is no kernel for float64 on a GPU"
        if reason is None and not is_plain:
            reason = "there is no kernel for an order of 3 or field weights on a GPU"
        return None if reason is None else f"it is on {table.device}, and {reason}"
    return None


def _placed(table):
    """Inside, an op of this table runs where it can; one of a variable runs where that is."""
    elsewhere = table.dtype != tf.resource and _library.leaves_gpus_alone()
    return tf.device("/CPU:0") if elsewhere else contextlib.nullcontext()


# The inputs of an op, then what its gradient has besides; each with the attribute that counts it, if it is a list.
_INPUTS = {"table": None, "indices": None, "values": "num_values", "row_splits": "num_row_splits"}
_INPUTS |= {"weights": "num_weights", "counts": "num_counts", "priors": "num_counts"}
_INPUTS |= {"field_weights": "num_field_weights"}
_OF_GRADIENT = {"sums": None, "embeddings": "num_embeddings", "d_interaction": None}
_OF_GRADIENT |= {"d_embeddings": "num_d_embeddings", "d_linear": "num_weights", "d_penalty": None}


def inputs_of(op):
    """{name: tensor or list of tensors} of an op, eager or not, or of its gradient."""
    given, names = iter(op.inputs), {**_INPUTS, **(_OF_GRADIENT if op.type.endswith("Grad") else {})}
    return {
        name: next(given) if count is None else list(itertools.islice(given, op.get_attr(count)))
        for name, count in names.items()
    }


def _table_shape(table):
    if table.dtype == tf.resource:
        return resource_variable_ops.variable_shape(table, tf.int64)
    return tf.shape(table, tf.int64)


def _values_needed(op, num_values):
    """False when the tape says that nobody asks for the gradient of the values."""
    return num_values > 0 and 2 not in (getattr(op, "skip_input_indices", None) or ())


@tf.RegisterGradient("DeepfmOpsFmInteraction")
@tf.RegisterGradient("DeepfmOpsResourceFmInteraction")
def _fm_interaction_grad(op, d_interaction, _, d_embeddings, d_linear, d_penalty):
    inputs = inputs_of(op)
    table, weights = inputs["table"], inputs["weights"]
    returns = op.get_attr("return_embeddings")
    keeps = returns and op.get_attr("output") != b"sum"  # rows as they were in the forward
    native = _library.native_ops("native")
    is_resource = table.dtype == tf.resource
    gradient = native.deepfm_ops_resource_fm_interaction_grad if is_resource else native.deepfm_ops_fm_interaction_grad
    with _placed(table):
        unique, rows, d_values, weight_rows, d_field_weights = gradient(
            **inputs,
            sums=op.outputs[1],
            embeddings=[op.outputs[2]] if keeps else [],
            d_interaction=d_interaction,
            d_embeddings=[d_embeddings] if returns else [],
            d_linear=[d_linear] if weights else [],
            d_penalty=d_penalty,
            **{name: op.get_attr(name) for name in ("output", "field_splits", "order", "l2", "l2_linear")},
            need_values=_values_needed(op, len(inputs["values"])),
            **({"T": op.get_attr("T")} if is_resource else {}),
        )
    d_table = tf.IndexedSlices(rows, unique, _table_shape(table))
    d_weights = [tf.IndexedSlices(weight_rows, unique, _table_shape(w)) for w in weights]
    d_values = [d_values] * len(inputs["values"])
    nones = [None] * len(inputs["counts"] + inputs["priors"])
    d_field_weights = [d_field_weights] * len(inputs["field_weights"])
    return [d_table, None, *d_values, *([None] * len(inputs["row_splits"])), *d_weights, *nones, *d_field_weights]


@tf.RegisterGradient("DeepfmOpsFmInteractionGrad")
@tf.RegisterGradient("DeepfmOpsResourceFmInteractionGrad")
def _fm_interaction_grad_grad(op, _, dd_rows, dd_values, dd_weight_rows, dd_field_weights):
    """The gradient of the gradient, by differentiating the reference formula twice.

    `sums` and `embeddings` are functions of the table and the values, so what flows through them is
    accounted for there.
    """
    inputs = inputs_of(op)
    table, indices, values, row_splits, weights, counts, priors, field_weights = (inputs[name] for name in _INPUTS)
    d_outputs = [inputs["d_interaction"], *inputs["d_embeddings"], *inputs["d_linear"], inputs["d_penalty"]]
    dtype = op.get_attr("T")
    unique = op.outputs[0]
    position = tf.reshape(tf.searchsorted(unique, tf.cast(tf.reshape(indices, [-1]), tf.int64)), tf.shape(indices))
    tables = [table, *weights]
    if table.dtype == tf.resource:
        rows = [tf.raw_ops.ResourceGather(resource=t, indices=unique, dtype=dtype) for t in tables]
    else:
        rows = [tf.gather(t, unique) for t in tables]
    pairs = arguments.Pairs(indices, values[0] if values else None, row_splits[0] if row_splits else None)
    penalty = reference.Penalty(op.get_attr("l2"), op.get_attr("l2_linear"), *counts, *priors)
    factors = penalty.factors(pairs, unique, position, arguments.accumulation_dtype(dtype))
    asked = values if op.get_attr("need_values") else []
    seeds = [dd_rows, *([dd_weight_rows] if weights else []), *([dd_values] if asked else [])]
    seeds += [dd_field_weights] if field_weights else []
    with forwardprop_util.push_forwardprop_state():  # else an accumulator would keep the tapes from recording
        with tf.GradientTape() as outer:
            outer.watch([*rows, *values, *field_weights, *d_outputs])
            with tf.GradientTape() as inner:
                inner.watch([*rows, *asked, *field_weights])
                wide = [tf.gather(tf.cast(r, arguments.accumulation_dtype(dtype)), position) for r in rows]
                result, embeddings, linear = reference.formula(
                    wide[0],
                    pairs,
                    op.get_attr("output").decode(),
                    op.get_attr("field_splits"),
                    wide[1] if weights else None,
                    op.get_attr("order"),
                    field_weights[0] if field_weights else None,
                )
                penalty = sum(
                    tf.reduce_sum(tf.cast(0.5 * factor, r.dtype) * r * r)
                    for factor, r in zip(factors, rows, strict=False)
                )
                outputs = [result, *([embeddings] if inputs["d_embeddings"] else []), *([linear] if weights else [])]
                outputs.append(tf.cast(penalty, d_outputs[-1].dtype))
            inputs_of_first = [*rows, *asked, *field_weights]
            first = inner.gradient(outputs, inputs_of_first, output_gradients=d_outputs, unconnected_gradients="zero")
            first = [tf.convert_to_tensor(g) for g in first]
        inputs_of_second = [*rows, *values, *field_weights, *d_outputs]
        second = outer.gradient(first, inputs_of_second, output_gradients=seeds, unconnected_gradients="zero")
    second = iter([tf.convert_to_tensor(g) for g in second])
    nones = lambda tensors: [None] * len(tensors)  # noqa: E731
    d_table, *d_weights = [tf.IndexedSlices(next(second), unique, _table_shape(t)) for t in tables]
    return [
        d_table,
        None,
        *(next(second) for _ in values),
        *nones(row_splits),
        *d_weights,
        *nones([*counts, *priors]),
        *(next(second) for _ in field_weights),
        *nones([inputs["sums"], *inputs["embeddings"]]),
        *second,
    ]


def _jvp(name):
    """The forward mode of an op, from its registered gradient, which is linear: its transpose, by a tape over a tape.

    That is TensorFlow's own way, which cannot take a gradient that is IndexedSlices; here they are made dense, as the
    tangent of a table is.
    """

    @forwardprop_util.push_forwardprop_state()
    def jvp(attributes, inputs, outputs, tangents):
        moved = [(x, t) for x, t in zip(inputs, tangents, strict=True) if t is not None]
        targets = [y for y in outputs if y.dtype.is_floating]
        with tf.GradientTape() as outer:
            seeds = [tf.ones_like(y) for y in targets]
            outer.watch(seeds)
            with tf.GradientTape() as inner:
                inner.watch([x for x, _ in moved])
                execute.record_gradient(name, inputs, attributes, outputs)
            gradients = [_dense(g) for g in inner.gradient(targets, [x for x, _ in moved], seeds)]
        pairs = [(g, t) for g, (_, t) in zip(gradients, moved, strict=True) if g is not None]
        found = iter(outer.gradient([g for g, _ in pairs], seeds, [t for _, t in pairs]))
        return [_dense(next(found)) if y.dtype.is_floating else None for y in outputs]

    return jvp


def _dense(gradient):
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, gradient.dense_shape[0])
    return gradient


for _name in [f"DeepfmOps{kind}FmInteraction{grad}" for kind in ("", "Resource") for grad in ("", "Grad")]:
    forwardprop._SPECIAL_CASES[_name] = _jvp(_name)
    if "Resource" in _name:  # two of them on one table need not wait for each other
        auto_control_deps_utils.register_read_only_resource_op(_name)
