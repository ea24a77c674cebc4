"""The gradient of a table and its update in one op, where nobody else asks for the gradient.

In a `tf.function` the gradient that reaches an optimizer is the output of the gradient's op. The optimizer adds an op
that computes the gradient again and updates the rows by it in one pass, to the same bits, and that of the gradient,
which nobody uses any more, is pruned from the function.
"""

import weakref

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps, auto_control_deps_utils

FORWARD, GRADIENT = "DeepfmOpsResourceFmInteraction", "DeepfmOpsResourceFmInteractionGrad"
READS = {FORWARD, GRADIENT, "ReadVariableOp", "ResourceGather", "VariableShape", "VarIsInitializedOp"}
_rows, _weight_rows = 1, 3  # outputs of the gradient's op

for _type in (FORWARD, GRADIENT):
    auto_control_deps_utils.register_read_only_resource_op(_type)
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


def inputs_of(op):
    """{name: tensor, or list of them where there may be none}."""
    given, found = iter(op.inputs), {}
    for argument in op.op_def.input_arg:
        count = argument.number_attr and op.get_attr(argument.number_attr)
        found[argument.name] = [next(given) for _ in range(count)] if argument.number_attr else next(given)
    return found


class Updates:
    """The updates of one step of an optimizer, as the native ops want them; gradients of one op go together."""

    def __init__(self, native):
        self._native = native
        self._waiting = {}

    def add(self, gradient, **update):
        """`update`: the arguments of deepfm_ops_sparse_update but for the gradient."""
        op = None if tf.executing_eagerly() else gradient.values.op
        if op is None or op.type != GRADIENT or op.graph is not tf.compat.v1.get_default_graph():
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
        self._native.deepfm_ops_sparse_update(indices=indices, gradient=gradient, **update)

    def _together(self, op, updates):
        first = updates[0]
        self._native.deepfm_ops_resource_fm_update(
            **inputs_of(op),
            **{name: op.get_attr(name) for name in ("T", "output", "field_splits", "l2", "l2_linear")},
            variables=[variable for update in updates for variable in (*update["slots"], *update["lags"])],
            hyper=[update["hyper"] for update in updates],
            counts_of_rare=first["counts"],
            rule=first["rule"],
            num_slots=len(first["slots"]),
            num_lags=len(first["lags"]),
        )

    def _is_all_of(self, op, updates):
        """Whether these are the updates of all tables of the op, alike, and no table was written to since."""
        inputs = inputs_of(op)
        tables = {_rows: inputs["table"], **dict.fromkeys([_weight_rows] * len(inputs["weights"]), *inputs["weights"])}
        if op.get_attr("need_values") or updates.keys() != tables.keys() or tf.distribute.has_strategy():
            return False
        kinds = [(u["rule"], len(u["lags"]), [id(c) for c in u["counts"]]) for u in updates.values()]
        if any(kind != kinds[0] for kind in kinds):
            return False
        order = {other: number for number, other in enumerate(op.graph.get_operations())}
        for output, table in tables.items():
            if op.graph.capture(updates[output]["table"]) is not table:
                return False
            if any(user.type not in READS and order[user] > order[op] for user in table.consumers()):
                return False
        return True
