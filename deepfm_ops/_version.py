"""The versions: this package's, and the TensorFlow series it is built for and runs with."""

__version__ = "0.1.0"
TENSORFLOW = ("2.19", "2.20", "2.21")  # ascending
NOT_PUBLISHED = {("2.19", "3.13")}  # TensorFlow series and Python without wheels on PyPI
_MAJOR, _MINOR = TENSORFLOW[-1].split(".")
REQUIREMENT = f">={TENSORFLOW[0]},<{_MAJOR}.{int(_MINOR) + 1}"
SUPPORTED = f"{', '.join(TENSORFLOW[:-1])} or {TENSORFLOW[-1]}"


def supports(version):
    """Whether TensorFlow `version`, such as 2.19.1, is of a supported series."""
    return ".".join(version.split(".")[:2]) in TENSORFLOW
