"""The parts that the commands share: the application, its choices, and the output of a fit."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from softjax import __version__, _files, _interrupt, models, plots, processes, regression, tables
from softjax.cli._metrics import MOST_SHOWN, metrics, metrics_table, overall
from softjax.cli._split import Parts
from softjax.cli._usage import usage_in_one_line
from softjax.tables import Column, DataError, IncompleteError, NumberError

MODEL, HISTORY, PICTURE = "model.npz", "history.jsonl", "report.png"
METRICS, SUMMARY, FOLDS = "metrics.json", "summary.txt", "cross_validation.csv"
# The file of the parameters of a fit that was interrupted or is no longer finite.
UNFINISHED = "unfinished.npz"
# The files that a fit has written, and the metrics of the held-out examples if there are any.
Written = tuple[list[Path], dict[str, Any] | None]
FILES = (MODEL, HISTORY, METRICS, PICTURE, SUMMARY, FOLDS, UNFINISHED)


class FitError(Exception):
    """A fit gives no model. The message is one line with the reason; the exit status is 1."""


@contextlib.contextmanager
def remedies_offered() -> Iterator[None]:
    """Adds to errors the options that help with incomplete rows and cells that are not numbers."""
    try:
        yield
    except IncompleteError as error:
        also = ", --impute fills missing cells in" if error.can_be_filled else ""
        raise DataError(f"{error} --skip-nonfinite skips such rows{also}.") from None
    except NumberError as error:
        name = quote(error.column)
        category = f"--category {name} takes its cells as categories, "
        also = category if error.is_text else ""
        missing = " Where it stands for a missing value, write NA in its place."
        end = missing if error.is_text else ""
        raise DataError(f"{error} {also}--drop {name} leaves it out.{end}") from None


class _OneLineErrors(TyperGroup):
    """Ends on an error with one line; status 2 for a bad file, 1 for a fit without a model."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with usage_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: typer.Context) -> Any:
        status = 2
        try:
            with usage_in_one_line():
                return super().invoke(ctx)
        except DataError as error:
            message = str(error)
        except FitError as error:
            message, status = str(error), 1
        except BrokenPipeError:  # the program that reads the output has ended
            raise
        except OSError as error:
            message = f"{error.filename}: {error.strerror}." if error.filename else str(error)
        return processes.fail(status, message)


class Command(TyperCommand):
    """A command that refuses a second value of an option, where click would keep the last one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param in given:
            takes_many = param.multiple or getattr(param, "is_flag", False)
            if given.count(param) > 1 and not takes_many:
                raise typer.BadParameter("takes one value, and is given twice", ctx, param)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_OneLineErrors,
    rich_markup_mode="markdown",  # it joins the lines of a paragraph
    epilog="Exit status: 0 done; 1 a fit that is not finite, or an accuracy goal that is missed; "
    "2 wrong options or files; 130 after Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"softjax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    """Fit a softmax regression to a file, predict with it, and check the accuracy of softjax."""


class Solver(StrEnum):
    """The solvers of `softjax.regression.fit`."""

    AUTO = "auto"
    NEWTON_CG = "newton-cg"
    NEWTON = "newton"
    LBFGS = "lbfgs"
    PROXIMAL = "proximal"
    FIRTH = "firth"
    OPTAX = "optax"


class Optimizer(StrEnum):
    """The optimizers of the command line; `regression.fit` takes any optax optimizer."""

    LBFGS = "lbfgs"
    ADAM = "adam"
    SGD = "sgd"


LEARNING_RATES = {Optimizer.ADAM: 0.01, Optimizer.SGD: 0.5}


def optax_optimizer(name: Optimizer, learning_rate: float) -> optax.GradientTransformation:
    """Adam or SGD; for L-BFGS, the default of a fit, no optax optimizer is passed."""
    if name is Optimizer.ADAM:
        return optax.adam(learning_rate)
    return optax.sgd(learning_rate, momentum=0.9)


def rate_of(name: Optimizer, learning_rate: float | None) -> float:
    return LEARNING_RATES[name] if learning_rate is None else learning_rate


class Task(NamedTuple):
    """The data of a fit that its report needs."""

    mean: np.ndarray  # [D], of the features; (features - mean) / scale is fitted
    scale: np.ndarray  # [D]
    feature_names: list[str]  # D names
    class_names: list[str]  # K names
    # Standardised features, float32, and labels of the held-out examples; None if there are none.
    held_out: tuple[np.ndarray, np.ndarray] | None
    # The shape of the image if the features are its pixels; otherwise None.
    image_shape: tuple[int, int] | None
    name: str  # the name of the data
    majority: int  # the most frequent class among the examples to fit
    # The columns of the file; empty if each feature is a column of numbers.
    columns: Sequence[Column] = ()


def task_of(parts: Parts, mean: np.ndarray, scale: np.ndarray, name: str) -> Task:
    """The task of data in memory."""
    train, test, image_shape = parts
    held_out = None
    if len(test.labels):
        held_out = ((test.features - mean) / scale).astype(np.float32), test.labels
    names = (train.feature_names, train.class_names)
    majority = int(np.argmax(np.bincount(train.labels, minlength=len(train.class_names))))
    return Task(mean, scale, *names, held_out, image_shape, name, majority, train.columns)


def print_columns(
    console: Console, columns: Sequence[Column], class_names: list[str], skipped: int
) -> None:
    """Prints the categories, how many rows are skipped, and if the classes are many numbers."""
    rows = f"{skipped} row{'s'[: skipped != 1]} skipped: not complete, or not finite in float32."
    described = tables.described(columns), tables.numbers_as_classes(class_names)
    for line in (rows if skipped else None, *described):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


class FitProgress:
    """A progress bar on a terminal; elsewhere a line whenever the number of steps has doubled.

    The bar shows the remaining time if the number of steps is known. Ctrl-C saves the current
    parameters and prints the path of their file.
    """

    def __init__(self, console: Console, steps: int | None, out: Path, task: Task):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            *([] if steps is None else [TextColumn("remaining"), TimeRemainingColumn()]),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar_task = self.bar.add_task("fit", total=steps, figures="")
        self.console, self.out, self.fit_task = console, out, task
        self.next_line = 0
        self.event: regression.Event | None = None
        self.reporting = _interrupt.reported_by(self.reached)

    def __enter__(self) -> "FitProgress":
        self.reporting.__enter__()
        self.bar.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.bar.stop()
        self.reporting.__exit__(*raised)

    def show(self, event: regression.Event) -> None:
        """The callback of a fit."""
        self.event = event
        figures = f"loss {event.objective:.4f}"
        if event.validation_accuracy is not None:
            figures += f"  held-out accuracy {event.validation_accuracy:.2%}"
        self.bar.update(self.bar_task, completed=event.step, figures=figures)
        if not self.console.is_terminal and event.step >= self.next_line:
            self.console.print(f"step {event.step}  {figures}", highlight=False)
            self.next_line = 2 * max(event.step, 1)

    def reached(self) -> str:
        """The message of an interrupt; another thread calls this at any moment."""
        if self.console.is_terminal:
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, and leaves the line of the bar
        event = self.event
        if event is None or not event.step or jax.process_index():
            return "interrupted before the first step; nothing was written."
        model = model_of(self.fit_task, event.params)
        if not model.is_finite:
            return f"interrupted after step {event.step}; its parameters are not finite."
        path = save_unfinished(self.out, model)
        return f"interrupted after step {event.step}; its parameters are in {path}."


def refuse_inputs(written: Iterable[Path], *inputs: str | Path | None) -> None:
    """Refuses to write a file that the command reads."""
    read = [Path(name) for name in inputs if name is not None and Path(name).is_file()]
    for path in written:
        if path.exists() and any(path.samefile(name) for name in read):
            raise DataError(f"{path}: the command reads this file; --out must name another place.")


def try_out(out: Path, *inputs: str | Path | None) -> None:
    """Raises an error before the fit begins if its files cannot be written, or are its inputs."""
    if out.is_file():
        raise DataError(f"{out}: is a file; --out must name a folder.")
    refuse_inputs([out / name for name in FILES], *inputs)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES[:-1]:
        _files.try_file(out / name)


def remove_earlier(out: Path, *kept: str) -> None:
    """Removes the files of an earlier fit from the folder, except those that the new one writes."""
    for name in {*FILES} - {*kept}:
        path = out / name
        if path.is_file() or path.is_symlink():
            path.unlink()


def save_unfinished(out: Path, model: models.Model) -> Path:
    """Writes the parameters of a fit without a model, and removes the files of an earlier fit."""
    path = model.save(out / UNFINISHED)
    remove_earlier(out, UNFINISHED)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes a file in UTF-8, completely or not at all."""
    with _files.whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write(console: Console, out: Path, task: Task, result: regression.FitResult) -> Written:
    """Writes the model for the features of the file, the history, the metrics and the picture."""
    params = regression.SoftmaxRegression(*map(jnp.asarray, map(np.asarray, result.params)))
    found, labels, probabilities = None, None, None
    if task.held_out is not None:
        features, labels = task.held_out
        probabilities = np.asarray(regression.predict_proba(params, jnp.asarray(features)))
        loss = result.history[-1]["validation_loss"]
        found = metrics(labels, probabilities, task.class_names, task.majority, loss)
    remove_earlier(out, MODEL, HISTORY, *([METRICS] if found else []))
    written = [
        model_of(task, result.params).save(out / MODEL),
        write_text(out / HISTORY, "".join(json.dumps(event) + "\n" for event in result.history)),
    ]
    if found:
        written.append(write_text(out / METRICS, json.dumps(found, indent=2) + "\n"))
    _interrupt.tell(f"interrupted; {' and '.join(map(str, written))} were written.")

    try:
        with _files.whole(out / PICTURE) as draft:
            plots.report(
                draft,
                result.history,
                np.asarray(params.kernel),
                task.feature_names,
                task.class_names,
                labels,
                probabilities,
                task.image_shape,
                name=task.name,
            )
    except ModuleNotFoundError as error:
        console.print(f"No picture was written: {escape(str(error))}")
        return written, found
    return [*written, out / PICTURE], found


def model_of(task: Task, params: regression.SoftmaxRegression) -> models.Model:
    """The model for the features of the file: kernel and bias include the standardisation."""
    kernel = np.asarray(params.kernel, np.float64) / task.scale[:, None]
    bias = np.asarray(params.bias, np.float64) - task.mean @ kernel
    return models.Model(kernel, bias, task.class_names, task.feature_names, task.columns)


def check_finite(out: Path, task: Task, result: regression.FitResult) -> None:
    """Raises a FitError if the fit has no model, and saves the parameters if they are finite."""
    model = model_of(task, result.params)
    not_finite = result.stop_reason == regression.NON_FINITE or not np.isfinite(result.objective)
    if not not_finite and model.is_finite:
        return
    steps = f"{result.steps} step{'s'[: result.steps != 1]}"
    message = f"the fit is no longer finite after {steps}, and no model was written"
    if not model.is_finite:
        raise FitError(f"{message}.")
    path = processes.of_first(lambda: save_unfinished(out, model))
    raise FitError(f"{message}; the last finite parameters are in {path}.")


# Why a fit stopped before the optimum, and what the user can do.
ADVICE = {
    regression.STEP_LIMIT: "it stopped at its limit of steps, which {limit} sets",
    regression.PRECISION_FLOOR: "the rounding of float32 hides any further progress",
    regression.SEPARATED: "the features separate the classes, so that the loss falls without end "
    "as the parameters grow; a larger --l2 gives an optimum",
    regression.QUASI_SEPARATED: "the features separate a part of the examples, so that some "
    "parameters grow without end; a larger --l2 gives an optimum",
}


def print_result(
    console: Console,
    result: regression.FitResult,
    written: Written,
    limit: str | None,
    more: Sequence[Path] = (),
) -> None:
    """Prints the result of the fit, and one line of advice if it is not the optimum.

    `limit` is the option that sets the number of steps; None if the fit always takes all of them,
    as for Adam. `more` are further files that were written.
    """
    (files, found), reason = written, result.stop_reason
    if found and len(found["classes"]) <= MOST_SHOWN:
        console.print(metrics_table(found, "Held-out examples"))
    table = Table(show_header=False)
    table.add_row("status", f"{reason} after {result.steps} step{'s'[: result.steps != 1]}")
    table.add_row("training objective", f"{result.objective:.4f} nats")
    for row in overall(found, "held-out ") if found else [("held-out metrics", "none")]:
        table.add_row(*row)
    table.add_row("written", escape("\n".join(map(str, [*files, *more]))))
    console.print(table)
    if console.quiet or reason == regression.CONVERGED:
        return
    if reason == regression.STEP_LIMIT and limit is None:
        return
    advice = ADVICE.get(reason, f"its status is {reason!r}").format(limit=limit)
    print(f"softjax: the fit has not converged: {advice}.", file=sys.stderr, flush=True)
