"""What a cell of a table is: missing, a category and its text, a number. One place for every encoding.

One value, one id: a category is its canonical text, whatever type it came in. 7, 7.0, "7", b"7", numpy.int64(7) and
Decimal("7.00") are one category, "007" is another, True is "True".
"""

import decimal

import numpy as np

# Beyond it a loss is NaN after a few steps even of cross-entropy, if another column holds such numbers too (tried: 1e10
# trains, 1e11 does not): the gradient of their product is squared by the optimizer, and 2^32 is the fourth root of what
# float32 holds. Smaller numbers may still diverge, under a squared loss above all: columns want to be scaled.
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
        return str.__str__(value)  # an Enum of texts would write out its name
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer) and not isinstance(value, np.timedelta64):
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


def kind(value, text):
    """What a category came as, "text", "boolean", "integer" or "fraction"; `text` is its canonical one."""
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, bool | np.bool_):
        return "boolean"
    return "integer" if is_integer(text) else "fraction"


def is_integer(text):
    """Whether a text is the canonical one of an integer."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits[0] != "0" or text == "0")


def first_unusable(numbers, allow_missing=False):
    """The position, a tuple, of the first number that would make a loss NaN; None if there is none.

    Args:
        numbers: array of floats or integers.
        allow_missing: whether NaN is fine, because it marks what is missing.

    """
    if numbers.dtype.itemsize < 4:  # in which the bound itself would be infinite
        numbers = numbers.astype(np.float32)
    bad = np.abs(numbers) > LARGEST
    if not allow_missing:
        bad |= np.isnan(numbers)
    return tuple(np.argwhere(bad)[0].tolist()) if bad.any() else None


def checked_numbers(name, numbers, cells, nonfinite="error", place="row {}".format):
    """The numbers of a column, NaN where they are missing, once none of them can make a loss NaN.

    Args:
        name: of the column, for the error.
        numbers: float64 [n].
        cells: function that returns the column as it was given, for the error.
        nonfinite: "error", or "missing": a number that cannot be used counts as missing.
        place: function of a row that says where it is, for the error.

    Raises:
        ValueError: an infinity, or a number beyond 2^32, by row and column.

    """
    bad = first_unusable(numbers, allow_missing=True)
    if bad is None:
        return numbers
    if nonfinite == "missing":
        return np.where(np.abs(numbers) > LARGEST, np.nan, numbers)
    shown = str(cells()[bad[0]])
    raise ValueError(
        f"column {name!r}, {place(bad[0])}: {shown if len(shown) < 40 else shown[:36] + ' ...'} {UNUSABLE}"
    )
