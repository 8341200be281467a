"""`softjax fit --stream`: a fit to streamed rows by one or several processes, with checkpoints."""

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import typer
from rich.console import Console

from softjax import _interrupt, processes, streaming, tables
from softjax.checkpoints import Checkpoints
from softjax.cli._app import (
    SUMMARY,
    FitError,
    FitProgress,
    Optimizer,
    Task,
    check_finite,
    model_of,
    optax_optimizer,
    print_columns,
    print_result,
    rate_of,
    remedies_offered,
    save_unfinished,
    task_of,
    try_out,
    write,
    write_text,
)
from softjax.cli._options import progress_bar, reading
from softjax.cli._plan import Plan
from softjax.cli._split import Split, digits, held_out_part, imputed, too_few
from softjax.cli._summary import summary_text
from softjax.regression import FitResult, SoftmaxRegression
from softjax.regression.inference import Summary
from softjax.streaming._fills import fills
from softjax.streaming._rows import ArrayRows, ClassWeighted, Rows, Standardised
from softjax.streaming._summary import summary
from softjax.streaming._survey import survey, survey_without
from softjax.tables import DataError

EPOCHS = 10
BATCH_SIZE = 1024
# More held-out rows would hardly make the report more precise, and they have to fit into memory.
MOST_HELD_OUT = 10_000
# The first rows, up to this many bytes, show whether a column of whole numbers is an identifier.
FIRST_BYTES = 2**24


class Data(NamedTuple):
    """The rows, the numbers of the held-out and of the bad rows, and the task of the fit."""

    rows: Rows
    held_out: np.ndarray
    bad: np.ndarray
    task: Task


def run(plan: Plan) -> None:
    """Fits on every process; process 0 prints messages and writes files.

    With checkpoints, Ctrl-C stops the fit as SIGTERM does: after the current step, which is saved.
    """
    with contextlib.ExitStack() as stack:
        stop = Stop(None, None)
        if plan.stochastic:
            stop = stop._replace(sigterm=stack.enter_context(processes.Sigterm()))
        if plan.checkpoint is not None:
            stop = stop._replace(interrupt=stack.enter_context(_interrupt.postponed()))
        _run(plan, stop)


class Stop(NamedTuple):
    """The signals that stop a fit after its current step; None for a signal that does not."""

    sigterm: processes.Sigterm | None
    interrupt: threading.Event | None

    def came(self) -> bool:
        terminated = self.sigterm is not None and self.sigterm.came()
        return terminated or self.interrupted()

    def interrupted(self) -> bool:
        return self.interrupt is not None and self.interrupt.is_set()


def _run(plan: Plan, stop: Stop) -> None:
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    _check_same(plan)
    processes.of_first(lambda: try_out(plan.out, plan.data, plan.label_column))
    checkpoints = None if plan.checkpoint is None else Checkpoints(plan.checkpoint)
    data = _data(plan, console, stop.came)
    if data is None:
        raise _stopped(plan, stop, "before the first step")
    count = data.rows.num_rows - len(data.held_out) - len(data.bad)
    shared = f", by {jax.process_count()} processes" if jax.process_count() > 1 else ""
    held_out = held_out_part(0 if data.task.held_out is None else len(data.task.held_out[1]))
    console.print(f"{count} examples to fit, {held_out}{shared}.")
    if plan.stochastic:
        result = _train(plan, data, checkpoints, console, stop)
    else:
        result = _fit(plan, data, console)
    if any(processes.gather(stop.interrupted())):
        path = _save_unfinished(plan, data, result.params)
        raise _stopped(plan, stop, f"after step {result.steps}, the last one", path)
    check_finite(plan.out, data.task, result)
    written = write(console, plan.out, data.task, result) if first else ([], None)
    text = _summary(plan, data, result, console) if plan.summary else None
    if first:
        limit = None if plan.stochastic else "--max-steps"
        more = [] if text is None else [write_text(plan.out / SUMMARY, f"{text}\n")]
        print_result(console, result, written, limit, more)
        if text is not None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    processes.gather(None)  # the others wait for the files


def _check_same(plan: Plan) -> None:
    """Refuses options that differ between the processes; paths may differ."""
    everywhere = plan._replace(data="", out=Path(), checkpoint=None)._asdict()
    for index, other in enumerate(processes.gather(everywhere)):
        for name, value in everywhere.items():
            if other[name] != value:
                option = name.replace("_", "-")
                raise DataError(
                    f"--{option} must be the same for all processes, got {value} of process "
                    f"{jax.process_index()} and {other[name]} of process {index}."
                )


def _fit(plan: Plan, data: Data, console: Console) -> FitResult:
    with FitProgress(console, plan.max_steps, plan.out, data.task) as progress:
        return streaming.fit(
            data.rows,
            num_classes=len(data.task.class_names),
            l2=plan.penalties[0],
            max_steps=plan.max_steps or 1000,
            held_out=np.union1d(data.held_out, data.bad),
            validation=data.task.held_out,
            callback=progress.show,
        )


def _train(
    plan: Plan, data: Data, checkpoints: Checkpoints | None, console: Console, stop: Stop
) -> FitResult:
    optimizer = plan.optimizer or Optimizer.ADAM
    rate = rate_of(optimizer, plan.learning_rate)
    batches = streaming.Batches(
        data.rows, plan.batch_size or BATCH_SIZE, seed=plan.seed, held_out=data.held_out
    )
    epochs = plan.epochs or EPOCHS
    if checkpoints is not None:
        checkpoints.configuration |= {
            "label_column": plan.label_column,
            "test_fraction": plan.test_fraction,
            "optimizer": str(optimizer),
            "learning_rate": rate,
        }
    with FitProgress(console, epochs * batches.epoch_steps, plan.out, data.task) as progress:
        try:
            return streaming.train(
                batches,
                num_classes=len(data.task.class_names),
                optimizer=optax_optimizer(optimizer, rate),
                epochs=epochs,
                l2=plan.penalties[0],
                every=plan.every,
                skip_nonfinite=plan.skip_nonfinite,
                checkpoints=checkpoints,
                validation=data.task.held_out,
                callback=progress.show,
                preempted=stop.came,
            )
        except streaming.Preempted as preempted:
            progress.bar.stop()
            path = _save_unfinished(plan, data, preempted.params)
            raise _stopped(plan, stop, f"after step {preempted.step}", path) from None
        except streaming.NonFiniteError as error:
            path = _save_unfinished(plan, data, error.params)
            words = f"{error} No model was written; the parameters before it are in {path}."
            raise (DataError if error.rows else FitError)(words) from None


def _summary(plan: Plan, data: Data, result: FitResult, console: Console) -> str | None:
    """The text of the summary; every process takes its part of two passes over the rows."""

    def of_rows() -> Summary:
        return summary(
            result.params,
            data.rows,
            np.union1d(data.held_out, data.bad),
            l2=plan.penalties[0],
            class_weighted=bool(plan.class_weight),
            odds_ratios=plan.odds_ratios,
            feature_names=data.task.feature_names,
            class_names=data.task.class_names,
        )

    with progress_bar(console, "standard errors"):
        return summary_text(console, result, data.task, plan.odds_ratios, of_rows)


def _save_unfinished(plan: Plan, data: Data, params: SoftmaxRegression) -> Path:
    return processes.of_first(lambda: save_unfinished(plan.out, model_of(data.task, params)))


def _stopped(plan: Plan, stop: Stop, when: str, path: Path | None = None) -> typer.Exit:
    """The exception that ends every process after SIGTERM or Ctrl-C to any of them.

    `path` has the parameters of the last step; None before the first one.
    """
    interrupted = any(processes.gather(stop.interrupted()))
    saved = []
    if plan.checkpoint is not None:
        saved.append(f"the same command resumes from {plan.checkpoint}")
    if path is not None:
        saved.append(f"the parameters are in {path}")
    if jax.process_index() == 0:
        verb = "interrupted" if interrupted else "stopped by SIGTERM"
        words = "; ".join(saved) or "nothing was saved"
        print(f"softjax: {verb} {when}: {words}.", file=sys.stderr, flush=True)
    processes.gather(None)  # the others wait for the checkpoint and the line
    if interrupted:
        return typer.Exit(_interrupt.STATUS)
    return typer.Exit(143 if plan.checkpoint is None else 0)


def _data(plan: Plan, console: Console, preempted: Callable[[], bool]) -> Data | None:
    """Opens the data, holds rows out and surveys the others; None if the run has to stop."""
    if plan.data == "digits":
        return _digits(plan)
    path, label = plan.file_and_label()
    with remedies_offered():
        with reading(console, plan.reading) as options:
            rows = tables.open_file(path, label, reading=options)
        # Every process reads the first rows, so that all of them refuse a column together.
        first, _ = rows.read(0, min(rows.num_rows, FIRST_BYTES // (8 * max(rows.num_features, 1))))
        first = first[tables.good_rows(first, keep_missing=plan.impute)]
        tables.refuse_identifiers(path, rows.columns, first)
        where = f" of the first {len(first)} rows" if len(first) < rows.num_rows else ""
        doubt = tables.like_identifiers(rows.columns, first, where)
        if doubt:
            console.print(doubt, markup=False, highlight=False, soft_wrap=True)
        split = Split(rows.num_rows, plan.test_fraction, plan.seed, MOST_HELD_OUT)
        with progress_bar(console, "first pass") as progress:

            def see(numbers: np.ndarray, names: list[str], codes: np.ndarray) -> None:
                split.see(numbers, names, codes)
                progress.update(progress.task_ids[0], total=rows.num_rows, advance=len(numbers))

            seen = survey(rows, plan.skip_nonfinite, preempted, see, plan.impute)
    if seen is None:
        return None
    held_out = split.held_out()
    if plan.test_fraction > 0 and not len(held_out):
        raise DataError(too_few(plan.data, rows.num_rows, plan.test_fraction))
    if plan.impute:
        with progress_bar(console, "medians"):
            columns = fills(rows, np.union1d(held_out, seen.bad), preempted)
        if columns is None:
            return None
        rows.columns = columns
        console.print(imputed(seen.incomplete), soft_wrap=True)
    with progress_bar(console, "means and scales"):
        seen = survey_without(rows, seen, held_out, preempted)
    if seen is None:
        return None
    print_columns(console, rows.columns, seen.classes, len(seen.bad))
    fitted = Standardised(rows, seen.mean, seen.scale, seen.classes)
    parts = [fitted.read(row, row + 1) for row in held_out.tolist()]
    x_and_y = None
    if parts:
        x, y = map(np.concatenate, zip(*parts, strict=True))
        x_and_y = x, y
    majority = int(np.argmax(seen.counts))
    names = (rows.names, seen.classes)
    task = Task(seen.mean, seen.scale, *names, x_and_y, None, path.name, majority, rows.columns)
    weights = plan.weights_of(seen.classes, seen.counts)
    return Data(_weighted(fitted, weights), held_out, seen.bad, task)


def _weighted(rows: Rows, weights: np.ndarray | None) -> Rows:
    return rows if weights is None else ClassWeighted(rows, weights)


def _digits(plan: Plan) -> Data:
    """The digits in memory, with their own held-out part."""
    parts = digits()
    rows, none = ArrayRows(parts.train.features, parts.train.labels), np.empty(0, np.int64)
    standard = (np.zeros(rows.num_features), np.ones(rows.num_features))
    weights = plan.weights_of(parts.train.class_names, np.bincount(parts.train.labels))
    task = task_of(parts, *standard, "digits")
    return Data(_weighted(rows, weights), none, none, task)
