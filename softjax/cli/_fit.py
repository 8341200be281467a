"""`softjax fit`: the arguments, and the fit of data in memory."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from softjax import regression, tables
from softjax.cli._app import (
    FitProgress,
    Optimizer,
    Solver,
    Task,
    app,
    optax_optimizer,
    print_result,
    rate_of,
    write,
)
from softjax.cli._stream import Plan, run
from softjax.datasets import load_digits
from softjax.processes import PATIENCE, fail, start
from softjax.tables import DataError, Dataset


def _finite(value: float | None) -> float | None:
    if value is not None and not np.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def _all_finite(values: list[float] | None) -> list[float] | None:
    for value in values or ():
        _finite(value)
    return values


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help="digits, or a .csv, .npy, .npz or .parquet file.")],
    label_column: Annotated[str | None, typer.Option(help="The column of the labels.")] = None,
    test_fraction: Annotated[
        float, typer.Option(min=0.01, max=0.99, callback=_finite, help="Of a file, held out.")
    ] = 0.2,
    l2: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            callback=_all_finite,
            help="Penalty l2 / 2 |kernel|^2 (0.0001); of several, the best in cross-validation.",
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Of the cross-validation of penalties (5).")
    ] = None,
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
    stream: Annotated[
        bool, typer.Option("--stream", help="Read batches from the file, which may be large.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where to save, and to go on from; streams, by optax.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Of a stream, steps between checkpoints (an epoch).")
    ] = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Of a stream, leave out rows that are not.")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar="JAX_COORDINATOR_ADDRESS",
            help="HOST:PORT of process 0, or auto; each process streams its own rows.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, envvar="JAX_NUM_PROCESSES", help="How many they are.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, envvar="JAX_PROCESS_ID", help="Of this one, from 0.")
    ] = None,
    patience: Annotated[
        int, typer.Option(min=1, help="Seconds that the processes wait for each other to start.")
    ] = PATIENCE,
) -> None:
    """Fit a softmax regression and measure it on held-out examples.

    Writes model.npz, history.jsonl and, with matplotlib, report.png. The features of a file are
    standardised for the fit, and the model is written for the features as they are.
    """
    penalties = l2 or [1e-4]
    if folds is not None and len(penalties) < 2:
        raise typer.BadParameter("--folds is for --l2 given several times")
    if stream or checkpoint is not None or coordinator is not None:
        if len(penalties) > 1:
            raise typer.BadParameter("a stream takes one --l2")
        if l1 > 0 or summary or solver not in (Solver.AUTO, Solver.LBFGS, Solver.OPTAX):
            raise typer.BadParameter(
                "a stream takes --solver lbfgs or optax, and no --l1 or --summary"
            )
        plan = Plan(
            data=data,
            label_column=label_column,
            test_fraction=test_fraction,
            l2=penalties[0],
            solver=solver,
            max_steps=max_steps,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            out=out,
            checkpoint=checkpoint,
            every=every,
            skip_nonfinite=skip_nonfinite,
        )
        plan.check()
        _check_coordinator(coordinator, processes, process_id)
        start(coordinator, processes, process_id, patience)
        run(plan)
        return
    if every is not None or skip_nonfinite:
        raise typer.BadParameter("--every and --skip-nonfinite are for --stream or --checkpoint")
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
    if len(penalties) > 1 and (l1 > 0 or first_order or solver is Solver.FIRTH):
        raise typer.BadParameter("several --l2 are for neither --l1 nor --solver optax or firth")
    optimizer = optimizer or Optimizer.LBFGS
    if optimizer is Optimizer.LBFGS and (batch_size is not None or learning_rate is not None):
        raise typer.BadParameter("lbfgs takes neither --batch-size nor --learning-rate")
    out.mkdir(parents=True, exist_ok=True)
    train, test, image_shape = _load(data, label_column, test_fraction, seed)
    mean, scale = _standardisation(train.features, image_shape is not None)
    x_train, x_test = (
        ((part.features - mean) / scale).astype(np.float32) for part in (train, test)
    )
    names = (train.feature_names, train.class_names)
    task = Task(mean, scale, *names, (x_test, test.labels), image_shape)

    console = Console()
    console.print(f"{len(train.labels)} examples to fit, {len(test.labels)} held out.")
    penalty = penalties[0]
    if len(penalties) > 1:
        folds = folds or 5
        if folds > len(train.labels):
            raise DataError(f"{data}: {len(train.labels)} examples to fit, for {folds} folds.")
        penalty = _chosen_penalty(console, x_train, train, penalties, folds, seed)
    if first_order:
        epochs = epochs or 300
        steps = epochs * (1 if batch_size is None else -(-len(train.labels) // batch_size))
    else:
        steps = max_steps
    of_optax = None
    if optimizer is not Optimizer.LBFGS:
        of_optax = optax_optimizer(optimizer, rate_of(optimizer, learning_rate))
    with FitProgress(console, steps) as progress:
        result = regression.fit(
            x_train,
            train.labels,
            solver=solver,
            num_classes=len(train.class_names),
            l2=penalty,
            l1=l1,
            max_steps=max_steps,
            optimizer=of_optax,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            validation=task.held_out,
            callback=progress.show,
        )
    print_result(console, result, write(console, out, task, result))
    if summary:
        _print_summary(console, result.params, x_train, train, penalty)


def _check_coordinator(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Refuses what JAX and the sockets would say in many lines."""
    if processes is not None and process_id is not None and process_id >= processes:
        fail(2, f"--process-id must be below --processes, {processes}, got {process_id}.")
    if coordinator in (None, "auto"):
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        fail(2, f"--coordinator must be HOST:PORT or auto, got {coordinator!r}.")
    if processes is None or process_id is None:
        fail(2, "--coordinator HOST:PORT needs --processes and --process-id.")


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


def _chosen_penalty(
    console: Console,
    features: np.ndarray,
    train: Dataset,
    penalties: list[float],
    folds: int,
    seed: int,
) -> float:
    """The penalty with the smallest mean loss on the examples held out of each fold in turn."""
    grid = np.sort(penalties)
    validated = regression.cross_validate(
        features,
        train.labels,
        l2=grid,
        folds=folds,
        seed=seed,
        num_classes=len(train.class_names),
    )
    loss, error, hits = (
        np.asarray(values)
        for values in (validated.mean_loss, validated.standard_error, validated.mean_accuracy)
    )
    best = int(np.argmin(loss))
    table = Table(title=f"{folds} folds", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("l2", "loss, nats", "standard error", "accuracy", ""):
        table.add_column(column)
    for k, l2 in enumerate(grid):
        chosen = "chosen" if k == best else ""
        table.add_row(f"{l2:g}", f"{loss[k]:.4f}", f"{error[k]:.4f}", f"{hits[k]:.4f}", chosen)
    console.print(table)
    return float(grid[best])


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
