"""The versions: this package's, and the one TensorFlow series it is built for and runs with."""

__version__ = "0.1.0"
TENSORFLOW = "2.21"
