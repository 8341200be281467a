"""Checks that the options of `softjax fit` go together and have an effect."""

from collections.abc import Sequence
from typing import Any

import typer

from softjax.cli._app import Solver
from softjax.processes import fail


def check_in_memory(
    solver: Solver,
    first_order_options: Sequence[Any],
    penalties: Sequence[float],
    l1: float,
    max_steps: int | None,
    summary: bool,
) -> None:
    """Refuses options of a fit in memory that do not go together.

    Args:
        solver: "optax" in place of "auto" where one of its options is given.
        first_order_options: those of "optax"; None where they are not given.
        penalties: of --l2.
        l1: of --l1.
        max_steps: of --max-steps.
        summary: whether --summary is given.
    """
    first_order = solver is Solver.OPTAX
    if not first_order and any(option is not None for option in first_order_options):
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


def check_effect(context: typer.Context, data: str, *, seeded: bool, several: bool) -> None:
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
        names = ("label_column", "test_fraction", "skip_nonfinite", "impute", "drop", "category")
        names += ("separator", "encoding", "any_classes")
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
