"""A trained model as a SavedModel."""

import re

import keras
import tensorflow as tf
from tensorflow.python.trackable import resource

from deepfm_ops import _library
from deepfm_ops.features.dictionary_tensorflow import DictionaryEncoder
from deepfm_ops.models.base import fitting


def export(model, path, portable=True, *, features=None):
    """Writes a SavedModel with one signature, "serving_default": named inputs of any batch size to "score" [B, 1].

    Of a model of classes "score" is [B, C]; one of several heads has an output of each head's name instead.

    Args:
        model: a DeepFM, or any functional Keras model with this package's layers and one output.
        path: folder; what a SavedModel there holds is overwritten.
        portable: True: standard TensorFlow operations alone, so that it loads and serves where this package was
            never installed. False: with the native op; then `import deepfm_ops.ops` before loading it.
        features: the FeatureDictionary of a model over matrices; None: the model's own, if it has one. The encoding
            becomes part of the SavedModel, and its inputs are the dictionary's columns, [B] each: text or int64 for a
            categorical column, as its values in `fit` were (float64 where there were fractions); float32 for a numeric
            one, NaN where it is missing; text for a multivalued one, its values separated as in `fit`. A value that was
            not seen counts as missing.

    The inputs are otherwise the model's: `indices` and `values`, or those of the feature columns.

    Raises:
        TypeError, ValueError: a model or dictionary that cannot be exported; the text says why.
        RuntimeError: portable=False without the native op.

    """
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise TypeError(f"model must be a functional Keras model, got {type(model).__name__}")
    if hasattr(model, "show_averages"):
        model.show_averages()
    named = isinstance(getattr(getattr(model, "plan", None), "task", None), dict)
    if len(model.outputs) != 1 and not named:
        raise ValueError(f"model must have one output, got {len(model.outputs)}")
    if dense := [x.name for x in model.inputs if getattr(x, "sparse", False) or getattr(x, "ragged", False)]:
        raise ValueError(f"inputs {dense} are ragged or sparse, which a signature here cannot have")
    if features is None:
        features = getattr(model, "features", None)
    native = None if portable else _library.native_ops()
    if native is None and not portable:
        raise RuntimeError(f"portable=False needs the native op: {_library.native_info()['reason']}")
    encoder = None if features is None else DictionaryEncoder(fitting(model, features))
    specs = (
        [tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name) for x in model.inputs]
        if encoder is None
        else encoder.specs
    )
    _check_names([spec.name for spec in specs])

    @tf.function(input_signature=[{spec.name: spec for spec in specs}])
    def score(inputs):
        if native is not None:  # the first operation that is not known is the one an error names
            native.import_deepfm_ops_dot_ops_before_loading_this_model()
        if encoder is not None:
            inputs = encoder(inputs)
        else:
            inputs = keras.tree.pack_sequence_as(model.input, [inputs[x.name] for x in model.inputs])
        scores = model(inputs, training=False)
        return scores if named else {"score": scores}

    with _library.export("portable" if portable else "native"):
        signature = score.get_concrete_function()
    module = tf.Module()  # what the signature uses must hang on it
    module.parts = [variable.value for variable in _served(model)], _resources(model), encoder
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature})


def _check_names(names):
    """Raises for names that TensorFlow would change or refuse."""
    seen = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == "self":
            raise ValueError(
                f"input {name!r}: in a SavedModel a name is a letter, then letters, digits and _, and not 'self'; "
                "rename the column"
            )
        if seen.setdefault(name.lower(), name) != name:
            raise ValueError(
                f"inputs {seen[name.lower()]!r} and {name!r} differ in case alone, which a SavedModel cannot"
            )


def _served(model):
    """The model's variables without those that training alone needs."""
    layers = [vars(layer) for layer in model._flatten_layers()]
    counts = {id(parts.get(name)) for parts in layers for name in ("feature_counts", "samples")}
    return [variable for variable in model.variables if id(variable) not in counts]


def _resources(model):
    """The lookup tables of the model's layers, those of nested models too."""
    found = []
    for layer in model._flatten_layers():
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part for part in parts if isinstance(part, resource.CapturableResource)]
    return found
