"""The pictures of a report: Altair charts, as SVG in the colours of the surrounding page.

Text and axes are `currentColor` and grids `var(--grid)`, so that a picture is legible on light and
on dark pages. A picture is at most `WIDTH` wide; a narrower page scrolls it.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

WIDTH = 325
INK, GRID = "currentColor", "var(--grid)"
# Colours of medium lightness, which are legible on white and on black; softjax has the first.
PALETTE = ("#3b82f6", "#f08c00", "#2f9e44", "#e64980", "#9775fa", "#12a5b8", "#c0792a", "#868e96")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
AXIS = {"labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK}
STYLE = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": AXIS | {"gridColor": GRID, "labelLimit": 340, "titleFontWeight": "normal"},
    "legend": {
        "labelColor": INK,
        "title": None,
        "labelLimit": 300,
        "titleColor": INK,
        "orient": "top",
    },
    "header": {"labelColor": INK, "titleColor": INK, "labelLimit": 400},
}


def svg(chart: alt.TopLevelMixin) -> str:
    """A chart as SVG, in the colours of the page."""
    return vl_convert.vegalite_to_svg(chart.to_dict(validate=False) | {"config": STYLE})


def look(sides: Sequence[str]) -> dict:
    """A colour and a marker for each side."""
    shapes = [SHAPES[k % len(SHAPES)] for k in range(len(sides))]
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(sides))]
    legend = alt.Legend(columns=1 if max(map(len, sides)) > 20 else 2)
    return {
        "color": alt.Color(
            "side:N", scale=alt.Scale(domain=list(sides), range=colours), legend=legend
        ),
        "shape": alt.Shape("side:N", scale=alt.Scale(domain=list(sides), range=shapes)),
    }


def logarithmic(field: str, title: str, base: int = 10) -> dict:
    """A logarithmic axis with plain numbers."""
    axis = alt.Axis(format=".3~g", tickCount=5)
    scale = alt.Scale(type="log", base=base, nice=False)
    return {"shorthand": f"{field}:Q", "title": title, "axis": axis, "scale": scale}


def dots(
    frame: pd.DataFrame, title: str, sides: Sequence[str], line: float | None = None
) -> alt.TopLevelMixin:
    """A line for each case below its name, with a marker and an interval for each side.

    Args:
        frame: columns case, side, device, value, low and high.
        title: what the values are.
        sides: all sides that have a colour, in order.
        line: the position of a rule.
    """
    above = alt.Axis(
        labelAlign="left", labelPadding=0, labelOffset=-11, ticks=False, domain=False, grid=True
    )
    y = alt.Y("case:N", sort=None, title=None, axis=above)
    base = alt.Chart(frame).encode(y=y, **look(sides))
    layers: list[Any] = [
        base.mark_rule().encode(x=alt.X(**logarithmic("low", title)), x2="high:Q"),
        base.mark_point(filled=True, size=45, opacity=0.9).encode(
            x=alt.X(**logarithmic("value", title))
        ),
    ]
    if line is not None:
        layers.append(alt.Chart(frame).mark_rule(color=INK).encode(x=alt.datum(line)))
    chart: Any = alt.layer(*layers, data=frame).properties(width=WIDTH, height=alt.Step(32))
    return by_device(chart, frame)


def curves(
    frame: pd.DataFrame, x: str, title: str, sides: Sequence[str], base: int = 10
) -> alt.TopLevelMixin:
    """A line for each side against a number; a panel for each panel of the frame."""
    size = WIDTH // 2 - 25
    one = (
        alt.Chart(frame)
        .mark_line(point=alt.OverlayMarkDef(filled=True, size=45))
        .encode(
            x=alt.X(**logarithmic(x, x, base)),
            y=alt.Y(**logarithmic("value", title)),
            **look(sides),
        )
        .properties(width=size, height=size)
    )
    return one.facet(alt.Facet("panel:N", header=alt.Header(title=None)), columns=2)


def roofline(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """Operations per second against operations per byte, below the ceilings of each run."""
    x = alt.X(**logarithmic("intensity", "operations a byte"))
    scale, legend = alt.Scale(range=list(PALETTE)), alt.Legend(columns=1)
    colour = alt.Color("operation:N", scale=scale, legend=legend)
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=45)
        .encode(x=x, y=alt.Y(**logarithmic("speed", "operations a second")), color=colour)
    )
    roof = alt.Chart(frame).mark_line(color=INK).encode(x=x, y="ceiling:Q", order="intensity:Q")
    chart: Any = alt.layer(points, roof, data=frame).properties(width=WIDTH)
    return by_device(chart, frame)


def by_device(chart: alt.LayerChart, frame: pd.DataFrame) -> alt.TopLevelMixin:
    """One panel for each device, one below the other, if there are several devices."""
    if frame.device.nunique() == 1:
        return chart
    facets = chart.facet(alt.Facet("device:N", header=alt.Header(title=None)), columns=1)
    return facets.resolve_scale(y="independent")
