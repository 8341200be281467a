"""Rows of Parquet files."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from softjax import _checks
from softjax.tables._cells import accepts, class_name, is_missing, reads_as_number
from softjax.tables._columns import PLAIN, Column, Doubt, Levels, Names, Reading, refuse_texts
from softjax.tables._errors import DataError, understood
from softjax.tables._rows import FileRows, chosen_columns, known_levels, stacked


class ParquetRows(FileRows):
    """Rows of a Parquet file, whose row groups are read one at a time."""

    def __init__(
        self, path: Path, label: str | None, names: Names = None, reading: Reading = PLAIN
    ):
        try:
            from pyarrow import parquet
        except ModuleNotFoundError:
            needs = _checks.needs_extra("a Parquet file", "pyarrow", "parquet")
            raise DataError(f"{path}: {needs}.") from None
        with understood(path):
            self.file = parquet.ParquetFile(path)
            schema = self.file.schema_arrow
            metadata = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
            # A range index is described by its bounds and has no column in the file.
            index = [name for name in metadata.get("index_columns", ()) if isinstance(name, str)]
            # Parquet keeps the dictionary of texts alone; pandas notes each column of categories.
            noted = metadata.get("columns", ())
            self.declared = {c["name"] for c in noted if c.get("pandas_type") == "categorical"}
            meta = self.file.metadata
            sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) != meta.num_rows:
                raise DataError(f"{path}: cannot be read: its numbers of rows do not add up.")
        chosen = chosen_columns(path, schema.names, label, names, index, reading.drop)
        if names is None:
            found = [self._column(path, c.name, reading) for c in chosen]
            refuse_texts(path, [doubt for _, doubt in found])
            chosen = [column for column, _ in found]
        self.levels = known_levels(path, chosen)
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None
        super().__init__(path, label, chosen, sum(sizes))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        parts = []
        for group in range(first, last + 1):
            begin = int(self.ends[group - 1]) if group else 0
            inside = slice(max(start - begin, 0), stop - begin)
            parts.append([part[inside] for part in self._row_group(group, begin)])
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    def _column(self, path: Path, name: str, reading: Reading) -> tuple[Column, Doubt | None]:
        """The column.

        It holds categories if the options or its type say so, or if it has only texts that are not
        numbers. Its type is a dictionary or, in pandas, category.
        """
        from pyarrow import types

        kind = self.file.schema_arrow.field(name).type
        forced = name in reading.categories or name in self.declared
        declared = forced or types.is_dictionary(kind)
        kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
        is_text = str(kind) in kinds or types.is_fixed_size_binary(kind)
        if not declared and not is_text:
            return Column(name), None
        levels, first = Levels(path, name), 0
        counts = np.zeros(0, np.int64)
        for group in range(self.file.metadata.num_row_groups):
            with understood(path):
                cells = self.file.read_row_group(group, columns=[name])[name].to_pylist()
            if not declared:
                texts = {cell for cell in cells if not is_missing(cell)}
                are_names = all(accepts(class_name, text) for text in texts)  # and no other bytes
                if not are_names or any(map(reads_as_number, texts)):
                    return Column(name), None
            codes = levels.codes(cells, first)
            more = np.bincount(codes[~np.isnan(codes)].astype(np.intp), minlength=len(levels.place))
            more[: len(counts)] += counts
            counts = more
            first += len(cells)
        if not counts.sum():
            return Column(name), None
        return levels.column()[0], levels.doubt(counts, declared)

    def _row_group(self, group: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
        if self.last is None or self.last[0] != group:
            self.last = None  # so that only one row group is in memory
            names = [column.name for column in self.columns]
            columns = names if self.label is None else [*names, self.label]
            with understood(self.path):
                table = self.file.read_row_group(group, columns=columns)
                arrays = {name: _decoded(table[name]) for name in columns}
            if len(table) != self.ends[group] - begin:
                raise DataError(f"{self.path}: cannot be read: a row group lacks rows.")
            cells = [arrays[name] for name in names]
            features = stacked(self.path, self.columns, cells, self.levels, begin)
            labels = np.empty(len(table), object) if self.label is None else arrays[self.label]
            self.last = (group, (features, labels))
        return self.last[1]


def _decoded(column: Any) -> np.ndarray:
    """A column of Arrow as a NumPy array; integers stay integers if some are missing."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count and pyarrow.types.is_integer(column.type):
        return np.array(column.to_pylist(), object)
    return column.to_numpy()
