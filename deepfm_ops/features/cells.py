"""What a cell of a table is: missing, a category and its text, a number. One place for every encoding.

One value, one id: a category is its canonical text, whatever type it came in. 7, 7.0, "7", b"7", numpy.int64(7) and
Decimal("7.00") are one category, "007" is another, True is "True".
"""

import decimal

import numpy as np

# The gradient of a product of two columns grows with the square of their numbers, and optimizers square it once more:
# beyond the fourth root of what float32 holds a loss becomes NaN.
LARGEST = 2.0**32
UNUSABLE = (
    "is no number to train on or to score: NaN, NaT, infinities and numbers beyond 2^32 make a loss NaN; mend it, or "
    "scale the column before"
)


def is_missing(value):
    """Whether a cell is empty: None, NaN, pandas.NA, NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # they have no truth value, so by their names
        return True
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return isinstance(value, float | np.floating | decimal.Decimal) and bool(value != value)


def text(value):
    """The canonical text of a category that is not missing.

    Raises:
        TypeError: a kind of value that cannot be a category.
        ValueError: bytes that are not UTF-8.

    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        # NumPy writes float32 out in its own digits: 0.1 is "0.1" in every precision.
        return str(int(value)) if float(value).is_integer() else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, decimal.Decimal):
        if value == value.to_integral_value():
            return str(int(value))
        return str(float(value)) if decimal.Decimal(str(float(value))) == value else f"{value.normalize():f}"
    raise TypeError(f"a category must be a string or a number, got {value!r}; convert it first")


def category(value, name):
    """`text` of a cell of column `name`, whose errors name the column."""
    try:
        return text(value)
    except UnicodeDecodeError:
        raise ValueError(f"column {name!r}: {value!r} is not UTF-8 text") from None
    except TypeError as error:
        raise TypeError(f"column {name!r}: {error}") from None


def kind(value):
    """What a category came as: "text", "boolean", "integer" or "fraction"."""
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, str | bytes):
        return "text"
    return "integer" if text(value).removeprefix("-").isdigit() else "fraction"


def in_order(texts):
    """Sorted so that equal data give equal numbers in every process: numbers by value, then text."""

    def key(category):
        number = _number(category)
        return (0, number, category) if number is not None else (1, 0, category)

    return sorted(texts, key=key)


def _number(category):
    """The number whose canonical text this is, or None."""
    digits = category.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 4000:  # Python refuses to read more
        number = int(category)
        return number if str(number) == category else None
    try:
        number = float(category)
    except ValueError:
        return None
    return number if number == number and str(number) == category else None


def checked_numbers(name, numbers, cells, nonfinite="error"):
    """The numbers of a column, NaN where they are missing, once none of them can make a loss NaN.

    Args:
        name: of the column, for the error.
        numbers: float64 [n].
        cells: function that returns the column as it was given, for the error.
        nonfinite: "error", or "missing": a number that cannot be used counts as missing.

    Raises:
        ValueError: an infinity, or a number beyond 2^32, by row and column.

    """
    good = ~(np.abs(numbers) > LARGEST)
    if good.all():
        return numbers
    if nonfinite == "missing":
        return np.where(good, numbers, np.nan)
    row = int(np.argmin(good))
    raise ValueError(f"column {name!r}, row {row}: {str(cells()[row])[:40]} {UNUSABLE}")
