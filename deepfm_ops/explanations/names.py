"""What fields, features and the values of a sample are called."""

import bisect

import numpy as np

from deepfm_ops.explanations.terms import Bag, Layout
from deepfm_ops.features import cells
from deepfm_ops.features.columns import DenseFeat, SparseFeat, VarLenSparseFeat
from deepfm_ops.features.tables import Table


class MatrixNames:
    """Of a model over matrices.

    Args:
        features: the FeatureDictionary, or None: a field is "field 3", a feature its number, "#17".
        field_sizes: index columns of each field.

    """

    def __init__(self, features, field_sizes):
        self.features = features
        names = [str(field.name) for field in features.fields] if features else None
        names = names or [f"field {number}" for number in range(len(field_sizes))]
        ends = np.cumsum(field_sizes).tolist()
        self.layout = Layout([Bag(*bag) for bag in zip(names, [0, *ends], ends, strict=False)])

    def feature(self, number):
        """The name of a feature."""
        column, value = (None, None) if self.features is None else self.features.name(number)
        if column is None:
            return f"feature {number}"
        field = next(field for field in self.features.fields if field.name == column)
        if value is None and field.kind == "numeric":
            return str(column)
        return f"{column}={self._other(field, number) if value is None else value}"

    def place(self, number):
        """What features of earlier fields have less of."""
        return 0 if self.features is None else int(self.features.vocabulary.columns[number])

    @staticmethod
    def _other(field, number):
        return "(unseen)" if number == field.unseen else f"#{number}"

    def of_row(self, indices, values, table, row):
        """What each index column of a sample, row `row` of a table or None, holds, [P]: text, or None: nothing."""
        if self.features is None:
            times = ["" if value == 1 else f" x {value:g}" for value in values.tolist()]
            found = zip(indices.tolist(), values.tolist(), times, strict=True)
            return [f"#{index}{by}" if value else None for index, value, by in found]
        found = []
        for field, bag in zip(self.features.fields, self.layout.bags, strict=True):
            given = None  # read when it is needed
            here = slice(bag.start, bag.stop)
            for index, value in zip(indices[here].tolist(), values[here].tolist(), strict=True):
                text = None
                if index:
                    text = self.features.name(index)[1]
                    if field.kind == "numeric" and field.transform != "quantiles":
                        text = f"{value:g}"
                    if text is None and table is not None:
                        given = self._given(field, table, row) if given is None else given
                        text = next((cells.text(x) for x in given if self.features.index(field.name, x) == index), None)
                    text = self._other(field, index) if text is None else text
                found.append(text)
        return found

    def _given(self, field, table, row):
        """The values of a cell: a scorer's dictionary knows values, but not their texts."""
        fields = self.features.fields
        lists = [field.name for field in fields if field.kind == "multivalued"]
        table = Table(table, [field.name for field in fields], lists)
        if field.kind != "multivalued":
            return [table.objects(field.name)[row]]
        entry = table.entries(field.name, self.features.separator)[row]
        return [cells.text(x).rpartition(":")[0] or x for x in entry] if field.weighted else entry


class ColumnNames:
    """Of a model of feature columns.

    A feature has a number of its own in each column, where columns share rows too.

    Args:
        plans: the `TablePlan` of each table that is looked up.
        dense: (name, dimension) of the dense columns of the first order.

    """

    def __init__(self, plans, dense):
        self._columns, self._starts, self._keys, self.layouts, first = [], [], {}, [], 0
        for plan in plans:
            bags, at = [], 0
            for column in plan.columns:
                self._columns.append(column)
                self._starts.append(first)
                shift = first - plan.offsets[column.name]
                if isinstance(column, DenseFeat):
                    for i, name in enumerate(numbers(column.name, column.dimension), at):
                        bags.append(Bag(name, i, i + 1, False, shift))
                    at, first = at + column.dimension, first + column.dimension
                else:
                    is_list = isinstance(column, VarLenSparseFeat)
                    size = column.maxlen if is_list else 1
                    bags.append(Bag(column.name, at, at + size, is_list and column.combiner == "max", shift))
                    at, first = at + size, first + column.vocabulary_size
            self.layouts.append(Layout(bags))
        self.dense_fields = [name for column, dimension in dense for name in numbers(column, dimension)]
        self.num_features = first

    def feature(self, number):
        """The name of a feature."""
        at = bisect.bisect_right(self._starts, number) - 1
        column, row = self._columns[at], number - self._starts[at]
        if isinstance(column, DenseFeat):
            return numbers(column.name, column.dimension)[row]
        if column.vocabulary is not None:
            return f"{column.name}={self._key(column, row)}"
        return f"{column.name}={'#' if column.use_hash else ''}{row}"

    def place(self, number):
        """What features of earlier columns have less of."""
        return number

    def _key(self, column, row):
        if column.name not in self._keys:
            self._keys[column.name] = {index: key for key, index in column.vocabulary.items()}
        return self._keys[column.name].get(row, "(unknown)" if row == 0 else f"#{row}")

    @staticmethod
    def of_row(columns, inputs, values, mask, row):
        """What each index column of a sample, row `row` of the inputs, holds, [P]: text, or None: nothing."""
        found = []
        for column in columns:
            if isinstance(column, DenseFeat):
                found += [f"{value:g}" for value in values[len(found) : len(found) + column.dimension].tolist()]
                continue
            there = [True] if isinstance(column, SparseFeat) else mask[len(found) : len(found) + column.maxlen] > 0
            given = np.asarray(inputs[column.name][row]).reshape(-1).tolist()
            texts = [cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell) for cell in given]
            found += [text if is_there else None for text, is_there in zip(texts, there, strict=True)]
        return found


def numbers(name, dimension):
    """The names of a dense column's numbers."""
    return [name] if dimension == 1 else [f"{name}[{i}]" for i in range(dimension)]


def named(field, value):
    """A field with what is in it; None: nothing."""
    return f"{field} missing" if value is None else f"{field}={value}"


def by_field(layout, values):
    """What each field of a sample holds, of what its columns hold: the names of `named`."""
    found = []
    for bag in layout.bags:
        there = [value for value in values[bag.start : bag.stop] if value is not None]
        found.append(named(bag.field, "+".join(there) if there else None))
    return found
