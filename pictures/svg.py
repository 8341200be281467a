"""A small writer of SVG: panels with axes, curves, dots and cells, for light and dark pages.

matplotlib would write every letter and every tick as a path whose numbers depend on its version.
These files are a few kilobytes, differ only if the picture differs, and follow the colours that a
reader prefers. Panels are stacked vertically, so that the words are large enough on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT = 480, 300
# The margins of a panel: left, right, top (title and legend) and bottom.
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 58, 46
FONT = 13
# The width of a letter relative to the font size, rounded up.
EM = 0.58
# Ink, grid, card and the colours of the series, on a light page and on a dark one.
COLORS = {
    "ink": ("#1f2937", "#e5e7eb"),
    "grid": ("#d1d5db", "#4b5563"),
    "card": ("#ffffff", "#111827"),
    "gray": ("#6b7280", "#9ca3af"),
    "blue": ("#1d4ed8", "#60a5fa"),
    "orange": ("#c2410c", "#fb923c"),
    "green": ("#15803d", "#4ade80"),
    "purple": ("#7e22ce", "#c084fc"),
}


@dataclass(frozen=True)
class Axis:
    """Values along a side of a panel.

    Attributes:
        label: the name of the values.
        ticks: values with a number and a grid line; the axis reaches from the first to the last.
        logarithmic: whether equal ratios take equal space.
    """

    label: str
    ticks: Sequence[float]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """The position of a value along the axis, from 0 to 1."""
        scale = math.log if self.logarithmic else float
        first, last = scale(self.ticks[0]), scale(self.ticks[-1])
        return (scale(value) - first) / (last - first)


@dataclass
class Panel:
    """A pair of axes under a title, with a legend of the series.

    Attributes:
        title: in one line.
        x, y: the axes.
        height: the height of the panel.
        drawn: for each series its name, its colour, its style (`line`, `dashed`, `dots`, `rings`)
            and its values; the tests compare them with the expected values.
    """

    title: str
    x: Axis
    y: Axis
    height: int = HEIGHT
    drawn: list[tuple[str, str, str, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(
        self, name: str, color: str, x: Iterable[float], y: Iterable[float], style: str = "line"
    ) -> None:
        """Draws y against x; values outside of the axes are not shown."""
        xs, ys = (np.asarray(values, np.float64) for values in (x, y))
        self.drawn.append((name, color, style, xs, ys))

    def place(self, x: float, y: float) -> str:
        """The point of a pair of values, in pixels of the panel."""
        across = LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x)
        down = self.height - BOTTOM - (self.height - TOP - BOTTOM) * self.y.share(y)
        return f"{across:.1f},{down:.1f}"

    def elements(self) -> list[str]:
        """The panel with its upper left corner at 0, 0."""
        right, bottom = WIDTH - RIGHT, self.height - BOTTOM
        parts = [words(WIDTH / 2, 20, self.title, "title"), *self._grid()]
        parts += [
            words((LEFT + right) / 2, self.height - 8, self.x.label),
            f'<g transform="rotate(-90)">{words(-(TOP + bottom) / 2, 14, self.y.label)}</g>',
        ]
        for _, color, style, xs, ys in self.drawn:
            parts += _marks(color, style, [self.place(x, y) for x, y in self._inside(xs, ys)])
        return parts + self._legend()

    def _grid(self) -> list[str]:
        parts = []
        for value in self.x.ticks:
            across, down = self.place(value, self.y.ticks[0]).split(",")
            parts.append(f'<path class="grid" d="M{across},{TOP}V{down}"/>')
            parts.append(words(float(across), self.height - BOTTOM + 17, number(value)))
        for value in self.y.ticks:
            across, down = self.place(self.x.ticks[0], value).split(",")
            parts.append(f'<path class="grid" d="M{across},{down}H{WIDTH - RIGHT}"/>')
            parts.append(words(LEFT - 6, float(down) + 4, number(value), "end"))
        return parts

    def _inside(self, xs: np.ndarray, ys: np.ndarray) -> list[tuple[float, float]]:
        kept = np.isfinite(xs) & np.isfinite(ys)
        for axis, values in ((self.x, xs), (self.y, ys)):
            slack = 1e-6 * abs(axis.ticks[-1] - axis.ticks[0]) * (not axis.logarithmic)
            kept &= (values >= axis.ticks[0] - slack) & (values <= axis.ticks[-1] + slack)
        return list(zip(xs[kept].tolist(), ys[kept].tolist(), strict=True))

    def _legend(self) -> list[str]:
        """One line under the title; the entries share the width."""
        widths = [30 + EM * FONT * len(name) + 14 for name, *_ in self.drawn]
        across = (WIDTH - sum(widths)) / 2
        parts = []
        for (name, color, style, _, _), width in zip(self.drawn, widths, strict=True):
            places = [
                f"{across + shift:.1f},38"
                for shift in ((0, 24) if style in ("line", "dashed") else (12,))
            ]
            parts += _marks(color, style, places)
            parts.append(words(across + 30, 42, name, "start"))
            across += width
        return parts


@dataclass
class Cells:
    """A square matrix, each entry a cell with its number; blue above 0 and orange below.

    Attributes:
        title: in one line.
        names: of rows and columns.
        values: [n, n].
    """

    title: str
    names: Sequence[str]
    values: np.ndarray
    height: int = 250

    def elements(self) -> list[str]:
        """The matrix with its upper left corner at 0, 0."""
        parts = [words(WIDTH / 2, 20, self.title, "title")]
        n, largest = len(self.names), np.abs(self.values).max()
        wide, high, left, top = 90, 56, (WIDTH - 90 * n) / 2, 52
        for i, name in enumerate(self.names):
            parts.append(words(left + (i + 0.5) * wide, top - 10, name))
            parts.append(words(left - 10, top + (i + 0.5) * high + 4, name, "end"))
        for (row, column), value in np.ndenumerate(self.values):
            color, across, down = "blue" if value > 0 else "orange", left + column * wide, top
            parts.append(
                f'<rect class="fill-{color}" x="{across:.1f}" y="{down + row * high}" '
                f'width="{wide - 3}" height="{high - 3}" rx="4" '
                f'fill-opacity="{0.45 * abs(value) / largest:.2f}"/>'
            )
            center = (across + wide / 2 - 1.5, down + (row + 0.5) * high + 3)
            parts.append(words(*center, f"{value:.3f}"))
        return parts


def picture(title: str, description: str, panels: Sequence[Panel | Cells]) -> str:
    """The panels, one below the other, as the text of an SVG file.

    Args:
        title: a short text for readers who do not see the picture.
        description: a description of what the picture shows.
        panels: the panels from top to bottom.

    Returns:
        The text of the file.
    """
    height = sum(panel.height for panel in panels)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    named = 'role="img" aria-labelledby="title description"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {named}>',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        f"<style>{_style()}</style>",
        f'<rect class="card" width="{WIDTH}" height="{height}" rx="6"/>',
    ]
    top = 0
    for panel in panels:
        parts += [f'<g transform="translate(0,{top})">', *panel.elements(), "</g>"]
        top += panel.height
    return "\n".join([*parts, "</svg>", ""])


def words(x: float, y: float, text: str, role: str = "middle") -> str:
    """A text whose middle, start or end is at x, or a title; hyphens are shown as minus signs."""
    text = text.replace("-", "\N{MINUS SIGN}")
    return f'<text class="{role}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def number(value: float) -> str:
    """The text of a number; large and small numbers are powers of ten."""
    if value and not 1e-2 <= abs(value) < 1e5:
        powers = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        return "10" + str(round(math.log10(value))).translate(powers)
    return f"{value:g}"


def _marks(color: str, style: str, places: Sequence[str]) -> list[str]:
    looks = {"dots": f'class="fill-{color}" r="3"', "rings": f'class="ring {color}" r="5.5"'}
    if style in looks:
        centers = (place.split(",") for place in places)
        return [f'<circle {looks[style]} cx="{x}" cy="{y}"/>' for x, y in centers]
    return [f'<polyline class="{style} {color}" points="{" ".join(places)}"/>']


def _style() -> str:
    def rules(which: int) -> str:
        lines = [f".{name}{{stroke:{pair[which]}}}" for name, pair in COLORS.items()]
        lines += [f".fill-{name}{{fill:{pair[which]}}}" for name, pair in COLORS.items()]
        ink, card = COLORS["ink"][which], COLORS["card"][which]
        return "".join([*lines, f"text{{fill:{ink}}}.card{{fill:{card};stroke:none}}"])

    fixed = (
        f"text{{font:{FONT}px system-ui,sans-serif;text-anchor:middle}}"
        ".title{font-weight:600}.start{text-anchor:start}.end{text-anchor:end}"
        ".grid{stroke-width:.7}polyline{fill:none;stroke-width:2.2;stroke-linejoin:round}"
        ".ring{fill:none;stroke-width:1.8}.dashed{stroke-dasharray:6 5}"
    )
    return f"{fixed}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"
