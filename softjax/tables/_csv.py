"""Rows of CSV files."""

import csv
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from softjax.tables._cells import number
from softjax.tables._errors import DataError, understood
from softjax.tables._rows import HeldRows, chosen_columns


class CsvRows(HeldRows):
    """Rows of a CSV file in UTF-8, whose first line names the columns.

    Numbers are kept in 8 bytes a cell, and each text among the labels once.
    """

    def __init__(self, path: Path, label: str | None, names: Sequence[str] | None = None):
        with understood(path), path.open(newline="", encoding="utf-8-sig") as file:
            rows = filter(None, csv.reader(_without_nul(path, file), strict=True))
            header = next(rows, None)
            if header is None:
                raise DataError(f"{path}: it is empty.")
            chosen = chosen_columns(path, header, label, names)
            place = {name: i for i, name in enumerate(header)}
            places = [place[name] for name in chosen]
            values, labels, texts = array("d"), [], {}
            row = 0
            for row, cells in enumerate(rows, 1):
                if len(cells) != len(header):
                    fields = f"row {row} has {len(cells)} fields, the header {len(header)}"
                    raise DataError(f"{path}: {fields}.")
                values.extend(_numbers(path, chosen, row, [cells[i] for i in places]))
                if label is not None:
                    text = cells[place[label]]
                    labels.append(texts.setdefault(text, text))
        features = np.frombuffer(values, np.float64) if row else np.empty(0)
        super().__init__(
            path, label, chosen, features.reshape(row, len(chosen)), _typed(labels, texts)
        )


def _without_nul(path: Path, file: IO[str]) -> Iterator[str]:
    for line in file:
        if "\0" in line:
            raise DataError(f"{path}: holds a byte of 0: it is not text in UTF-8.")
        yield line


def _numbers(path: Path, names: list[str], row: int, cells: list[str]) -> list[float]:
    """The numbers of a row, by the rule of `number`, which is asked only where it may differ."""
    text = "".join(cells)
    if text.isascii() and "_" not in text:
        try:
            return list(map(float, cells))
        except ValueError:
            pass
    return [number(path, name, row, cell) for name, cell in zip(names, cells, strict=True)]


def _typed(labels: list[str], texts: Iterable[str]) -> np.ndarray:
    """Labels as integers where each is one, as Python writes it; else as text."""
    try:
        if all(str(int(text)) == text for text in texts):
            return np.array([int(label) for label in labels], np.int64)
    except (ValueError, OverflowError):
        pass
    return np.array(labels, object)
