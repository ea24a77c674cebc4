"""What Keras saved can be loaded after `import deepfm_ops`, though the package imports neither Keras nor TensorFlow.

Keras looks the classes of a file up in its registry. As soon as Keras is imported, each class of this package has an
entry there that imports its module when it is needed.
"""

import importlib
import sys

HOME = {
    "DeepFM": "models",
    "ColumnDeepFM": "models",
    "Head": "models.parts",
    "Projection": "models.parts",
    "BiInteraction": "models.parts",
    "Fields": "models.parts",
    "Sum": "models.parts",
    "FMInteraction": "layers",
    "FirstOrder": "layers",
    "ColumnEncoder": "features.columns_tensorflow",
    "DenseColumns": "features.columns_tensorflow",
    "PoolMax": "features.columns_tensorflow",
    "StackedInitializer": "features.columns_tensorflow",
    "SGD": "optimizers",
    "Adagrad": "optimizers",
    "RowWiseAdagrad": "optimizers",
    "LazyAdam": "optimizers",
    "Ftrl": "optimizers",
    "CombinedOptimizer": "combined",
    "RowNormal": "cluster.initializers",
}
MODELS = ("DeepFM", "ColumnDeepFM")  # an .h5 file names a model's class alone, without the package


class _Later:
    """Stands in Keras's registry for a class whose module is not imported yet."""

    def __init__(self, name):
        self._name = name
        self.__name__ = name

    def _class(self):
        return getattr(importlib.import_module(f"deepfm_ops.{HOME[self._name]}"), self._name)

    def from_config(self, config):
        return self._class().from_config(config)


def register(keras):
    """Enters the classes into Keras's registry; those that are there already stay."""
    registry = keras.saving.get_custom_objects()
    for name in HOME:
        registry.setdefault(f"deepfm_ops>{name}", _Later(name))
    for name in MODELS:
        registry.setdefault(name, _Later(name))


class _KerasFinder:
    """Finds Keras as the other finders do, and registers the classes once it was imported.

    wrapt has such a hook; it would be a third of the time that the scorer takes to import.
    """

    for_deepfm_ops = True

    def find_spec(self, name, path=None, target=None):
        if name != "keras":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def when_keras_comes():
    """Registers the classes now, or when Keras is imported."""
    if "keras" in sys.modules and hasattr(sys.modules["keras"], "saving"):
        register(sys.modules["keras"])
    elif not any(getattr(finder, "for_deepfm_ops", False) for finder in sys.meta_path):  # imported twice
        sys.meta_path.insert(0, _KerasFinder())
