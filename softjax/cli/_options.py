"""Checks of single options, and the reading of files with them."""

import codecs
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from softjax.tables import DataError, Dataset, Reading

SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " ", "pipe": "|"}


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, which Python parses as numbers."""
    if value is not None and not np.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def positive(value: float | None) -> float | None:
    """Refuses all but finite numbers above 0."""
    if value is not None and not 0 < value < np.inf:
        raise typer.BadParameter("must be a finite number above 0")
    return value


def all_finite(values: list[float] | None) -> list[float] | None:
    """Refuses NaN and infinity among numbers."""
    for value in values or ():
        finite(value)
    return values


def separator(value: str | None) -> str | None:
    """The separator: one character, or its name."""
    if value is None:
        return None
    value = SEPARATORS.get(value, value)
    if len(value) != 1 or value in '"\r\n':
        raise typer.BadParameter(f"must be one character or one of {', '.join(SEPARATORS)}")
    return value


def encoding(value: str | None) -> str | None:
    """The encoding, by a name that Python knows."""
    if value is None:
        return None
    try:
        name = codecs.lookup(value).name
        "".encode(name)
    except (LookupError, ValueError):
        raise typer.BadParameter("must be an encoding, such as utf-8, cp1252 or latin-1") from None
    return "utf-8-sig" if name == "utf-8" else name


def class_weights(values: Sequence[str] | None) -> list[str] | None:
    """Refuses values that are neither "balanced" nor of the form CLASS=WEIGHT."""
    for value in values or ():
        name, _, weight = value.rpartition("=")
        if value == "balanced" and len(values or ()) == 1:
            continue
        try:
            good = bool(name) and 0 <= float(weight) < np.inf
        except ValueError:
            good = False
        if not good:
            raise typer.BadParameter("must be balanced, or CLASS=WEIGHT with a weight >= 0")
    return list(values) if values else None


def weights_of_classes(
    options: Sequence[str] | None, data: str, label: str | None, train: Dataset
) -> np.ndarray | None:
    """The weight of each class, [K]; N / (K N_k) for "balanced", None if all are 1."""
    if not options:
        return None
    if list(options) == ["balanced"]:
        counts = np.bincount(train.labels, minlength=len(train.class_names))
        return len(train.labels) / (len(counts) * counts)
    weights = np.ones(len(train.class_names))
    for name, _, weight in (option.rpartition("=") for option in options):
        if name not in train.class_names:
            there = ", ".join(train.class_names[:10])
            raise DataError(f"{data}: column {label!r}: has no class {name!r}; it has {there}.")
        weights[train.class_names.index(name)] = float(weight)
    return weights


@contextlib.contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Progress]:
    """A progress bar with the remaining time on a terminal, removed when the work is done."""
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = console.is_terminal and not console.quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(title, total=None)
        yield progress


@contextlib.contextmanager
def reading(
    console: Console,
    drop: Sequence[str] | None,
    categories: Sequence[str] | None,
    separator: str | None,
    encoding: str | None,
    any_classes: bool = False,
) -> Iterator[Reading]:
    """The options of reading a file, with a progress bar while it is read."""
    with progress_bar(console, "reading") as progress:

        def told(done: int, total: int) -> None:
            progress.update(progress.task_ids[0], completed=done, total=total)

        columns = (tuple(drop or ()), tuple(categories or ()))
        yield Reading(*columns, separator, encoding, any_classes, told)
