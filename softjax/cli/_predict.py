"""`softjax predict` and `softjax check`: the classes of a file, and the accuracy on this device."""

import csv
import sys
from pathlib import Path
from typing import Annotated
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softjax import accuracy, regression, tables
from softjax.cli._app import MODEL_ARRAYS, app
from softjax.tables import DataError


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The model.npz that `fit` wrote.")],
    data: Annotated[str, typer.Argument(help="A file with the columns of the features.")],
    out: Annotated[
        Path | None, typer.Option(help="A CSV file; to the terminal by default.")
    ] = None,
    proba: Annotated[bool, typer.Option("--proba", help="Also the probabilities.")] = False,
) -> None:
    """Predict the class of each row of a file."""
    jax.config.update("jax_enable_x64", True)  # features as they are may be far from 0
    params, class_names, feature_names = _load_model(model)
    x = jnp.asarray(tables.features(Path(data), feature_names))
    predicted = np.asarray(regression.predict(params, x)).tolist()
    rows = [[class_names[k]] for k in predicted]
    if proba:
        probabilities = np.asarray(regression.predict_proba(params, x)).tolist()
        rows = [row + p for row, p in zip(rows, probabilities, strict=True)]
    header = ["class", *(f"p({name})" for name in class_names)] if proba else ["class"]
    if out is None:
        csv.writer(sys.stdout).writerows([header, *rows])
        return
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths.")] = False,
) -> None:
    """Measure the accuracy on this device beside the peers; exit status 1 outside a goal."""
    jax.config.update("jax_enable_x64", True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = jax.devices()[0]
    console.print(f"Largest errors on {device.device_kind} ({device.platform})", highlight=False)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("Measuring")
        rows = accuracy.measure(
            quick, lambda done, total: progress.update(task, completed=done, total=total)
        )
    table = Table("function", "dtype", "unit", "softjax", "peer", "", "goal, at most", "within")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        within = f"yes ({row.ratio:.2f})" if row.ok else f"[red]NO ({row.ratio:.2f})[/]"
        figures = (f"{row.softjax:.3g}", f"{row.peer:.3g}", row.peer_name)
        last_of_dtype = following is None or following.dtype != row.dtype
        cells = (row.function, row.dtype, row.unit, *figures, row.goal, within)
        table.add_row(*cells, end_section=last_of_dtype)
    console.print(table)
    met = sum(row.ok for row in rows)
    console.print(f"softjax is within {met} of {len(rows)} goals (error over bound in brackets).")
    raise typer.Exit(0 if met == len(rows) else 1)


def _load_model(path: Path) -> tuple[regression.SoftmaxRegression, list[str], list[str]]:
    """The parameters, the names of the classes and those of the features."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        with np.load(path, allow_pickle=False) as saved:
            kernel, bias, classes, features = (saved[name] for name in MODEL_ARRAYS)
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, BadZipFile) as error:
        raise DataError(f"{path}: is not a model that `softjax fit` wrote.") from error
    params = regression.SoftmaxRegression(jnp.asarray(kernel), jnp.asarray(bias))
    return params, classes.tolist(), features.tolist()
