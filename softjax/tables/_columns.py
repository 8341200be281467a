"""The columns of a table as features: numbers are unchanged, categories are one-hot encoded."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from softjax.tables._cells import (
    DATES,
    DECIMALS,
    FORMS,
    SIGNS,
    THOUSANDS,
    Form,
    class_name,
    form_of,
    in_order,
    is_missing,
    like,
)
from softjax.tables._errors import DataError

# Columns that hold distinct whole numbers identify the rows if their names end with such a word: a
# word of its own, a capitalised one as in PassengerId, or the end of a German compound.
IDENTIFIER = re.compile(
    r"(?i:(.*[ _.-])?(id|uuid|guid|identifier|index|row ?num(ber)?|no|num|number|key|code))"
    r"|(?i:.*(nr|nummer))|.*[a-z](Id|ID|No|Num|Number|Key|Code)"
)
WHOLE = re.compile(r"-?\d+(\.0)?")
# Fewer rows than this may differ by chance.
FEWEST_ROWS = 10
# From here on float64 rounds whole numbers.
ROUNDED = 2**53
SHOWN_LEVELS = 12


class Reading(NamedTuple):
    """The options for reading a file."""

    drop: Sequence[str] = ()  # columns that are not features
    categories: Sequence[str] = ()  # columns whose numbers are names of categories
    separator: str | None = None  # the separator of a CSV file; None to find it in the header
    # The encoding of a CSV file; None for UTF-8, or UTF-16 with a byte order mark.
    encoding: str | None = None
    # The decimal mark of a CSV file, a point or a comma; None for a point.
    decimal: str | None = None
    # Whether the labels are classes even if they look like identifiers or measurements.
    any_classes: bool = False
    # Called with the number of bytes read so far and the total.
    progress: Callable[[int, int], None] = lambda done, total: None


PLAIN = Reading()


class Column(NamedTuple):
    """A column of a file, and its encoding as features."""

    name: str  # the name of the column
    # The categories in order; None for numbers. The first is the reference; each of the others
    # becomes a feature that is 1 in its rows and 0 in all other rows.
    levels: tuple[str, ...] | None = None
    # The number or category that replaces a missing cell; None to refuse missing cells.
    fill: float | str | None = None

    @property
    def features(self) -> list[str]:
        """The names of its features."""
        if self.levels is None:
            return [self.name]
        return [f"{self.name}={level}" for level in self.levels[1:]]

    @property
    def filling(self) -> np.ndarray:
        """The values of this column's features in a row whose cell is missing."""
        if self.levels is None or self.fill is None:
            return np.array([np.nan if self.fill is None else self.fill] * len(self.features))
        return np.array([level == self.fill for level in self.levels[1:]], np.float64)


# The columns of the features, in order; None for all columns but that of the labels.
Names = Sequence[str | Column] | None


class Levels:
    """The categories of a column by appearance, or those of a model, which must hold every cell."""

    def __init__(self, path: Path, name: str, known: Sequence[str] | None = None):
        self.path, self.name, self.known = path, name, known
        self.place = {level: code for code, level in enumerate(known or ())}
        self.first_rows: dict[str, int] = {}

    def code(self, cell: object, row: int) -> float:
        """The number of the category of a cell; NaN if the cell is missing."""
        try:
            name = class_name(cell)
            if is_missing(cell) and name not in self.place:  # a model may know NA as a category
                return np.nan
            level = str(name)
        except (TypeError, ValueError):
            where = f"{self.path}: column {self.name!r}, row {row}"
            raise DataError(f"{where}: expected a category, got {type(cell).__name__}.") from None
        code = self.place.get(level)
        if code is None and self.known is not None and WHOLE.fullmatch(level):
            # Whole numbers beside missing cells are floats in pandas: 1.0 is the category 1.
            code = self.place.get(level.removesuffix(".0"), self.place.get(f"{level}.0"))
        if code is None:
            if self.known is not None:
                expected = f"one of the categories of the model, {listed(self.known)}"
                where = f"column {self.name!r}, row {row}"
                near = like(level, self.known)
                raise DataError(f"{self.path}: {where}: expected {expected}, got {level!r}.{near}")
            code = self.place[level] = len(self.place)
            self.first_rows[level] = row
        return float(code)

    def codes(self, cells: Sequence[object], first: int) -> np.ndarray:
        """The category numbers of cells; the first cell is in row `first`, counted from 0."""
        rows = range(first + 1, first + 1 + len(cells))
        return np.array([self.code(c, r) for c, r in zip(cells, rows, strict=True)], np.float64)

    def doubt(self, counts: np.ndarray, forced: bool) -> "Doubt | None":
        """Why the column holds no categories; None if it may.

        `counts` are the numbers of rows of each category, in the order of their numbers, and
        `forced` is whether the options say that the column holds categories.
        """
        present = int(np.sum(counts))
        forms = [form_of(level) for level in self.place]
        share = {f: np.dot(counts, [form is f for form in forms]) / max(present, 1) for f in FORMS}
        looks = {
            form: f"looks like {form.name}, such as {list(self.place)[forms.index(form)]!r}"
            for form in FORMS
            if share[form]
        }
        if not forced and share[DECIMALS] + share[THOUSANDS] > 1 / 2:
            form = THOUSANDS if share[THOUSANDS] else DECIMALS
            return Doubt(self.name, form, f"column {self.name!r} {looks[form]}")
        if len(self.place) > max(2, present / 2):
            what = f"has {len(self.place)} different texts in {present} rows"
            for form in (SIGNS, DATES):
                if share[form] > 1 / 2:
                    what = f"{what} and {looks[form]}: {form.remedy}"
            return Doubt(self.name, None, f"column {self.name!r}: {what}")
        return None

    def column(self) -> tuple[Column, np.ndarray]:
        """The column with its categories in order, and the position of each number among them."""
        levels = in_order(self.place) if self.known is None else list(self.known)
        place = {level: i for i, level in enumerate(levels)}
        ranks = np.array([place[level] for level in self.place], np.float64)
        return Column(self.name, tuple(levels)), ranks


class Doubt(NamedTuple):
    """Why a column of text holds no categories."""

    name: str  # the column
    form: Form | None  # numbers with commas; None if most of its cells differ
    words: str  # the reason, which names the column


def refuse_texts(
    path: Path, doubts: Sequence[Doubt | None], decimals: str = "Convert them to numbers"
) -> None:
    """Refuses all columns of text that hold no categories, in one error.

    `decimals` says what to do with decimal commas in this format of files.
    """
    lines = []
    for form in (DECIMALS, THOUSANDS, None):
        found = [doubt for doubt in doubts if doubt is not None and doubt.form is form]
        if not found:
            continue
        words = "; ".join(doubt.words for doubt in found)
        if form is not None:
            remedy = decimals if form is DECIMALS else form.remedy.capitalize()
            names = " ".join(f"--category {quote(doubt.name)}" for doubt in found)
            hint = f". {remedy}; {names} takes them as categories."
        else:
            hint = f"; an identifier or text is not a category. {_left_out(found)}"
        lines.append(words + hint)
    if lines:
        raise DataError(f"{path}: {' Also '.join(lines)}")


def _left_out(columns: Sequence[Doubt | Column]) -> str:
    it = "it" if len(columns) == 1 else "them"
    return f"{' '.join(f'--drop {quote(column.name)}' for column in columns)} leaves {it} out."


def feature_names(path: Path, columns: Sequence[Column]) -> list[str]:
    """The names of all features; an error if two are equal."""
    names = [name for column in columns for name in column.features]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: two features have one name, {repeated[0]!r}.")
    return names


def encoded(columns: Sequence[Column], table: np.ndarray) -> np.ndarray:
    """The features [n, D] of a table of numbers and category numbers; NaN for a missing cell."""
    if all(column.levels is None for column in columns):
        return table
    parts = []
    for column, values in zip(columns, table.T, strict=True):
        part = values[:, None]
        if column.levels is not None:
            one_hot = part == np.arange(1, len(column.levels))
            part = np.where(np.isnan(part), np.nan, one_hot)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def filled(columns: Sequence[Column], features: np.ndarray) -> np.ndarray:
    """The features [n, D], in which `Column.filling` replaces NaN."""
    if all(column.fill is None for column in columns):
        return features
    filling = np.concatenate([column.filling for column in columns])
    return np.where(np.isnan(features), filling, features)


def with_fills(
    path: Path,
    columns: Sequence[Column],
    present: np.ndarray,
    sums: np.ndarray,
    median: Callable[[int], float],
) -> list[Column]:
    """The columns with their median or most frequent category as their fills.

    `present` and `sums` [D] are the number of cells of each feature that are not missing, and their
    sum; `median` gives the median of the feature in this place.
    """
    found, place = [], 0
    for column in columns:
        own = slice(place, place + len(column.features))
        place = own.stop
        if not present[own].all():
            why = "has no cell to impute others from, among the rows to fit"
            raise DataError(f"{path}: column {column.name!r}: {why}. {_left_out([column])}")
        fill: float | str
        if column.levels is None:
            fill = float(median(own.start))
        else:
            counts = [present[own].max(initial=0) - sums[own].sum(), *sums[own]]
            fill = column.levels[int(np.argmax(counts))]
        found.append(column._replace(fill=fill))
    return found


def refuse_identifiers(path: Path, columns: Sequence[Column], features: np.ndarray) -> None:
    """Refuses columns of whole numbers that identify if their names are those of identifiers."""
    identifying = identifying_numbers(columns, features)
    found = [c for c in columns if c.name in identifying and IDENTIFIER.fullmatch(c.name)]
    if found:
        differ = f"has {len(features)} different numbers in as many rows"
        rounded = "has whole numbers beyond 2^53, which float64 rounds"
        words = "; ".join(
            f"column {c.name!r}: {differ if identifying[c.name] else rounded}" for c in found
        )
        raise DataError(
            f"{path}: {words}; an identifier is not a feature. {_left_out(found)} "
            f"If it is a measurement, rename the column."
        )


def identifying_numbers(columns: Sequence[Column], features: np.ndarray) -> dict[str, bool]:
    """The columns of whole numbers that identify the rows, if there are enough rows to tell.

    All numbers of such a column differ (True), or all are beyond 2^53, where float64 rounds them,
    so that they may differ although they are equal here (False). An integer has at most 64 bits:
    larger numbers are measurements, whose fractions float64 drops.
    """
    found, place = {}, 0
    for column in columns:
        if column.levels is None and len(features) >= FEWEST_ROWS:
            values = features[:, place]
            if np.all((np.floor(values) == values) & (np.abs(values) <= 2**64)):
                differ = len(np.unique(values)) == len(values)
                if differ or np.all(np.abs(values) >= ROUNDED):
                    found[column.name] = differ
        place += len(column.features)
    return found


def like_identifiers(
    columns: Sequence[Column], features: np.ndarray, where: str = ""
) -> str | None:
    """A line for the output if features look like identifiers by their values; otherwise None.

    `where` says which rows these are, such as " of the first 100 rows"; all if it is empty.
    """
    identifying = identifying_numbers(columns, features)
    if not identifying:
        return None
    names = [repr(name) for name in identifying]
    rounded = "" if all(identifying.values()) else " or are beyond 2^53, where float64 rounds them"
    if len(names) == 1:
        return (
            f"Column {names[0]}: all its whole numbers{where} differ{rounded}; it looks like an "
            f"identifier; --drop it if so."
        )
    return (
        f"Columns {listed(names)}: all whole numbers of each{where} differ{rounded}; they look "
        f"like identifiers; --drop them if so."
    )


def constant_columns(columns: Sequence[Column], features: np.ndarray) -> str | None:
    """A line for the output if columns have the same value in all rows; otherwise None."""
    found, place = [], 0
    for column in columns:
        own = features[:, place : place + len(column.features)].T
        present = (values[~np.isnan(values)] for values in own)
        # Rounded numbers may differ even if they are equal here.
        if not any((v != v[:1]).any() or (np.abs(v) >= ROUNDED).any() for v in present):
            found.append(repr(column.name))
        place += len(own)
    if not found:
        return None
    what, they = ("Column", "it tells") if len(found) == 1 else ("Columns", "they tell")
    return f"{what} {listed(found)}: all values are equal; {they} nothing."


def described(columns: Sequence[Column]) -> str | None:
    """The categories of all columns in one line; None if there are none."""
    coded = [column for column in columns if column.levels is not None]
    if not coded:
        return None
    parts = []
    for column in coded:
        reference, *others = column.levels or ("",)
        parts.append(f"{column.name} ({listed(others)}; against {reference})")
    return f"Categories, one-hot encoded: {', '.join(parts)}."


def listed(levels: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    shown = ", ".join(levels[:SHOWN_LEVELS])
    more = len(levels) - SHOWN_LEVELS
    return f"{shown} and {more} more" if more > 0 else shown
