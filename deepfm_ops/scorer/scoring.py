"""The scores of a scorer's file, by the kernels and NumPy."""

import contextlib
import copy
import math
import warnings

import numpy as np

from deepfm_ops import forks, heads
from deepfm_ops.features import cells, columns_numpy
from deepfm_ops.features.columns import sequence_names
from deepfm_ops.features.tables import is_table
from deepfm_ops.scorer import content, file
from deepfm_ops.scorer.file import ScorerFileError
from deepfm_ops.scorer.ranking import Items
from deepfm_ops.scorer.rows import INT8_HEADER, Sharded, decoded, gathered

try:
    from deepfm_ops import _kernels as kernels
except ImportError:  # a pure-Python install can write files, but not score with them
    kernels = None


def _relu(x):
    return np.maximum(x, 0, out=x)


def _sigmoid(x):
    np.minimum(np.negative(x, out=x), 88, out=x)  # e^88 is the largest that float32 holds
    return np.reciprocal(np.add(np.exp(x, out=x), 1, out=x), out=x)


def _elu(x, alpha=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


# Keras's activations, on an array that may be overwritten.
ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": _relu,
    "relu6": lambda x: np.clip(x, 0, 6, out=x),
    "leaky_relu": lambda x: np.where(x > 0, x, np.float32(0.2) * x),
    "sigmoid": _sigmoid,
    "tanh": lambda x: np.tanh(x, out=x),
    "elu": _elu,
    "selu": lambda x: np.float32(1.05070098) * _elu(x, np.float32(1.67326324)),
    "silu": lambda x: x * _sigmoid(x.copy()),
    "swish": lambda x: x * _sigmoid(x.copy()),
    "softplus": lambda x: np.logaddexp(x, np.float32(0)),
}


def _softmax(x):
    x -= x.max(axis=1, keepdims=True)
    np.exp(x, out=x)
    return np.divide(x, x.sum(axis=1, keepdims=True), out=x)


# Of the numbers [B, 1] or, of classes, [B, C], in an array that may be overwritten.
_OUTPUT = {"binary": lambda x: _sigmoid(x)[:, 0], "regression": lambda x: x[:, 0], "multiclass": _softmax}


class Scorer:
    """A model's scores, without TensorFlow.

    Scoring is safe from any number of threads, and the kernels release the GIL. The file is mapped, so that the
    processes of a machine share one copy of its tables, forked ones too. NumPy's BLAS has threads of its own: a server
    that scores from several threads sets OPENBLAS_NUM_THREADS=1.

    Attributes:
        path: the file.
        digest: SHA-256 of the file's content, hex: the version of the model.
        info: dict: "task" ("binary", "regression", ["multiclass", C], or of several heads a dict of these), "table"
            ("float32", "bfloat16" or "int8"), "inputs" ("features", "columns" or "matrices"), "kinds" (by name of a raw
            input: "categorical", "numeric", "multivalued"; for columns "string", "int64" or a float dtype),
            "num_features" and "num_columns" (V and P of the matrices, or None), "shards" (how many files beside it hold
            the tables; None: it holds them).

    Example:
        >>> import numpy as np, tempfile, deepfm_ops
        >>> model = deepfm_ops.DeepFM(num_features=1000, num_fields=3, embedding_dim=8, hidden_units=(32,))
        >>> path = tempfile.mkdtemp() + "/model.scorer"
        >>> deepfm_ops.export_scorer(model, path)
        >>> scorer = deepfm_ops.scorer.Scorer.load(path)
        >>> scorer.score(np.array([[1, 20, 300], [4, 50, 600]])).shape
        (2,)

    """

    def __init__(self, path, threads=1):
        if kernels is None:
            raise RuntimeError("scoring needs the compiled kernels, and deepfm_ops was installed without them")
        self._threads = threads
        self._turn = forks.Turn()
        self._model = _Model.read(path, threads)
        self.path = path

    @classmethod
    def load(cls, path, threads=1):
        """Opens a file that `deepfm_ops.export_scorer` wrote, and checks all of it.

        Args:
            path: of the file; its shards, if it has them, lie beside it. Replace it as a whole (as export_scorer
                does), never write into it.
            threads: that one call may use in the kernels.

        Raises:
            FileNotFoundError: no such file.
            ScorerFileError: the file is damaged, of a newer format, or not a scorer's, or a shard of it is damaged, of
                another export, or not there.

        """
        return cls(path, threads)

    @property
    def digest(self):
        return self._model.digest

    @property
    def info(self):
        return dict(self._model.info)

    def reload(self, path=None):
        """Opens the file anew, or another one, and scores with it from now on. Calls that run end with the old one.

        Returns:
            Whether the content is another one.

        Raises:
            what `load` raises; then the old model stays.

        """
        with self._turn.of_this_process():
            path = self.path if path is None else path
            fresh = _Model.read(path, self._threads)
            changed = fresh.digest != self._model.digest
            self._model, self.path = fresh, path
            return changed

    def score(self, indices, values=None, *, row_splits=None, bag_splits=None):
        """The scores of a batch.

        Args:
            indices: int32 or int64 [B, P], the columns of the model's matrix; or [nnz] with row_splits or bag_splits.
                Or raw features, for a model that was exported with its FeatureDictionary or made of feature columns:
                a pandas or polars DataFrame, a pyarrow Table, a dict of equally long lists or arrays, or one record: a
                dict of plain values.
            values: numbers, the same shape; None: all ones.
            row_splits: int64 [B + 1]: sample b owns pairs [row_splits[b], row_splits[b + 1]), each a field of its
                own; for models without a deep part and without multi-valued fields.
            bag_splits: int64 [B * F + 1]: field f of sample b owns pairs [bag_splits[b * F + f],
                bag_splits[b * F + f + 1]), which are summed.

        Returns:
            float32 [B]: probabilities, or the plain sums for "regression"; of "multiclass" [B, C]; of several heads a
            dict of these.

        Raises:
            IndexError: an index outside [0, V).
            ValueError: shapes or inputs that do not fit the model.
            TypeError: dtypes that do not fit.
            KeyError: a missing raw input.

        """
        model = self._model  # one model for the whole call, whatever reload does
        if (type(indices) is not np.ndarray or indices.dtype.names) and is_table(indices):
            if values is not None or row_splits is not None or bag_splits is not None:
                raise ValueError("raw features come alone, without values and splits")
            return model.score_raw(indices)
        is_list = isinstance(indices, list) and len(indices) and isinstance(indices[0], dict)
        if model.inputs is not None or is_list:
            names = model.inputs if model.inputs is not None else model.info["kinds"]
            raise ValueError(
                f"this model takes raw inputs: a dict of {list(names)}, or a table; of records, pass "
                "pandas.DataFrame(records)"
            )
        indices, values = as_matrices(indices, values)
        if row_splits is None and bag_splits is None:
            return model.score_matrix(indices, values)
        if row_splits is not None and bag_splits is not None:
            raise ValueError("row_splits and bag_splits exclude each other")
        return model.score_ragged(indices, values, row_splits, bag_splits)

    def items(self, table, key=None):
        """Items to be ranked, encoded and summed once.

        Args:
            table: an item per row: a pandas or polars DataFrame, a pyarrow Table or a dict of equally long lists or
                arrays, with some of the model's raw inputs; the others are the user's, and other columns are ignored.
            key: name of a column with a key for each item, for `Items.update` and `Items.keys`; it may be an input.

        Returns:
            `Items`, bound to this scorer's model.

        Raises:
            ValueError: a model of matrices, no input in the table, two inputs of one column of which only one is there,
                a key that is missing or there twice; inputs that do not fit the model.
            KeyError: no column of that name.
            TypeError: something that is no table, or inputs of another kind.

        """
        return Items.of(self._model, table, key)

    def rank(self, user, items, k, *, among=None, shortlist=None, head=None):
        """The k items of the highest scores, those that `score` gives the joined rows to 1e-5.

        Without a deep part it is one pass over `items.rows`. With one, the hidden layers are computed for each item,
        from the first layer's sum on, or for those of a shortlist: the items that are first without the deep part.
        `recall` says what a shortlist loses. The probability of a class needs the numbers of all classes of each item.

        Args:
            user: the raw inputs that the items do not give: one record, a dict of plain values; or a table of users.
            items: what `items` gave, or `Items.load`.
            k: how many, from 1 on; where it is more than there are, all of them.
            among: the items that count: a mask, bool [N], or positions. None: all.
            shortlist: how many items, k at least, get their deep part. None: all.
            head: of several, the name of the one that orders, or (name, class): by the probability of a class; of a
                model of classes alone, the class. None: the model's only number.

        Returns:
            positions: int64 [k] of a record, or [B, k] of a table, of the highest score first; equal ones as they lie.
            scores: float32, of the same shape.

        Raises:
            ValueError: items of another model, an input that the user and the items give, an item whose score is NaN,
                k, among, shortlist or head that cannot be; inputs that do not fit the model.
            KeyError: inputs that neither gives, or a head of another name.
            IndexError: a position that no item has.
            TypeError: something that is no table or no Items, or inputs of another kind.

        """
        if not isinstance(items, Items):
            raise TypeError(f"items must be Items, which scorer.items(table) makes, got {type(items).__name__}")
        model = self._model
        if items.digest != model.digest:
            raise ValueError(
                f"items were made with the model {items.digest}, this scorer has {model.digest}: make them anew"
            )
        return items.rank(user, k, among, shortlist, head)

    def recall(self, user, items, k, shortlist, *, among=None, head=None):
        """The share of the first k items that `rank` finds with a shortlist, the mean over the users.

        Raises: what `rank` raises.

        """
        exact, found = (
            np.atleast_2d(self.rank(user, items, k, among=among, shortlist=n, head=head)[0]) for n in (None, shortlist)
        )
        shares = [np.isin(right, got).mean() for right, got in zip(exact, found, strict=True) if len(right)]
        return float(np.mean(shares)) if shares else 1.0


def as_matrices(indices, values=None):
    """Indices and values, or None, as the kernels take them; raises TypeError for dtypes that do not fit."""
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu" and indices.size:
        raise TypeError(f"indices must be integers, got dtype {indices.dtype}")
    if indices.dtype != np.int64 and indices.dtype != np.int32:
        indices = indices.astype(np.int64)
    indices = np.ascontiguousarray(indices)
    if values is not None:
        values = np.asarray(values)
        if values.dtype != np.float32:
            if values.dtype.kind not in "fiub":
                raise TypeError(f"values must be numbers, got dtype {values.dtype}")
            values = values.astype(np.float32)
        values = np.ascontiguousarray(values)
    return indices, values


_SHORT = 4096  # numbers of a product that takes no lock, see forks.Calls


def _check_values(values):
    """Raises ValueError for a number that no model can score. One product says of nearly all that they are fine."""
    if values is None:
        return
    flat = values.reshape(-1)
    with contextlib.nullcontext() if flat.size <= _SHORT else forks.matrix_products:
        if flat.dot(flat) <= cells.LARGEST**2:  # not for NaN
            return
    bad = cells.first_unusable(values)
    if bad is not None:
        raise ValueError(f"values[{','.join(map(str, bad))}] = {values[bad]} {cells.UNUSABLE}")


PLAIN = 2, None  # order and field weights


class _Lookup:
    """One table of the file: the arguments of its kernel call; and of one more for weights of several numbers."""

    def __init__(self, plan, arrays, threads, numbers):
        self.table = arrays[plan["table"]]
        self.weights = arrays[plan["weights"]] if plan.get("weights") else None
        self.numbers = numbers
        self.encoder = plan["encoder"] or 0  # the matrices count as the only one
        self.dim = self.table.shape[1] - INT8_HEADER * (self.table.dtype == np.uint8)
        self.threads = threads
        self.order, self.field_weights = PLAIN  # how its fields interact, where all of them do
        self._set_fields(plan["field_sizes"], plan["spans"])

    def _set_fields(self, field_sizes, spans):
        self.field_sizes, self.spans, self.splits = field_sizes, spans, None
        if any(size != 1 for size in field_sizes):
            self.splits = [0, *np.cumsum(field_sizes).tolist()]
        self.first_columns = [0, *np.cumsum(field_sizes[:-1]).tolist()]

    def part(self, columns):
        """The lookup of some of its columns of pairs alone, and which of its fields, after pooling, are left.

        Args:
            columns: whether each is one of them, a list of bool.

        Returns:
            (lookup, or None if no field is left; a list of bool).

        Raises:
            ValueError: a field has columns of both kinds.

        """
        kept = []
        for first, size in zip(self.first_columns, self.field_sizes, strict=True):
            kinds = set(columns[first : first + size])
            if len(kinds) > 1:
                raise ValueError(f"columns {first} to {first + size - 1} of the matrices are one field")
            kept += kinds
        spans, pooled, first = [], [], 0
        for fields, is_max in self.spans or [(len(kept), False)]:
            here = kept[first : first + fields]
            spans += [(sum(here), is_max)] * any(here)
            pooled += here[:1] if is_max else here
            first += fields
        if not any(kept):
            return None, pooled
        part = copy.copy(self)
        sizes = [size for size, keep in zip(self.field_sizes, kept, strict=True) if keep]
        part._set_fields(sizes, None if self.spans is None else spans)
        return part, pooled

    def __call__(self, indices, values, output="scalar", embeddings=False, row_splits=None):
        """(interaction, sums, embeddings or None, linear or None)."""
        order, field_weights = PLAIN if output == "sum" else (self.order, self.field_weights)
        field_splits = self.splits if row_splits is None else None
        # Arguments are named one by one: a dict of them costs as much as 40 rows.
        interaction, sums, e, linear = kernels.fm_forward(
            self.table,
            indices,
            values,
            weights=self.weights if self.numbers == 1 else None,
            row_splits=row_splits,
            field_splits=field_splits,
            output=output,
            return_embeddings=embeddings,
            threads=self.threads,
            order=order,
            field_weights=field_weights,
        )
        if self.numbers > 1:
            linear = None
            if self.weights is not None:
                options = {"row_splits": row_splits, "field_splits": field_splits, "threads": self.threads}
                linear = kernels.fm_forward(self.weights, indices, values, output="sum", **options)[0]
        return interaction, sums, e, linear

    def pooled(self, e, mask):
        """The embeddings after max pooling, which only some columns have."""
        if self.spans is None:
            return e
        present, parts, first = mask[:, self.first_columns] > 0, [], 0
        for fields, is_max in self.spans:
            part = e[:, first : first + fields]
            if is_max:
                here = present[:, first : first + fields, None]
                part = np.where(here, part, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
                part = np.where(here.any(axis=1, keepdims=True), part, 0).astype(np.float32)
            parts.append(part)
            first += fields
        return np.concatenate(parts, axis=1)


class _ShardedLookup(_Lookup):
    """One table in shards: the kernel sees the rows of the batch, and where each is among them."""

    def __init__(self, plan, arrays, threads, numbers):
        super().__init__(plan, arrays, threads, numbers)
        self.sharded = [self.table] if self.weights is None else [self.table, self.weights]
        if not all(isinstance(table, Sharded) for table in self.sharded):
            raise ValueError(f"table {plan['table']!r:.100} and its weights are not in the same files")

    def __call__(self, indices, values, *args, **options):
        rows = self.table.shape[0]
        wrong = (indices < 0) | (indices >= rows)
        any_wrong = wrong.any()
        found, positions = gathered(self.sharded, np.where(wrong, 0, indices) if any_wrong else indices)
        here = copy.copy(self)
        here.table, here.weights = found[0], found[1] if len(found) == 2 else None
        result = super(_ShardedLookup, here).__call__(positions, values, *args, **options)
        if any_wrong:  # said after whatever else is wrong, as the kernel does
            place = np.unravel_index(np.argmax(wrong), wrong.shape)
            raise IndexError(f"indices[{','.join(map(str, place))}] = {indices[place]} is not in [0, {rows})")
        return result


def _lookup(plan, arrays, threads, numbers):
    kind = _ShardedLookup if isinstance(arrays[plan["table"]], Sharded) else _Lookup
    return kind(plan, arrays, threads, numbers)


class _Model:
    """What one file says, ready to score. Never changed after it was read, but for what was warned of."""

    def __init__(self, manifest, arrays, digest, threads):
        self.encoders, self.features = content.checked(manifest, arrays, ACTIVATIONS)
        self.warned, plan = set(), manifest["plan"]
        self.digest, shards = digest, manifest.get("shards")
        self.info = manifest["info"] | {"shards": len(shards["digests"]) if shards else None}
        self.task = heads.plain(manifest["info"]["task"])
        self.numbers = heads.width(self.task)  # of a sample
        self.first_orders = [_lookup(part, arrays, threads, self.numbers) for part in plan["first_orders"]]
        self.lookups = [_lookup(part, arrays, threads, self.numbers) for part in plan["lookups"]]
        self.second_order, self.order = plan["second_order"], plan.get("order", 2)
        self.field_weights = [
            np.array(arrays[f"field_weights_{i}"]) for i in range(len(self.second_order)) if plan.get("field_weights")
        ]
        self.set_interactions()
        self.inputs, self.linear_dense, self.deep_dense = plan["inputs"], plan["linear_dense"], plan["deep_dense"]
        self.sequences = set().union(*(sequence_names(encoder.plan.columns) for encoder in self.encoders))
        self.linear_kernel = arrays.get("linear_kernel")
        self.layers = [
            (decoded(arrays[f"kernel_{i}"]), arrays[f"bias_{i}"], ACTIVATIONS[plan["activation"]])
            for i in range(plan["num_hidden"])
        ]
        self.deep = arrays.get("deep")
        self.threads = threads
        self.bias = np.array(arrays["bias"])
        self.kind = "vector" if self.numbers > 1 else "scalar"  # of interactions
        # What a score of one number needs is made once: it takes but a few microseconds.
        self.first_bias, self.is_probability = float(self.bias[0]), heads.of(self.task)[0].kind == "binary"
        self.projections = [arrays[f"second_order_{i}"] for i in range(len(self.second_order)) if self.numbers > 1]
        needs = {pair[0] for group in self.second_order if isinstance(group, list) for pair in group}
        self.needs_embeddings = [self.deep is not None or i in needs for i in range(len(self.lookups))]
        self.plain_fields = all(part.splits is None for part in [*self.first_orders, *self.lookups])
        self.side = None  # what `explain` makes of it, once

    @classmethod
    def read(cls, path, threads):
        manifest, arrays, digest = file.read(path)
        try:
            model = cls(manifest, arrays, digest, threads)
            # Whatever is done once is done now, and not in a server's first request.
            with np.errstate(all="ignore"):
                model.score_something()
            return model
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of another writer
            raise ScorerFileError(f"{path} does not hold a model: {error!r}") from error

    def score_something(self):
        """One sample, of missing features and zeros."""
        if self.features is not None:
            self.score_raw({field.name: None for field in self.features.fields})
        elif self.inputs is not None:
            kinds = {name: (shape, object if kind == "string" else kind) for name, (shape, kind) in self.inputs.items()}
            self.score_raw({name: np.zeros((1, *shape), kind) for name, (shape, kind) in kinds.items()})
        else:
            self.score_matrix(np.zeros((1, self.info["num_columns"]), np.int64), None)

    def score_matrix(self, indices, values):
        return self._scores(self.pairs_of_matrix(indices, values), {}, None)

    def score_raw(self, table):
        inputs = self.raw_inputs(table)
        return self._scores(self.pairs(inputs), inputs, None)

    def pairs_of_matrix(self, indices, values):
        """[(indices, values, None)], once they are known to fit the model."""
        columns = self.info["num_columns"]
        _check_values(values)
        if indices.ndim != 2 or indices.shape[1] != columns:
            raise ValueError(f"indices must have shape [B, {columns}], got {indices.shape}")
        return [(indices, values, None)]

    def raw_inputs(self, table, stacklevel=4):
        """{name: array} of raw features: what `pairs` takes, and what dense columns are read from."""
        if self.features is not None:
            indices, values, unknown = self.features.encode(table)
            for name in unknown.keys() - self.warned:  # once per column and model: a server has many requests
                self.warned.add(name)
                warnings.warn(unknown[name], stacklevel=stacklevel)
            return {"indices": indices, "values": values}
        if self.inputs is None:
            raise ValueError("this model was exported without its FeatureDictionary: it takes indices and values")
        inputs = columns_numpy.raw_inputs(table, self.inputs, self.sequences)
        for name, (shape, kind) in self.inputs.items():
            if kind not in ("string", "int64"):
                inputs[name] = inputs[name].astype(kind).astype(np.float32)  # as the model's input rounds it
            inputs[name] = inputs[name].reshape(-1, math.prod(shape))
        return inputs

    def pairs(self, inputs):
        """[(indices, values, mask or None)] of each encoder, or of the matrices."""
        if self.features is not None:
            _check_values(inputs["values"])
            return [(inputs["indices"], inputs["values"], None)]
        return [encode and encode(inputs) for encode in self.encoders]

    def score_ragged(self, indices, values, row_splits, bag_splits):
        splits = np.asarray(row_splits if bag_splits is None else bag_splits)
        if splits.dtype.kind not in "iu":
            raise TypeError(f"splits must be integers, got dtype {splits.dtype}")
        splits = np.ascontiguousarray(splits, np.int64)
        _check_values(values)
        fields = len((self.lookups or self.first_orders)[0].field_sizes)
        if row_splits is not None:
            if self.deep is not None or not self.plain_fields:
                raise ValueError(
                    "row_splits need a model without a deep part and without multi-valued fields; use bag_splits"
                )
            return self._scores([(indices, values, None)], {}, splits)
        if splits.ndim != 1 or len(splits) % fields != 1 % fields:
            raise ValueError(f"bag_splits must have B * {fields} + 1 entries, got shape {splits.shape}")
        batch = (len(splits) - 1) // fields
        # Every bag is a sample here: its sum is its field's embedding.
        parts, embeddings = [], []
        for first in self.first_orders:
            parts.append(first(indices, values, "sum", row_splits=splits)[0])
        for lookup in self.lookups:
            e, _, _, linear = lookup(indices, values, "sum", row_splits=splits)
            embeddings.append(e.reshape(batch, fields, e.shape[1]))
            if linear is not None:
                parts.append(linear)
        parts = [part.reshape(batch, fields, part.shape[1]).swapaxes(1, 2).sum(axis=2) for part in parts]
        crossed = [self.crossed(number, embeddings[lookup]) for number, lookup in enumerate(self.second_order)]
        parts += self._projected(crossed)
        return self._finish(parts, embeddings, {})

    def interaction(self, number):
        """(order, field weights or None) of a second order."""
        return self.order, self.field_weights[number] if self.field_weights else None

    def set_interactions(self):
        """Tells the lookups whose fields all interact how they do."""
        for number, group in enumerate(self.second_order):
            if isinstance(group, int):
                self.lookups[group].order, self.lookups[group].field_weights = self.interaction(number)

    def together(self, number, embeddings):
        """The embeddings [B, F, K] that interact in a second order, of those of each lookup."""
        group = self.second_order[number]
        if isinstance(group, int):
            return embeddings[group]
        return np.stack([embeddings[table][:, field] for table, field in group], axis=1)

    def crossed(self, number, e):
        """A second order, [B, 1], or [B, K] for a vector, of its embeddings [B, F, K]: the kernel's table here."""
        batch, fields, dim = e.shape
        order, field_weights = self.interaction(number)
        options = {"order": order, "field_weights": field_weights, "output": self.kind, "threads": self.threads}
        return kernels.fm_forward(e.reshape(-1, dim), np.arange(batch * fields).reshape(batch, fields), **options)[0]

    def _projected(self, interactions):
        """The second orders [B, H] of interactions, which are vectors for more than one number."""
        if self.numbers == 1:
            return interactions
        with forks.matrix_products:
            return [vector @ kernel for vector, kernel in zip(interactions, self.projections, strict=True)]

    def _scores(self, pairs, inputs, row_splits):
        """The scores, from the (indices, values, mask) of each encoder, or of the matrices."""
        parts, _, embeddings = self.parts(pairs, inputs, row_splits)
        return self._finish(parts, embeddings, inputs)

    def parts(self, pairs, inputs, row_splits=None):
        """What is added up but for the deep part.

        Args:
            pairs: (indices, values, mask) of each encoder, or of the matrices.
            inputs: by name, those that are numbers.
            row_splits: of ragged samples, or None.

        Returns:
            parts: list of float32 [B, 1].
            sums: of the embeddings [B, K] that interact, for each group of the second order.
            embeddings: [B, F, K] of each lookup, or None where nobody needs them.

        """
        parts, sums, embeddings, interactions = [], [], [], []
        for first in self.first_orders:
            indices, values, mask = pairs[first.encoder]
            if first.spans is None:
                parts.append(first(indices, values, "sum", row_splits=row_splits)[0])
            else:
                e = first(indices, values, embeddings=True)[2]
                parts.append(first.pooled(e, mask).sum(axis=1))
        for lookup, needed in zip(self.lookups, self.needs_embeddings, strict=True):
            indices, values, mask = pairs[lookup.encoder]
            interaction, summed, e, linear = lookup(indices, values, self.kind, needed, row_splits)
            interactions.append((interaction, summed))
            embeddings.append(e if e is None else lookup.pooled(e, mask))
            if linear is not None:
                parts.append(linear)
        found = []
        for number, group in enumerate(self.second_order):
            if isinstance(group, int):
                found.append(interactions[group][0])
                sums.append(interactions[group][1])
            else:
                chosen = self.together(number, embeddings)
                found.append(self.crossed(number, chosen))
                sums.append(chosen.sum(axis=1))
        parts += self._projected(found)
        if self.linear_dense:
            numbers = np.concatenate([inputs[name] for name in self.linear_dense], axis=1)
            with forks.matrix_products:
                parts.append(numbers.astype(np.float32, copy=False) @ self.linear_kernel)
        return parts, sums, embeddings

    def _finish(self, parts, embeddings, inputs):
        """Adds the deep part, and makes the heads' outputs of the sums."""
        if self.deep is not None:
            parts.append(self.deep_part(embeddings, inputs))
        if self.numbers == 1:
            score = kernels.head(parts, self.first_bias, self.is_probability)
            return heads.joined(self.task, [score]) if isinstance(self.task, dict) else score
        sums = sum(parts, self.bias)
        found = [_OUTPUT[head.kind](np.ascontiguousarray(x)) for head, x in heads.split(self.task, sums)]
        return heads.joined(self.task, found)

    def deep_part(self, embeddings, inputs):
        """[B, 1] of the embeddings [B, F, K] of each lookup."""
        x = self.deep_input(embeddings, inputs)
        with forks.matrix_products:
            if self.layers:
                x = x @ self.layers[0][0]
                x += self.layers[0][1]
            return self.deep_from(x)

    def deep_input(self, embeddings, inputs):
        """[B, .], what enters the deep part."""
        flat = [e.reshape(len(e), e.shape[1] * e.shape[2]) for e in embeddings]
        flat += [inputs[name].astype(np.float32, copy=False) for name in self.deep_dense]
        return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)

    def deep_from(self, x):
        """The deep part [B, 1] from the first product and its bias on, which are overwritten; in matrix_products."""
        for number, (kernel, bias, activation) in enumerate(self.layers):
            if number:
                x = x @ kernel
                x += bias
            x = activation(x)
        return x @ self.deep
