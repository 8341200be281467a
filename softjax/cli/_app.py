"""What the commands share: the application, its choices, and what a fit shows and writes."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from softjax import _files, _interrupt, plots, processes, regression
from softjax.cli import _model
from softjax.tables import DataError, IncompleteError

# The exception class for wrong usage belongs to click, which typer may carry within itself.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

MODEL, HISTORY, PICTURE = "model.npz", "history.jsonl", "report.png"
# The parameters of a fit that was interrupted, or that ended in numbers that are not finite.
UNFINISHED = "unfinished.npz"


class FitError(Exception):
    """Why a fit has no model, in one line; the exit status is 1."""


@contextlib.contextmanager
def skipping_offered() -> Iterator[None]:
    """Names the option for rows that are not complete, where a fit refuses them."""
    try:
        yield
    except IncompleteError as error:
        raise DataError(f"{error} --skip-nonfinite skips such rows.") from None


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Lets the first of several processes alone say what is wrong with the options."""
    try:
        yield
    except USAGE_ERROR:
        if processes.given_index(sys.argv) == 0:
            raise
        processes.fail(2)


class _OneLineErrors(TyperGroup):
    """Ends with one line: status 2 where a file is wrong, status 1 where a fit has no model."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _said_once():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: typer.Context) -> Any:
        status = 2
        try:
            with _said_once():
                return super().invoke(ctx)
        except DataError as error:
            message = str(error)
        except FitError as error:
            message, status = str(error), 1
        except BrokenPipeError:  # the reader of the output has left
            raise
        except OSError as error:
            message = f"{error.filename}: {error.strerror}." if error.filename else str(error)
        return processes.fail(status, message)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Fit a softmax regression to a file, predict with it, and check the accuracy of softjax.",
    epilog="Exit status: 0 done; 1 a fit that is not finite, or an accuracy goal that is missed; "
    "2 wrong options or files; 130 after Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """The optimizers of the command line; `softjax.regression.fit` takes any of optax."""

    LBFGS = "lbfgs"
    ADAM = "adam"
    SGD = "sgd"


LEARNING_RATES = {Optimizer.ADAM: 0.01, Optimizer.SGD: 0.5}


def optax_optimizer(name: Optimizer, learning_rate: float) -> optax.GradientTransformation:
    """The optimizer of a name, but for L-BFGS, which a fit takes without being told."""
    if name is Optimizer.ADAM:
        return optax.adam(learning_rate)
    return optax.sgd(learning_rate, momentum=0.9)


def rate_of(name: Optimizer, learning_rate: float | None) -> float:
    """The learning rate that was given, or that of the optimizer."""
    return LEARNING_RATES[name] if learning_rate is None else learning_rate


class Task(NamedTuple):
    """What was fitted.

    Attributes:
        mean, scale: [D], of the features; the fit is of (features - mean) / scale.
        feature_names, class_names: D and K names.
        held_out: features as they were fitted, float32, and labels.
        image_shape: where the features are the pixels of an image.
        name: of the data.
    """

    mean: np.ndarray
    scale: np.ndarray
    feature_names: list[str]
    class_names: list[str]
    held_out: tuple[np.ndarray, np.ndarray]
    image_shape: tuple[int, int] | None
    name: str


class FitProgress:
    """A bar on a terminal; elsewhere a line each time that the number of steps has doubled.

    After Ctrl-C it saves the parameters that the fit has reached, and names them.
    """

    def __init__(self, console: Console, steps: int | None, out: Path, task: Task):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
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
        figures = f"loss {event.objective:.4f}  held-out accuracy {event.validation_accuracy:.2%}"
        self.bar.update(self.bar_task, completed=event.step, figures=figures)
        if not self.console.is_terminal and event.step >= self.next_line:
            self.console.print(f"step {event.step}  {figures}", highlight=False)
            self.next_line = 2 * max(event.step, 1)

    def reached(self) -> str:
        """What an interrupt says; called by another thread, whatever this one is doing."""
        if self.console.is_terminal:
            os.write(1, b"\x1b[?25h\n")  # shows the cursor, and leaves the line of the bar
        event = self.event
        if event is None or not event.step or jax.process_index():
            return "interrupted before the first step; nothing was written."
        model = model_of(self.fit_task, event.params)
        if not model.is_finite:
            return f"interrupted after step {event.step}; its parameters are not finite."
        path = _model.write(self.out / UNFINISHED, model)
        return f"interrupted after step {event.step}; its parameters are in {path}."


def try_out(out: Path) -> None:
    """Raises where a fit could not write its files, before it begins."""
    _files.try_folder(out, MODEL, HISTORY, PICTURE)


def write(console: Console, out: Path, task: Task, result: regression.FitResult) -> list[Path]:
    """Writes the model, for features as they are, the history and the picture."""
    written = [_model.write(out / MODEL, model_of(task, result.params)), out / HISTORY]
    with _files.whole(written[1]) as draft:
        lines = (json.dumps(event) + "\n" for event in result.history)
        draft.write_text("".join(lines), encoding="utf-8")
    _interrupt.tell(f"interrupted; {' and '.join(map(str, written))} were written.")

    features, labels = task.held_out
    params = regression.SoftmaxRegression(*map(jnp.asarray, map(np.asarray, result.params)))
    try:
        with _files.whole(out / PICTURE) as draft:
            plots.report(
                draft,
                result.history,
                np.asarray(params.kernel),
                task.feature_names,
                task.class_names,
                labels,
                np.asarray(regression.predict_proba(params, jnp.asarray(features))),
                task.image_shape,
                name=task.name,
            )
    except ModuleNotFoundError as error:
        console.print(f"No picture was written: {escape(str(error))}")
        return written
    return [*written, out / PICTURE]


def model_of(task: Task, params: regression.SoftmaxRegression) -> _model.Model:
    """The model for features as they are: the standardisation becomes a part of it."""
    kernel = np.asarray(params.kernel, np.float64) / task.scale[:, None]
    bias = np.asarray(params.bias, np.float64) - task.mean @ kernel
    return _model.Model(kernel, bias, task.class_names, task.feature_names)


def check_finite(out: Path, task: Task, result: regression.FitResult) -> None:
    """Raises a FitError where the fit has no model, and saves the parameters if they are finite."""
    model = model_of(task, result.params)
    not_finite = result.stop_reason == regression.NON_FINITE or not np.isfinite(result.objective)
    if not not_finite and model.is_finite:
        return
    steps = f"{result.steps} step{'s'[: result.steps != 1]}"
    message = f"the fit is no longer finite after {steps}, and no model was written"
    if not model.is_finite:
        raise FitError(f"{message}.")
    path = processes.of_first(lambda: _model.write(out / UNFINISHED, model))
    raise FitError(f"{message}; the last finite parameters are in {path}.")


# What the user may do where the fit has stopped without an optimum.
ADVICE = {
    regression.STEP_LIMIT: "it stopped at its limit of steps, which {limit} sets",
    regression.PRECISION_FLOOR: "the rounding of float32 hides any further progress",
    regression.SEPARATED: "the features separate the classes, so that the loss falls without end "
    "as the parameters grow; a larger --l2 gives an optimum",
    regression.QUASI_SEPARATED: "the features separate a part of the examples, so that some "
    "parameters grow without end; a larger --l2 gives an optimum",
}


def print_result(
    console: Console, result: regression.FitResult, written: list[Path], limit: str | None
) -> None:
    """Prints what the fit came to, and one line of advice where that is no optimum.

    Args:
        console: to print to.
        result: of the fit.
        written: the files.
        limit: the option that sets the number of steps; None where the fit always takes all of
            them, as Adam does.
    """
    last, reason = result.history[-1], result.stop_reason
    table = Table(show_header=False)
    table.add_row("status", f"{reason} after {result.steps} step{'s'[: result.steps != 1]}")
    table.add_row("training objective", f"{result.objective:.4f} nats")
    table.add_row("held-out loss", f"{last['validation_loss']:.4f} nats")
    table.add_row("held-out accuracy", f"{last['validation_accuracy']:.4f}")
    table.add_row("written", escape("\n".join(map(str, written))))
    console.print(table)
    if console.quiet or reason == regression.CONVERGED:
        return
    if reason == regression.STEP_LIMIT and limit is None:
        return
    advice = ADVICE.get(reason, f"its status is {reason!r}").format(limit=limit)
    print(f"softjax: the fit has not converged: {advice}.", file=sys.stderr, flush=True)
