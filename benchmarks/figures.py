"""The pictures of a report, as SVG that takes the colours of the page around it.

Text and axes are `currentColor` and grids `var(--grid)`, so that one picture is legible on light
and on dark pages. Each has one column or row a device.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Placeholders that the SVG is searched for; no palette has them.
INK, GRID = "#010203", "#040506"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "softjax",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
# Of middle lightness: legible on white and on black.
PALETTE = ("#f08c00", "#2f9e44", "#e64980", "#9775fa", "#12a5b8", "#c0792a", "#868e96", "#d9480f")
SOFTJAX = "#3b82f6"
# Where a logarithmic axis that spans less than a factor has its numbers, in each decade.
TICKS = (
    (2.5, (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)),
    (12, (1.0, 1.5, 2, 3, 4, 5, 7)),
    (400, (1.0, 2, 5)),
    (math.inf, (1.0,)),
)
MANY = 1e5
# A colour and a marker for each series; a colour comes again with another marker only.
SHAPES = "sD^vP*Xh"
LOOKS: list[tuple[str, str]] = [
    look
    for shift in range(len(SHAPES))
    for look in zip(PALETTE, SHAPES[shift:] + SHAPES[:shift], strict=True)
]
# Who keeps a look from picture to picture; peers of different groups are never in the same.
PEERS = (
    ("jax.nn", "optax", "torch", "torch compiled", "jaxopt", "scipy", "scikit-learn"),
    ("plain", "map"),
    ("scikit-learn lbfgs", "scikit-learn newton-cg", "scikit-learn newton-cholesky"),
)
KNOWN = {name: look for group in PEERS for name, look in zip(group, LOOKS, strict=False)}


@dataclass(frozen=True)
class Point:
    """A value of a series in a row, with its interval; None is a value that is not finite."""

    row: str
    series: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """Points (series, classes, value) under a title."""

    title: str
    points: Sequence[tuple[str, float, float]]


@dataclass(frozen=True)
class Roof:
    """The ceilings of a device, and what was measured: (series, operations a byte, a second)."""

    bytes_per_second: float
    flops_per_second: float
    points: Sequence[tuple[str, float, float]]


def dots(
    columns: Sequence[tuple[str, Sequence[Point]]], xlabel: str, line: float | None = None
) -> str:
    """One row a case, one column a device, one marker an implementation, on a logarithmic axis."""
    rows = list(dict.fromkeys(point.row for _, points in columns for point in points))
    looks = _looks(point.series for _, points in columns for point in points)
    with mpl.rc_context(STYLE):
        size = 3.2 + max(3.6 * len(columns), 6.5), 1.1 + 0.24 * len(rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(columns), sharey=True, sharex=True, squeeze=False)[0]
        values = [p.value for _, points in columns for p in points if p.value]
        edge = 2 * max(values, default=1.0)
        for axes, (title, points) in zip(grid, columns, strict=True):
            axes.set(title=title, xlabel=xlabel, xscale="log", ylim=(len(rows) - 0.4, -0.6))
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(axis="y", length=0)
            if line is not None:
                axes.axvline(line, color=INK, linewidth=1)
            # Softjax last and smaller: where both are equal, both are seen.
            for point in sorted(points, key=lambda point: looks[point.series][0] == SOFTJAX):
                _dot(axes, rows.index(point.row), point, looks[point.series], edge)
            _plain_numbers(axes.xaxis)
        _legend(figure, looks)
        return _svg(figure)


def against_classes(
    grid: Sequence[tuple[str, Sequence[Panel]]], ylabel: str, logarithmic: bool
) -> str:
    """One row a device, one column an operation, one line an implementation."""
    looks = _looks(name for _, row in grid for panel in row for name, _, _ in panel.points)
    width = max(len(row) for _, row in grid)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.8 * width, 0.6 + 2.5 * len(grid)), layout="constrained")
        panels = figure.subplots(len(grid), width, sharex=True, sharey=True, squeeze=False)
        for k, (axes_row, (device, row)) in enumerate(zip(panels, grid, strict=True)):
            for axes, panel in zip(axes_row, row, strict=True):
                axes.set(xscale="log", yscale="log" if logarithmic else "linear")
                if k == 0:
                    axes.set_title(panel.title)
                # As in `dots`.
                for name, (colour, marker) in reversed(looks.items()):
                    size = 4 if colour == SOFTJAX else 5.5
                    own = sorted((x, y) for series, x, y in panel.points if series == name)
                    if own:
                        look = {"color": colour, "marker": marker, "markersize": size}
                        axes.plot(*zip(*own, strict=True), linewidth=1.3, **look)
                axes.xaxis.set_major_locator(LogLocator(numticks=8))
                axes.xaxis.set_minor_formatter(NullFormatter())
                if logarithmic:
                    _plain_numbers(axes.yaxis)
            axes_row[0].set_ylabel(f"{ylabel}\n{device}" if len(grid) > 1 else ylabel)
        for axes in panels[-1]:
            axes.set_xlabel("classes")
        _legend(figure, looks)
        return _svg(figure)


def rooflines(devices: Sequence[tuple[str, Roof]]) -> str:
    """Operations a second against operations a byte, below what memory and arithmetic allow."""
    looks = _looks((name for _, roof in devices for name, _, _ in roof.points), ours=False)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5 + 4.6 * len(devices), 4.2), layout="constrained")
        grid = figure.subplots(1, len(devices), squeeze=False)[0]
        for axes, (title, roof) in zip(grid, devices, strict=True):
            for name, intensity, speed in roof.points:
                colour, marker = looks[name]
                axes.plot(intensity, speed, marker, color=colour, markersize=5, alpha=0.85)
            ridge = roof.flops_per_second / roof.bytes_per_second
            right = max([p[1] for p in roof.points] + [ridge]) * 4
            # A third of the width at least is the slope's, and so its number has a place.
            left = min([p[1] / 2 for p in roof.points] + [ridge * (ridge / right) ** 0.5])
            xs = (left, ridge, right)
            ys = [min(roof.flops_per_second, roof.bytes_per_second * x) for x in xs]
            axes.plot(xs, ys, color=INK, linewidth=1.2)
            axes.annotate(
                f"{roof.flops_per_second / 1e9:,.0f} GFLOP/s",
                (right, ys[2]),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
            )
            axes.annotate(
                f"{roof.bytes_per_second / 1e9:,.0f} GB/s",
                (left**0.25 * ridge**0.75, ys[0] ** 0.25 * ys[1] ** 0.75),
                xytext=(-6, 6),
                textcoords="offset points",
                ha="right",
            )
            axes.set(xscale="log", yscale="log", title=title)
            axes.set(xlabel="operations a byte", ylabel="operations a second")
            _plain_numbers(axes.xaxis)
        _legend(figure, looks, beside=True)
        return _svg(figure)


def _dot(axes: Axes, row: int, point: Point, look: tuple[str, str], edge: float) -> None:
    colour, marker = look
    if point.value is None:
        axes.plot(edge, row, ">", color=colour, markersize=5)
        axes.annotate("not finite", (edge, row), xytext=(6, -3), textcoords="offset points")
        return
    if point.low is not None and point.high is not None:
        axes.plot((point.low, point.high), (row, row), color=colour, linewidth=1.6)
    size = 4 if colour == SOFTJAX else 5.5
    axes.plot(point.value, row, marker, color=colour, markersize=size)


def _looks(names: Iterable[str], ours: bool = True) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each series; softjax and the usual peers keep their own."""
    unique = list(dict.fromkeys(names))
    softjax = [name for name in unique if ours and name.startswith("softjax")]
    known = [name for name in KNOWN if name in unique]
    looks = dict.fromkeys(softjax, (SOFTJAX, "o")) | {name: KNOWN[name] for name in known}
    free = [look for look in LOOKS if look not in looks.values()]
    others = [name for name in unique if name not in looks]
    return looks | dict(zip(others, cycle(free), strict=False))


def _legend(figure: Figure, looks: dict[str, tuple[str, str]], beside: bool = False) -> None:
    """Below the panels in as many columns as fit, or beside them in one."""
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in looks.items()
    ]
    if beside:
        figure.legend(handles=handles, loc="outside right upper")
    elif handles:
        inches = 0.55 + 0.085 * max(map(len, looks))
        columns = min(len(looks), max(1, int(figure.get_figwidth() // inches)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _plain_numbers(axis) -> None:
    """0.5 and 2 rather than powers of ten, unless there are many of these."""
    low, high = axis.get_view_interval()
    if high > MANY * low:
        axis.set_major_locator(LogLocator(numticks=9))
        return
    subs = next(subs for span, subs in TICKS if high < span * low)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _svg(figure: Figure) -> str:
    """The picture without the header of a file, in the colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
