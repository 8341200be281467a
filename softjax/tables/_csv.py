"""Rows of CSV files, plain or compressed by gzip."""

import codecs
import csv
import gzip
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

import numpy as np

from softjax.tables._cells import DECIMALS, NumberError, number, reads_as_number
from softjax.tables._columns import PLAIN, Column, Levels, Names, Reading, encoded, refuse_texts
from softjax.tables._errors import DataError, understood
from softjax.tables._rows import HeldRows, chosen_columns

SEPARATORS = (",", ";", "\t", "|")
# The line before the header that tells Excel the separator.
TOLD = re.compile(r'"?sep=(.)"?\s*')
# The number of rows between two reports of the progress.
ROWS_PER_REPORT = 10_000


class CsvRows(HeldRows):
    """Rows of a CSV file, whose first line names the columns.

    Each number takes 8 bytes, and each distinct text of the labels is stored once. A column holds
    categories if none of its cells can be read as a number.
    """

    def __init__(
        self, path: Path, label: str | None, names: Names = None, reading: Reading = PLAIN
    ):
        with understood(path), path.open("rb") as raw:
            lines = _Lines(path, raw, reading)
            rows = filter(_is_not_blank, _reader(lines, lines.separator, strict=True))
            header = next(rows, None)
            if header is None:
                raise DataError(f"{path}: it is empty.")
            header = [name.strip(" ") for name in header]
            columns = chosen_columns(path, header, label, names, drop=reading.drop)
            place = {name: i for i, name in enumerate(header)}
            places = [place[column.name] for column in columns]
            cells_of = _Cells(path, columns, names is not None, reading)
            labels, texts = [], {}
            row = 0
            for row, cells in enumerate(rows, 1):
                lines.row = row
                if len(cells) != len(header):
                    fields = f"row {row} has {len(cells)} fields, the header {len(header)}"
                    raise DataError(f"{path}: {fields}.")
                cells_of.add(row, [cells[i] for i in places])
                if label is not None:
                    text = cells[place[label]]
                    labels.append(texts.setdefault(text, text))
            columns, table = cells_of.table(row)
        super().__init__(path, label, columns, encoded(columns, table), _typed(labels, texts))


class _Cells:
    """The cells of the features, row by row, as numbers and category numbers.

    A model determines which columns are categories if they are `known`.
    """

    def __init__(self, path: Path, columns: Sequence[Column], known: bool, reading: Reading):
        self.path, self.columns, self.known = path, columns, known
        self.forced = set(reading.categories)
        self.commas = reading.decimal == ","
        self.values = array("d")
        self.levels = {
            i: Levels(path, column.name, column.levels)
            for i, column in enumerate(columns)
            if column.levels is not None or column.name in self.forced
        }

    def add(self, row: int, cells: list[str]) -> None:
        for i, levels in self.levels.items():
            cells[i] = str(levels.code(cells[i], row))
        self.values.extend(self._numbers(row, cells))

    def _numbers(self, row: int, cells: list[str]) -> list[float]:
        """The cells as `number` reads them; `float` is faster and agrees on plain text."""
        text = "".join(cells)
        if not self.commas and text.isascii() and "_" not in text:
            try:
                return list(map(float, cells))
            except ValueError:
                pass
        return [self._number(i, row, cell) for i, cell in enumerate(cells)]

    def _number(self, i: int, row: int, cell: str) -> float:
        name = self.columns[i].name
        if self.commas and i not in self.levels:
            if DECIMALS.pattern.fullmatch(cell.strip()):
                cell = cell.replace(",", ".")
            elif "." in cell and reads_as_number(cell):
                where = f"{self.path}: column {name!r}, row {row}"
                raise DataError(f"{where}: expected a number with a decimal comma, got {cell!r}.")
        try:
            return number(self.path, name, row, cell)
        except NumberError:
            so_far = np.array(self.values[i :: len(self.columns)])
            if self.known or not np.isnan(so_far).all():
                raise
        self.levels[i] = Levels(self.path, name)
        return self.levels[i].code(cell, row)

    def table(self, num_rows: int) -> tuple[list[Column], np.ndarray]:
        """The columns and the cells [rows, columns], with the categories numbered in order."""
        columns = list(self.columns)
        # `frombuffer` refuses an empty buffer.
        cells = np.frombuffer(self.values, np.float64) if num_rows else np.empty(0)
        table = cells.reshape(num_rows, len(columns))
        doubts = []
        for i, levels in self.levels.items():
            if self.known:
                continue
            name = columns[i].name
            forced = name in self.forced
            if not forced and any(map(self._is_number, levels.place)):
                text, row = next(t for t in levels.first_rows.items() if not self._is_number(t[0]))
                raise NumberError(self.path, name, row, text)
            present = ~np.isnan(table[:, i])
            codes = table[present, i].astype(np.intp)
            doubts.append(levels.doubt(np.bincount(codes, minlength=len(levels.place)), forced))
            columns[i], ranks = levels.column()
            table[present, i] = ranks[codes]
        refuse_texts(self.path, doubts, "--decimal , reads them")
        return columns, table

    def _is_number(self, text: str) -> bool:
        is_decimal = self.commas and bool(DECIMALS.pattern.fullmatch(text.strip()))
        return is_decimal or reads_as_number(text)


class _Lines:
    """The lines of a file as text, with errors that name the row.

    Attributes:
        row: the last row that was read; `CsvRows` sets it.
        separator: the separator of the cells.
    """

    def __init__(self, path: Path, raw: IO[bytes], reading: Reading):
        self.path, self.raw, self.row = path, raw, 0
        self.size, self.progress = max(os.fstat(raw.fileno()).st_size, 1), reading.progress
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        self.encoding = reading.encoding or _encoding(file)
        # `_checked` reports bytes that are not valid in the encoding, since it knows the row.
        self.file = TextIOWrapper(file, self.encoding, "surrogateescape", newline="")
        self.first = self.file.readline().removeprefix("\ufeff")
        told = TOLD.fullmatch(self.first)
        if told:
            self.first = self.file.readline()
        self.separator = reading.separator or (told[1] if told else _separator(path, self.first))

    def __iter__(self) -> Iterator[str]:
        yield self._checked(self.first)
        for count, line in enumerate(self.file):
            if count % ROWS_PER_REPORT == 0:
                self.progress(self.raw.tell(), self.size)
            yield self._checked(line)

    def _checked(self, line: str) -> str:
        if "\0" in line:
            raise DataError(f"{self.path}: holds a byte of 0: it is not text in {self.name}.")
        if not line.isascii():
            bad = next((c for c in line if "\udc80" <= c <= "\udcff"), None)
            if bad is not None:
                where = f"row {self.row + 1}" if self.row or line != self.first else "the header"
                what = f"{where} holds the byte 0x{ord(bad) - 0xDC00:x}"
                hint = "--encoding says what it is, such as cp1252 or latin-1"
                raise DataError(f"{self.path}: {what}, which is no text in {self.name}; {hint}.")
        return line

    @property
    def name(self) -> str:
        return {"utf-8-sig": "UTF-8"}.get(self.encoding, self.encoding)


def _reader(lines: Iterable[str], separator: str, strict: bool = False) -> Iterator[list[str]]:
    """The cells of each row; a quote after a separator and spaces begins a quoted cell."""
    return csv.reader(lines, delimiter=separator, strict=strict, skipinitialspace=True)


def _is_not_blank(cells: list[str]) -> bool:
    return len(cells) > 1 or bool("".join(cells).strip())


def _encoding(file: Any) -> str:
    """UTF-16 if the file begins with its byte order mark, as Excel writes text; else UTF-8."""
    start = file.read(2)
    file.seek(0)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _separator(path: Path, header: str) -> str:
    """The tab for .tsv, the comma for others, or else what gives the header the most names."""
    usual = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","

    def fields(separator: str) -> int:
        try:
            return len(next(_reader([header], separator), []))
        except csv.Error:
            return 0

    return usual if fields(usual) > 1 else max((usual, *SEPARATORS), key=fields)


def _typed(labels: list[str], texts: Iterable[str]) -> np.ndarray:
    """Labels as integers if each is written as Python writes integers; else as text."""
    try:
        if all(str(int(text)) == text for text in texts):
            return np.array([int(label) for label in labels], np.int64)
    except (ValueError, OverflowError):
        pass
    return np.array(labels, object)
