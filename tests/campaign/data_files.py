"""Broken or unusual data files: `softjax fit` fits them, or prints the reason in one line."""

import contextlib
import csv
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from softjax import cli
from tests.campaign import Failure, Outcome

NAME = "data-files"
FIGURE = "no figure: exit status 0, or 2 with one line"

ROWS = 40
CELLS = (
    *("", " ", "nan", "inf", "-inf", "1e400", "-1e39", "1e-400", "1,5", "1_000", "0x10", " 1 "),
    *("+1", "True", "None", "NA", "é", "\u0661", "\uff11", "\x00", "\ufeff", '"', "'", "a\nb"),
    *("1\r", "--1", "1e", "9" * 400, "x" * 200_000, "1;2", "1\t2", "[bold]", "{}", "%s", "\u2028"),
)
ARRAYS = (
    *("float64", "float32", "float16", ">f4", ">f8", "int64", "uint8", "bool", "complex64"),
    *("object", "str", "bytes", "datetime64[s]", "structured", "in columns", "reversed", "rank 0"),
    *("rank 1", "rank 3", "no rows", "no columns", "nan", "inf", "large", "last large"),
)


def run(rng: np.random.Generator) -> Outcome:
    kind = str(rng.choice(["csv", "npy", "npz", "parquet"]))
    with in_a_folder():
        path, label, how = WRITERS[kind](rng)
        if rng.random() < 0.35:
            how += ", " + spoil(rng, path)
        plain, streamed = (
            invoke("fit", path, "--label-column", label, "--max-steps", "20", *options)
            for options in (("--out", "plain"), ("--out", "streamed", "--stream"))
        )
        for result, options in ((plain, ""), (streamed, " --stream")):
            check(f"fit {path} {how}{options}", result)
        for name, result in (("plain", plain), ("streamed", streamed)):
            if result.exit_code == 0:
                check_model(f"fit {path} {how} {name}", Path(name, "model.npz"))
        if plain.exit_code != streamed.exit_code:
            said = (plain.stderr + streamed.stderr).strip()
            raise Failure(
                f"fit {path} {how}: exit status {plain.exit_code}, with --stream "
                f"{streamed.exit_code}: {said}"
            )
    return Outcome(0.0, f"{kind} {'fitted' if plain.exit_code == 0 else 'refused'}")


@contextlib.contextmanager
def in_a_folder() -> Iterator[None]:
    """A context with a temporary working directory, and without pictures, which take long."""
    before, matplotlib = Path.cwd(), sys.modules.get("matplotlib.axes")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.modules["matplotlib.axes"] = None  # type: ignore[assignment]
        plots = sys.modules.pop("softjax.plots", None)
        try:
            yield
        finally:
            os.chdir(before)
            for name, module in (("matplotlib.axes", matplotlib), ("softjax.plots", plots)):
                sys.modules.pop(name, None)
                if module is not None:
                    sys.modules[name] = module


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def check(words: str, result: Any) -> None:
    """Requires exit status 0, with at most one warning, or exit status 2 with one line."""
    lines = result.stderr.splitlines()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        error = result.exception
        raise Failure(f"{words}: a traceback: {type(error).__name__}: {error}")
    expected = len(lines) == 1 and lines[0].startswith("softjax: ")
    if (result.exit_code == 0 and not lines) or (result.exit_code in (0, 2) and expected):
        return
    raise Failure(f"{words}: exit status {result.exit_code}, {len(lines)} lines: {result.stderr}")


def check_model(words: str, path: Path) -> None:
    with np.load(path) as model:
        for name in ("kernel", "bias"):
            if not np.isfinite(model[name]).all():
                raise Failure(f"{words}: the {name} of the model is not finite")
        sizes = (len(model["features"]), len(model["classes"]))
        if model["kernel"].shape != sizes or model["bias"].shape != sizes[1:]:
            raise Failure(f"{words}: the arrays of the model do not fit each other")


# Files


def columns(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = np.round(rng.normal(size=(ROWS, 2)), 3)
    return x, np.argmax(x @ [[1, -1, 0], [0, 1, -1]] + rng.gumbel(size=(ROWS, 3)), 1)


def spoil(rng: np.random.Generator, path: Path) -> str:
    """Changes some bytes of a file."""
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    how = str(rng.choice(["cut", "empty", "flip", "insert", "delete", "zeros", "twice"]))
    if how == "cut":
        content = content[:place]
    elif how == "empty":
        content = bytearray()
    elif how == "flip":
        for _ in range(int(rng.choice([1, 1, 20]))):
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    elif how == "insert":
        content[place:place] = rng.bytes(int(rng.choice([1, 5, 300])))
    elif how == "delete":
        del content[place : place + int(rng.choice([1, 5, 300]))]
    elif how == "zeros":
        content[place : place + 50] = bytes(50)
    else:
        content += content[place:]
    path.write_bytes(content)
    return f"bytes {how} at {place}"


def write_csv(rng: np.random.Generator) -> tuple[Path, str, str]:
    x, y = columns(rng)
    rows: list[list[str]] = [["a", "b", "kind"]]
    rows += [[str(u), str(v), "xyz"[k]] for (u, v), k in zip(x, y, strict=True)]
    hows = []
    for _ in range(int(rng.integers(0, 3))):
        how = str(
            rng.choice(["cell", "label", "header", "short", "long", "blank", "twice", "no rows"])
        )
        row = int(rng.integers(1, len(rows))) if len(rows) > 1 else 0
        cell = str(rng.choice(np.array(CELLS, object)))
        if how == "cell":
            rows[row][0] = cell
        elif how == "label":
            rows[row][-1] = cell
        elif how == "header":
            rows[0][int(rng.integers(len(rows[0])))] = cell
        elif how == "short":
            del rows[row][-1:]
        elif how == "long":
            rows[row].append(cell)
        elif how == "blank":
            rows.insert(row, [])
        elif how == "twice":
            rows[0][1] = "a"
        else:
            del rows[1:]
        hows.append(f"{how} {cell[:12]!r} in row {row}")
    text = io.StringIO()
    csv.writer(text, lineterminator=str(rng.choice(["\n", "\r\n", "\r"]))).writerows(rows)
    encoding = str(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16"]))
    path = Path("data.csv")
    path.write_bytes(text.getvalue().encode(encoding, "replace"))
    return path, "kind", ", ".join([encoding, *hows])


def odd_array(rng: np.random.Generator, array: np.ndarray) -> tuple[np.ndarray, str]:
    """The same numbers in another dtype, shape or order, or with some unusual numbers."""
    how = str(rng.choice(ARRAYS))
    array = array.astype(np.float64)
    if how == "in columns":
        return np.asfortranarray(array), how
    if how == "reversed":
        return array[::-1], how
    if how == "rank 1":
        return array.ravel(), how
    if how == "rank 3":
        return array[None], how
    if how == "rank 0":
        return np.array(1.0), how
    if how == "no rows":
        return array[:0], how
    if how == "no columns":
        return array[:, :0] if array.ndim == 2 else array[:0], how
    if how in ("nan", "inf", "large", "last large"):
        array = array.copy()
        value = {"nan": np.nan, "inf": -np.inf, "large": 1e300, "last large": 1e7}[how]
        array.flat[-1 if how == "last large" else int(rng.integers(array.size))] = value
        return array, how
    if how == "structured":
        return np.array(
            [tuple(np.atleast_1d(row)[:2]) for row in array], "f8,f8" if array.ndim == 2 else "f8"
        ), how
    if how == "datetime64[s]":
        return array.astype("int64").astype(how), how
    with np.errstate(invalid="ignore"):
        return array.astype("S" if how == "bytes" else how), how


def write_npy(rng: np.random.Generator) -> tuple[Path, str, str]:
    x, y = columns(rng)
    array, how = odd_array(rng, np.column_stack([x, y]))
    path = Path("data.npy")
    np.save(path, array, allow_pickle=True)
    return path, str(rng.choice(["2", "2", "2", "-1", "3", "kind"])), how


def write_npz(rng: np.random.Generator) -> tuple[Path, str, str]:
    x, y = columns(rng)
    arrays: dict[str, Any] = {"x": x, "more": x[:, 0], "kind": np.array(list("xyz"))[y]}
    name = str(rng.choice(list(arrays)))
    source = y if name == "kind" else arrays[name]
    arrays[name], how = odd_array(rng, source)
    if rng.random() < 0.2:
        del arrays[str(rng.choice(list(arrays)))]
        how += ", one array less"
    path = Path("data.npz")
    np.savez(path, **arrays)
    return path, "kind", f"{name} {how}"


def write_parquet(rng: np.random.Generator) -> tuple[Path, str, str]:
    import pyarrow as pa
    from pyarrow import parquet

    x, y = columns(rng)
    first, kind = x[:, 0].tolist(), [str("xyz"[k]) for k in y]
    odd: dict[str, Any] = {
        "as it is": pa.array(first),
        "a null": pa.array([None, *first[1:]]),
        "nulls": pa.nulls(ROWS),
        "nan": pa.array([float("nan"), *first[1:]]),
        "infinite": pa.array([float("inf"), *first[1:]]),
        "float16": pa.array(np.float16(first)),
        "text of numbers": pa.array([str(v) for v in first]),
        "text": pa.array(kind),
        "booleans": pa.array([v > 0 for v in first]),
        "lists": pa.array([[v, v] for v in first]),
        "structs": pa.array([{"u": v} for v in first]),
        "decimals": pa.array(np.round(first, 2).tolist()).cast(pa.decimal128(10, 3)),
        "times": pa.array([int(1000 * v) for v in first], pa.timestamp("s")),
        "bytes": pa.array([b"1" for _ in first]),
        "a dictionary": pa.array([str(round(v)) for v in first]).dictionary_encode(),
        "large integers": pa.array([2**62 + k for k in range(ROWS)]),
    }
    of_kind: dict[str, Any] = {
        "as it is": pa.array(kind),
        "integers": pa.array(y),
        "floats": pa.array(y * 1.0),
        "booleans": pa.array(y > 0),
        "a null": pa.array([None, *kind[1:]]),
        "bytes": pa.array([value.encode() for value in kind]),
        "a dictionary": pa.array(kind).dictionary_encode(),
        "lists": pa.array([[value] for value in kind]),
        "times": pa.array(y, pa.timestamp("s")),
    }
    how, how_kind = (str(rng.choice([*names, "as it is"])) for names in (list(odd), list(of_kind)))
    table = pa.table({"a": odd[how], "b": pa.array(x[:, 1]), "kind": of_kind[how_kind]})
    if rng.random() < 0.1:
        table, how = table.slice(0, int(rng.choice([0, 1, 3]))), how + ", few rows"
    if rng.random() < 0.1:
        table, how = table.rename_columns(["a", "a", "kind"]), how + ", a name twice"
    path = Path("data.parquet")
    parquet.write_table(table, path, row_group_size=int(rng.choice([7, ROWS])))
    return path, "kind", f"a: {how}, kind: {how_kind}"


WRITERS = {"csv": write_csv, "npy": write_npy, "npz": write_npz, "parquet": write_parquet}
