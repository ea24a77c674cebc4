"""What a scorer's file may hold: its manifest and its arrays are held against each other before anything is scored.

Arrays are known by dtype and shape alone, their numbers may be any.
"""

import math
import re

from deepfm_ops import heads
from deepfm_ops.features.columns import COMBINERS, input_specs
from deepfm_ops.features.columns_numpy import ColumnEncoder
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.features.dictionary_state import MOST_COLUMNS, whole
from deepfm_ops.scorer.rows import INT8_HEADER

MOST_NUMBERS = 1 << 26  # in the embeddings of one sample
MOST_PARTS = 1 << 12  # of each list of the plan
TABLES = ("float32", "bfloat16", "int8")
KINDS = ("string", "int64", "float16", "float32", "float64")  # of a column's input
_NUMBERS = KINDS[1:]
_DTYPE = re.compile(r"[<=|]?[a-z_]\w{0,20}")
_NAMES = dict.fromkeys(("length_name", "weight_name"), (str, type(None)))
_SPARSE = {"name": str, "vocabulary_size": int, "dtype": str, "embedding_name": (str, type(None))}
_COLUMNS = {
    "SparseFeat": _SPARSE,
    "DenseFeat": {"name": str, "dimension": int, "dtype": str},
    "VarLenSparseFeat": {"sparsefeat": dict, "maxlen": int, "combiner": str},
}


def _require(good, what):
    if not good:
        raise ValueError(what)


def _need(owner, content, kinds):
    """The values of names of an object, which must be of types."""
    _require(isinstance(content, dict), f"{owner} must be an object")
    for name, kind in kinds.items():
        _require(name in content, f"{owner} has no {name}")
        good = isinstance(content[name], kind) and not (kind is int and isinstance(content[name], bool))
        _require(good, f"{owner} cannot have {name} {content[name]!r:.100}")
    return [content[name] for name in kinds]


def checked(manifest, arrays, activations):
    """(encoders, FeatureDictionary or None) of a file whose parts fit each other.

    Args:
        manifest: what JSON gave.
        arrays: {name: array, or `rows.Sharded` for a table}.
        activations: names of those that there are.

    Raises:
        ValueError: what does not fit, by name.

    """
    info, plan, state = _need("the manifest", manifest, {"info": dict, "plan": dict, "features": (dict, type(None))})
    lists = ["encoders", "first_orders", "lookups", "second_order", "linear_dense", "deep_dense"]
    kinds = dict.fromkeys(lists, list) | {"num_hidden": int, "inputs": (dict, type(None))}
    encoders, first_orders, lookups, second_order, linear_dense, deep_dense, num_hidden, inputs = _need(
        "the plan", plan, kinds
    )
    for name in lists:
        _require(len(plan[name]) <= MOST_PARTS, f"the plan has {len(plan[name]):,} {name}, {MOST_PARTS:,} are the most")
    _check_inputs(inputs)
    _require(all(isinstance(columns, list) for columns in encoders), "encoders must have lists of columns")
    width = sum(_width(column) for columns in encoders for column in columns)
    _require(width <= MOST_COLUMNS, f"the encoders make {width:,} pairs, {MOST_COLUMNS:,} are the most")
    encoders = [_encoder(number, columns, inputs) for number, columns in enumerate(encoders)]
    features = None
    if state is not None:
        vocabulary = {n.removeprefix("features_"): arrays[n] for n in arrays if n.startswith("features_")}
        features = FeatureDictionary.from_state(state, vocabulary)
    _check_info(info, inputs, features)
    numbers = heads.width(info["task"])
    tables = _Tables(arrays, encoders, info)
    for number, part in enumerate(first_orders):
        dim, _ = tables.check(f"first order {number}", part)
        _require(dim == numbers, f"first order {number} must have a table of {numbers} columns")
    shapes = [tables.check(f"lookup {number}", part) for number, part in enumerate(lookups)]
    _require(inputs is not None or shapes or first_orders, "a model of indices must have a table")
    width = sum(dim * fields for dim, fields in shapes)
    _require(width <= MOST_NUMBERS, f"a sample's embeddings have {width:,} numbers, {MOST_NUMBERS:,} are the most")
    order, weighted = plan.get("order", 2), plan.get("field_weights", False)
    good = type(order) is int and order in (2, 3) and isinstance(weighted, bool) and not (weighted and order == 3)
    _require(good, f"the plan has order {order!r:.50} and field_weights {weighted!r:.50}")
    for number, group in enumerate(second_order):
        dim, fields = _check_group(group, shapes, inputs is None)
        if weighted:
            _shape(arrays, f"field_weights_{number}", "float32", (fields * (fields - 1) // 2,))
        if numbers > 1:
            _shape(arrays, f"second_order_{number}", "float32", (dim, numbers))
    _shape(arrays, "bias", "float32", (numbers,))
    if linear_dense:
        _shape(arrays, "linear_kernel", "float32", (_dense("linear_dense", linear_dense, inputs), numbers))
    if "deep" in arrays:
        width += _dense("deep_dense", deep_dense, inputs)
        _check_deep(arrays, width, num_hidden, plan.get("activation"), activations, numbers)
    _require("deep" in arrays or num_hidden == 0, "hidden layers end in an array 'deep'")
    held = numbers == 1  # by the rows of int8 themselves
    linear = any(part["weights"] is not None or (held and arrays[part["table"]].dtype == "u1") for part in lookups)
    _require(first_orders or second_order or linear_dense or linear or "deep" in arrays, "nothing is added up")
    return encoders, features


def _check_info(info, inputs, features):
    kinds = {"task": (str, list, dict), "table": str, "inputs": str, "kinds": dict}
    task, table, form, kinds = _need("info", info, kinds)
    _require(table in TABLES, f"info has table {table[:50]!r}")
    _require(heads.plain(task) == task, f"info has task {task!r:.100}")
    sizes = info.get("num_features"), info.get("num_columns")
    if inputs is not None:
        expected, wanted = "columns", {name: kind for name, (_, kind) in inputs.items()}
        _require(
            features is None and sizes == (None, None), "a model of columns has no dictionary and no numbers of it"
        )
    else:
        _require(whole(sizes[0], 1) and whole(sizes[1], 1, MOST_COLUMNS), f"info has sizes {sizes!r:.100}")
        expected, wanted = "matrices", {}
    if features is not None:
        expected, wanted = "features", {str(field.name): field.kind for field in features.fields}
        fit = (features.num_features, features.num_columns)
        _require(sizes == fit, f"info has sizes {sizes}, the dictionary {fit}")
    _require((form, kinds) == (expected, wanted), f"info must have inputs {expected!r}, and their kinds")


def _check_inputs(inputs):
    for name, spec in (inputs or {}).items():
        good = isinstance(spec, list) and len(spec) == 2 and isinstance(spec[0], list) and spec[1] in KINDS
        good = good and 1 <= len(spec[0]) <= 2 and all(whole(size, 1, MOST_COLUMNS) for size in spec[0])
        _require(good, f"input {name!r} cannot be {spec!r:.100}")
    width = sum(math.prod(shape) for shape, _ in (inputs or {}).values())
    _require(width <= MOST_COLUMNS, f"a sample's inputs have {width:,} cells, {MOST_COLUMNS:,} are the most")


def _encoder(number, columns, inputs):
    """The encoder of columns, whose inputs are there."""
    _require(bool(columns) and inputs is not None, f"encoder {number} must have columns, and inputs")
    encoder = ColumnEncoder(columns)
    for name, (shape, dtype) in input_specs(encoder.plan.columns).items():
        kind = dtype if dtype == "string" or "float" in dtype else "int64"
        _require(inputs.get(name) == [list(shape), kind], f"input {name!r} must be {[list(shape), kind]}")
    return encoder


def _width(column):
    """The pairs that a column makes."""
    (kind,) = _need("a column", column, {"kind": str})
    _require(kind in _COLUMNS, f"there is no column of kind {kind[:50]!r}")
    _need(f"a {kind}", column, _COLUMNS[kind])
    if kind == "VarLenSparseFeat":
        sparse = column["sparsefeat"]
        _require(
            sparse.get("kind") == "SparseFeat" and column["combiner"] in COMBINERS, "a VarLenSparseFeat of another"
        )
        _need("a VarLenSparseFeat", {"length_name": None, "weight_name": None} | column, _NAMES)
        _width(sparse)
        return column["maxlen"]
    unused = ("vocabulary_path", "embeddings_initializer", "transform_fn")  # a file names no other file, and no code
    _require(all(column.get(name) is None for name in unused), f"column {column['name']!r} has one of {unused}")
    _require(_DTYPE.fullmatch(column["dtype"]), f"no dtype {column['dtype'][:50]!r}")
    if kind == "DenseFeat":
        return column["dimension"]
    _require(whole(column["vocabulary_size"], 1, 2**48), f"no vocabulary_size {column['vocabulary_size']!r:.50}")
    return 1


def _shape(arrays, name, dtype, shape):
    """Requires an array of a dtype and a shape, in which None is any size from 1 on; returns its shape."""
    array = arrays.get(name)
    fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
    fits = fits and all(size if want is None else size == want for want, size in zip(shape, array.shape, strict=True))
    got = "none" if array is None else f"{array.dtype} {array.shape}"
    _require(fits, f"array {name[:50]!r} must be {dtype} {shape}, got {got}")
    return array.shape


def _rows(arrays, name):
    """(rows, columns) of a table or a kernel of any of the three forms."""
    dtype = str(arrays[name].dtype) if name in arrays else "float32"
    _require(dtype in ("float32", "uint16", "uint8"), f"array {name[:50]!r} is no table, but of {dtype}")
    rows, width = _shape(arrays, name, dtype, (None, None))
    dim = width - INT8_HEADER * (dtype == "uint8")
    _require(dim > 0, f"a row of {name[:50]!r} has {width} bytes, and a header of {INT8_HEADER}")
    return rows, dim


class _Tables:
    """What tables have to fit: the encoders, or the model's matrices."""

    def __init__(self, arrays, encoders, info):
        self._arrays, self._encoders, self._info = arrays, encoders, info
        self._field_sizes = None

    def check(self, owner, part):
        """(dimension, fields after pooling) of a table."""
        optional = (str, type(None))
        kinds = {"table": str, "weights": optional, "encoder": (int, type(None)), "spans": (list, type(None))}
        name, weights, encoder, spans, sizes = _need(owner, part, kinds | {"field_sizes": list})
        rows, dim = _rows(self._arrays, name)
        if weights is not None:
            dtype, numbers = str(self._arrays[name].dtype), heads.width(self._info["task"])
            if numbers > 1:
                found = _rows(self._arrays, weights)
                _require(found == (rows, numbers), f"the weights of {owner} must be {(rows, numbers)}, got {found}")
            else:
                _require(dtype != "uint8", f"{owner} has weights beside int8, which holds them")
                _shape(self._arrays, weights, dtype, (rows, 1))
        good = 0 < len(sizes) <= MOST_COLUMNS and all(whole(size, 1, MOST_COLUMNS) for size in sizes)
        _require(good, f"{owner} cannot have field_sizes {sizes!r:.100}")
        if self._info["inputs"] == "columns":
            _require(whole(encoder, 0, len(self._encoders) - 1), f"{owner} has encoder {encoder!r}")
            table = self._encoders[encoder].plan
            _require((rows, sizes) == (table.num_rows, table.field_sizes), f"{owner} does not fit its encoder")
        else:
            matrices = self._info["num_features"], self._info["num_columns"]
            _require(encoder is spans is None and (rows, sum(sizes)) == matrices, f"{owner} must fit {matrices}")
            self._field_sizes = self._field_sizes or sizes
            _require(sizes == self._field_sizes, f"{owner} has other field_sizes than the first table")
        if spans is None:
            return dim, len(sizes)
        good = all(isinstance(x, list) and len(x) == 2 and whole(x[0], 1) and type(x[1]) is bool for x in spans)
        _require(good and sum(fields for fields, _ in spans) == len(sizes), f"{owner} cannot have spans {spans!r:.100}")
        return dim, sum(1 if is_max else fields for fields, is_max in spans)


def _check_group(group, shapes, of_matrices):
    """(width, fields) of a part of the second order: the number of a lookup, or (lookup, field) pairs of one width."""
    if isinstance(group, list) and group and not of_matrices:
        pairs = [tuple(pair) for pair in group if isinstance(pair, list) and len(pair) == 2]
        good = len(pairs) == len(group) and all(whole(table, 0, len(shapes) - 1) for table, _ in pairs)
        good = good and all(whole(field, 0, shapes[table][1] - 1) for table, field in pairs)
        good = good and len(set(pairs)) == len(pairs) and len({shapes[table][0] for table, _ in pairs}) == 1
    else:
        good, pairs = whole(group, 0, len(shapes) - 1), [(group, 0)]
    _require(good, f"there is no second order {group!r:.100}")
    table = pairs[0][0]
    return shapes[table][0], shapes[table][1] if isinstance(group, int) else len(pairs)


def _dense(owner, names, inputs):
    """The numbers of dense columns."""
    specs = [(inputs or {}).get(name) if isinstance(name, str) else None for name in names]
    good = len(set(map(str, names))) == len(names) and all(spec is not None and spec[1] in _NUMBERS for spec in specs)
    _require(good, f"{owner} must name inputs of numbers, got {names!r:.100}")
    return sum(math.prod(shape) for shape, _ in specs)


def _check_deep(arrays, width, num_hidden, activation, activations, numbers):
    _require(0 <= num_hidden <= len(arrays), f"there are no {num_hidden!r:.50} hidden layers")
    known = isinstance(activation, str) and activation in activations
    _require(known or not num_hidden, f"there is no activation {activation!r:.50}")
    for i in range(num_hidden):
        rows, units = _rows(arrays, f"kernel_{i}")
        _require(rows == width and arrays[f"kernel_{i}"].dtype != "uint16", f"kernel_{i} must have {width} rows")
        _shape(arrays, f"bias_{i}", "float32", (units,))
        width = units
    _shape(arrays, "deep", "float32", (width, numbers))
