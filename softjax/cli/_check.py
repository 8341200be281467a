"""`softjax check`: the accuracy on this device."""

import sys
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softjax import accuracy
from softjax.cli._app import app


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
