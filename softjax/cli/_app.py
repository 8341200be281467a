"""What the commands share: the application, its choices, and what a fit shows and writes."""

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from softjax import processes, regression
from softjax.tables import DataError

# Of click, which typer may have within itself.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Of several processes that are used wrongly the first one says it."""
    try:
        yield
    except USAGE_ERROR:
        if processes.given_index(sys.argv) == 0:
            raise
        processes.fail(2)


class _OneLineErrors(TyperGroup):
    """What is wrong with a file is one line, and exit status 2; of usage one process speaks."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _said_once():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            with _said_once():
                return super().invoke(ctx)
        except DataError as error:
            message = str(error)
        except BrokenPipeError:  # the reader of the output has left
            raise
        except OSError as error:
            message = f"{error.filename}: {error.strerror}." if error.filename else str(error)
        return processes.fail(2, message)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Softmax regression, and how accurate softjax is on this device.",
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


MODEL_ARRAYS = ("kernel", "bias", "classes", "features")


class Task(NamedTuple):
    """What was fitted.

    Attributes:
        mean, scale: [D], of the features; the fit is of (features - mean) / scale.
        feature_names, class_names: D and K names.
        held_out: features as they were fitted, float32, and labels.
        image_shape: where the features are the pixels of an image.
    """

    mean: np.ndarray
    scale: np.ndarray
    feature_names: list[str]
    class_names: list[str]
    held_out: tuple[np.ndarray, np.ndarray]
    image_shape: tuple[int, int] | None


class FitProgress:
    """A bar on a terminal; elsewhere a line each time that the number of steps has doubled."""

    def __init__(self, console: Console, steps: int | None):
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("fit", total=steps, figures="")
        self.console = console
        self.next_line = 0

    def __enter__(self) -> "FitProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, event: regression.Event) -> None:
        """The callback of a fit."""
        figures = f"loss {event.objective:.4f}  held-out accuracy {event.validation_accuracy:.2%}"
        self.bar.update(self.task, completed=event.step, figures=figures)
        if not self.console.is_terminal and event.step >= self.next_line:
            self.console.print(f"step {event.step}  {figures}", highlight=False)
            self.next_line = 2 * max(event.step, 1)


def write(console: Console, out: Path, task: Task, result: regression.FitResult) -> list[Path]:
    """Writes the model, for features as they are, the history and the picture."""
    written = [write_model(out, task, result.params), out / "history.jsonl"]
    written[1].write_text("".join(json.dumps(event) + "\n" for event in result.history))
    try:
        from softjax import plots
    except ModuleNotFoundError:
        install = escape("pip install 'softjax-regression[plot]'")
        console.print(f"No picture: it needs matplotlib, {install}.")
        return written
    written.append(out / "report.png")
    features, labels = task.held_out
    params = regression.SoftmaxRegression(*map(jnp.asarray, map(np.asarray, result.params)))
    plots.report(
        written[-1],
        result.history,
        np.asarray(params.kernel),
        task.feature_names,
        task.class_names,
        labels,
        np.asarray(regression.predict_proba(params, jnp.asarray(features))),
        task.image_shape,
    )
    return written


def write_model(out: Path, task: Task, params: regression.SoftmaxRegression) -> Path:
    """Writes model.npz."""
    kernel = np.asarray(params.kernel, np.float64) / task.scale[:, None]
    bias = np.asarray(params.bias, np.float64) - task.mean @ kernel
    arrays = (kernel, bias, np.array(task.class_names), np.array(task.feature_names))
    np.savez(out / "model.npz", **dict(zip(MODEL_ARRAYS, arrays, strict=True)))
    return out / "model.npz"


def print_result(console: Console, result: regression.FitResult, written: list[Path]) -> None:
    last = result.history[-1]
    table = Table(show_header=False)
    table.add_row("stopped", f"{result.stop_reason} after {result.steps} steps")
    table.add_row("training objective", f"{result.objective:.4f} nats")
    table.add_row("held-out loss", f"{last['validation_loss']:.4f} nats")
    table.add_row("held-out accuracy", f"{last['validation_accuracy']:.4f}")
    table.add_row("written", escape("\n".join(map(str, written))))
    console.print(table)
