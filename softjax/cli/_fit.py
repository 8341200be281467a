"""`softjax fit`: its options, and the choice of a fit in memory or of a stream."""

from pathlib import Path
from typing import Annotated

import typer

from softjax.cli import _combinations, _memory, _options, _stream
from softjax.cli._app import Optimizer, Solver, app, try_out
from softjax.datasets import PASSENGERS
from softjax.processes import PATIENCE, start

# The headings below which --help shows the options.
DATA, MODEL, SEARCH = "The data", "The model", "The solver"
OUTPUT, LARGE = "Output", "Large data and many processes"


@app.command(
    epilog="Example: softjax fit people.csv --label-column income --drop id --impute --l2 1e-3 "
    "--summary --out run"
)
def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="A .csv, .tsv (also .gz), .npy, .npz or .parquet file; or the word digits or "
            "passengers, for an example."
        ),
    ],
    label_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Name of the column with the labels; for a .npy file its number, counted from 0.",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Column that is no feature, such as an identifier. Repeat the option for more.",
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Column whose numbers are names of categories, such as a postcode. Repeat the "
            "option for more. Columns of text are categories without it.",
        ),
    ] = None,
    impute: Annotated[
        bool,
        typer.Option(
            "--impute",
            rich_help_panel=DATA,
            help="Fill missing cells with the median or the most frequent category of the rows to "
            "fit; the model does the same (default: missing cells are refused).",
        ),
    ] = False,
    separator: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            callback=_options.separator,
            help="Separator of a .csv or .tsv file: a character, or tab, comma, semicolon, pipe or "
            "space (default: found in the header).",
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            callback=_options.encoding,
            help="Encoding of a .csv or .tsv file, such as cp1252 or latin-1 (default: utf-8, or "
            "utf-16 with a byte order mark).",
        ),
    ] = None,
    any_classes: Annotated[
        bool,
        typer.Option(
            "--any-classes",
            rich_help_panel=DATA,
            help="Take the labels as classes even if they look like identifiers, measurements or "
            "counts, because many of them occur once or few times.",
        ),
    ] = False,
    class_weight: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=MODEL,
            callback=_options.class_weights,
            help="Weight of a class in the loss, as CLASS=WEIGHT, repeated for more; or balanced, "
            "for the same total weight of every class (default: 1 each).",
        ),
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(
            rich_help_panel=DATA,
            min=0.01,
            max=0.99,
            callback=_options.finite,
            help="Share of the rows of each class to hold out from the fit and report on.",
        ),
    ] = 0.2,
    l2: Annotated[
        list[float] | None,
        typer.Option(
            rich_help_panel=MODEL,
            min=0.0,
            callback=_options.all_finite,
            help="L2 penalty: adds l2 / 2 |kernel|^2 to the loss (default: 0.0001; 0 for --solver "
            "firth). Repeat the option to choose by cross-validation: --l2 1e-4 --l2 1e-2.",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=MODEL,
            min=2,
            help="Number of folds of the cross-validation of several --l2 (default: 5).",
        ),
    ] = None,
    l1: Annotated[
        float,
        typer.Option(
            rich_help_panel=MODEL,
            min=0.0,
            callback=_options.finite,
            help="L1 penalty: adds l1 |kernel|_1 to the loss; the solver is then proximal.",
        ),
    ] = 0.0,
    solver: Annotated[
        Solver,
        typer.Option(
            rich_help_panel=SEARCH,
            help="Solver. auto is newton-cg, or proximal with --l1, or optax with --optimizer, "
            "--epochs, --batch-size or --learning-rate.",
        ),
    ] = Solver.AUTO,
    max_steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SEARCH,
            min=1,
            help="Largest number of steps of any solver but optax (default: set by the solver).",
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(
            rich_help_panel=SEARCH,
            help="Optimizer of --solver optax (default: lbfgs; with --stream: adam, not lbfgs).",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SEARCH,
            min=1,
            help="Largest number of passes of --solver optax over the data (default: 300; with "
            "--stream: 10).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SEARCH,
            min=1,
            help="Examples in each step of --optimizer adam or sgd (default: all; with --stream: "
            "1024).",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SEARCH,
            callback=_options.positive,
            help="Learning rate of adam (default: 0.01) or sgd (default: 0.5).",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=SEARCH,
            min=0,
            help="Seed of the held-out rows, the batches and the folds.",
        ),
    ] = 0,
    summary: Annotated[
        bool,
        typer.Option(
            "--summary",
            rich_help_panel=OUTPUT,
            help="Print the coefficients with their standard errors.",
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            rich_help_panel=OUTPUT,
            help="Folder for model.npz, metrics.json, history.jsonl and report.png.",
        ),
    ] = Path("softjax-out"),
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            rich_help_panel=LARGE,
            help="Read the file in runs of rows: it need not fit into memory.",
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=LARGE,
            help="Folder for checkpoints, of a stream by --solver optax. The same command resumes "
            "from the last of them.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=LARGE,
            min=1,
            help="Steps from one checkpoint or line of the history to the next, of a stream by "
            "--solver optax (default: an epoch).",
        ),
    ] = None,
    skip_nonfinite: Annotated[
        bool,
        typer.Option(
            "--skip-nonfinite",
            rich_help_panel=DATA,
            help="Skip rows that contain NaN or infinity or an empty cell, or have no label.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LARGE,
            envvar="JAX_COORDINATOR_ADDRESS",
            help="HOST:PORT of process 0 of a run of several processes, each of which streams a "
            "part of the rows; or auto, to detect a cluster such as Slurm.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=LARGE, min=1, envvar="JAX_NUM_PROCESSES", help="Number of processes."
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=LARGE, min=0, envvar="JAX_PROCESS_ID", help="Which one this is, from 0."
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            rich_help_panel=LARGE, min=1, help="Seconds to wait for the other processes to start."
        ),
    ] = PATIENCE,
) -> None:
    """Fit a softmax regression to a file and measure it on the rows that were held out.

    Writes the model, the history of the fit and, with matplotlib, a picture to the folder --out.
    The features of a file are standardised for the fit; the model is for the features as they are
    in the file.
    """
    if data == "passengers":
        data = str(PASSENGERS)
    penalties = l2 or [0.0 if solver is Solver.FIRTH else 1e-4]
    if folds is not None and len(penalties) < 2:
        raise typer.BadParameter("--folds needs --l2 given more than once")
    if stream or checkpoint is not None or coordinator is not None:
        if len(penalties) > 1:
            raise typer.BadParameter("--stream takes one --l2, not several")
        if impute or class_weight:
            raise typer.BadParameter("--stream takes neither --impute nor --class-weight")
        if l1 > 0 or summary or solver not in (Solver.AUTO, Solver.LBFGS, Solver.OPTAX):
            raise typer.BadParameter(
                "--stream takes --solver lbfgs or optax, and neither --l1 nor --summary"
            )
        plan = _stream.Plan(
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
            drop=tuple(drop or ()),
            categories=tuple(category or ()),
            separator=separator,
            encoding=encoding,
            any_classes=any_classes,
        )
        plan.check()
        _combinations.check_effect(
            context, data, seeded=plan.stochastic, several=coordinator is not None
        )
        _combinations.check_coordinator(coordinator, processes, process_id)
        start(coordinator, processes, process_id, patience)
        _stream.run(plan)
        return
    if every is not None:
        raise typer.BadParameter("--every needs --stream or --checkpoint")
    options = (optimizer, epochs, batch_size, learning_rate)
    if solver is Solver.AUTO and any(option is not None for option in options):
        solver = Solver.OPTAX
    _combinations.check_in_memory(solver, options, penalties, l1, max_steps, summary)
    optimizer = optimizer or Optimizer.LBFGS
    if optimizer is Optimizer.LBFGS and (batch_size is not None or learning_rate is not None):
        raise typer.BadParameter("--batch-size and --learning-rate need --optimizer adam or sgd")
    seeded = batch_size is not None or len(penalties) > 1
    _combinations.check_effect(context, data, seeded=seeded, several=False)
    try_out(out)
    _memory.run(
        _memory.Plan(
            data=data,
            label_column=label_column,
            test_fraction=test_fraction,
            penalties=penalties,
            folds=folds,
            l1=l1,
            solver=solver,
            max_steps=max_steps,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            class_weight=class_weight,
            seed=seed,
            summary=summary,
            out=out,
            skip_nonfinite=skip_nonfinite,
            impute=impute,
            drop=tuple(drop or ()),
            categories=tuple(category or ()),
            separator=separator,
            encoding=encoding,
            any_classes=any_classes,
        )
    )
