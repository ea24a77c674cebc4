"""A Keras model whose weights are averages wherever they are read."""

import keras

from deepfm_ops.combined import unscaled


class AveragedModel(keras.Model):
    """Weights are the raw ones while they are trained, and their averages, where an optimizer keeps some, elsewhere."""

    def _averaging(self):
        """The optimizer, if it keeps averages of the weights that can be shown, or None."""
        optimizer = unscaled(getattr(self, "optimizer", None))
        return optimizer if getattr(optimizer, "use_ema", False) and hasattr(optimizer, "show_averages") else None

    def show_averages(self):
        """Makes the weights their averages, if the optimizer keeps some; `fit` goes on from the raw ones.

        `fit`, `evaluate`, `predict`, `save` and the exports do it themselves.
        """
        if (optimizer := self._averaging()) is not None:
            optimizer.show_averages()

    def _hide_averages(self):
        if (optimizer := self._averaging()) is not None:
            optimizer.hide_averages()

    def get_weights(self):
        self.show_averages()
        return super().get_weights()

    def set_weights(self, weights):
        self.show_averages()  # training, and the average, go on from what is set where averages are shown
        super().set_weights(weights)

    def load_weights(self, *args, **kwargs):
        self.show_averages()
        super().load_weights(*args, **kwargs)

    def save(self, *args, **kwargs):
        self.show_averages()
        return super().save(*args, **kwargs)

    def save_weights(self, *args, **kwargs):
        self.show_averages()
        return super().save_weights(*args, **kwargs)

    def export(self, *args, **kwargs):
        self.show_averages()
        return super().export(*args, **kwargs)
