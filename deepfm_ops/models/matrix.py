"""DeepFM over index and value matrices."""

import copy
import warnings

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import arguments, heads
from deepfm_ops.features import cells, counts
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.features.vocabulary import NO_TEXT
from deepfm_ops.layers import FirstOrder, FMInteraction, check_interaction, positive
from deepfm_ops.models import recipe, resizing
from deepfm_ops.models.base import ConfiguredModel, DtypePolicy, check_integers, clonable, fitting
from deepfm_ops.models.columns import ColumnDeepFM
from deepfm_ops.models.parts import Head, mlp, second_order, seed_for
from deepfm_ops.models.penalties import Penalties
from deepfm_ops.plan import Lookup, Plan

CHECKED_ROWS = 1 << 16  # at a time


@keras.saving.register_keras_serializable("deepfm_ops")
@clonable
class DeepFM(ConfiguredModel):
    """DeepFM: y = sigmoid(w0 + first order + second order + MLP), on one shared embedding table.

    Without the deep part it is a factorization machine (FM); without the second order too, logistic
    regression (LR); with the deep part alone, a plain deep network on embeddings (DNN).

    Args:
        num_features: number of features, V; indices are in [0, V).
        num_fields: fields of a sample, F.
        embedding_dim: width of the embeddings, K.
        hidden_units: widths of the MLP's layers.
        use_linear, use_fm, use_deep: which parts there are.
        order: 2, or 3 for triples of fields in the FM part; see `FMInteraction`.
        field_weights: whether every pair of fields of the FM part has a trained weight; see there.
        dropout: rate after each hidden layer.
        activation: of the hidden layers.
        batch_norm: normalize before each activation.
        task: "binary" (a probability), "regression" (the plain sum) or ("multiclass", classes) (a probability of each);
            or a dict of names to these: heads that share the tables, see docs/heads.md.
        seed: int for repeatable initial weights and dropout, or None.
        embeddings_initializer: of the table; None: normal with a deviation of 0.01.
        l2_linear, l2_embedding, l2_deep: strengths of L2 penalties on the first-order weights, the table
            and the MLP's kernels.
        l2_scope: what the first two act on. "batch": the rows that a batch uses; each gets 2 * l2 * row added
            to its gradient, which stays sparse, and the reported loss does not hold the penalty. "table": whole
            tables at every step, as in Keras and DeepCTR; the gradient is then dense.
        feature_counts: int [V], how many pairs with a value other than zero each feature has in the training rows
            (`FeatureDictionary.counts`): they turn on a normal prior on every row of the table and on the first-order
            weights, of which every occurrence in a batch carries 1/count; see `FMInteraction`. None: no prior.
        num_samples: training rows that were counted; see there.
        embedding_prior, linear_prior: deviations of the priors; None: none on that part.
        field_sizes: columns of the matrices per field, P in all; a field's columns are summed
            (`FeatureDictionary.field_sizes`). None: one each, P = F.
        features: the `FeatureDictionary` whose matrices the model takes, see `from_features`; it is saved with the
            model. None: indices and values from elsewhere.
        backend: "auto", "native" or "reference".

    Call arguments:
        inputs: (indices int64 [B, P], values float32 [B, P]).

    Returns:
        [B, 1] float32, of "multiclass" [B, classes]; of a dict of tasks a dict of them.

    Raises:
        ValueError: arguments that do not fit.
        InvalidArgumentError: an index outside [0, V).

    Example:
        >>> import numpy as np
        >>> model = DeepFM(num_features=1000, num_fields=3, embedding_dim=8, hidden_units=(32,))
        >>> model.compile(optimizer="adam", loss="binary_crossentropy")
        >>> indices, values = np.array([[1, 20, 300], [4, 50, 600]]), np.ones((2, 3))
        >>> history = model.fit((indices, values), np.array([1, 0]), verbose=0)
        >>> model.predict((indices, values), verbose=0).shape
        (2, 1)

    References:
        Guo, Tang, Ye, Li and He, "DeepFM: A Factorization-Machine based Neural Network for CTR
        Prediction", IJCAI 2017, equations (1) to (4).

    """

    def __init__(
        self,
        num_features,
        num_fields,
        embedding_dim=16,
        hidden_units=(400, 400, 400),
        *,
        use_linear=True,
        use_fm=True,
        use_deep=True,
        order=2,
        field_weights=False,
        dropout=0.0,
        activation="relu",
        batch_norm=False,
        task="binary",
        seed=None,
        embeddings_initializer=None,
        l2_linear=0.0,
        l2_embedding=0.0,
        l2_deep=0.0,
        l2_scope="batch",
        feature_counts=None,
        num_samples=None,
        embedding_prior=recipe.EMBEDDING_PRIOR,
        linear_prior=recipe.LINEAR_PRIOR,
        field_sizes=None,
        features=None,
        backend="auto",
        name=None,
        trainable=True,
        frozen=(),
        adapted=None,
        dtype=None,
    ):
        if not (use_linear or use_fm or use_deep):
            raise ValueError("at least one of use_linear, use_fm and use_deep must be True")
        check_interaction(order, field_weights, use_fm)
        num_fields = positive("num_fields", num_fields)
        if field_sizes is not None and len(field_sizes) != num_fields:
            raise ValueError(f"field_sizes must have num_fields = {num_fields} entries, got {len(field_sizes)}")
        if embeddings_initializer is None:
            embeddings_initializer = keras.initializers.RandomNormal(stddev=0.01, seed=seed_for(seed, 0))
        if feature_counts is not None:
            feature_counts = counts.checked(feature_counts, positive("num_features", num_features))
        priors = (embedding_prior, linear_prior, feature_counts, num_samples)
        penalties = Penalties(l2_scope, l2_embedding, l2_linear, *priors).checked()
        task = heads.plain(task)
        config = {
            "num_features": num_features,
            "num_fields": num_fields,
            "embedding_dim": embedding_dim,
            "hidden_units": [positive("a hidden width", units) for units in hidden_units],
            "use_linear": use_linear,
            "use_fm": use_fm,
            "use_deep": use_deep,
            "order": order,
            "field_weights": field_weights,
            "dropout": dropout,
            "activation": activation if isinstance(activation, str) else keras.activations.serialize(activation),
            "batch_norm": batch_norm,
            "task": task,
            "seed": seed,
            "embeddings_initializer": keras.initializers.serialize(keras.initializers.get(embeddings_initializer)),
            "l2_linear": l2_linear,
            "l2_embedding": l2_embedding,
            "l2_deep": l2_deep,
            "l2_scope": l2_scope,
            "feature_counts": None if feature_counts is None else counts.packed(feature_counts),
            "num_samples": num_samples,
            "embedding_prior": embedding_prior,
            "linear_prior": linear_prior,
            "field_sizes": None if field_sizes is None else list(field_sizes),
            "backend": backend,
        }
        with DtypePolicy(dtype):
            num_columns = num_fields if field_sizes is None else sum(field_sizes)
            inputs = (
                keras.Input((num_columns,), dtype="int64", name="indices"),
                keras.Input((num_columns,), dtype="float32", name="values"),
            )
            sizes = list(field_sizes or [1] * num_fields)
            shared = {"field_sizes": sizes, "backend": backend}
            parts, plan = [], Plan(task, order=order)
            if use_fm or use_deep:
                fm = FMInteraction(
                    num_features,
                    embedding_dim,
                    use_linear=use_linear,
                    linear_apart=use_linear,
                    linear_units=plan.width if use_linear else 1,
                    output="vector" if plan.width > 1 else "scalar",
                    return_embeddings=True,
                    order=order,
                    field_weights=field_weights,
                    embeddings_initializer=embeddings_initializer,
                    **penalties.of_table(),
                    name="fm",
                    **shared,
                )
                embeddings, interaction, *linear = fm(inputs)
                plan.lookups.append(Lookup(fm, sizes, use_linear))
                parts += [*linear, second_order(interaction, plan, seed)] if use_fm else linear
                plan.second_order += [0] if use_fm else []
                plan.field_weights += [fm] if field_weights else []
            else:
                options = {**penalties.of_weights(), "units": plan.width}
                first_order = FirstOrder(num_features, **options, name="first_order", **shared)
                plan.first_orders.append(Lookup(first_order, sizes))
                parts.append(first_order(inputs))
            if use_deep:
                flat = keras.layers.Flatten(name="flatten")(embeddings)
                options = (config["hidden_units"], activation, dropout, batch_norm, l2_deep, seed, adapted or {})
                parts.append(mlp(flat, plan, *options))
            plan.head = Head(task, name="head")
            self._finish(config, inputs, plan.head(parts), name, trainable, frozen, plan)
        self.features = FeatureDictionary.from_config(features) if isinstance(features, dict) else features

    def _as_inputs(self, x):
        """The inputs, once the values that are arrays are known to be ones a loss can use."""
        values = _values(x)
        if values is not None and not tf.is_tensor(values):
            check_values(values)
        return x

    def _before_training(self, x):
        """Warns, once, of features that occur though none was counted."""
        part = (self.plan.lookups or self.plan.first_orders)[0]
        known = part.source.feature_counts
        if known is None or x is None or self._uncounted_said:
            return
        indices, values = (x["indices"], x["values"]) if isinstance(x, dict) else x
        known = known.numpy()
        occurring = np.zeros(len(known), bool)
        for start in range(0, len(indices), CHECKED_ROWS):
            some = indices[start : start + CHECKED_ROWS][values[start : start + CHECKED_ROWS] != 0]
            occurring[some[(some >= 0) & (some < len(known))]] = True  # the op says which are out of range
        missed = np.flatnonzero(occurring & (known == 0))
        if missed.size:
            self._uncounted_said = True
            warnings.warn(
                f"feature_counts say 0 of {missed.size} features that occur, such as {missed[0]}: they count as 1",
                stacklevel=3,
            )

    def _checked(self, inputs):
        values = _values(inputs)
        if values is None or any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten(inputs)):
            return inputs
        parts = dict(inputs) if isinstance(inputs, dict) else dict(zip(("indices", "values"), inputs, strict=True))
        check_integers("indices", parts["indices"])
        parts = {name: tf.convert_to_tensor(x) for name, x in parts.items()}
        parts["values"] = arguments.usable("values", tf.cast(parts["values"], tf.float32), what="input")
        return parts if isinstance(inputs, dict) else tuple(parts.values())

    @classmethod
    def from_features(cls, features, **arguments):
        """A DeepFM over the matrices of a FeatureDictionary, which is saved with it.

        It is the one that is recommended (docs/learning.md): with the priors on, from the dictionary's counts, and an
        MLP of 256-128; `compile()` without arguments, then, has the recommended optimizers.

        Args:
            features: a fitted FeatureDictionary; sizes and counts come from it. One that an older version saved has no
                counts, and the model no priors. Or libsvm and libffm files: `data.PairFeatures`, or what
                `data.read_libsvm` and `data.read_libffm` gave. libsvm has no fields, so the model has no deep part.
            **arguments: DeepFM's arguments, instead of these.

        Example:
            >>> from deepfm_ops import FeatureDictionary
            >>> features = FeatureDictionary().fit({"city": ["Rome", "Oslo"]}, categorical=["city"])
            >>> model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,))
            >>> model.embedding("city", "Oslo").shape, model.embedding("city").shape
            ((4,), (2, 4))

        """
        return cls(**arguments_of(features, arguments))

    def resize(self, features):
        """Follows its FeatureDictionary after `update` and `evict`: rows are added, nothing moves.

        Rows of values that are new, at the end or where a value was evicted, and everything that the optimizer keeps of
        them, get the values that a fresh model's have; the others keep theirs, bit for bit. Counts and `num_samples` of
        the priors are the dictionary's. Works with every Keras optimizer, compiled or not, trained or loaded.

        Args:
            features: the dictionary that the model was made of, or a later load of it, after updates. It is the model's
                from now on.

        Returns:
            self.

        Raises:
            ValueError: the model does not know its features, or these are not the same after updates.

        """
        if self._features is None:
            raise ValueError(
                "this model does not know its features: set model.features to them as they were, then resize"
            )
        rows = resizing.fresh_rows(self._features, features)
        layer = (self.plan.lookups or self.plan.first_orders)[0].source
        shown = (optimizer := self._averaging()) is not None and optimizer.averages_are_shown
        self._hide_averages()
        if len(rows):
            size = features.num_features
            optimizer = getattr(self, "optimizer", None)
            optimizer = optimizer if optimizer is not None and optimizer.built else None
            fresh = [(table, rows, resizing.fresh_values(table, make, rows, size)) for table, make in layer.tables()]
            with self._scope():
                resizing.grow_tables(optimizer, fresh)
            layer.num_features = self._config["num_features"] = size
        if layer.feature_counts is not None and features.counts is not None:
            with self._scope():
                resizing.grow(layer.feature_counts, rows, 0)
            layer.set_feature_counts(features.counts, features.num_samples)
            self._config["feature_counts"] = counts.packed(counts.checked(features.counts, features.num_features))
            self._config["num_samples"] = features.num_samples
        self.features = features
        for name in ("train_function", "test_function", "predict_function"):
            setattr(self, name, None)  # they were traced with the old tables
        if shown:
            self.show_averages()
        return self

    # One signature, and one documentation: those of the model that it makes.
    from_columns = ColumnDeepFM

    _uncounted_said = False

    @property
    def features(self):
        """The FeatureDictionary whose matrices the model takes, or None; one that does not fit is a ValueError."""
        return self._features

    @features.setter
    def features(self, features):
        # A copy: another fit makes the caller's another dictionary, and this model's would be wrong.
        self._features = None if features is None else copy.copy(fitting(self, features))

    def get_config(self):
        return {**super().get_config(), "features": None if self._features is None else self._features.to_config()}

    def _rows(self, parts, column, value):
        if self._features is None:
            raise ValueError(
                "this model does not know its features: make it by DeepFM.from_features, or set model.features to the "
                "FeatureDictionary"
            )
        if not parts:
            return None
        if value is None:
            return parts[0].source, np.asarray(self._features.indices(column))
        index = self._features.index(column, value)
        if index == 0:
            raise KeyError(f"value {value!r} of column {column!r} was not seen by fit")
        return parts[0].source, index

    def _named_rows(self, column):
        features = self._features
        rows = features.indices(column)
        if features._field(column).transform != "quantiles":
            has_text = features.vocabulary.text_starts[rows] != NO_TEXT
            rows = rows[has_text & features.keep_texts]
        if not len(rows):
            raise ValueError(f"the values of column {column!r} have no names: it is numeric, hashed, or without texts")
        return rows, lambda row: features.name(row)[1]

    def _dense_weights(self, column):
        return None

    def _column_names(self):
        return [field.name for field in self._features.fields]


def arguments_of(features, arguments):
    """The arguments of a DeepFM over the matrices of a FeatureDictionary, but for those that are given."""
    named = isinstance(features, FeatureDictionary)
    if not named and not features.has_fields:
        if arguments.setdefault("use_deep", False):
            raise ValueError(
                "libsvm rows have no fields, which a deep part needs: the k-th pair of one row is another thing "
                "than that of the next. Leave use_deep out (False is the default here), or write the rows as libffm"
            )
    known = {"field_sizes": features.field_sizes, "hidden_units": recipe.HIDDEN_UNITS}
    known |= {"features": features} if named else {}
    known |= {"feature_counts": features.counts, "num_samples": features.num_samples}
    known |= {"num_features": features.num_features, "num_fields": features.num_fields}
    return {**known, **arguments}


def _values(inputs):
    """The values of (indices, values) or of {"indices", "values"}; None of anything else."""
    if isinstance(inputs, dict):
        return inputs.get("values") if "indices" in inputs else None
    return inputs[1] if isinstance(inputs, list | tuple) and len(inputs) == 2 else None


def check_values(values):
    """Raises ValueError where a value is one that makes a loss NaN."""
    values = np.asarray(values)
    if values.dtype.kind != "f" or values.ndim != 2:
        return
    for start in range(0, len(values), CHECKED_ROWS):
        bad = cells.first_unusable(values[start : start + CHECKED_ROWS])
        if bad is not None:
            row, column = start + bad[0], bad[1]
            raise ValueError(f"values[{row},{column}] = {values[row, column]} {cells.UNUSABLE}")
