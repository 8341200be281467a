"""`softjax fit` of data that is streamed: by one process or many, with checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from rich.console import Console

from softjax import processes, streaming, tables
from softjax.checkpoints import Checkpoints
from softjax.cli._app import (
    FitProgress,
    Optimizer,
    Solver,
    Task,
    optax_optimizer,
    print_result,
    rate_of,
    write,
    write_model,
)
from softjax.datasets import load_digits
from softjax.regression import FitResult
from softjax.streaming._rows import ArrayRows, Encoded, Rows, file_fingerprint
from softjax.streaming._survey import Survey, survey
from softjax.tables import DataError

EPOCHS = 10
BATCH_SIZE = 1024
# More tell no more of a model, and have to fit into memory.
MOST_HELD_OUT = 10_000


class Plan(NamedTuple):
    """The options of the command."""

    data: str
    label_column: str | None
    test_fraction: float
    l2: float
    solver: Solver
    max_steps: int | None
    optimizer: Optimizer | None
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    seed: int
    out: Path
    checkpoint: Path | None
    every: int | None
    skip_nonfinite: bool

    @property
    def stochastic(self) -> bool:
        """Whether it is of optax, by one of its options."""
        options = (self.optimizer, self.epochs, self.batch_size, self.learning_rate, self.every)
        given = any(option is not None for option in (*options, self.checkpoint))
        return given or self.solver is Solver.OPTAX

    def check(self) -> None:
        """Refuses options that do not go together."""
        if self.stochastic and (self.solver is Solver.LBFGS or self.max_steps is not None):
            raise typer.BadParameter("--solver lbfgs and --max-steps go with no option of optax")
        if self.optimizer is Optimizer.LBFGS:
            raise typer.BadParameter("a stream takes --optimizer adam or sgd, or --solver lbfgs")


class Data(NamedTuple):
    """Rows, the numbers of those that are held out or bad, and what is known of them."""

    rows: Rows
    held_out: np.ndarray
    bad: np.ndarray
    task: Task
    transform: Callable[[Array], Array] | None
    source: dict[str, Any]


def run(plan: Plan) -> None:
    """Fits, on every process; the first of them speaks and writes."""
    if not plan.stochastic:
        _run(plan, lambda: False)
        return
    with processes.Sigterm() as sigterm:
        _run(plan, sigterm.came)


def _run(plan: Plan, preempted: Callable[[], bool]) -> None:
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    _check_same(plan)
    if first:
        plan.out.mkdir(parents=True, exist_ok=True)
    data = _data(plan, preempted)
    if data is None:
        raise _stopped(plan, console, "before the first step")
    count = data.rows.num_rows - len(data.held_out)
    shared = f", by {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.print(f"{count} examples to fit, {len(data.task.held_out[1])} held out{shared}.")
    if plan.stochastic:
        result = _train(plan, data, console, preempted)
    else:
        result = _fit(plan, data, console)
    if first:
        print_result(console, result, write(console, plan.out, data.task, result))
    processes.gather(None)  # the others wait for the files


def _check_same(plan: Plan) -> None:
    """Refuses options that differ between the processes, but for where files are."""
    everywhere = plan._replace(data="", out=Path(), checkpoint=None)._asdict()
    for index, other in enumerate(processes.gather(everywhere)):
        for name, value in everywhere.items():
            if other[name] != value:
                option = name.replace("_", "-")
                raise DataError(f"--{option} is {value}, and of process {index} {other[name]}.")


def _fit(plan: Plan, data: Data, console: Console) -> FitResult:
    with FitProgress(console, plan.max_steps) as progress:
        return streaming.fit(
            data.rows,
            num_classes=len(data.task.class_names),
            l2=plan.l2,
            max_steps=plan.max_steps or 1000,
            transform=data.transform,
            held_out=np.union1d(data.held_out, data.bad),
            validation=data.task.held_out,
            callback=progress.show,
        )


def _train(plan: Plan, data: Data, console: Console, preempted: Callable[[], bool]) -> FitResult:
    optimizer = plan.optimizer or Optimizer.ADAM
    rate = rate_of(optimizer, plan.learning_rate)
    batches = streaming.Batches(
        data.rows, plan.batch_size or BATCH_SIZE, seed=plan.seed, held_out=data.held_out
    )
    steps = (plan.epochs or EPOCHS) * batches.epoch_steps
    checkpoints = None
    if plan.checkpoint is not None:
        configuration = {
            **data.source,
            "label_column": plan.label_column,
            "test_fraction": plan.test_fraction,
            "optimizer": str(optimizer),
            "learning_rate": rate,
            "l2": plan.l2,
        }
        checkpoints = Checkpoints(plan.checkpoint, configuration)
    with FitProgress(console, steps) as progress:
        try:
            return streaming.train(
                batches,
                num_classes=len(data.task.class_names),
                optimizer=optax_optimizer(optimizer, rate),
                steps=steps,
                l2=plan.l2,
                transform=data.transform,
                every=plan.every,
                skip_nonfinite=plan.skip_nonfinite,
                checkpoints=checkpoints,
                validation=data.task.held_out,
                callback=progress.show,
                preempted=preempted,
            )
        except streaming.Preempted as stop:
            progress.bar.stop()
            raise _stopped(plan, console, f"after step {stop.step}") from None
        except streaming.NonFiniteError as error:
            params = error.params
            path = processes.of_first(lambda: write_model(plan.out, data.task, params))
            raise DataError(f"{error} The parameters before it are in {path}.") from None


def _stopped(plan: Plan, console: Console, when: str) -> typer.Exit:
    """What ends all processes after SIGTERM to one of them."""
    saved = "nothing was saved" if plan.checkpoint is None else "the same command goes on"
    console.print(f"Stopped by SIGTERM {when}: {saved}.")
    processes.gather(None)  # the others wait for the checkpoint
    return typer.Exit(143 if plan.checkpoint is None else 0)


def _data(plan: Plan, preempted: Callable[[], bool]) -> Data | None:
    """Opens the data, passes over them once, and holds some of them out; None where preempted."""
    if plan.data == "digits":
        return _digits()
    if plan.label_column is None:
        raise DataError(f"{plan.data}: --label-column must name the column of the labels.")
    path, source = Path(plan.data), {}
    if path.suffix.lower() in (".npy", ".parquet"):
        rows: Rows = streaming.open_rows(path, plan.label_column)
        names = _feature_names(rows)
    else:
        whole = tables.dataset(path, plan.label_column)
        rows = ArrayRows(whole.features, np.array(whole.class_names, object)[whole.labels])
        names, source = whole.feature_names, {"file": file_fingerprint(path)}
    if not names:
        raise DataError(f"{path}: has no columns beside the labels.")
    if not rows.num_rows:
        raise DataError(f"{path}: has no rows.")
    seen = survey(rows, preempted)
    if seen is None:
        return None
    if len(seen.bad) and not plan.skip_nonfinite:
        shown = ", ".join(map(str, seen.bad[:10])) + (", ..." if len(seen.bad) > 10 else "")
        raise DataError(
            f"{path}: {len(seen.bad)} rows are not finite, or without a label: {shown}, counted "
            f"from 0; --skip-nonfinite leaves them out."
        )
    origin = seen.mean.astype(np.float32)
    rows = Encoded(rows, seen.classes, origin)
    held_out = _held_out(path, rows, plan)
    transform = _standardising(seen, origin)
    features, labels = zip(*(rows.read(row, row + 1) for row in held_out.tolist()), strict=True)
    x, y = np.concatenate(features).astype(np.float32), np.concatenate(labels)
    good = np.isfinite(x).all(1) & (y >= 0)
    validation = (np.asarray(transform(jnp.asarray(x[good]))), y[good])
    classes = [str(name) for name in seen.classes.tolist()]
    task = Task(seen.mean, seen.scale, names, classes, validation, None)
    return Data(rows, held_out, seen.bad, task, transform, source)


def _digits() -> Data:
    """All of them in memory, with the held-out part that they come with."""
    digits = load_digits()
    rows = ArrayRows(digits.train_features, digits.train_labels)
    size = rows.num_features
    names, classes = [str(pixel) for pixel in range(size)], [str(k) for k in range(10)]
    held_out = (digits.test_features, digits.test_labels)
    task = Task(np.zeros(size), np.ones(size), names, classes, held_out, digits.image_shape)
    return Data(rows, np.empty(0, np.int64), np.empty(0, np.int64), task, None, {})


def _feature_names(rows: Any) -> list[str]:
    if hasattr(rows, "names"):
        return rows.names
    numbers = range(rows.num_features + (rows.column is not None))
    return [str(number) for number in numbers if number != rows.column]


def _held_out(path: Path, rows: Rows, plan: Plan) -> np.ndarray:
    """The numbers of the rows that are held out, in order."""
    count = min(round(plan.test_fraction * rows.num_rows), MOST_HELD_OUT)
    if not 0 < count < rows.num_rows:
        raise DataError(
            f"{path}: {rows.num_rows} rows cannot be split with {plan.test_fraction} held out."
        )
    drawn = np.random.default_rng(plan.seed).choice(rows.num_rows, count, False, shuffle=False)
    return np.sort(drawn)


def _standardising(seen: Survey, origin: np.ndarray) -> Callable[[Array], Array]:
    """(x - mean) / scale, on the device, of rows that are read around an origin.

    The origin is the mean in float32, which does not depend on the number of processes.
    """
    rest, scale = (seen.mean - origin).astype(np.float32), seen.scale.astype(np.float32)

    def transform(features: Array) -> Array:
        return (features - rest) / scale

    return transform
