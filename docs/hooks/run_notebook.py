"""Runs a notebook of examples/ and writes its visible results: `run_notebook.py SCRIPT FOLDER`.

A notebook is a Python script with cells ("percent" format), which Jupyter can open with jupytext.
The output of a cell is what it prints, and the value of its last line. If a cell leaves a figure
open, the figure, as SVG, replaces this value; the line that opens the cell has the text alternative
of the figure: # %% alt="A line that falls".
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import jupytext
import matplotlib

matplotlib.use("Agg")  # before pyplot is imported, which would look for a screen
from matplotlib import pyplot

STYLE = {
    "figure.figsize": (6.4, 3.2),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "softjax",  # so that a picture is the same in every run
}


def main(script: Path, folder: Path) -> None:
    """Writes NAME.json, a list of cells, and the pictures NAME-1.svg, ..."""
    matplotlib.rcParams.update(STYLE)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, pictures = [], 0
    for cell in jupytext.read(script, fmt="py:percent").cells:
        if cell.cell_type == "markdown":
            cells.append({"markdown": cell.source})
            continue
        output = run_cell(cell.source, f"{script.name}, cell {len(cells)}", namespace)
        shown = {"code": cell.source, "output": output, "pictures": []}
        for figure in _open_figures():
            if "alt" not in cell.metadata:
                raise ValueError(f"{script.name}: a figure needs a text alternative: {cell.source}")
            pictures += 1
            name = f"{script.stem}-{pictures}.svg"
            figure.savefig(folder / name, metadata={"Date": None})
            shown["pictures"].append([name, cell.metadata["alt"]])
        cells.append(shown)
    (folder / f"{script.stem}.json").write_text(json.dumps(cells))


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> str:
    """What a cell prints, and the value of its last line if there is one and no figure."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            if value is not None and not pyplot.get_fignums():
                print(repr(value))
    return printed.getvalue()


def _open_figures() -> list[Any]:
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
