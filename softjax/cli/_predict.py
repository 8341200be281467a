"""The commands `softjax predict` and `softjax check`."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softjax import _files, _interrupt, accuracy, models, regression, tables
from softjax.cli import _options
from softjax.cli._app import Command, app, refuse_inputs
from softjax.cli._metrics import metrics, print_metrics
from softjax.datasets import PASSENGERS
from softjax.tables import DataError, IncompleteError

Labels = Annotated[
    str | None,
    typer.Option(
        help="Name of the column with the true classes, to print the accuracy of the predictions."
    ),
]


@app.command(
    cls=Command,
    epilog="Example: softjax predict run/model.npz new.csv --proba --out predictions.csv",
)
def predict(
    model: Annotated[Path, typer.Argument(help="The model.npz that softjax fit wrote.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A .csv, .tsv, .npy, .npz or .parquet file that has the columns of the "
            "model among its own; or the word passengers."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file to write, in UTF-8 (default: print to the terminal)."),
    ] = None,
    label_column: Labels = None,
    proba: Annotated[
        bool, typer.Option("--proba", help="Add a column with the probability of each class.")
    ] = False,
    separator: _options.Separator = None,
    encoding: _options.Encoding = None,
    decimal: _options.Decimal = None,
) -> None:
    """Predict the class of each row of a file.

    Writes one row for each row of the file, with the class in the column named class. Columns are
    found by their names; categories are encoded, and missing cells filled, as in the fit. With
    --label-column it prints accuracy, precision, recall and F1 to the standard error.
    """
    data = str(PASSENGERS) if data == "passengers" else data
    jax.config.update("jax_enable_x64", True)  # features as they are may be far from 0
    if out is not None:
        refuse_inputs([out], model, data, label_column)
        _files.try_file(out)
    fitted = models.load_model(model)
    errors = Console(stderr=True)
    text = tables.Reading(separator=separator, encoding=encoding, decimal=decimal)
    with _options.reading(errors, text) as reading:
        try:
            x = jnp.asarray(fitted.encode(data, reading))
        except IncompleteError as error:
            hint = " A model that is fitted with --impute fills missing cells in."
            raise DataError(f"{error}{hint if error.can_be_filled else ''}") from None
        named = label_column is not None
        labels = _labels(fitted, Path(data), label_column, reading) if named else None
    params = regression.SoftmaxRegression(jnp.asarray(fitted.kernel), jnp.asarray(fitted.bias))
    logits = np.asarray(regression.logits(params, x))
    beyond = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(beyond):  # features and parameters are finite, but their products are not
        raise DataError(f"{data}: row {beyond[0] + 1}: the model's logits overflow float64.")
    probabilities = np.asarray(regression.predict_proba(params, x)) if proba else None
    with _printing() if out is None else _writing(out) as file:
        csv.writer(file).writerows(_lines(fitted.classes, logits, probabilities))
    if labels is not None:
        found = _metrics(fitted, np.asarray(regression.predict_log_proba(params, x)), labels)
        print_metrics(errors, found, f"{len(labels)} rows of {Path(data).name}")


def _lines(
    classes: Sequence[str], logits: np.ndarray, probabilities: np.ndarray | None
) -> list[list[Any]]:
    """The header and the row of each example: its class, and the probabilities if given."""
    lines: list[list[Any]] = [["class"], *([classes[k]] for k in logits.argmax(axis=1).tolist())]
    if probabilities is None:
        return lines
    parts = [[f"p({name})" for name in classes], *probabilities.tolist()]
    return [line + part for line, part in zip(lines, parts, strict=True)]


def _metrics(fitted: models.Model, log_p: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    loss = -float(np.mean(np.take_along_axis(log_p, labels[:, None], axis=1)))
    majority = int(np.bincount(labels).argmax())
    return metrics(labels, np.exp(log_p), fitted.classes, majority, loss)


def _labels(fitted: models.Model, path: Path, column: str, reading: tables.Reading) -> np.ndarray:
    """The index of the label of each row among the classes of the model, [N]."""
    rows = tables.open_file(path, column, fitted.table, reading)
    names, codes = tables.as_classes(path, column, rows.read(0, rows.num_rows)[1])
    where = f"{path}: column {column!r}"
    if (codes < 0).any():
        raise DataError(f"{where}, row {np.argmax(codes < 0) + 1}: the label is missing.")
    place = {name: index for index, name in enumerate(fitted.classes)}
    for name in names:
        if name not in place:
            known = ", ".join(fitted.classes[:10]) + (", ..." if len(place) > 10 else "")
            near = tables.like(name, place)
            raise DataError(f"{where}: has the label {name!r}; the classes are {known}.{near}")
    return np.array([place[name] for name in names])[codes]


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[TextIO]:
    """A file in UTF-8 that is written completely or not at all."""
    with _files.whole(out) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def _printing() -> Iterator[TextIO]:
    """The standard output in UTF-8 under any locale, as `softjax fit` reads files."""
    _interrupt.tell("interrupted.")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Otherwise the interpreter would write the rest of the buffer at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


@app.command(cls=Command, epilog="Example: softjax check --quick")
def check(
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure 3 numbers of classes instead of 8.")
    ] = False,
) -> None:
    """Measure the accuracy of softjax, jax.nn and optax on this device.

    Exits with 1 if any accuracy goal is missed.
    """
    jax.config.update("jax_enable_x64", True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = jax.devices()[0]
    console.print(f"Largest errors on {device.device_kind} ({device.platform})", highlight=False)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("Measuring")
        try:
            rows = accuracy.measure(
                quick, lambda done, total: progress.update(task, completed=done, total=total)
            )
        except ModuleNotFoundError as error:  # the message names the extra
            raise DataError(str(error)) from error
    table = Table("function", "dtype", "unit", "softjax", "peer", "", "goal, at most", "within")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        within = f"yes ({row.ratio:.2f})" if row.ok else f"[red]NO ({row.ratio:.2f})[/]"
        figures = (f"{row.softjax:.3g}", f"{row.peer:.3g}", row.peer_name)
        last_of_dtype = following is None or following.dtype != row.dtype
        cells = (row.function, row.dtype, row.unit, *figures, row.goal, within)
        table.add_row(*cells, end_section=last_of_dtype)
    console.print(table)
    met = sum(row.ok for row in rows)
    console.print(f"softjax meets {met} of {len(rows)} goals (in brackets: error / bound).")
    raise typer.Exit(0 if met == len(rows) else 1)
