"""`softjax fit`: its options, and the choice between a fit in memory and a streamed fit."""

from pathlib import Path

import typer

from softjax.cli import _memory, _options, _plan, _stream
from softjax.cli._app import Command, Solver, app, try_out
from softjax.cli._plan import Plan
from softjax.datasets import PASSENGERS
from softjax.processes import PATIENCE, start


@app.command(
    cls=Command,
    epilog="Example: softjax fit people.csv --label-column income --drop id --impute --l2 1e-3 "
    "--summary --out run",
)
def fit(
    context: typer.Context,
    data: _options.DataFile,
    label_column: _options.LabelColumn = None,
    drop: _options.Drop = None,
    category: _options.Category = None,
    impute: _options.Impute = False,
    separator: _options.Separator = None,
    encoding: _options.Encoding = None,
    decimal: _options.Decimal = None,
    any_classes: _options.AnyClasses = False,
    class_weight: _options.ClassWeight = None,
    test_fraction: _options.TestFraction = 0.2,
    l2: _options.L2 = None,
    folds: _options.Folds = None,
    l1: _options.L1 = 0.0,
    solver: _options.SolverName = Solver.AUTO,
    max_steps: _options.MaxSteps = None,
    optimizer: _options.OptimizerName = None,
    epochs: _options.Epochs = None,
    batch_size: _options.BatchSize = None,
    learning_rate: _options.LearningRate = None,
    seed: _options.Seed = 0,
    summary: _options.Summary = False,
    odds_ratios: _options.OddsRatios = False,
    out: _options.Out = Path("softjax-out"),
    stream: _options.Stream = False,
    checkpoint: _options.Checkpoint = None,
    every: _options.Every = None,
    skip_nonfinite: _options.SkipNonfinite = False,
    coordinator: _options.Coordinator = None,
    processes: _options.Processes = None,
    process_id: _options.ProcessId = None,
    patience: _options.Patience = PATIENCE,
) -> None:
    """Fit a softmax regression to a file and evaluate it on held-out rows.

    Writes the model, the history of the fit and, with matplotlib, a picture to the folder --out.
    The features of a file are standardised for the fit; the coefficients of the model refer to the
    original features.
    """
    given = locals()
    plan = Plan(**{name: given[name] for name in Plan._fields})
    if data == "passengers":
        plan = plan._replace(data=str(PASSENGERS))
    if folds is not None and len(plan.penalties) < 2:
        raise typer.BadParameter("--folds needs --l2 given more than once")
    if stream or checkpoint is not None or coordinator is not None:
        other = "--coordinator" if checkpoint is None else "--checkpoint"
        _plan.check_stream(plan, "--stream" if stream else other)
        several = coordinator is not None
        _plan.check_effect(context, data, seeded=plan.stochastic, several=several)
        _plan.check_coordinator(coordinator, processes, process_id)
        start(coordinator, processes, process_id, patience)
        _stream.run(plan)
    else:
        _plan.check_in_memory(plan)
        seeded = batch_size is not None or len(plan.penalties) > 1
        _plan.check_effect(context, data, seeded=seeded, several=False)
        try_out(out, plan.data, label_column)
        _memory.run(plan)
