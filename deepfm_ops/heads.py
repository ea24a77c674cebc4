"""What a model predicts: one thing, or several by name. Imports no TensorFlow.

A task is

    "binary"             a probability, by the sigmoid
    "regression"         a number
    ("multiclass", C)    the probabilities of the classes 0 to C - 1, by the softmax
    {name: one of them}  heads that share the tables

Of a dict, a head's labels may be missing, and the heads stand in the order of their names.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

SINGLE = ("binary", "regression")  # with one number a sample
MOST_CLASSES = 1 << 16
MOST_HEADS = 1 << 12
LARGEST = 2.0**63  # label of regression: float32 holds the squares


class Head(NamedTuple):
    """One of the things that a model predicts.

    Attributes:
        name: str; None of a model that predicts one thing.
        kind: "binary", "regression" or "multiclass".
        width: numbers a sample: the classes of "multiclass", else 1.

    """

    name: Any
    kind: str
    width: int = 1

    @property
    def of_labels(self):
        """What errors call its labels."""
        return "labels" if self.name is None else f"labels[{self.name!r}]"


def plain(task):
    """The task as JSON holds it, once it is known to be one: a tuple becomes a list, and names are sorted.

    Raises:
        ValueError: what is no task.

    """
    if isinstance(task, Mapping):
        if not 1 <= len(task) <= MOST_HEADS or not all(isinstance(name, str) and name for name in task):
            raise ValueError(f"task must be a dict of names, which are text, to tasks, got {task!r:.200}")
        return {name: _plain(f"task[{name!r}]", task[name]) for name in sorted(task)}
    return _plain("task", task)


def _plain(owner, task):
    if isinstance(task, str) and task in SINGLE:
        return task
    if isinstance(task, list | tuple) and len(task) == 2 and task[0] == "multiclass":
        classes = task[1]
        if not _is_whole(classes) or not 2 <= classes <= MOST_CLASSES:
            raise ValueError(f"{owner} must have 2 to {MOST_CLASSES:,} classes, a whole number, got {classes!r:.100}")
        return ["multiclass", int(classes)]
    nested = "" if "[" in owner else ", or a dict of names to these"
    raise ValueError(f"{owner} must be one of {', '.join(SINGLE)}, ('multiclass', classes){nested}, got {task!r:.100}")


def _is_whole(x):
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def of(task):
    """The list of `Head` of what `plain` gave."""
    named = task if isinstance(task, dict) else {None: task}
    return [Head(name, kind) if isinstance(kind, str) else Head(name, *kind) for name, kind in named.items()]


def width(task):
    """Numbers a sample of all heads."""
    return sum(head.width for head in of(task))


class Number(NamedTuple):
    """One of the numbers of a sample.

    Attributes:
        head: the `Head` that it is of.
        class_: the class that it is of, int; None of a head of one number.
        place: int, where it stands among the H numbers.

    """

    head: Head
    class_: int | None
    place: int

    @property
    def of_head(self):
        """The slice of its head's numbers."""
        first = self.place - (self.class_ or 0)
        return slice(first, first + self.head.width)

    @property
    def key(self):
        """What `number` finds it by: a name, a class, both, or None."""
        name = self.head.name
        return self.class_ if name is None else name if self.class_ is None else (name, self.class_)

    @property
    def label(self):
        """What texts call it; nothing, where a model predicts one number that has no name."""
        parts = (self.head.name, None if self.class_ is None else f"class {self.class_}")
        return ", ".join(part for part in parts if part is not None)


def number(task, key):
    """The `Number` that a key says.

    Args:
        task: what `plain` gave.
        key: the name of a head of one number; (name, class) of a head of classes; of classes without a name the class.
            None: the only number.

    Raises:
        KeyError: no head has the name.
        ValueError: any other key that says none, or more than one.

    """
    if key is None and width(task) == 1:
        return Number(of(task)[0], None, 0)
    name, class_ = None, key
    if isinstance(task, dict):
        name, class_ = key if isinstance(key, tuple | list) and len(key) == 2 else (key, None)
    place = 0
    for head in of(task):
        if name == head.name and head.kind == "multiclass" and _is_whole(class_) and class_ in range(head.width):
            return Number(head, int(class_), place + int(class_))
        if name == head.name and head.kind != "multiclass" and class_ is None:
            return Number(head, None, place)
        place += head.width
    allowed = ", ".join(map(_keys, of(task)))
    error = KeyError if isinstance(name, str) and name not in task else ValueError
    raise error(f"head must be {allowed:.500}, got {key!r:.100}")


def _keys(head):
    """The keys of a head's numbers, as text."""
    if head.kind == "multiclass":
        return " to ".join(repr(Number(head, class_, 0).key) for class_ in (0, head.width - 1))
    return "None" if head.name is None else repr(head.name)


def split(task, numbers):
    """[(head, its numbers [B, width])] of [B, width of all]; arrays or tensors."""
    found, start = [], 0
    for head in of(task):
        found.append((head, numbers[:, start : start + head.width]))
        start += head.width
    return found


def joined(task, found):
    """The only one of a list with an entry for each head, or {name: entry}."""
    return dict(zip(task, found, strict=True)) if isinstance(task, dict) else found[0]


class Rule(NamedTuple):
    """What the labels of a head have to be.

    Attributes:
        least, most: that they are between.
        said: of others, in errors.
        whole: whether they are whole numbers.
        may_miss: whether NaN, and of classes a negative number, stands for a label that is not there.

    """

    least: float
    most: float
    said: str
    whole: bool = False
    may_miss: bool = False

    def missing(self, labels, is_nan=np.isnan):
        """Where labels, of NumPy or TensorFlow with its `is_nan`, are not there; nowhere, where none may be missing."""
        missing = is_nan(labels) & self.may_miss
        return missing | (labels < 0) & self.may_miss if self.whole else missing

    def usable(self, labels, floor=np.floor):
        """Where labels, of NumPy or TensorFlow with its `floor`, are there and as they have to be; not where NaN is."""
        usable = (labels >= self.least) & (labels <= self.most)
        return usable & (labels == floor(labels)) if self.whole else usable


def rule(head, may_miss=False):
    """The `Rule` of a head."""
    if head.kind == "multiclass":
        said = f"no class of ('multiclass', {head.width}): classes are the whole numbers 0 to {head.width - 1}"
        return Rule(0.0, head.width - 1.0, said, True, may_miss)
    if head.kind == "binary":
        said = "not in [0, 1], as task 'binary' needs it: map -1 and +1 by (labels + 1) / 2, other numbers by a "
        return Rule(0.0, 1.0, f"{said}threshold (labels > 3), or use task 'regression'", False, may_miss)
    said = "not finite, or too large to be squared: drop the sample, or mend it"
    return Rule(-LARGEST, LARGEST, said, False, may_miss)


def rules(task):
    """[(head, its Rule)]; labels may be missing where a task is a dict."""
    return [(head, rule(head, isinstance(task, dict))) for head in of(task)]


# Of a column of labels among others, as long as no model says more.
MAYBE = Rule(-LARGEST, LARGEST, "no number", may_miss=True)
