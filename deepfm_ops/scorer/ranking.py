"""Items that are encoded and summed once, and their order for users.

A model's score falls apart into what the user brings, what the item brings, and few products of both. With n for first
orders and for the second order of the fields of one side, and s for the sums of their embeddings (Rendle 2010),

    1/2 ((s_u + s_i)^2 - q_u - q_i) = 1/2 (s_u^2 - q_u) + 1/2 (s_i^2 - q_i) + < s_u, s_i >
    score(u, i) = link(bias + n_u + n_i + < s_u, s_i > + deep part)

so that an item is a row [n_i, s_i], and the best ones without a deep part are those whose inner products with [1, s_u]
are the largest. The deep part's first product is x W = x_u W_u + x_i W_i, of which the item's part is kept too.

Other interactions have more vectors on a side, x_p of the user and y_q of the item, which meet by numbers m[p,q]. An
item is then [n_i, y_1, y_2 ...], and sum over p of m[p,q] x_p asks for y_q:

    sum over p, q of m[p,q] < x_p, y_q >

    order 3          [s, a] on each side, a = sum over pairs of its fields of the products of their elements;
                     < s_u, s_i > + < s_u, a_i > + < a_u, s_i >
    field weights    the fields' embeddings; m is the weights of pairs of a field of the user and one of the item

A model of H numbers, of several heads or of classes, projects its second order by a kernel P [K, H]. An item is then
[n_i1 ... n_iH, s_i], and number j asks by [1 at j and 0 elsewhere, s_u * P[:, j]]. Of classes with the numbers z, the
probability p of class c orders, by its logit:

    log(p / (1 - p)) = z_c - log(sum over the other classes d of exp(z_d))
"""

import collections.abc
import copy
import math
from typing import Any

import numpy as np

from deepfm_ops import forks, heads
from deepfm_ops.features.tables import Table, column_names, is_plain
from deepfm_ops.scorer import file
from deepfm_ops.scorer.file import ScorerFileError

try:
    from deepfm_ops import _kernels as kernels
except ImportError:  # then there is no scorer either
    kernels = None

_ENCODED = 1 << 14  # rows whose embeddings are there at a time
_SCORED = 1 << 10  # rows whose hidden layers are there at a time: they stay in the cache


class Items:
    """A table of items, ready to be ranked by the scorer that made it: `Scorer.items` makes one.

    Ranking is safe from any number of threads; a call that runs while `update` does may see rows of before and after.

    Attributes:
        digest: of the scorer's file: the model that they were made with.
        inputs: names of the raw inputs that the items give; the user gives the others.
        key: name of the column of keys, or None.
        rows: float32 [N, H + W]: an item's own part of each of the model's H numbers, and what meets the user's: K sums
            of its embeddings for each group; with an order of 3, 2 K; with field weights, K for each of its fields.
        hidden: float32 [N, units], its part of the first hidden layer; None of a model without one.

    Example:
        >>> import tempfile, deepfm_ops
        >>> df = {"user": ["ann", "bob", "bob"], "film": ["M", "M", "Z"], "year": [1931, 1931, 1969]}
        >>> features = deepfm_ops.FeatureDictionary().fit(df, categorical=["user", "film", "year"])
        >>> path = tempfile.mkdtemp() + "/model.scorer"
        >>> deepfm_ops.export_scorer(deepfm_ops.DeepFM.from_features(features), path)
        >>> scorer = deepfm_ops.scorer.Scorer.load(path)
        >>> items = scorer.items({"film": ["M", "Z"], "year": [1931, 1969]}, key="film")
        >>> positions, scores = scorer.rank({"user": "ann"}, items, k=10)
        >>> sorted(items.keys(positions))
        ['M', 'Z']

    """

    def __init__(self, model, inputs, key):
        names = _inputs(model)
        self._model, self.digest, self.inputs, self.key = model, model.digest, list(inputs), key
        self._user_inputs = [name for name in names if name not in self.inputs]
        self._item, self._user = _Side(model, self.inputs), _Side(model, self._user_inputs)
        self._item.meet(self._user)
        self._user.meet(self._item)
        shared = self._item.shared
        self._meetings = [_meeting(model, group, self._user, self._item) for group in shared]
        # [H, W], what a query is multiplied by for each number.
        self._kernels = np.ones((model.numbers, self._item.width - model.numbers), np.float32)
        if shared and model.projections:
            of_groups = zip(shared, self._meetings, strict=True)
            tiled = [np.tile(model.projections[group].T, meeting.shape[1]) for group, meeting in of_groups]
            self._kernels = np.concatenate(tiled, axis=1)
        self.rows: Any
        self.hidden: Any
        self._texts: Any = None
        self._starts: Any = None

    @classmethod
    def of(cls, model, table, key):
        """The items of a table: see `Scorer.items`."""
        known = column_names(table)
        inputs = [name for name in _inputs(model) if name in known]
        if not inputs:
            raise ValueError(f"the table has none of the model's inputs {_inputs(model)}; it has {known}")
        items = cls(model, inputs, key)
        keys, items.rows, items.hidden = items._encoded(table, stacklevel=6)
        if key is not None:
            items._texts = np.frombuffer(b"".join(keys), np.uint8)
            items._starts = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        return items

    def _encoded(self, table, stacklevel):
        """(keys, if there is a column of them; rows, hidden) of a table."""
        keys = [] if self.key is None else self._keys_of(table)
        rows, hidden = self._item(table, stacklevel)
        if self.key is not None and len(keys) != len(rows):
            raise ValueError(f"column {self.key!r} has {len(keys)} keys, the table's inputs have {len(rows)} rows")
        return keys, rows, hidden

    def _keys_of(self, table):
        """The keys of a table, canonical texts as bytes."""
        source = Table(table, [self.key])
        column, _ = source.texts(self.key)
        keys, seen = [column[row] for row in range(len(column))], {}
        for row, key in enumerate(keys):
            if key is None:
                raise ValueError(f"column {self.key!r}, {source.place(row)}: an item without a key")
            if seen.setdefault(key, row) != row:
                raise ValueError(f"column {self.key!r}: key {_text(key)!r} is in rows {seen[key]} and {row}")
        return keys

    def __len__(self):
        return len(self.rows)

    @forks.cached
    def _places(self):
        return {self._key(place): place for place in range(len(self))}

    def _key(self, place):
        return self._texts[self._starts[place] : self._starts[place + 1]].tobytes()

    def keys(self, positions):
        """The keys of items, a list of text in the form of `positions`; [k] or [B, k] integers.

        Raises:
            ValueError: made without keys.
            TypeError, IndexError: positions that are no integers, or not those of items.

        """
        if self.key is None:
            raise ValueError("these items were made without keys: scorer.items(table, key=...) takes a column of them")
        positions = np.asarray(positions)
        if positions.dtype.kind not in "iu" and positions.size:
            raise TypeError(f"positions must be integers, got dtype {positions.dtype}")
        wrong = (positions < 0) | (positions >= len(self))
        if wrong.any():
            raise IndexError(f"position {positions[wrong][0]} is not in [0, {len(self)})")
        found = [_text(self._key(place)) for place in positions.reshape(-1).tolist()]
        return np.array(found, object).reshape(positions.shape).tolist()

    def update(self, table):
        """Encodes items again that are there, by their keys, in place; what `save` wrote stays as it is.

        Args:
            table: with the column of keys and all inputs of the items.

        Raises:
            KeyError: a key that no item has, or a missing column; nothing has changed then.
            ValueError: made without keys, a key that is there twice, or what `Scorer.items` raises.

        """
        if self.key is None:
            raise ValueError("these items were made without keys: scorer.items(table, key=...) takes a column of them")
        keys, rows, hidden = self._encoded(table, stacklevel=5)
        places = self._places
        unknown = next((key for key in keys if key not in places), None)
        if unknown is not None:
            raise KeyError(f"no item has the key {_text(unknown)!r}: new ones need items that are made anew")
        chosen = [places[key] for key in keys]
        self.rows[chosen] = rows
        if hidden is not None:
            self.hidden[chosen] = hidden

    def save(self, path):
        """Writes the items to a file, replacing what is at `path` whole or not at all."""
        arrays = {"rows": self.rows}
        if self.hidden is not None:
            arrays["hidden"] = self.hidden
        if self.key is not None:
            arrays |= {"texts": self._texts, "starts": self._starts}
        manifest = {"items": {"model": self.digest, "inputs": self.inputs, "key": self.key}}
        file.write_items(path, manifest, arrays)

    @classmethod
    def load(cls, path, scorer):
        """Maps what `save` wrote, and checks all of it.

        Processes share the memory of the file; `update` makes pages of this process's own.

        Args:
            path: of the file. Replace it as a whole, never write into it.
            scorer: the `Scorer` that made them, or one of the same file.

        Raises:
            FileNotFoundError: no such file.
            ScorerFileError: the file is damaged, of a newer format, holds no items, or those of another model.
            TypeError: no scorer.

        """
        model = getattr(scorer, "_model", None)
        if model is None:
            raise TypeError(f"scorer must be a Scorer, got {type(scorer).__name__}")
        manifest, arrays = file.read_items(path)
        try:
            return cls._read(model, manifest, arrays)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of another writer
            raise ScorerFileError(f"{path} does not hold items of this scorer: {error}") from error

    @classmethod
    def _read(cls, model, manifest, arrays):
        content = manifest["items"]
        digest, inputs, key = content["model"], content["inputs"], content["key"]
        if digest != model.digest:
            raise ValueError(
                f"they were made with the model {digest!r:.80}, the scorer has {model.digest!r}: make them anew"
            )
        if not isinstance(inputs, list) or inputs != [name for name in _inputs(model) if name in inputs] or not inputs:
            raise ValueError(f"they cannot have inputs {inputs!r:.100} of {_inputs(model)!r:.100}")
        if not (key is None or isinstance(key, str) or type(key) is int):
            raise ValueError(f"they cannot have key {key!r:.100}")
        items = cls(model, inputs, key)
        count, want = len(arrays["rows"]), {"rows": ("float32", items._item.width)}
        if items._item.units is not None:
            want["hidden"] = ("float32", items._item.units)
        if key is not None:
            want |= {"texts": ("uint8", None), "starts": ("int64", None)}
        if arrays.keys() != want.keys():
            raise ValueError(f"they must have the arrays {sorted(want)}, got {sorted(arrays)!r:.100}")
        for name, (dtype, width) in want.items():
            array = arrays[name]
            shape = (count, width) if width else (count + 1,) if name == "starts" else (array.size,)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"array {name!r} must be {dtype} {shape}, got {array.dtype} {array.shape}")
        if key is not None:
            starts = arrays["starts"]
            if starts[0] != 0 or starts[-1] != len(arrays["texts"]) or (starts[1:] < starts[:-1]).any():
                raise ValueError(f"starts must ascend from 0 to {len(arrays['texts'])}")
        items.rows, items.hidden = arrays["rows"], arrays.get("hidden")
        items._texts, items._starts = arrays.get("texts"), arrays.get("starts")
        return items

    def rank(self, user, k, among=None, shortlist=None, head=None):
        """The items' order for users: see `Scorer.rank`."""
        for name, most in (("k", k), ("shortlist", shortlist)):
            good = isinstance(most, int | np.integer) and not isinstance(most, bool) and most >= 1
            if not good and not (most is None and name == "shortlist"):
                raise ValueError(f"{name} must be a whole number from 1 on, got {most!r}")
        number = heads.number(self._model.task, head)
        asked = number.of_head, number.class_
        is_one, rows, hidden = self._users(user)
        self._check_users(rows, hidden, asked[0])
        chosen = self._chosen(among)
        count = len(self) if chosen is None else len(chosen)
        k = min(int(k), count)
        if hidden is None:
            positions, values = self._without_deep(rows, k, chosen, *asked)
        else:
            here = [chosen] * len(rows)
            if shortlist is not None:
                here, _ = self._without_deep(rows, min(max(k, shortlist), count), chosen, *asked)
                here.sort(axis=1)
            positions, values = self._each(rows, hidden, k, here, *asked)
        is_sigmoid = number.head.kind != "regression"
        scores = kernels.head([values.reshape(-1, 1)], 0.0, is_sigmoid).reshape(values.shape)
        return (positions[0], scores[0]) if is_one else (positions, scores)

    def _users(self, user):
        """Of users, with the biases.

        Returns:
            is_one: whether it is one record.
            rows: [B, H + W], their own numbers, and what asks for items.
            hidden: their part [B, units] of the first hidden layer, or None.

        """
        given = column_names(user)
        both = [name for name in self.inputs if name in given]
        if both:
            raise ValueError(
                f"the inputs {both} are given by the user and by the items: one of them must leave them out"
            )
        missing = [name for name in self._user_inputs if name not in given]
        if missing:
            raise KeyError(f"inputs are missing {missing}: neither the user nor the items give them")
        is_one = isinstance(user, collections.abc.Mapping)
        is_one = is_one and (not self._user_inputs or any(is_plain(user[name]) for name in self._user_inputs))
        rows, hidden = self._user(user, stacklevel=6)
        rows[:, : self._model.numbers] += self._model.bias
        if not self._user.is_plain:
            rows = self._asking(rows)
        if hidden is not None:
            hidden += self._model.layers[0][1]
        return is_one, rows, hidden

    def _check_users(self, rows, hidden, numbers):
        """Raises ValueError for a user whose part of every item's score is NaN."""
        parts = [rows[:, numbers], rows[:, self._model.numbers :], *([] if hidden is None else [hidden])]
        nan = np.logical_or.reduce([np.isnan(part).any(axis=1) for part in parts])
        if nan.any():
            raise ValueError(f"user {int(nan.argmax())} makes every score NaN: mend the model's weights")

    def _asking(self, rows):
        """Users' rows with what asks for the items' vectors in place of their own."""
        own, *vectors = np.split(rows, self._user.starts, axis=1)
        found = [own]
        for x, meeting in zip(vectors, self._meetings, strict=True):
            users, (parts, asked) = len(x), meeting.shape
            dim = x.shape[1] // parts
            asking = np.einsum("bpk,pq->bqk", x.reshape(users, parts, dim), meeting)
            found.append(asking.reshape(users, asked * dim))
        return np.concatenate(found, axis=1)

    def _chosen(self, among):
        """The positions, ascending, of a mask or of positions; None for all."""
        if among is None:
            return None
        among = np.asarray(among)
        if among.dtype == bool and among.shape == (len(self),):
            return np.flatnonzero(among)
        if among.ndim != 1 or among.dtype.kind not in "iu" and among.size:
            raise ValueError(
                f"among must be a mask of {len(self)} items or a list of positions, got {among.dtype} {among.shape}"
            )
        chosen = np.unique(among)
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < len(self):
            wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
            raise IndexError(f"among has position {wrong}, which is not in [0, {len(self)})")
        return chosen.astype(np.int64)

    def _without_deep(self, rows, k, chosen, numbers, of_class):
        """(positions, values) [B, k] for users' rows; values are logits, or the numbers of a regression."""
        if of_class is not None:
            return self._each(rows, [None] * len(rows), k, [chosen] * len(rows), numbers, of_class)
        own, queries = rows[:, numbers], rows.copy()
        queries[:, : self._model.numbers] = 0
        queries[:, numbers] = 1
        queries[:, self._model.numbers :] *= self._kernels[numbers]
        places, values, nan = kernels.top_products(self.rows, queries, max(1, k), chosen, threads=self._model.threads)
        if (nan >= 0).any():
            self._refuse(nan[nan >= 0][0])
        with np.errstate(all="ignore"):
            values += own
        if np.isnan(values).any():
            self._refuse(places[np.isnan(values)][0])
        return places, values

    def _each(self, rows, hidden, k, chosen, numbers, of_class):
        """(positions, values) [B, k] of one user after the other, each among positions of its own or None for all."""
        positions, values = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
        for user in range(len(rows) if k else 0):
            found = self._values(rows[user], hidden[user], chosen[user], numbers, of_class)
            least = np.partition(found, len(found) - k)[len(found) - k]
            candidates = np.flatnonzero(found >= least)
            best = candidates[np.argsort(-found[candidates], kind="stable")[:k]]  # equal ones stay as they lie
            positions[user], values[user] = best if chosen[user] is None else chosen[user][best], found[best]
        return positions, values

    def _values(self, row, hidden, chosen, numbers, of_class):
        """What one user orders items by, [n]; with the deep part where its `hidden` is there."""
        own, query = row[numbers], (row[self._model.numbers :] * self._kernels[numbers]).T
        count = len(self) if chosen is None else len(chosen)
        values = np.empty(count, np.float32)
        for start in range(0, count, _SCORED):
            block = slice(start, min(start + _SCORED, count))
            here = block if chosen is None else chosen[block]
            items = self.rows[here]
            # Held to the end of the block: freed earlier, its pages go back and are faulted in anew.
            layer = None if hidden is None else self.hidden[here] + hidden
            with forks.matrix_products, np.errstate(all="ignore"):
                x = items[:, self._model.numbers :] @ query
                x += items[:, numbers]
                if layer is not None:
                    x += self._model.deep_from(layer)[:, numbers]
                x += own
                values[block] = x[:, 0] if of_class is None else _logit(x, of_class)
        nan = np.isnan(values)
        if nan.any():
            place = int(nan.argmax())
            self._refuse(place if chosen is None else chosen[place])
        return values

    def _refuse(self, place):
        name = (
            f"item {int(place)}" if self.key is None else f"item {_text(self._key(place))!r}, at position {int(place)},"
        )
        raise ValueError(f"{name} has a score that is NaN: mend the model's weights, or leave the item out by among")


def _logit(x, number):
    """The logit of a class's probability by the softmax of x [n, C]."""
    return x[:, number] - np.logaddexp.reduce(np.delete(x, number, axis=1), axis=1)


def _text(key):
    return key.decode("utf-8", "replace")


def _inputs(model):
    """The names of a model's raw inputs."""
    if model.features is not None:
        return [field.name for field in model.features.fields]
    if model.inputs is None:
        raise ValueError(
            "ranking needs a model of raw inputs, to know which of them are the items': export it with its "
            "FeatureDictionary"
        )
    return list(model.inputs)


def _meeting(model, group, user, item):
    """The m [P, Q] by which the vectors of a user and an item meet in a group."""
    if model.field_weights:
        return _square(model.field_weights[group])[np.ix_(user.groups[group], item.groups[group])]
    return np.array([[1, 1], [1, 0]] if model.order == 3 else [[1]], np.float32)


def _square(weights):
    """The weights [F (F - 1) / 2] of pairs of fields as [F, F]."""
    fields = math.isqrt(2 * len(weights)) + 1
    found = np.zeros((fields, fields), np.float32)
    found[np.tril_indices(fields, -1)] = weights
    return found + found.T


class _Side:
    """Some of a model's inputs: what they add up to without the others.

    Attributes:
        groups: of the second order that they have fields in: {group: for each field whether it is theirs}.
        shared, starts, width: those of them that the other side has fields in too, where they begin in a row, and its
            width; after `meet`.
        is_plain: whether a side's vectors are the sums of its embeddings alone.
        units: of the first hidden layer, or None.

    """

    def __init__(self, model, names):
        self._names, self.groups = names, {}
        self._part = part = copy.copy(model)
        if model.features is not None:
            fields = model.features.fields
            part.features = copy.copy(model.features)
            part.features.fields = [field for field in fields if field.name in names]
            columns = [[field.name in names for field in fields for _ in range(field.size)]]
        else:
            part.inputs = {name: spec for name, spec in model.inputs.items() if name in names}
            parts = [encoder.part(names) for encoder in model.encoders]
            part.encoders, columns = [encoder for encoder, _ in parts], [kept for _, kept in parts]
        first_orders = [lookup.part(columns[lookup.encoder])[0] for lookup in model.first_orders]
        part.first_orders = [lookup for lookup in first_orders if lookup is not None]
        lookups = [lookup.part(columns[lookup.encoder]) for lookup in model.lookups]
        kept = [number for number, (lookup, _) in enumerate(lookups) if lookup is not None]
        part.lookups = [lookups[number][0] for number in kept]
        self.is_plain = model.order == 2 and not model.field_weights
        part.needs_embeddings = [model.needs_embeddings[number] or not self.is_plain for number in kept]
        part.second_order = []
        for number, group in enumerate(model.second_order):
            if isinstance(group, int):
                here = [kept.index(group)] if group in kept else []
                mask = lookups[group][1]
            else:
                mask = [lookups[table][1][field] for table, field in group]
                fields = [pair for pair, is_here in zip(group, mask, strict=True) if is_here]
                here = (
                    [[(kept.index(table), sum(lookups[table][1][:field])) for table, field in fields]] if fields else []
                )
            part.second_order += here
            if here:
                self.groups[number] = mask
        part.projections = [model.projections[number] for number in self.groups if model.projections]
        squares = [
            _square(model.field_weights[n])[mask][:, mask] for n, mask in self.groups.items() if model.field_weights
        ]
        part.field_weights = [square[np.tril_indices(len(square), -1)] for square in squares]
        part.set_interactions()
        part.linear_dense = [name for name in model.linear_dense if name in names]
        if part.linear_dense:
            part.linear_kernel = model.linear_kernel[self._rows_of(model, model.linear_dense)]
        part.deep_dense = [name for name in model.deep_dense if name in names]
        self.units = None
        if model.deep is not None:
            rows = [np.repeat(pooled, whole.dim) for whole, (_, pooled) in zip(model.lookups, lookups, strict=True)]
            rows = np.concatenate([*rows, self._rows_of(model, model.deep_dense)])
            self._kernel = (model.layers[0][0] if model.layers else model.deep)[rows]
            self.units = self._kernel.shape[1] if model.layers else None

    def _rows_of(self, model, dense):
        """Whether each number of dense inputs is of this side."""
        widths = [math.prod(model.inputs[name][0]) for name in dense]
        return np.repeat(np.array([name in self._names for name in dense], bool), widths)

    def meet(self, other):
        """Says what the other side is, before anything is computed."""
        self.shared = [group for group in self.groups if group in other.groups]
        widths = [self._part.numbers, *map(self._width, self.shared)]
        *self.starts, self.width = np.cumsum(widths).tolist()

    def _width(self, group):
        part, mask = self._part, self.groups[group]
        of_part = part.second_order[list(self.groups).index(group)]
        vectors = sum(mask) if part.field_weights else part.order - 1
        return vectors * part.lookups[of_part if isinstance(of_part, int) else of_part[0][0]].dim

    def _vectors(self, group, sums, embeddings):
        """What meets the other side in a group, [B, W of it]."""
        number = list(self.groups).index(group)
        if self.is_plain:
            return sums[number]
        e = self._part.together(number, embeddings)
        if self._part.field_weights:
            return e.reshape(len(e), e.shape[1] * e.shape[2])
        pairs = (e[:, 1:] * e.cumsum(axis=1)[:, :-1]).sum(axis=1)
        return np.concatenate([sums[number], pairs], axis=1)

    def __call__(self, table, stacklevel):
        """(rows [B, H + W], hidden [B, units] or None) of a table; one row for a side without inputs.

        Warnings are raised `stacklevel` frames above `_Model.raw_inputs`.
        """
        part = self._part
        pairs, inputs, count = [], {}, 1
        if self._names:
            inputs = part.raw_inputs(table, stacklevel)
            pairs = part.pairs(inputs)
            count = len(next(iter(inputs.values())))
        rows = np.zeros((count, self.width), np.float32)
        hidden = None if self.units is None else np.zeros((count, self.units), np.float32)
        for start in range(0, count if self._names else 0, _ENCODED):
            block = slice(start, start + _ENCODED)
            here = [pair and tuple(x if x is None else x[block] for x in pair) for pair in pairs]
            numbers = {name: array[block] for name, array in inputs.items()}
            parts, sums, embeddings = part.parts(here, numbers)
            for x in parts:
                rows[block, : part.numbers] += x
            for group, column in zip(self.shared, self.starts, strict=True):
                x = self._vectors(group, sums, embeddings)
                rows[block, column : column + x.shape[1]] = x
            if part.deep is not None and len(self._kernel):
                x = part.deep_input(embeddings, numbers)
                with forks.matrix_products:
                    if hidden is None:
                        rows[block, : part.numbers] += x @ self._kernel
                    else:
                        hidden[block] = x @ self._kernel
        return rows, hidden
