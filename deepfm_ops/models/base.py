"""What both kinds of models share as Keras models."""

import contextlib
import functools
import warnings
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import heads
from deepfm_ops.data.stream import Stream
from deepfm_ops.models import epochs as epochs_
from deepfm_ops.models import labels, multi_worker, recipe, replicated
from deepfm_ops.models.losses import HeadsModel

# What Keras can change in a Dense layer of a finished model: its precision by `quantize`, its kernel by `enable_lora`.
ADAPTED = ("dtype", "quantization_config", "lora_rank", "lora_alpha")


def clonable(model_class):
    """Lets `keras.models.clone_model`, which calls a class with (inputs, outputs, name=...), make one of this class.

    It does so with classes whose constructor takes any arguments, as this one's then seems to; the others become plain
    functional models, which no longer know what they are.
    """
    make = model_class.__init__

    @functools.wraps(make)
    def __init__(self, *args, **kwargs):
        outputs = keras.tree.flatten(args[1]) if len(args) == 2 else []
        original = getattr(outputs[0], "_clone_of", None) if outputs else None
        if original is None:
            make(self, *args, **kwargs)
        else:
            self._become_clone(*original, *args, **kwargs)

    __init__.is_clonable = True
    model_class.__init__ = __init__
    return model_class


class ConfiguredModel(HeadsModel):
    """A functional model that is saved as the arguments it was made with.

    A class below has
        _rows(parts, column, value): (source, rows) in the first of the lookups that has the column, or None.
        _dense_weights(column): the first-order weights of a dense column, or None.
        _column_names(): of the features.
        _named_rows(column): (rows of its values that have names, function from a row to its name), or a ValueError.
    """

    _features = None
    training_stream = None

    def _finish(self, config, inputs, outputs, name, trainable, frozen, plan):
        try:
            super().__init__(inputs=inputs, outputs=outputs, name=name)
        except ValueError as error:
            if "times in the model" in str(error):
                raise ValueError(f"a column has the name of a layer of the model, so rename it: {error}") from error
            raise
        self._config = config
        self.plan = plan
        self._index_inputs = [tensor.name for tensor in self.inputs if tensor.dtype == "int64"]
        self.trainable = trainable
        for layer in frozen:
            self.get_layer(layer).trainable = False

    def get_config(self):
        return {
            **self._config,
            "name": self.name,
            "trainable": self.trainable,
            "frozen": [layer.name for layer in self.layers if self.trainable and not layer.trainable],
            "adapted": self._adapted(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    def _adapted(self):
        """{name of a layer: what Keras changed in it after it was made}, for `parts.adapted`."""
        layers = [layer for layer in self.layers if isinstance(layer, keras.layers.Dense)]
        layers = [layer for layer in layers if layer.quantization_mode is not None or layer.lora_rank]
        return {layer.name: {k: v for k, v in layer.get_config().items() if k in ADAPTED} for layer in layers}

    def _run_through_graph(self, inputs, operation_fn=lambda layer: layer, call_fn=None):
        """Keras's; where it clones the layers, what they are clones of is noted on the output."""
        clones = {}

        def noted(layer):
            result = operation_fn(layer)
            if isinstance(result, keras.layers.Layer):
                clones[layer] = result
            return result

        outputs = super()._run_through_graph(inputs, operation_fn=noted, call_fn=call_fn)
        tensors = keras.tree.flatten(outputs)
        if clones and all(isinstance(tensor, keras.KerasTensor) for tensor in tensors):
            if not getattr(type(self).__init__, "is_clonable", False):
                raise ValueError(
                    f"{type(self).__name__} has a constructor of its own, whose arguments a clone would lose: make "
                    "another by type(model).from_config(model.get_config())"
                )
            changed = [old.name for old, new in clones.items() if not _is_alike(old, new)]
            if changed or call_fn is not None:
                what = f"clone_function changed {changed}" if changed else "call_function changed the model"
                raise ValueError(
                    f"{what}, and {type(self).__name__} would not be what its arguments say: make another with other "
                    "arguments, or clone keras.Model(model.inputs, model.outputs), which is a plain functional model"
                )
            for tensor in tensors:
                tensor._clone_of = (self, clones)
        return outputs

    def _become_clone(self, original, clones, inputs, outputs, name=None):
        plan = original.plan.with_sources(lambda layer: clones[layer])
        self._finish(dict(original._config), inputs, outputs, name, original.trainable, (), plan)
        self._features = original._features

    def embedding(self, column, value=None):
        """The embedding of a value of a column, or those of all its values.

        Args:
            column: name.
            value: a category, in any type; of a multi-valued column, one of its values. None: all.

        Returns:
            float [K], or [n, K]: in the order of the indices; a row per number of a dense column.

        Raises:
            KeyError: no such column, or a value that `fit` did not see.
            ValueError: the column has no embedding, or the model does not know its features.

        """
        found = self._rows(self.plan.lookups, column, value)
        if found is None:
            self._refuse(column, "embedding")
        source, rows = found
        self.show_averages()
        return keras.ops.convert_to_numpy(tf.gather(source.embeddings.value, rows))

    def weight(self, column, value=None):
        """The first-order weight of a value of a column, a float, or those of all its values, [n]; see `embedding`.

        With several heads or classes, [H] and [n, H]: the weights of the heads in the order of their names.
        """
        self.show_averages()
        dense = self._dense_weights(column)
        if dense is not None:
            return dense[:, 0] if self.plan.width == 1 else dense
        parts = [*self.plan.first_orders, *(part for part in self.plan.lookups if part.linear)]
        found = self._rows(parts, column, value)
        if found is None:
            self._refuse(column, "first-order weight")
        source, rows = found
        table = source.embeddings if source.w is None else source.w  # max pooling has a table of one column
        weights = keras.ops.convert_to_numpy(tf.gather(table.value, rows))
        weights = weights[..., 0] if self.plan.width == 1 else weights
        return weights if weights.ndim else float(weights)

    def similar(self, column, value, k=10):
        """The values of a column whose embeddings are the most similar to one's, by cosine.

        Args:
            column: name.
            value: as for `embedding`.
            k: how many; more than there are: all.

        Returns:
            [(value, cosine)], the most similar first, of equal ones in the order of the indices; without the value
            itself. Values are texts, or integers of a `SparseFeat` of integers. Of an embedding of zeros the cosine is
            0.

        Raises:
            KeyError: no such column, or a value that `fit` did not see.
            ValueError: the column has no embedding, or its values no names: it is numeric, or hashed.

        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        found = self._rows(self.plan.lookups, column, value)
        if found is None:
            self._refuse(column, "embedding")
        (source, row), (rows, name) = found, self._named_rows(column)
        if value is None or row not in rows:
            raise KeyError(f"column {column!r} has no value {value!r}")
        rows = rows[rows != row]
        self.show_averages()
        e = keras.ops.convert_to_numpy(tf.gather(source.embeddings.value, [row, *rows])).astype(np.float64)
        lengths = np.linalg.norm(e, axis=1)
        products, scale = e[1:] @ e[0], lengths[1:] * lengths[0]
        cosines = np.divide(products, scale, out=np.zeros(len(rows)), where=scale != 0)  # NaN, of NaN, is last
        first = np.argsort(-cosines, kind="stable")[:k]
        return [(name(int(rows[i])), float(cosines[i])) for i in first]

    def _refuse(self, column, what):
        if column not in self._column_names():
            raise KeyError(f"column {column!r} is not in the model; it has {self._column_names()}")
        raise ValueError(f"column {column!r} has no {what} in this model")

    def __call__(self, inputs, *args, **kwargs):
        if hasattr(self, "_index_inputs"):  # Keras calls the model while it is being made, too
            inputs = self._checked(inputs)
        return super().__call__(inputs, *args, **kwargs)

    # Keras asks these for arrays, or for something it can iterate over.

    def compile(self, optimizer=None, loss=None, loss_weights=None, *args, **kwargs):
        """Keras's `compile`; what is not given is what is recommended.

        Args:
            optimizer: None: `CombinedOptimizer` of LazyAdam at 3e-3 for the tables, faster for rows of rare features,
                and at 5e-4 for the dense weights, with averages of all weights; `fit` on arrays then has batches of 64
                (under 10,000 samples) to 1,024 (from 30,000 on), unless it is given another size.
            loss: None: cross-entropy for tasks "binary" and "multiclass", squared error for "regression". Of a dict of
                tasks a dict, too; the heads that it does not name have what is recommended.
            loss_weights: of a dict of tasks: {head: what its loss is times in the sum}; 1 for those that it does not
                name.
            *args: as Keras's.
            **kwargs: as Keras's.

        """
        with self._scope():
            optimizer = recipe.optimizer(self.trainable_variables) if optimizer is None else optimizer
            loss, loss_weights = recipe.losses(self.plan.task, loss), recipe.weights(self.plan.task, loss_weights)
            super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        if self._is_replicated:
            given = [part for part in keras.tree.flatten((args, kwargs)) if isinstance(part, keras.metrics.Metric)]
            for part in (self.optimizer, *given):
                if not all(isinstance(v.value, tf.distribute.DistributedValues) for v in part.variables):
                    raise ValueError(
                        f"{type(part).__name__} was made outside of the strategy that the model was made under, so its "
                        "variables are not the replicas': make it inside `with strategy.scope():`"
                    )

    def compile_from_config(self, config):
        """Keras's, which leaves a model alone whose `compile` is not its own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Keras's `fit`. Arrays come in a fresh order every epoch, one that follows from the global seed.

        A stream (`FeatureDictionary.stream`) is passed over once an epoch, from its position on, and moves with the
        training. Where the optimizer keeps averages, they are validated and stopped on, and are the weights afterwards.

        A model that was made under MirroredStrategy or MultiWorkerMirroredStrategy has replicas that share each batch,
        and learns what one process does: docs/data_parallel.md.
        """
        if isinstance(x, Stream):
            others = {"y": y, "sample_weight": sample_weight, "class_weight": class_weight, "batch_size": batch_size}
            refuse_beside_stream(**others, validation_split=validation_split or None)
            if validation_data is x:
                raise ValueError("validation_data must be a stream of its own: both would move the one position")
            if isinstance(validation_data, list | tuple):
                x_validation, y_validation, *rest = validation_data
                validation_data = (self._as_inputs(x_validation), self._targets(y_validation), *rest)
            return self._fit_stream(
                x,
                self._as_inputs(validation_data),
                callbacks,
                epochs,
                verbose,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
            )
        x, y = self._as_inputs(x), self._targets(y)
        if isinstance(validation_data, list | tuple):
            x_validation, y_validation, *rest = validation_data
            validation_data = (self._as_inputs(x_validation), self._targets(y_validation), *rest)
        else:
            validation_data = self._as_inputs(validation_data)
        order, arrays = None, epochs_.arrays_of(x, y, sample_weight)
        split_off = None
        if arrays is not None and validation_split and validation_data is None:
            arrays, split_off = epochs_.split(arrays, validation_split)
        self._before_training(None if arrays is None else arrays[0])
        if arrays is not None:
            if batch_size is None and steps_per_epoch is None:
                batch_size = recipe.batch_size(getattr(self, "optimizer", None), len(keras.tree.flatten(arrays)[0]))
            validates_stream = isinstance(validation_data, Stream)
            if shuffle is True or self._is_replicated or validates_stream:
                validation_data = validation_data if split_off is None else split_off
                if not validates_stream:  # which has batches of its own
                    validation_batch_size = validation_batch_size or batch_size
                order = epochs_.EpochOrder(arrays, batch_size, steps_per_epoch, bool(shuffle))
                if self._is_multi_worker:
                    replicated.the_same(self.distribute_strategy, "samples", len(order))
                    order.seed = int(replicated.gathered(self.distribute_strategy, order.seed)[0])
                x, y, sample_weight, batch_size = order.dataset(), None, None, None
                validation_split, shuffle = 0.0, False
        elif isinstance(x, tf.data.Dataset):
            x = epochs_.cut(x)
        self.epoch_order = order
        if self._is_replicated:
            options = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "class_weight": class_weight}
            x, y, sample_weight, class_weight = self._replicated(x, y, sample_weight, **options), None, None, None
            validation_data = self._replicated_validation(validation_data, validation_batch_size or batch_size)
        with _streaming(self, x):
            history = super().fit(
                x,
                y,
                batch_size,
                epochs,
                verbose,
                epochs_.with_first(callbacks, epochs_.EpochCallback(order)),
                validation_split,
                validation_data,
                shuffle,
                class_weight,
                sample_weight,
                initial_epoch,
                steps_per_epoch,
                validation_steps,
                validation_batch_size,
                validation_freq,
            )
        self.show_averages()
        return history

    def _fit_stream(self, stream, validation_data, callbacks, epochs, verbose, **options):
        for some in (stream, validation_data):
            if isinstance(some, Stream):
                refuse_without_labels(some)
        stream.track(endless=options["steps_per_epoch"] is not None)
        callbacks = epochs_.with_first(callbacks, epochs_.StreamCallback(stream))
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = epochs_.callback_list(self, callbacks, verbose, epochs, options["steps_per_epoch"])
        self.epoch_order, self.training_stream = None, stream
        try:
            with _streaming(self, stream, validation_data):
                history = super().fit(
                    self._replicated(stream),
                    epochs=epochs,
                    verbose=verbose,
                    callbacks=callbacks,
                    validation_data=self._replicated_validation(validation_data, options["validation_batch_size"]),
                    **options,
                )
        finally:
            self.training_stream = None
            stream.untrack()
        self.show_averages()
        return history

    def _before_training(self, x):
        """What a model wants to know of the inputs that `fit` was given; None: they are no arrays."""

    # The replicas of a strategy of tf.distribute that the model was made under.

    def _scope(self):
        """Where variables are made that belong to the model."""
        return contextlib.nullcontext() if self._distribute_strategy is None else self._distribute_strategy.scope()

    @property
    def _is_replicated(self):
        return self.distribute_strategy.num_replicas_in_sync > 1

    @property
    def _is_multi_worker(self):
        return replicated.is_multi_worker(self.distribute_strategy)

    def _replicated(self, x, y=None, sample_weight=None, **options):
        """What Keras iterates over, dealt out to the replicas; x in one process."""
        if not self._is_replicated or isinstance(x, replicated.Batches | tf.distribute.DistributedDataset):
            return x
        return replicated.Batches(self.distribute_strategy, x, y, sample_weight, **options)

    def _replicated_validation(self, data, batch_size):
        if data is None or not self._is_replicated:
            return data
        return self._replicated(*(data if isinstance(data, list | tuple) else (data,)), batch_size=batch_size)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Keras's, which learns the shapes of a batch from its mean over replicas: of ids no ids, of text an error."""
        batches = None if iterator is None else iterator.data_adapter
        if isinstance(batches, replicated.Batches):
            known = all(spec.shape.rank is not None for spec in keras.tree.flatten(batches.element_spec))
            iterator, data_batch = None, batches.element_spec if known else batches.first_batch()
        super()._maybe_symbolic_build(iterator, data_batch)

    def _make_function(self, step):
        """Keras's, which fails for several processes, and for several steps per execution of several replicas."""
        return multi_worker.function(self, step) if self._is_replicated else super()._make_function(step)

    def _first(self, prepare, name, make, force):
        """Has Keras make a function that runs steps, and prepares the weights before each of its calls."""
        before = getattr(self, name)
        make(force)
        function, is_replicated = getattr(self, name), self._is_replicated
        if function is not before:

            def prepared(batches):
                prepare()
                if is_replicated and not isinstance(batches, tf.distribute.DistributedIterator):
                    batches = [replicated.dealt(self.distribute_strategy, batch) for batch in batches]
                return function(batches)

            setattr(self, name, prepared)
        return getattr(self, name)

    def _before_step(self):
        if self.training_stream is not None and self.training_stream.is_at_end and not self._is_replicated:
            # Keras's function would run the step on nothing to see that, and the optimizer would count it.
            raise tf.errors.OutOfRangeError(None, None, "the stream's pass is over")
        self._hide_averages()

    def make_train_function(self, force=False):
        return self._first(self._before_step, "train_function", super().make_train_function, force)

    def make_test_function(self, force=False):
        return self._first(self.show_averages, "test_function", super().make_test_function, force)

    def make_predict_function(self, force=False):
        return self._first(self.show_averages, "predict_function", super().make_predict_function, force)

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
        **kwargs,
    ):
        if isinstance(x, Stream):
            refuse_beside_stream(y=y, batch_size=batch_size, sample_weight=sample_weight)
            refuse_without_labels(x)
        with _streaming(self, x):
            x, y = self._as_inputs(x), self._targets(y)
            if self._is_replicated:
                x = self._replicated(x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps)
                y = sample_weight = None
            options = (batch_size, verbose, sample_weight, steps, callbacks, return_dict)
            return super().evaluate(x, y, *options, **kwargs)

    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None):
        """Keras's `predict`; no samples give no scores, [0, 1] where a sample has one, instead of an error.

        Of several processes under MultiWorkerMirroredStrategy, each predicts all that it is given, by itself.
        """
        x = self._as_inputs(x)
        arrays = keras.tree.flatten(x) if isinstance(x, dict | list | tuple) else []
        if arrays and all(getattr(array, "shape", None) and array.shape[0] == 0 for array in arrays):
            return heads.joined(self.plan.task, [np.zeros((0, x.shape[1]), np.float32) for x in self.outputs])
        with _streaming(self, x), self._apart():
            x = self._replicated(x, batch_size=batch_size, steps_per_epoch=steps)
            return super().predict(x, batch_size, verbose, steps, callbacks)

    @contextlib.contextmanager
    def _apart(self):
        """Inside, a process of several is one by itself, so that the others need not do the same."""
        strategy = self._distribute_strategy
        if self._is_multi_worker:
            if tf.distribute.has_strategy():
                raise ValueError("predict outside of `with strategy.scope():`, each process by itself")
            self._distribute_strategy = None
        try:
            yield
        finally:
            self._distribute_strategy = strategy

    def train_on_batch(self, x, y=None, *args, **kwargs):
        return super().train_on_batch(self._as_inputs(x), self._targets(y), *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        return super().test_on_batch(self._as_inputs(x), self._targets(y), *args, **kwargs)

    def predict_on_batch(self, x):
        with self._apart():
            return super().predict_on_batch(self._as_inputs(x))

    def _targets(self, y):
        """The labels as the model's scores are, [B, 1] or a dict; arrays once it is known that a loss can use them."""
        if y is None or any(map(tf.is_tensor, y.values() if isinstance(y, Mapping) else [y])):
            return y
        return labels.checked(self.plan.task, y)


def refuse_beside_stream(**arguments):
    for name, given in arguments.items():
        if given is not None:
            raise ValueError(f"{name} must be left out: a stream has its labels, its batches and its rows")


def refuse_without_labels(stream):
    if not stream.has_labels:
        raise ValueError("the stream has no labels: tell the dictionary their column, fit(..., label=...)")


@contextlib.contextmanager
def _streaming(model, *inputs):
    """Inside, streams raise their own errors, and Keras does not warn at the end of passes of unknown length.

    Raises:
        ValueError: a stream of features that are not the model's.

    """
    with contextlib.ExitStack() as stack:
        for stream in inputs:
            if isinstance(stream, Stream):
                fitting(model, stream.features)
                stream.check_labels(model.plan.task)
                stack.enter_context(stream.raising())
        if any(isinstance(x, Stream | replicated.Batches) and x.num_batches == 0 for x in inputs):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Your input ran out of data")
        yield


def _is_alike(layer, clone):
    """Whether a clone is the same kind of layer, with the same arguments."""
    return clone is layer or (type(clone) is type(layer) and clone.get_config() == layer.get_config())


def fitting(model, features, num_features=None):
    """The dictionary, if the model's matrices are its; `num_features` of a model whose rows are elsewhere."""
    shapes = [tuple(x.shape[1:]) for x in model.inputs]
    if not features.fields:
        raise ValueError("features must be fitted")
    if shapes != [(features.num_columns,)] * 2:
        raise ValueError(
            f"features have {features.num_columns} columns, but the inputs of the model have shapes {shapes}"
        )
    if isinstance(model, ConfiguredModel):
        table = model.plan.tables[0]
        num_features = table.source.num_features if num_features is None else num_features
        if num_features != features.num_features:
            raise ValueError(f"features number {features.num_features} features, but the model has {num_features}")
        if table.field_sizes != features.field_sizes:
            raise ValueError(f"features have field_sizes {features.field_sizes}, but the model has {table.field_sizes}")
    return features


class DtypePolicy:
    """The dtype policy of a saved model while its layers are made again; None: the policy in force."""

    def __init__(self, dtype):
        self.policy = None if dtype is None else keras.dtype_policies.get(dtype)

    def __enter__(self):
        self.before = keras.config.dtype_policy()
        if self.policy is not None:
            keras.config.set_dtype_policy(self.policy)

    def __exit__(self, *_):
        keras.config.set_dtype_policy(self.before)


def check_integers(name, x):
    """Raises where Keras would cast numbers to integers silently."""
    dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
    if "int" not in str(getattr(dtype, "name", dtype)):
        raise TypeError(f"{name} must be int32 or int64, got {getattr(dtype, 'name', dtype)}")
