"""The options of `softjax fit`, and checks that they are compatible and have an effect."""

from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer

from softjax.cli._app import Optimizer, Solver
from softjax.processes import fail
from softjax.tables import DataError, Reading, like


class Plan(NamedTuple):
    """The options of the command; the fields have the names of its arguments."""

    data: str
    label_column: str | None
    drop: list[str] | None
    category: list[str] | None
    impute: bool
    separator: str | None
    encoding: str | None
    decimal: str | None
    any_classes: bool
    class_weight: list[str] | None
    test_fraction: float
    l2: list[float] | None
    folds: int | None
    l1: float
    solver: Solver
    max_steps: int | None
    optimizer: Optimizer | None
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    seed: int
    summary: bool
    odds_ratios: bool
    out: Path
    checkpoint: Path | None
    every: int | None
    skip_nonfinite: bool

    @property
    def reading(self) -> Reading:
        """The options for reading the file."""
        columns = (tuple(self.drop or ()), tuple(self.category or ()))
        return Reading(*columns, self.separator, self.encoding, self.decimal, self.any_classes)

    @property
    def penalties(self) -> list[float]:
        return self.l2 or [0.0 if self.solver is Solver.FIRTH else 1e-4]

    @property
    def of_optax(self) -> bool:
        options = (self.optimizer, self.epochs, self.batch_size, self.learning_rate)
        return any(option is not None for option in options)

    @property
    def first_order(self) -> bool:
        """Whether a fit in memory uses --solver optax, which auto chooses for its options."""
        auto = self.solver is Solver.AUTO
        return self.solver is Solver.OPTAX or (auto and self.of_optax)

    @property
    def by_lbfgs(self) -> bool:
        """Whether --solver optax takes its default optimizer."""
        return self.optimizer in (None, Optimizer.LBFGS)

    @property
    def stochastic(self) -> bool:
        """Whether a stream is trained on batches: by --solver optax, its options or checkpoints."""
        given = self.every is not None or self.checkpoint is not None
        return given or self.of_optax or self.solver is Solver.OPTAX

    def file_and_label(self) -> tuple[Path, str]:
        """The file, which must exist, and the column of its labels, which must be given."""
        path = Path(self.data)
        if not path.exists():
            close = get_close_matches(self.data, ["digits", "passengers"], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise DataError(f"{path}: there is no such file.{hint}")
        if self.label_column is None:
            raise DataError(f"{self.data}: --label-column must name the column with the labels.")
        return path, self.label_column

    def weights_of(self, classes: list[str], counts: np.ndarray) -> np.ndarray | None:
        """The weight of each class, [K]; N / (K N_k) for "balanced", None if all are 1."""
        if not self.class_weight:
            return None
        if self.class_weight == ["balanced"]:
            return counts.sum() / (len(counts) * counts)
        weights = np.ones(len(classes))
        for name, _, weight in (option.rpartition("=") for option in self.class_weight):
            if name not in classes:
                where = f"{self.data}: column {self.label_column!r}"
                there = ", ".join(classes[:10])
                near = like(name, classes)
                raise DataError(f"{where}: has no class {name!r}; it has {there}.{near}")
            weights[classes.index(name)] = float(weight)
        return weights


def check_stream(plan: Plan, option: str) -> None:
    """Refuses options that a stream does not take; `option` is the one that makes it a stream."""
    if len(plan.penalties) > 1:
        raise typer.BadParameter(f"{option} takes one --l2, not several")
    known = plan.solver in (Solver.AUTO, Solver.LBFGS, Solver.OPTAX)
    _check_summary(plan)
    if plan.l1 > 0 or not known:
        raise typer.BadParameter(f"{option} takes --solver lbfgs or optax, and no --l1")
    if plan.stochastic and (plan.solver is Solver.LBFGS or plan.max_steps is not None):
        raise typer.BadParameter(
            "--solver lbfgs and --max-steps go with none of --solver optax, --optimizer, "
            "--epochs, --batch-size, --learning-rate, --checkpoint and --every"
        )
    if plan.optimizer is Optimizer.LBFGS:
        raise typer.BadParameter(f"{option} takes --optimizer adam or sgd, or --solver lbfgs")


def check_in_memory(plan: Plan) -> None:
    """Refuses incompatible options of a fit in memory."""
    if plan.every is not None:
        raise typer.BadParameter("--every needs --stream or --checkpoint")
    if plan.of_optax and not plan.first_order:
        raise typer.BadParameter(
            "--optimizer, --epochs, --batch-size and --learning-rate need --solver optax"
        )
    if plan.first_order and plan.max_steps is not None:
        raise typer.BadParameter("--solver optax takes --epochs, not --max-steps")
    if plan.l1 > 0 and (plan.first_order or plan.solver not in (Solver.AUTO, Solver.PROXIMAL)):
        raise typer.BadParameter("--l1 needs --solver proximal")
    _check_summary(plan)
    other = plan.l1 > 0 or plan.first_order or plan.solver is Solver.FIRTH
    if len(plan.penalties) > 1 and other:
        raise typer.BadParameter("several --l2 go with neither --l1 nor --solver optax or firth")
    if plan.solver is Solver.FIRTH and plan.penalties != [0.0]:
        raise typer.BadParameter("--solver firth has a penalty of its own and takes no --l2 but 0")
    if plan.by_lbfgs and (plan.batch_size is not None or plan.learning_rate is not None):
        raise typer.BadParameter("--batch-size and --learning-rate need --optimizer adam or sgd")


def _check_summary(plan: Plan) -> None:
    """Refuses the options of a summary without one, and a summary of a fit that has none."""
    if plan.odds_ratios and not plan.summary:
        raise typer.BadParameter("--odds-ratios needs --summary")
    if plan.summary and plan.l1 > 0:
        raise typer.BadParameter(
            "--summary does not go with --l1, which selects coefficients by the same rows: "
            "standard errors that ignore this would be too small; --l2 alone has a summary"
        )
    if plan.summary and plan.solver is Solver.FIRTH:
        raise typer.BadParameter(
            "--summary does not go with --solver firth, for whose penalty softjax has no standard "
            "errors; --l2 with another solver has a summary"
        )


def check_effect(context: typer.Context, data: str, *, seeded: bool, several: bool) -> None:
    """Refuses an option of the command line that would have no effect.

    The seed may be used for nothing but the choice of the held-out rows, unless `seeded`. Without
    several processes, numbers of processes in the environment are not refused, since they may be
    meant for other programs.
    """
    without: dict[str, str] = {}
    if data == "digits":
        why = "the digits come with labels and held-out examples"
        names = ("label_column", "test_fraction", "skip_nonfinite", "impute", "drop", "category")
        names += ("separator", "encoding", "decimal", "any_classes")
        without |= dict.fromkeys(names, why)
        if not seeded:
            without["seed"] = "nothing of this fit to the digits is drawn at random"
    if not several:
        names = ("processes", "process_id", "patience")
        without |= dict.fromkeys(names, "without --coordinator there is one process")
    for name, why in without.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect: {why}")


def check_coordinator(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Refuses addresses and numbers on which JAX or the sockets would fail with a traceback."""
    if processes is not None and process_id is not None and process_id >= processes:
        fail(2, f"--process-id must be below --processes ({processes}), got {process_id}.")
    if coordinator in (None, "auto"):
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        fail(2, f"--coordinator must be HOST:PORT or auto, got {coordinator!r}.")
    if processes is None or process_id is None:
        fail(2, "--coordinator HOST:PORT needs --processes and --process-id.")
