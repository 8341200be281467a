"""The cells of a table: a feature is a number, and a label is the name of a class."""

import numbers
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softjax import _foreign
from softjax.tables._errors import DataError

LARGEST = float(np.finfo(np.float32).max)

# A column with more than MOST_NUMBERS different numbers holds measurements, unless the numbers are
# whole and have ROWS_OF_A_NUMBER rows each on average.
MOST_NUMBERS, ROWS_OF_A_NUMBER = 20, 10
# What SAS and Stata write for a missing value: a point, or a point and a letter.
CODE = re.compile(r"\.[A-Za-z_]?")
# The texts that pandas, R, SQL, Excel and archives of data sets write for a missing value.
MISSING = frozenset(("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "?"))


class Form(NamedTuple):
    """A form of text that is meant as numbers, and that `number` does not read."""

    name: str  # its name, after "looks like"
    remedy: str  # what the user can do
    pattern: re.Pattern  # of a cell without spaces around it


DECIMALS = Form(
    "numbers with decimal commas",
    "--decimal , reads decimal commas of .csv and .tsv files",
    re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?"),
)
THOUSANDS = Form(
    "numbers with separators of thousands",
    "remove separators of thousands",
    re.compile(
        r"[+-]?[\d.]*\d,\d[\d,]*(\.\d+)?([eE][+-]?\d+)?"
        r"|[+-]?\d{1,3}([ \u00a0\u202f'\u2019]\d{3})+([.,]\d+)?"
    ),
)
SIGNS = Form(
    "numbers with % or $",
    "remove signs such as % and $",
    re.compile(r"(?=.*[%$€£¥])[+-]?[$€£¥]?\s?[+-]?\d[\d.,]*\s?[%$€£¥]?"),
)
DATES = Form(
    "dates",
    "a date has to become a number, such as the days since the first one",
    re.compile(r"\d{4}([-/.])\d\d?\1\d\d?([ T].*)?|\d\d?([-/.])\d\d?\3(\d\d){1,2}( .*)?"),
)
FORMS = (DECIMALS, THOUSANDS, SIGNS, DATES)
TRUTHS = {"true": 1.0, "false": 0.0}
# The kernel has a column for each class and has to fit into memory.
MOST_CLASSES = 100_000


class NumberError(DataError):
    """A cell that is not a number in a column of numbers.

    `is_text` is whether it may be the name of a category, unlike a list or the point of SAS.
    """

    def __init__(self, path: Path, name: str, row: int, cell: object):
        where = f"column {name!r}, row {row}"
        line = f"{path}: {where}: expected a number, got {_shown(cell)}."
        form = form_of(cell)
        is_code = isinstance(cell, str) and CODE.fullmatch(cell.strip()) is not None
        if form is not None:
            line += f" {form.remedy.capitalize()}."
        elif is_code:
            line += " SAS and Stata write it for a missing value: write NA in its place."
        super().__init__(line)
        self.column, self.is_text = name, isinstance(cell, (str, bytes)) and not is_code


def as_features(path: Path, name: str, column: np.ndarray, first: int = 0) -> np.ndarray:
    """A column of features in float32 or float64; NaN for an empty cell.

    The column has numbers of any dtype, or cells of text or other Python objects. Errors name the
    file, the column and the row, counted from `first`.
    """
    kind = column.dtype.kind
    if kind in "biuf":
        dtype = np.result_type(np.float32, column.dtype)
        return column.astype(min(dtype, np.dtype(np.float64)), copy=False)
    # `tolist` would make whole numbers of dates.
    values = column.tolist() if kind in "OSU" else list(column)
    rows = range(first + 1, first + 1 + len(column))
    cells = (number(path, name, row, c) for row, c in zip(rows, values, strict=True))
    return np.fromiter(cells, np.float64, len(column))


def number(path: Path, name: str, row: int, cell: object) -> float:
    """The number in a cell: NaN if the cell is missing, 1 and 0 for true and false.

    Python also reads text with underscores, or with digits other than 0 to 9, as numbers. Such text
    is refused, since no other program writes numbers in this form.
    """
    try:
        value: Any = cell.decode() if isinstance(cell, bytes) else cell
        if is_missing(value):
            return np.nan
        value = value.strip() if isinstance(value, str) else value
        if isinstance(value, str) and value.lower() in TRUTHS:
            return TRUTHS[value.lower()]
        is_text = isinstance(value, str) and value.isascii() and "_" not in value
        is_duration = isinstance(value, np.timedelta64)  # an integer for NumPy
        if is_text or (isinstance(value, (numbers.Real, np.bool_, Decimal)) and not is_duration):
            return float(value)
    except OverflowError:
        return np.inf
    except ValueError:
        pass
    raise NumberError(path, name, row, cell)


def accepts(function: Callable[..., Any], *arguments: object) -> bool:
    """Whether a function raises no error for these arguments."""
    try:
        function(*arguments)
    except (NumberError, TypeError, ValueError):
        return False
    return True


def form_of(cell: object) -> Form | None:
    """The form of a cell that is meant as a number and cannot be read as one; otherwise None."""
    if isinstance(cell, np.datetime64) or hasattr(cell, "isoformat"):
        return DATES
    text = cell.strip() if isinstance(cell, str) else ""
    return next((form for form in FORMS if form.pattern.fullmatch(text)), None)


def reads_as_number(text: str) -> bool:
    return accepts(number, Path(), "", 0, text)


def is_missing(cell: object) -> bool:
    """Whether a cell of the features holds no value."""
    if isinstance(cell, bytes):
        return cell.strip().decode("latin1") in MISSING
    if isinstance(cell, str):
        return cell.strip() in MISSING
    return _foreign.is_missing(cell)


def as_classes(
    path: Path, name: str, labels: np.ndarray, first: int = 0
) -> tuple[list[str], np.ndarray]:
    """The names of the classes in a column of labels, and the index of each label among them.

    Returns:
        Distinct names in any order, and integers [n]: -1 for a missing label.
    """
    kind = labels.dtype.kind
    if kind in "biuf":
        if kind == "f":
            exact = labels.dtype in (np.float32, np.float64)
            labels = (labels if exact else labels.astype(np.float64)) + 0  # -0.0 is 0.0
        values, codes = np.unique(labels, return_inverse=True)
        known = np.isfinite(values) if kind == "f" else np.ones(len(values), bool)
        names: list[str | None] = values.astype(str).tolist()
        names = [n if good else None for n, good in zip(names, known, strict=True)]
    elif kind in "OSU":
        place: dict[object, int] = {}
        try:
            codes = np.array([place.setdefault(x, len(place)) for x in labels.tolist()], np.int64)
            names = [class_name(value) for value in place]
        except (TypeError, ValueError):
            cells = enumerate(labels.tolist())
            row, cell = next((r, x) for r, x in cells if not accepts(class_name, x))
            where = f"column {name!r}, row {first + row + 1}"
            expected = "a label: text, a whole number or a truth value"
            raise DataError(f"{path}: {where}: expected {expected}, got {_shown(cell)}.") from None
    else:
        expected = "labels: text, whole numbers or truth values"
        raise DataError(f"{path}: column {name!r}: expected {expected}, got {labels.dtype}.")
    distinct = list(dict.fromkeys(n for n in names if n is not None))
    where = {None: -1} | {n: i for i, n in enumerate(distinct)}
    return distinct, np.array([where[n] for n in names], np.int64)[codes]


def in_order(names: Iterable[str]) -> list[str]:
    """The names of classes, sorted as numbers or as text.

    They are sorted as numbers if all names are whole numbers, or all are numbers, in the form in
    which Python writes them. The names 01, 1 and +1 are three classes, which are sorted as text.
    """
    names = list(names)
    for kind in (int, float):
        try:
            if all(str(kind(name)) == name for name in names):
                return sorted(names, key=kind)
        except ValueError:
            pass
    return sorted(names)


def check_classes(
    path: Path, name: str, names: Iterable[str], count: int, any_classes: bool = False
) -> list[str]:
    """The names of all classes in order, or an error if the labels are not plausible classes.

    Row numbers, identifiers, measurements and counts are refused: more than two classes must have
    two of the `count` rows each on average. At most 20 labels may be numbers that are not whole.
    More than 20 whole numbers must have ten rows each on average, unless they are class indices:
    all of 0, 1, ... or of 1, 2, ..., without a gap, which is unlikely for ages. With `any_classes`
    none of these rules applies.
    """
    classes = in_order(names)
    where = f"{path}: column {name!r}"
    if not classes:
        raise DataError(f"{where}: there is no complete row with a label.")
    if len(classes) < 2:
        raise DataError(f"{where}: all labels are {classes[0]}, one class only.")
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{where}: has {len(classes)} different labels; there may be {MOST_CLASSES} classes."
        )
    doubt = None if any_classes else _doubt(classes, count)
    if doubt is not None:
        raise DataError(
            f"{where}: has {doubt} Choose a column of classes; --any-classes takes these labels as "
            f"classes."
        )
    return classes


def _doubt(classes: list[str], count: int) -> str | None:
    """Why the labels of `count` rows are not plausible classes; None if they are plausible."""
    number = len(classes)
    if number > max(2, count / 2):
        return (
            f"{number} different labels in {count} rows; classes have two rows each on average, "
            f"and identifiers and measurements fewer."
        )
    if number <= MOST_NUMBERS or not _are_numbers(classes):
        return None
    fractions = [name for name in classes if not float(name).is_integer()]
    if fractions:
        return (
            f"{number} different numbers, such as {fractions[0]}; more than {MOST_NUMBERS} numbers "
            f"that are not whole are measurements."
        )
    values = sorted(map(float, classes))
    are_indices = values[0] in (0, 1) and values[-1] - values[0] == number - 1
    if count < ROWS_OF_A_NUMBER * number and not are_indices:
        return (
            f"{number} different whole numbers, from {classes[0]} to {classes[-1]}, in {count} "
            f"rows; with fewer than {ROWS_OF_A_NUMBER} rows each they look like an amount or a "
            f"count, and softmax regression knows no order of its classes."
        )
    return None


def numbers_as_classes(classes: list[str]) -> str | None:
    """A line for the output if more than 20 numbers are taken as classes; otherwise None."""
    if len(classes) <= MOST_NUMBERS or not _are_numbers(classes):
        return None
    ends = f"{classes[0]} to {classes[-1]}"
    return f"The labels are {len(classes)} numbers, {ends}: taken as classes without an order."


def good_rows(
    features: np.ndarray, codes: np.ndarray | None = None, keep_missing: bool = False
) -> np.ndarray:
    """Which rows have a label and only finite numbers of float32, or NaN with `keep_missing`."""
    good = np.all((np.abs(features) <= LARGEST) | (keep_missing & np.isnan(features)), axis=1)
    return good if codes is None else good & (codes >= 0)


def class_name(value: object) -> str | None:
    """The name of the class of a label, without spaces around it; None for a missing label."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        value = value.strip()
    if _foreign.is_missing(value) or value == "":
        return None
    if isinstance(value, (str, np.bool_, numbers.Real, Decimal)):
        return str(value)
    raise TypeError


def like(name: str, known: Iterable[str]) -> str:
    """A sentence if a known name differs from an unknown one in case or blanks only; else empty."""

    def plain(text: str) -> str:
        return "".join(text.split()).casefold()

    meant = [repr(other) for other in known if plain(other) == plain(name)]
    if not meant:
        return ""
    differ = "differs" if len(meant) == 1 else "differ"
    return f" {' and '.join(meant)} {differ} from it in case or blanks only."


def _are_numbers(names: list[str]) -> bool:
    return all(accepts(float, name) and np.isfinite(float(name)) for name in names)


def _shown(cell: object) -> str:
    if isinstance(cell, np.generic):
        cell = str(cell) if isinstance(cell, (np.datetime64, np.timedelta64)) else cell.item()
    text = repr(cell)
    return text if len(text) <= 60 else f"{text[:57]}..."
