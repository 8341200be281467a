"""`softjax fit`: the options, and the fit to data in memory."""

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
    check_finite,
    optax_optimizer,
    print_result,
    rate_of,
    skipping_offered,
    try_out,
    write,
)
from softjax.cli._split import Split, too_few
from softjax.cli._stream import Plan, run
from softjax.datasets import load_digits
from softjax.processes import PATIENCE, fail, start
from softjax.tables import DataError, Dataset


def _finite(value: float | None) -> float | None:
    if value is not None and not np.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < np.inf:
        raise typer.BadParameter("must be a finite number above 0")
    return value


def _all_finite(values: list[float] | None) -> list[float] | None:
    for value in values or ():
        _finite(value)
    return values


@app.command(epilog="Example: softjax fit data.csv --label-column y --l2 1e-3 --out run")
def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="A .csv, .npy, .npz or .parquet file, or the word digits for an example."
        ),
    ],
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Name of the column with the labels; for a .npy file its number, counted from 0."
        ),
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=0.99,
            callback=_finite,
            help="Share of the rows of each class to hold out from the fit and report on.",
        ),
    ] = 0.2,
    l2: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            callback=_all_finite,
            help="L2 penalty: adds l2 / 2 |kernel|^2 to the loss (default: 0.0001; 0 for --solver "
            "firth). Repeat the option to choose by cross-validation: --l2 1e-4 --l2 1e-2.",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of folds of the cross-validation of several --l2 (default: 5)."
        ),
    ] = None,
    l1: Annotated[
        float,
        typer.Option(
            min=0.0,
            callback=_finite,
            help="L1 penalty: adds l1 |kernel|_1 to the loss; the solver is then proximal.",
        ),
    ] = 0.0,
    solver: Annotated[
        Solver,
        typer.Option(
            help="Solver. auto is newton-cg, or proximal with --l1, or optax with --optimizer, "
            "--epochs, --batch-size or --learning-rate."
        ),
    ] = Solver.AUTO,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of steps of any solver but optax (default: set by the solver).",
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(
            help="Optimizer of --solver optax (default: lbfgs; with --stream: adam, and not lbfgs)."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of passes of --solver optax over the data (default: 300; with "
            "--stream: 10).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Examples in each step of --optimizer adam or sgd (default: all; with --stream: "
            "1024).",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            callback=_positive, help="Learning rate of adam (default: 0.01) or sgd (default: 0.5)."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the held-out rows, the batches and the folds."),
    ] = 0,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print the coefficients with their standard errors.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for model.npz, history.jsonl and report.png.")
    ] = Path("softjax-out"),
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read the file in runs of rows: it need not fit into memory."
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, of a stream by --solver optax. The same command resumes "
            "from the last of them."
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps from one checkpoint or line of the history to the next, of a stream by "
            "--solver optax (default: an epoch).",
        ),
    ] = None,
    skip_nonfinite: Annotated[
        bool,
        typer.Option(
            "--skip-nonfinite",
            help="Skip rows that contain NaN or infinity or an empty cell, or have no label.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar="JAX_COORDINATOR_ADDRESS",
            help="HOST:PORT of process 0 of a run of several processes, each of which streams a "
            "part of the rows; or auto, to detect a cluster such as Slurm.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, envvar="JAX_NUM_PROCESSES", help="Total number of processes."),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            min=0, envvar="JAX_PROCESS_ID", help="Number of this process, counted from 0."
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(min=1, help="Seconds to wait for the other processes to start."),
    ] = PATIENCE,
) -> None:
    """Fit a softmax regression to a file and measure it on the rows that were held out.

    Writes the model, the history of the fit and, with matplotlib, a picture to the folder --out.
    The features of a file are standardised for the fit; the model is for the features as they are
    in the file.
    """
    penalties = l2 or [0.0 if solver is Solver.FIRTH else 1e-4]
    if folds is not None and len(penalties) < 2:
        raise typer.BadParameter("--folds needs --l2 given more than once")
    if stream or checkpoint is not None or coordinator is not None:
        if len(penalties) > 1:
            raise typer.BadParameter("--stream takes one --l2, not several")
        if l1 > 0 or summary or solver not in (Solver.AUTO, Solver.LBFGS, Solver.OPTAX):
            raise typer.BadParameter(
                "--stream takes --solver lbfgs or optax, and neither --l1 nor --summary"
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
        _check_effect(context, data, seeded=plan.stochastic, several=coordinator is not None)
        _check_coordinator(coordinator, processes, process_id)
        start(coordinator, processes, process_id, patience)
        run(plan)
        return
    if every is not None:
        raise typer.BadParameter("--every needs --stream or --checkpoint")
    options = (optimizer, epochs, batch_size, learning_rate)
    if solver is Solver.AUTO and any(option is not None for option in options):
        solver = Solver.OPTAX
    first_order = solver is Solver.OPTAX
    if not first_order and any(option is not None for option in options):
        raise typer.BadParameter(
            "--optimizer, --epochs, --batch-size and --learning-rate need --solver optax"
        )
    if first_order and max_steps is not None:
        raise typer.BadParameter("--solver optax takes --epochs, not --max-steps")
    if l1 > 0 and solver not in (Solver.AUTO, Solver.PROXIMAL):
        raise typer.BadParameter("--l1 needs --solver proximal")
    if summary and (l1 > 0 or solver is Solver.FIRTH):
        raise typer.BadParameter("--summary goes with neither --l1 nor --solver firth")
    if len(penalties) > 1 and (l1 > 0 or first_order or solver is Solver.FIRTH):
        raise typer.BadParameter("several --l2 go with neither --l1 nor --solver optax or firth")
    if solver is Solver.FIRTH and penalties != [0.0]:
        raise typer.BadParameter("--solver firth has a penalty of its own and takes no --l2 but 0")
    optimizer = optimizer or Optimizer.LBFGS
    if optimizer is Optimizer.LBFGS and (batch_size is not None or learning_rate is not None):
        raise typer.BadParameter("--batch-size and --learning-rate need --optimizer adam or sgd")
    seeded = batch_size is not None or len(penalties) > 1
    _check_effect(context, data, seeded=seeded, several=False)
    try_out(out)
    train, test, image_shape = _load(data, label_column, test_fraction, seed, skip_nonfinite)
    mean, scale = _standardisation(train.features, image_shape is not None)
    x_train, x_test = (
        ((part.features - mean) / scale).astype(np.float32) for part in (train, test)
    )
    names = (train.feature_names, train.class_names)
    task = Task(mean, scale, *names, (x_test, test.labels), image_shape, Path(data).name)

    console = Console()
    console.print(f"{len(train.labels)} examples to fit, {len(test.labels)} held out.")
    penalty = penalties[0]
    if len(penalties) > 1:
        folds = folds or 5
        if folds > len(train.labels):
            raise DataError(
                f"{data}: {len(train.labels)} examples to fit are too few for {folds} folds."
            )
        penalty = _chosen_penalty(console, x_train, train, penalties, folds, seed)
    if first_order:
        epochs = epochs or 300
        steps = epochs * (1 if batch_size is None else -(-len(train.labels) // batch_size))
    else:
        steps = max_steps
    of_optax = None
    if optimizer is not Optimizer.LBFGS:
        of_optax = optax_optimizer(optimizer, rate_of(optimizer, learning_rate))
    with FitProgress(console, steps, out, task) as progress:
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
    check_finite(out, task, result)
    limit = "--max-steps"
    if first_order:
        limit = "--epochs" if optimizer is Optimizer.LBFGS else None
    print_result(console, result, write(console, out, task, result), limit)
    if summary:
        _print_summary(console, result.params, x_train, train, penalty)


def _check_effect(context: typer.Context, data: str, *, seeded: bool, several: bool) -> None:
    """Refuses an option of the command line that would change nothing.

    Args:
        context: of the command.
        data: the file, or "digits".
        seeded: whether the seed has a use besides the draw of the held-out rows.
        several: whether there is a coordinator. The environment may hold the number of processes
            for other programs too.
    """
    without: dict[str, str] = {}
    if data == "digits":
        why = "the digits come with labels and held-out examples"
        without |= dict.fromkeys(("label_column", "test_fraction", "skip_nonfinite"), why)
        if not seeded:
            without["seed"] = "nothing of this fit to the digits is drawn at random"
    if not several:
        names = ("processes", "process_id", "patience")
        without |= dict.fromkeys(names, "without --coordinator there is one process")
    for name, why in without.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect: {why}")


def _check_coordinator(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Refuses what JAX and the sockets would refuse in many lines."""
    if processes is not None and process_id is not None and process_id >= processes:
        fail(2, f"--process-id must be below --processes ({processes}), got {process_id}.")
    if coordinator in (None, "auto"):
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        fail(2, f"--coordinator must be HOST:PORT or auto, got {coordinator!r}.")
    if processes is None or process_id is None:
        fail(2, "--coordinator HOST:PORT needs --processes and --process-id.")


def _load(
    data: str, label_column: str | None, test_fraction: float, seed: int, skip_nonfinite: bool
) -> tuple[Dataset, Dataset, tuple[int, int] | None]:
    """The part to fit, the held-out part and, of the digits, the shape of an image."""
    if data == "digits":
        digits = load_digits()
        height, width = digits.image_shape
        names = [str(pixel) for pixel in range(height * width)]  # as the columns of a .npy file
        classes = [str(k) for k in range(10)]
        first = len(digits.train_labels)
        rows = np.split(np.arange(first + len(digits.test_labels)), [first])
        train = Dataset(digits.train_features, digits.train_labels, names, classes, rows[0])
        test = Dataset(digits.test_features, digits.test_labels, names, classes, rows[1])
        return train, test, (height, width)
    if label_column is None:
        raise DataError(f"{data}: --label-column must name the column with the labels.")
    with skipping_offered():
        whole = tables.dataset(Path(data), label_column, skip_nonfinite)
    count = len(whole.labels)
    split = Split(count, test_fraction, seed)
    split.see(whole.rows, whole.class_names, whole.labels)
    held_out = np.isin(whole.rows, split.held_out())
    if not held_out.any():
        raise DataError(too_few(data, count, test_fraction))
    train, test = (
        whole._replace(
            features=whole.features[part], labels=whole.labels[part], rows=whole.rows[part]
        )
        for part in (~held_out, held_out)
    )
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
    """The penalty with the smallest mean loss on the folds, each held out in turn."""
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
    """Prints the coefficients and their statistics, for the features as they were fitted."""
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
        console.print(f"No summary was printed: {error}", markup=False)
        return
    console.print(table.text, markup=False, highlight=False, soft_wrap=True)
    console.print("The coefficients are for the standardised features.")
