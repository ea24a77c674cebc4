"""The private names of Keras and TensorFlow that are used: one that is gone or renamed fails here, and not silently."""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import deepfm_ops
from deepfm_ops import DeepFM, _library, optimizers

PACKAGE = pathlib.Path(deepfm_ops.__file__).parent
# Hooks that are overridden here, and that Keras must go on calling: (class, name, its arguments there).
HOOKS = [
    (keras.optimizers.Optimizer, "_backend_apply_gradients", ["self", "grads", "trainable_variables"]),
    (keras.optimizers.Optimizer, "_clip_gradients", ["self", "grads"]),
    (keras.optimizers.Optimizer, "_apply_weight_decay", ["self", "variables"]),
    (keras.Model, "_run_through_graph", ["self", "inputs", "operation_fn", "call_fn"]),
    (keras.Model, "_maybe_symbolic_build", ["self", "iterator", "data_batch"]),
    (keras.Model, "_make_function", ["self", "step_function"]),
]
# Hooks that do nothing here, and that Keras would otherwise rewrite whole tables in.
SILENCED = [
    (keras.optimizers.Optimizer, "_update_model_variables_moving_average", ["self", "trainable_variables"]),
    (keras.optimizers.Optimizer, "_overwrite_model_variables_with_average_value", ["self", "trainable_variables"]),
]
# Methods and attributes that are asked for.
METHODS = [
    (keras.optimizers.Optimizer, "_get_variable_index"),
    (keras.optimizers.Optimizer, "_var_key"),
    (keras.optimizers.Optimizer, "_use_weight_decay"),
    (keras.Model, "_flatten_layers"),
    (keras.Model, "_aggregate_additional_loss"),
]
SLOTS = {"Adagrad": ["_accumulators"], "Adam": ["_momentums", "_velocities"], "Ftrl": ["_accumulators", "_linears"]}
MODULES = [
    ("tensorflow.python.distribute.coordinator.coordinator_context", ["get_current_dispatch_context"]),
    ("tensorflow.python.eager.context", ["context", "executor_scope"]),
    ("tensorflow.python.eager.execute", ["record_gradient"]),
    ("tensorflow.python.eager.executor", ["new_executor"]),
    ("tensorflow.python.eager.forwardprop", ["_SPECIAL_CASES"]),
    ("tensorflow.python.eager.forwardprop_util", ["push_forwardprop_state"]),
    ("tensorflow.python.framework.auto_control_deps", ["register_acd_resource_resolver"]),
    ("tensorflow.python.framework.auto_control_deps_utils", ["register_read_only_resource_op"]),
    ("tensorflow.python.framework.func_graph", ["FuncGraph"]),
    ("tensorflow.python.ops.resource_variable_ops", ["variable_accessed", "variable_shape", "BaseResourceVariable"]),
    ("tensorflow.python.ops.script_ops", ["_py_funcs"]),
    ("tensorflow.python.trackable.resource", ["CapturableResource"]),
    ("tensorflow.python.data.ops.batch_op", ["_BatchDataset"]),
    ("tensorflow.python.data.ops.from_tensor_slices_op", ["_TensorSliceDataset"]),
    ("tensorflow.python.data.ops.prefetch_op", ["_PrefetchDataset"]),
    (_library.KERAS_EXPORT, []),
    ("keras.src.trainers.data_adapters.data_adapter.DataAdapter", []),
    ("keras.src.trainers.data_adapters", ["get_data_adapter"]),
]
ATTRIBUTES = ["_initial_epoch", "_distribute_strategy", "_compile_loss"]  # of a model, which `fit` reads
OPTIMIZERS = ["_iterations", "_trainable_variables", "_trainable_variables_indices"]  # of an optimizer that was built
VARIABLES = ["_shape", "_initialize"]  # of a keras.Variable


def functional():
    """A functional model's class: where Keras puts what a keras.Model made of tensors has."""
    x = keras.Input((1,))
    return type(keras.Model(x, keras.layers.Dense(1)(x)))


NAMES = {"ids": lambda x: x if isinstance(x, str) else ""}


@pytest.mark.parametrize(("owner", "name", "arguments"), HOOKS + SILENCED, **NAMES)
def test_hooks_are_there(owner, name, arguments):
    owner = functional() if owner is keras.Model else owner
    assert list(inspect.signature(getattr(owner, name)).parameters) == arguments


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda x: x if isinstance(x, str) else "")
def test_methods_are_there(owner, name):
    assert callable(getattr(functional() if owner is keras.Model else owner, name))


@pytest.mark.parametrize("name", SLOTS)
def test_slots_are_there(name):
    optimizer = getattr(keras.optimizers, name)()
    variable = keras.Variable(np.ones((3, 2)))
    optimizer.build([variable])
    for slots in SLOTS[name]:
        assert getattr(optimizer, slots)[optimizer._get_variable_index(variable)].shape == (3, 2)


def test_attributes_of_optimizers_are_there():
    variable = keras.Variable(np.ones(3))
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2)
    optimizer.build([variable])
    assert optimizer._trainable_variables == [variable]
    for _ in range(3):
        optimizer.apply([np.ones(3)], [variable])
    assert int(optimizer._iterations) == 3  # calls, where `iterations` counts updates


@pytest.mark.parametrize(("module", "names"), MODULES, ids=lambda x: x if isinstance(x, str) else "")
def test_modules_are_there(module, names):
    module, _, owner = module.rpartition(".") if module.endswith("DataAdapter") else (module, "", "")
    found = __import__(module, fromlist=["x"])
    found = getattr(found, owner) if owner else found
    for name in names:
        assert hasattr(found, name)


def test_a_graph_captures_a_tensor_once():
    """And its tensors have consumers, its operations types: what tells whether a table was written to."""
    variable = tf.Variable(1.0)

    @tf.function
    def read():
        graph, value = tf.compat.v1.get_default_graph(), variable.read_value()
        (handle,) = value.op.inputs[0].op.inputs if value.op.type == "Identity" else value.op.inputs
        assert graph.capture(variable.handle) is handle
        assert "ReadVariableOp" in [user.type for user in handle.consumers()]
        return value

    assert read() == 1


def test_attributes_of_datasets_are_there():
    slices = tf.data.Dataset.from_tensor_slices((np.arange(5), np.ones((5, 2))))
    batched = slices.batch(2, drop_remainder=True)
    assert batched.prefetch(1)._input_dataset is batched and batched._input_dataset is slices
    assert [tensor.shape for tensor in slices._tensors] == [(5,), (5, 2)]
    assert int(batched._batch_size) == 2 and bool(batched._drop_remainder)


def test_a_variable_can_grow():
    """Keras's optimizers, layers and models hold the variable, not what is inside it."""
    variable = keras.Variable(np.ones((3, 2)))
    for name in VARIABLES:
        assert hasattr(variable, name)
    variable._shape = (5, 2)
    variable._initialize(np.zeros((5, 2), "f"))
    assert variable.shape == (5, 2) and variable.value.shape == (5, 2) and not variable.numpy().any()


def test_keras_takes_a_data_adapter_as_it_is():
    from keras.src.trainers import data_adapters

    features = deepfm_ops.FeatureDictionary().fit({"a": [1]}, categorical="a")
    stream = features.stream({"a": [1]}, 1)
    assert data_adapters.get_data_adapter(stream) is stream


def test_the_hooks_are_called(monkeypatch):
    """By a training step with clipping and weight decay, and by a clone."""
    called = set()
    for owner in (optimizers._Sparse, deepfm_ops.models.base.ConfiguredModel):
        for _, name, _ in HOOKS:
            if name in vars(owner):
                original = vars(owner)[name]

                def watched(self, *args, original=original, name=name, **kwargs):
                    called.add(name)
                    return original(self, *args, **kwargs)

                monkeypatch.setattr(owner, name, watched)
    model = DeepFM(9, 2, 2, (2,))
    model.compile(optimizers.LazyAdam(0.1, clipnorm=1.0, weight_decay=0.01), "binary_crossentropy")
    model.fit((np.ones((2, 2), int), np.ones((2, 2))), np.ones(2), verbose=0)
    keras.models.clone_model(model)
    assert called == {name for _, name, _ in HOOKS}


def test_a_resumed_fit_begins_where_the_model_says():
    seen = []
    model = DeepFM(9, 2, 2, (2,))
    model.compile("adam", "binary_crossentropy")
    epochs = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(epoch),
        on_train_begin=lambda logs: setattr(model, "_initial_epoch", 2),
    )
    model.fit((np.ones((2, 2), int), np.ones((2, 2))), np.ones(2), epochs=4, verbose=0, callbacks=[epochs])
    assert seen == [2, 3]


def test_the_strategy_of_a_model_can_be_set_aside():
    """The one that it was made under is what everything of Keras's asks for."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = DeepFM(9, 2, 2, (2,))
    assert model.distribute_strategy is model._distribute_strategy
    model._distribute_strategy = None
    assert model.distribute_strategy is tf.distribute.get_strategy()
    assert callable(tf.__internal__.distribute.ShardedVariable)
    assert callable(context.context().report_error_to_cluster)


def test_the_list_is_complete():
    """Every name with an underscore that this package uses and does not define stands above."""
    listed = {name for _, name, _ in HOOKS} | {name for _, name in METHODS} | {*ATTRIBUTES, *OPTIMIZERS}
    listed |= {name for names in SLOTS.values() for name in names}
    used, own = set(), set()
    for text in [path.read_text() for path in PACKAGE.glob("**/*.py")]:
        used |= set(re.findall(r"(?:super\(\)|model|optimizer|layer|self)\.(_[a-z]\w*)", text))
        own |= set(re.findall(r"^    (?:def )?(_[a-z]\w*)(?=\(| =|: )", text, re.MULTILINE))
        for left in re.findall(r"^( +self\._[^()=]*) = ", text, re.MULTILINE):
            own |= set(re.findall(r"self\.(_\w+)", left))
        for module, names in re.findall(r"from ((?:tensorflow\.python|keras\.src)[\w.]*) import (\w[\w, ]*)", text):
            assert {f"{module}.{name}" for name in names.split(", ")} <= set(dict(MODULES))
    assert used - (own - {"_accumulators"}) <= listed
    assert {name for _, name, _ in HOOKS} <= used


def test_the_coordinator_takes_functions_of_python():
    """`cluster.passes` schedules them by a name that is not public, as the public one takes graphs alone."""
    from tensorflow.python.distribute.coordinator import cluster_coordinator

    parameters = inspect.signature(cluster_coordinator.Cluster.schedule).parameters
    assert list(parameters) == ["self", "function", "args", "kwargs"]
    assert "self._cluster.schedule(" in inspect.getsource(cluster_coordinator.ClusterCoordinator.schedule)
    assert "regular python function" in inspect.getsource(cluster_coordinator.Closure)


def test_a_model_tracks_its_loss():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert model._loss_tracker in model.metrics


def test_losses_of_heads_can_go_untracked():
    """What a worker of a cluster computes is added up by the chief."""
    model = DeepFM(9, 2, 2, (2,), task={"a": "binary", "b": "regression"})
    model.compile()
    y = {name: tf.ones((2, 1)) for name in "ab"}
    model.compute_loss(None, y, {name: tf.fill((2, 1), 0.5) for name in "ab"})
    losses = model._compile_loss
    kept = losses._metrics
    assert [metric.name for metric in kept] == ["a_loss", "b_loss"] and kept[0].result() > 0
    model.reset_metrics()
    losses._metrics = [None, None]
    assert model.compute_loss(None, y, {name: tf.fill((2, 1), 0.5) for name in "ab"}) > 0
    losses._metrics = kept
    assert kept[0].result() == 0 and kept[0] in model.metrics
