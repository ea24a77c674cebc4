"""The gradient of a table and its update in one op, where nobody else asks for the gradient.

In a `tf.function` the gradient that reaches an optimizer is the output of the gradient's op. The optimizer adds an op
that computes the gradient again and updates the rows by it in one pass, to the same bits, and that of the gradient,
which nobody uses any more, is pruned from the function.
"""

import weakref

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps, func_graph

from deepfm_ops import _library, ops

FORWARD, GRADIENT = "DeepfmOpsResourceFmInteraction", "DeepfmOpsResourceFmInteractionGrad"
READS = {FORWARD, GRADIENT, "ReadVariableOp", "ResourceGather", "VariableShape", "VarIsInitializedOp"}
_rows, _weight_rows = 1, 3  # outputs of the gradient's op

_replaced = weakref.WeakSet()


@auto_control_deps.register_acd_resource_resolver
def _forget(op, reads, writes):
    """What replaced a gradient's op need not wait for it."""
    if op not in _replaced or any(output.consumers() for output in op.outputs):
        return False
    changed = bool(reads or writes)  # it is called until nothing changes
    reads.clear()
    writes.clear()
    return changed


class Updates:
    """The updates of one step of an optimizer, by the native ops; gradients of one op go together."""

    def __init__(self):
        self._waiting = {}

    def add(self, gradient, **update):
        """`update`: the arguments of deepfm_ops_sparse_update but for the gradient."""
        op = None if tf.executing_eagerly() or tf.distribute.has_strategy() else gradient.values.op
        if (
            op is None
            or op.type != GRADIENT
            or op.graph is not tf.compat.v1.get_default_graph()
            or not isinstance(op.graph, func_graph.FuncGraph)
            or gradient.indices is not op.outputs[0]
            or gradient.values.value_index in self._waiting.get(op, {})
        ):
            self._apart(gradient.indices, gradient.values, update)
        else:
            self._waiting.setdefault(op, {})[gradient.values.value_index] = update

    def emit(self):
        """Adds the ops of what was added."""
        for op, updates in self._waiting.items():
            if self._is_all_of(op, updates):
                self._together(op, list(map(updates.get, sorted(updates))))
                _replaced.add(op)
            else:
                for output, update in updates.items():
                    self._apart(op.outputs[0], op.outputs[output], update)
        self._waiting = {}

    def _apart(self, indices, gradient, update):
        _library.native_ops().deepfm_ops_sparse_update(indices=indices, gradient=gradient, **update)

    def _together(self, op, updates):
        first = updates[0]
        _library.native_ops().deepfm_ops_resource_fm_update(
            **ops.inputs_of(op),
            **{name: op.get_attr(name) for name in ("T", "output", "field_splits", "order", "l2", "l2_linear")},
            variables=[variable for update in updates for variable in (*update["slots"], *update["lags"])],
            hyper=[update["hyper"] for update in updates],
            counts_of_rare=first["counts"],
            rule=first["rule"],
            num_slots=len(first["slots"]),
            num_lags=len(first["lags"]),
        )

    def _is_all_of(self, op, updates):
        """Whether these are the updates of all tables of the op, alike, and no table was written to since."""
        inputs = ops.inputs_of(op)
        tables = dict(zip((_rows, _weight_rows), [inputs["table"], *inputs["weights"]], strict=False))
        used = op.get_attr("need_values") or any(output.consumers() for output in op.outputs)
        if used or updates.keys() != tables.keys():
            return False
        kinds = [(u["rule"], len(u["lags"]), [_source(c) for c in u["counts"]]) for u in updates.values()]
        if any(kind != kinds[0] for kind in kinds):
            return False
        order = {other: number for number, other in enumerate(op.graph.get_operations())}
        for output, table in tables.items():
            if op.graph.capture(updates[output]["table"]) is not table:
                return False
            if any(user.type not in READS and order[user] > order[op] for user in table.consumers()):
                return False
        return True


def _source(tensor):
    """What tells whether two tensors are the same: of one that was just read from a variable, that."""
    return id(tensor.op.inputs[0] if tensor.op.type == "ReadVariableOp" else tensor)
