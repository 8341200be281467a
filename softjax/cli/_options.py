"""The options of the commands with their checks, and the options for reading files."""

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from softjax.cli._app import Optimizer, Solver
from softjax.tables import Reading

SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " ", "pipe": "|"}


# Fits are in float32, for which larger numbers are infinite and smaller ones may be 0.
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, which Python parses as numbers, and what is infinite in float32."""
    if value is not None and not abs(value) <= MOST:
        raise typer.BadParameter("must be a finite number of float32")
    return value


def is_positive(value: float) -> bool:
    return LEAST <= value <= MOST


def positive(value: float | None) -> float | None:
    if value is not None and not is_positive(value):
        raise typer.BadParameter("must be a finite number of float32 above 0")
    return value


def all_finite(values: list[float] | None) -> list[float] | None:
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
    """Refuses values that are not "balanced" alone, or CLASS=WEIGHT once for a class."""
    names = set()
    for value in values or ():
        name, _, weight = value.rpartition("=")
        if value == "balanced" and len(values or ()) == 1:
            continue
        try:
            good = bool(name) and is_positive(float(weight))
        except ValueError:
            good = False
        if not good:
            expected = "balanced, or CLASS=WEIGHT with a weight > 0 that float32 can hold"
            raise typer.BadParameter(f"must be {expected}")
        if name in names:
            raise typer.BadParameter(f"class {name!r} has one weight, and is given two")
        names.add(name)
    return list(values) if values else None


def decimal(value: str | None) -> str | None:
    if value not in (None, ".", ","):
        raise typer.BadParameter("must be , or .")
    return value


# The options of `softjax fit`, by the headings below which --help shows them.
of_data = partial(typer.Option, rich_help_panel="The data")
of_model = partial(typer.Option, rich_help_panel="The model")
of_solver = partial(typer.Option, rich_help_panel="The solver")
of_output = partial(typer.Option, rich_help_panel="Output")
of_large = partial(typer.Option, rich_help_panel="Large data and many processes")

DataFile = Annotated[
    str,
    typer.Argument(
        help="A .csv, .tsv (also .gz), .npy, .npz or .parquet file; or the word digits or "
        "passengers, for an example."
    ),
]

LabelColumn = Annotated[
    str | None,
    of_data(help="Name of the column with the labels; for a .npy file its number, counted from 0."),
]
Drop = Annotated[
    list[str] | None,
    of_data(
        help="Column that is not a feature, such as an identifier. Repeat the option for more."
    ),
]
Category = Annotated[
    list[str] | None,
    of_data(
        help="Column whose numbers are names of categories, such as a postcode. Repeat the "
        "option for more. Columns of text are categories without it."
    ),
]
Impute = Annotated[
    bool,
    of_data(
        "--impute",
        help="Fill missing cells with the median or the most frequent category of the rows to "
        "fit; the model does the same (default: missing cells are refused).",
    ),
]
Separator = Annotated[
    str | None,
    of_data(
        callback=separator,
        help="Separator of a .csv or .tsv file: a character, or tab, comma, semicolon, pipe or "
        "space (default: found in the header).",
    ),
]
Encoding = Annotated[
    str | None,
    of_data(
        callback=encoding,
        help="Encoding of a .csv or .tsv file, such as cp1252 or latin-1 (default: utf-8, or "
        "utf-16 with a byte order mark).",
    ),
]
Decimal = Annotated[
    str | None,
    of_data(
        callback=decimal,
        help="Decimal mark of the numbers of a .csv or .tsv file: , or . (default: the point).",
    ),
]
AnyClasses = Annotated[
    bool,
    of_data(
        "--any-classes",
        help="Take the labels as classes even if they look like identifiers, measurements or "
        "counts, because many of them occur once or few times.",
    ),
]
TestFraction = Annotated[
    float,
    of_data(
        min=0.0,
        max=0.99,
        callback=finite,
        help="Share of the rows of each class to hold out from the fit and report on; 0 fits all "
        "rows.",
    ),
]
SkipNonfinite = Annotated[
    bool,
    of_data(
        "--skip-nonfinite",
        help="Skip rows that contain NaN or infinity or an empty cell, or have no label.",
    ),
]

ClassWeight = Annotated[
    list[str] | None,
    of_model(
        callback=class_weights,
        help="Weight of a class in the loss, as CLASS=WEIGHT, repeated for more; or balanced, "
        "for the same total weight of every class (default: 1 each).",
    ),
]
L2 = Annotated[
    list[float] | None,
    of_model(
        min=0.0,
        callback=all_finite,
        help="L2 penalty: adds l2 / 2 |kernel|^2 to the loss (default: 0.0001; 0 for --solver "
        "firth). Repeat the option to choose by cross-validation: --l2 1e-4 --l2 1e-2.",
    ),
]
Folds = Annotated[
    int | None,
    of_model(min=2, help="Number of folds of the cross-validation of several --l2 (default: 5)."),
]
L1 = Annotated[
    float,
    of_model(
        min=0.0,
        callback=finite,
        help="L1 penalty: adds l1 |kernel|_1 to the loss; the solver is then proximal.",
    ),
]

SolverName = Annotated[
    Solver,
    of_solver(
        help="Solver. auto is newton-cg, or proximal with --l1, or optax with --optimizer, "
        "--epochs, --batch-size or --learning-rate."
    ),
]
MaxSteps = Annotated[
    int | None,
    of_solver(
        min=1, help="Largest number of steps of any solver but optax (default: set by the solver)."
    ),
]
OptimizerName = Annotated[
    Optimizer | None,
    of_solver(help="Optimizer of --solver optax (default: lbfgs; with --stream: adam, not lbfgs)."),
]
Epochs = Annotated[
    int | None,
    of_solver(
        min=1,
        help="Largest number of passes of --solver optax over the data (default: 300; with "
        "--stream: 10).",
    ),
]
BatchSize = Annotated[
    int | None,
    of_solver(
        min=1,
        help="Examples in each step of --optimizer adam or sgd (default: all; with --stream: "
        "1024).",
    ),
]
LearningRate = Annotated[
    float | None,
    of_solver(
        callback=positive, help="Learning rate of adam (default: 0.01) or sgd (default: 0.5)."
    ),
]
Seed = Annotated[
    int,
    of_solver(min=0, max=2**63 - 1, help="Seed of the held-out rows, the batches and the folds."),
]

Summary = Annotated[
    bool, of_output("--summary", help="Print the coefficients with their standard errors.")
]
OddsRatios = Annotated[
    bool,
    of_output(
        "--odds-ratios",
        help="Show odds ratios in the table of --summary, in place of coefficients.",
    ),
]
Out = Annotated[
    Path, of_output(help="Folder for model.npz, metrics.json, history.jsonl and report.png.")
]

Stream = Annotated[
    bool, of_large("--stream", help="Read the file in runs of rows: it need not fit into memory.")
]
Checkpoint = Annotated[
    Path | None,
    of_large(
        help="With --solver optax: folder for the checkpoints of a streamed fit. The same command "
        "resumes from the last checkpoint."
    ),
]
Every = Annotated[
    int | None,
    of_large(
        min=1,
        help="With --stream and --solver optax: number of steps between two checkpoints and lines "
        "of the history (default: one epoch).",
    ),
]
Coordinator = Annotated[
    str | None,
    of_large(
        envvar="JAX_COORDINATOR_ADDRESS",
        help="HOST:PORT of process 0, to run several processes, each of which streams a part of "
        "the rows; or auto, to detect a cluster such as Slurm.",
    ),
]
Processes = Annotated[
    int | None, of_large(min=1, envvar="JAX_NUM_PROCESSES", help="Number of processes.")
]
ProcessId = Annotated[
    int | None,
    of_large(min=0, envvar="JAX_PROCESS_ID", help="Number of this process, counted from 0."),
]
Patience = Annotated[int, of_large(min=1, help="Seconds to wait for the other processes to start.")]


@contextlib.contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Progress]:
    """A progress bar with the remaining time on a terminal, removed when the work is done."""
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = console.is_terminal and not console.quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(title, total=None)
        yield progress


@contextlib.contextmanager
def reading(console: Console, options: Reading) -> Iterator[Reading]:
    """The options for reading a file, with a progress bar that is shown while it is read."""
    with progress_bar(console, "reading") as progress:

        def told(done: int, total: int) -> None:
            progress.update(progress.task_ids[0], completed=done, total=total)

        yield options._replace(progress=told)
