"""What a model adds up, for those who compute it without Keras: exporters and the scorer. Imports no TensorFlow.

    y = bias + first orders + second orders + deep part, and its sigmoid for task "binary"

of each of H numbers where there are several heads, or classes (`heads` says which; their second orders have
projections).

A model writes its plan while it is made. There the sources of numbers are its Keras layers; in a scorer's file they are
the names of arrays, and in a scorer the arrays. Nothing is ever looked up by the name of a layer.
"""

import dataclasses
from typing import Any

from deepfm_ops import heads
from deepfm_ops.features.columns import input_specs


@dataclasses.dataclass
class Lookup:
    """The rows of one table, by the pairs of an encoder.

    Attributes:
        source: what owns the table [V, K], and first-order weights [V, H].
        field_sizes: index columns of each field; they are summed.
        linear: whether its first order is added up too.
        encoder: number of the encoder that makes the pairs; None: indices and values are the model's own inputs.
        spans: of fields that are then pooled by maximum, [(number of fields, whether to pool them)], or None.

    """

    source: Any
    field_sizes: list
    linear: bool = False
    encoder: int | None = None
    spans: list | None = None


@dataclasses.dataclass
class Plan:
    """The parts of a model.

    Attributes:
        task: what `heads.plain` gave.
        head: the source of the bias.
        inputs: {name: (shape of a sample, dtype)} of a model of feature columns; None: indices and values.
        columns: the feature columns of a model of them.
        encoders: the feature columns of each encoder.
        first_orders: lookups whose rows, of H columns, are summed.
        lookups: lookups of embeddings.
        second_order: numbers of lookups, for the interaction of all their fields, or lists of the (lookup, field) that
            interact.
        order: of their interactions, 2, or 3 with triples of fields.
        field_weights: the source of the weights of pairs of fields of each second order, where they have them; else
            none.
        projections: for more than one number, the source of a kernel [K, H] of each second order; else none.
        linear_dense, linear_kernel: dense columns of the first order, and the source of their kernel.
        deep_dense: dense columns that enter the deep part after the embeddings.
        hidden: (source of kernel and bias, source of a normalization before the activation or None) of each layer.
        activation: of the hidden layers, as Keras serializes it.
        deep: the source of the kernel [., H] that ends the deep part, or None without a deep part.

    """

    task: Any = "binary"
    head: Any = None
    inputs: dict | None = None
    columns: list = dataclasses.field(default_factory=list)
    encoders: list = dataclasses.field(default_factory=list)
    first_orders: list[Lookup] = dataclasses.field(default_factory=list)
    lookups: list[Lookup] = dataclasses.field(default_factory=list)
    second_order: list = dataclasses.field(default_factory=list)
    order: int = 2
    field_weights: list = dataclasses.field(default_factory=list)
    projections: list = dataclasses.field(default_factory=list)
    linear_dense: list = dataclasses.field(default_factory=list)
    linear_kernel: Any = None
    deep_dense: list = dataclasses.field(default_factory=list)
    hidden: list = dataclasses.field(default_factory=list)
    activation: Any = None
    deep: Any = None

    @property
    def width(self):
        """H, the numbers of a sample."""
        return heads.width(self.task)

    @property
    def is_plain(self):
        """Whether pairs of fields interact, without weights."""
        return self.order == 2 and not self.field_weights

    @property
    def tables(self):
        """All lookups, first orders first."""
        return [*self.first_orders, *self.lookups]

    def with_sources(self, change):
        """The plan with `change(source)` for every source."""
        moved = lambda parts: [dataclasses.replace(part, source=change(part.source)) for part in parts]  # noqa: E731
        optional = lambda source: None if source is None else change(source)  # noqa: E731
        return dataclasses.replace(
            self,
            head=change(self.head),
            first_orders=moved(self.first_orders),
            lookups=moved(self.lookups),
            field_weights=list(map(change, self.field_weights)),
            projections=list(map(change, self.projections)),
            linear_kernel=optional(self.linear_kernel),
            hidden=[(change(layer), optional(norm)) for layer, norm in self.hidden],
            deep=optional(self.deep),
        )

    def used(self):
        """The plan without lookups that nothing adds up, the encoders that only they had, and the inputs of those."""
        groups = [[table for table, _ in group] if isinstance(group, list) else [group] for group in self.second_order]
        interacting = set().union(*groups)
        kept = [n for n, part in enumerate(self.lookups) if part.linear or self.deep is not None or n in interacting]
        lookups = [self.lookups[number] for number in kept]
        encoders = sorted({part.encoder for part in (*self.first_orders, *lookups)} - {None})
        renumbered = lambda part: dataclasses.replace(  # noqa: E731
            part, encoder=None if part.encoder is None else encoders.index(part.encoder)
        )
        columns = [column for number in encoders for column in self.encoders[number]]
        needed = None if self.inputs is None else input_specs([*columns, *self.linear_dense, *self.deep_dense])
        return dataclasses.replace(
            self,
            inputs=None if needed is None else {name: spec for name, spec in self.inputs.items() if name in needed},
            encoders=[self.encoders[number] for number in encoders],
            first_orders=[renumbered(part) for part in self.first_orders],
            lookups=[renumbered(part) for part in lookups],
            second_order=[
                [(kept.index(table), field) for table, field in group] if isinstance(group, list) else kept.index(group)
                for group in self.second_order
            ],
        )
