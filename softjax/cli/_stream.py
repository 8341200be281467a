"""`softjax fit` of data that is streamed: by one process or many, with checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import typer
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
from softjax.streaming._rows import ArrayRows, Rows, Standardised
from softjax.streaming._survey import survey
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
    path = Path(plan.data)
    rows = tables.open_file(path, plan.label_column)
    try:
        seen = survey(rows, plan.skip_nonfinite, preempted)
    except tables.IncompleteError as error:
        raise DataError(f"{error} --skip-nonfinite leaves such rows out.") from None
    if seen is None:
        return None
    fitted = Standardised(rows, seen.mean, seen.scale, seen.classes)
    held_out = _held_out(path, fitted, plan)
    parts = [fitted.read(row, row + 1) for row in np.setdiff1d(held_out, seen.bad).tolist()]
    if not parts:
        raise DataError(f"{path}: no row that is held out is complete; hold out more of them.")
    x, y = map(np.concatenate, zip(*parts, strict=True))
    if np.count_nonzero(seen.counts - np.bincount(y, minlength=len(seen.counts))) < 2:
        raise DataError(f"{path}: one class only is left to fit; hold out less or change the seed.")
    task = Task(seen.mean, seen.scale, rows.names, seen.classes, (x, y), None)
    return Data(fitted, held_out, seen.bad, task)


def _digits() -> Data:
    """All of them in memory, with the held-out part that they come with."""
    digits = load_digits()
    rows = ArrayRows(digits.train_features, digits.train_labels)
    size = rows.num_features
    names, classes = [str(pixel) for pixel in range(size)], [str(k) for k in range(10)]
    held_out = (digits.test_features, digits.test_labels)
    task = Task(np.zeros(size), np.ones(size), names, classes, held_out, digits.image_shape)
    return Data(rows, np.empty(0, np.int64), np.empty(0, np.int64), task)


def _held_out(path: Path, rows: Rows, plan: Plan) -> np.ndarray:
    """The numbers of the rows that are held out, in order."""
    count = min(round(plan.test_fraction * rows.num_rows), MOST_HELD_OUT)
    if not 0 < count < rows.num_rows:
        raise DataError(
            f"{path}: {rows.num_rows} rows cannot be split with {plan.test_fraction} held out."
        )
    drawn = np.random.default_rng(plan.seed).choice(rows.num_rows, count, False, shuffle=False)
    return np.sort(drawn)
