"""The command line: `softjax fit | predict | check`."""

import csv
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

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

from softjax import accuracy, regression, tables
from softjax.datasets import load_digits
from softjax.tables import DataError, Dataset


class _OneLineErrors(TyperGroup):
    """What is wrong with a file is one line, and exit status 2."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DataError as error:
            message = str(error)
        except BrokenPipeError:  # the reader of the output has left
            raise
        except OSError as error:
            message = f"{error.filename}: {error.strerror}." if error.filename else str(error)
        print(f"softjax: {message}", file=sys.stderr)
        raise typer.Exit(2)


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


MODEL_ARRAYS = ("kernel", "bias", "classes", "features")
LEARNING_RATES = {Optimizer.ADAM: 0.01, Optimizer.SGD: 0.5}


def _finite(value: float | None) -> float | None:
    if value is not None and not np.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help="digits, or a .csv, .npy, .npz or .parquet file.")],
    label_column: Annotated[str | None, typer.Option(help="The column of the labels.")] = None,
    test_fraction: Annotated[
        float, typer.Option(min=0.01, max=0.99, callback=_finite, help="Of a file, held out.")
    ] = 0.2,
    l2: Annotated[
        float, typer.Option(min=0.0, callback=_finite, help="Penalty l2 / 2 |kernel|^2.")
    ] = 1e-4,
    l1: Annotated[
        float, typer.Option(min=0.0, callback=_finite, help="Penalty l1 |kernel|_1 (proximal).")
    ] = 0.0,
    solver: Annotated[
        Solver, typer.Option(help="By default newton-cg, proximal with --l1, optax with its own.")
    ] = Solver.AUTO,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, at most; not of optax.")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Of optax; lbfgs by default.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of optax, passes over the data, at most (300).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of optax; all examples by default.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, callback=_finite, help="Of adam (0.01) and sgd (0.5).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the batches.")] = 0,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print coefficients with standard errors.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("softjax-out"),
) -> None:
    """Fit a softmax regression and measure it on held-out examples.

    Writes model.npz, history.jsonl and, with matplotlib, report.png. The features of a file are
    standardised for the fit, and the model is written for the features as they are.
    """
    options = (optimizer, epochs, batch_size, learning_rate)
    if solver is Solver.AUTO and any(option is not None for option in options):
        solver = Solver.OPTAX
    first_order = solver is Solver.OPTAX
    if not first_order and any(option is not None for option in options):
        raise typer.BadParameter("--optimizer and its options are for --solver optax")
    if first_order and max_steps is not None:
        raise typer.BadParameter("optax takes --epochs, not --max-steps")
    if l1 > 0 and solver not in (Solver.AUTO, Solver.PROXIMAL):
        raise typer.BadParameter("--l1 is for --solver proximal")
    if summary and (l1 > 0 or solver is Solver.FIRTH):
        raise typer.BadParameter("--summary is for fits with neither --l1 nor --solver firth")
    optimizer = optimizer or Optimizer.LBFGS
    if optimizer is Optimizer.LBFGS and (batch_size is not None or learning_rate is not None):
        raise typer.BadParameter("lbfgs takes neither --batch-size nor --learning-rate")
    out.mkdir(parents=True, exist_ok=True)
    train, test, image_shape = _load(data, label_column, test_fraction, seed)
    mean, scale = _standardisation(train.features, image_shape is not None)
    x_train, x_test = ((part.features - mean) / scale for part in (train, test))

    console = Console()
    console.print(f"{len(train.labels)} examples to fit, {len(test.labels)} held out.")
    if first_order:
        epochs = epochs or 300
        steps = epochs * (1 if batch_size is None else -(-len(train.labels) // batch_size))
    else:
        steps = max_steps
    with _FitProgress(console, steps) as progress:
        result = regression.fit(
            x_train.astype(np.float32),
            train.labels,
            solver=solver,
            num_classes=len(train.class_names),
            l2=l2,
            l1=l1,
            max_steps=max_steps,
            optimizer=_optimizer(optimizer, learning_rate),
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            validation=(x_test.astype(np.float32), test.labels),
            callback=progress.show,
        )
    probabilities = regression.predict_proba(result.params, jnp.asarray(x_test, jnp.float32))
    kernel = np.asarray(result.params.kernel, np.float64) / scale[:, None]
    bias = np.asarray(result.params.bias, np.float64) - mean @ kernel

    written = [out / "model.npz", out / "history.jsonl"]
    arrays = (kernel, bias, np.array(train.class_names), np.array(train.feature_names))
    np.savez(written[0], **dict(zip(MODEL_ARRAYS, arrays, strict=True)))
    written[1].write_text("".join(json.dumps(event) + "\n" for event in result.history))
    try:
        from softjax import plots
    except ModuleNotFoundError:
        install = escape("pip install 'softjax-regression[plot]'")
        console.print(f"No picture: it needs matplotlib, {install}.")
    else:
        written.append(out / "report.png")
        plots.report(
            written[-1],
            result.history,
            np.asarray(result.params.kernel),
            train.feature_names,
            train.class_names,
            test.labels,
            np.asarray(probabilities),
            image_shape,
        )
    _print_result(console, result, written)
    if summary:
        _print_summary(console, result.params, x_train.astype(np.float32), train, l2)


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
    columns = tables.read(Path(data))
    missing = [name for name in feature_names if name not in columns]
    if missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        count = len(feature_names)
        raise DataError(f"{data}: lacks {len(missing)} of the model's {count} features: {names}.")
    x = jnp.asarray(tables.features(Path(data), columns, feature_names))
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


class _FitProgress:
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

    def __enter__(self) -> "_FitProgress":
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


def _load(
    data: str, label_column: str | None, test_fraction: float, seed: int
) -> tuple[Dataset, Dataset, tuple[int, int] | None]:
    """The part to fit, the held-out part and the shape of an image, for the digits."""
    if data == "digits":
        digits = load_digits()
        height, width = digits.image_shape
        names = [str(pixel) for pixel in range(height * width)]  # as the columns of a .npy file
        classes = [str(k) for k in range(10)]
        train = Dataset(digits.train_features, digits.train_labels, names, classes)
        return (
            train,
            Dataset(digits.test_features, digits.test_labels, names, classes),
            (height, width),
        )
    if label_column is None:
        raise DataError(f"{data}: --label-column must name the column of the labels.")
    whole = tables.dataset(Path(data), label_column)
    order = np.random.default_rng(seed).permutation(len(whole.labels))
    held_out = round(test_fraction * len(order))
    if not 0 < held_out < len(order):
        raise DataError(f"{data}: {len(order)} rows cannot be split with {test_fraction} held out.")
    parts = (order[held_out:], order[:held_out])
    train, test = (
        whole._replace(features=whole.features[rows], labels=whole.labels[rows]) for rows in parts
    )
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{data}: one class only is left to fit; hold out less or change the seed.")
    return train, test, None


def _standardisation(features: np.ndarray, as_they_are: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature; 1 for a constant one."""
    if as_they_are:
        return np.zeros(features.shape[1]), np.ones(features.shape[1])
    scale = np.where(np.ptp(features, axis=0) > 0, features.std(axis=0), 1)
    return features.mean(axis=0), np.where(scale > 0, scale, 1)


def _optimizer(name: Optimizer, learning_rate: float | None) -> optax.GradientTransformation | None:
    if name is Optimizer.LBFGS:
        return None
    rate = LEARNING_RATES[name] if learning_rate is None else learning_rate
    return optax.adam(rate) if name is Optimizer.ADAM else optax.sgd(rate, momentum=0.9)


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


def _print_summary(
    console: Console,
    params: regression.SoftmaxRegression,
    features: np.ndarray,
    train: Dataset,
    l2: float,
) -> None:
    """The table of the fit, of features as they were fitted."""
    try:
        table = regression.inference.summary(
            params,
            features,
            train.labels,
            l2=l2,
            feature_names=train.feature_names,
            class_names=train.class_names,
        )
    except ValueError as error:  # no covariance: collinear features, or not at the optimum
        console.print(f"No summary: {error}", markup=False)
        return
    console.print(table.text, markup=False, highlight=False, soft_wrap=True)
    console.print("Coefficients are those of the standardised features.")


def _print_result(console: Console, result: regression.FitResult, written: list[Path]) -> None:
    last = result.history[-1]
    table = Table(show_header=False)
    table.add_row("stopped", f"{result.stop_reason} after {result.steps} steps")
    table.add_row("training objective", f"{result.objective:.4f} nats")
    table.add_row("held-out loss", f"{last['validation_loss']:.4f} nats")
    table.add_row("held-out accuracy", f"{last['validation_accuracy']:.4f}")
    table.add_row("written", escape("\n".join(map(str, written))))
    console.print(table)
