"""`explain`: the way from a model and its inputs to terms."""

import collections.abc
import contextlib
import os
import sys

import numpy as np

from deepfm_ops.data.stream import Stream
from deepfm_ops.explanations.results import Batches, Explanation, Summary, Totals
from deepfm_ops.explanations.scored import side_of
from deepfm_ops.explanations.strongest import Strongest
from deepfm_ops.explanations.terms import Terms
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.features.tables import is_table
from deepfm_ops.scorer import Scorer

NUMBERS = 1 << 19  # that the products of a batch may have


def explain(model, inputs, *, head=None, summary=None, top=20, features=None):
    """Takes a logit of a model apart: bias, first order, second order of each pair of fields, triples, and deep part.

    The parts add up to the logit, to float32's precision (of a model that computes in fewer bits, to theirs). The deep
    part is one number: what it makes of a field is no sum; and so are the triples of an order of 3. As `predict`, it is
    without dropout and with averaged weights.

    Args:
        model: a DeepFM, of matrices or of columns, or a `scorer.Scorer`, which need not import TensorFlow for it.
        inputs: what the model's `predict` or the scorer's `score` takes, raw features too where the model knows its
            FeatureDictionary. Or a data set: a stream, a tf.data.Dataset, a PyDataset, or an iterable of batches, with
            or without labels, which is iterated over once, to its end.
        head: which number, of a model that predicts several: the name of a head; of ("multiclass", C) a class, 0 to
            C - 1; of a head of classes (its name, the class). None: the only one there is.
        summary: False: the terms of each sample, an `Explanation`, in memory. True: means and mean absolute values of
            each pair of fields, and the strongest pairs of features, a `Summary`, in the memory of a batch. None: True
            for a data set, False for arrays and tables.
        top: pairs of features of a `Summary`; 0: none, which is several times faster.
        features: the FeatureDictionary that names the features of a model over matrices, where it does not know it, or
            of a scorer, whose file holds no texts.

    Returns:
        `Explanation` or `Summary`.

    Raises:
        TypeError: a model or inputs of another kind.
        ValueError, KeyError: inputs that do not fit the model; no samples for a summary; a head that the model has not,
            or None where it has several.
        IndexError: an index outside of the table.

    Example:
        >>> import numpy as np
        >>> import deepfm_ops
        >>> model = deepfm_ops.DeepFM(num_features=100, num_fields=3, embedding_dim=4, use_deep=False)
        >>> explanation = deepfm_ops.explain(model, (np.array([[1, 20, 30]]), np.ones((1, 3))))
        >>> explanation.first_order.shape, explanation.pairs.shape, explanation.fields
        ((1, 3), (1, 3), ['field 0', 'field 1', 'field 2'])

    """
    if not (features is None or isinstance(features, FeatureDictionary)):
        raise TypeError(f"features must be a FeatureDictionary, got {type(features).__name__}")
    side = _side(model, features).of_head(head)
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 0:
        raise ValueError(f"top must be an integer of at least 0, got {top!r}")
    if isinstance(inputs, Stream):
        side.require(inputs.features)
    batches = _batches(inputs)
    if summary is None:
        summary = batches is not None
    with inputs.raising() if isinstance(inputs, Stream) else contextlib.nullcontext():
        prepared = map(side.prepared, [inputs] if batches is None else batches)
        return _summary(side, prepared, int(top)) if summary else _explanation(side, prepared)


def _side(model, features):
    if isinstance(model, Scorer):
        return side_of(model, features)
    from deepfm_ops.explanations.modelled import ModelSide

    return ModelSide(model, features)


def _explanation(side, prepared):
    batches, parts, probabilities = list(prepared), [], []
    for batch in batches:
        for rows in _slices(side, batch):
            pairs, inputs = side.pairs_of(batch, rows)
            parts.append(side.terms(pairs, inputs))
            if side.task == "multiclass":  # the other classes' logits are in it too
                probabilities.append(side.probabilities(pairs, inputs))
    if not parts:
        raise ValueError("inputs have no batch")
    terms = parts[0] if len(parts) == 1 else Terms(*map(np.concatenate, zip(*parts, strict=True)))
    return Explanation(side, terms, Batches(batches), np.concatenate(probabilities) if probabilities else None)


def _summary(side, prepared, top):
    total = Totals(side, Strongest(side.num_features) if top else None)
    for batch in prepared:
        for rows in _slices(side, batch):
            total.add(side.terms(*side.pairs_of(batch, rows), total.strongest))
    if not total.samples:
        raise ValueError("there is no sample to summarize")
    return Summary(side, total, top)


def _slices(side, batch):
    """The rows of a batch, in parts whose products fit into memory; of no rows one."""
    step = max(1, NUMBERS // side.width)
    return [slice(start, min(start + step, len(batch))) for start in range(0, max(1, len(batch)), step)]


def _batches(inputs):
    """The inputs of each batch of a data set; None of inputs that are one batch."""
    if isinstance(inputs, Stream):
        return map(_inputs_of, inputs.batches())
    if isinstance(inputs, str | os.PathLike):
        raise TypeError(
            "inputs must be arrays, a table or a data set; of files, pass a stream: features.stream(path, 1024)"
        )
    if is_table(inputs) or hasattr(inputs, "__array__") or isinstance(inputs, tuple):
        return None
    if isinstance(inputs, list) and not any(is_table(x) or isinstance(x, tuple) for x in inputs):
        return None
    if _is_endless(inputs):
        raise ValueError("inputs have no end: take as many batches as there should be")
    if _is_py_dataset(inputs):
        return (_inputs_of(inputs[number]) for number in range(inputs.num_batches))
    if isinstance(inputs, collections.abc.Iterable):
        return map(_inputs_of, inputs)
    raise TypeError(f"inputs must be arrays, a table, or batches of them, got {type(inputs).__name__}")


def _is_py_dataset(inputs):
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(inputs, keras.utils.PyDataset)


def _is_endless(inputs):
    if _is_py_dataset(inputs):
        return inputs.num_batches is None
    return hasattr(inputs, "cardinality") and int(inputs.cardinality()) == -1  # of tf.data


def _inputs_of(element):
    """The inputs of an element (inputs, labels, weights), or inputs; two matrices alike are indices and values."""
    if not isinstance(element, tuple):
        return element
    if len(element) == 2 and all(len(getattr(x, "shape", ())) == 2 for x in element):
        first, second = (tuple(x.shape) for x in element)
        if first == second:
            return element
    return element[0]
