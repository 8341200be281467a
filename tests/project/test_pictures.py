"""The pictures of the documentation are current, correct, legible and described in words."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import oracles
import pytest

from pictures.__main__ import FOLDER
from pictures.svg import (
    BOTTOM,
    COLORS,
    EM,
    FONT,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Panel,
    number,
)
from pictures.thread import PICTURES

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

NUMBER = re.compile(r"(?<![\w#])-?\d+(?:\.\d+)?")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawings():
    return {name: draw() for name, draw in PICTURES.items()}


def test_the_pictures_in_the_documentation_are_what_the_code_draws(drawings):
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(drawings)
    for name, drawing in drawings.items():
        there, drawn = (FOLDER / f"{name}.svg").read_text("utf-8"), drawing.text()
        hint = f"{name}.svg is not current: run python -m pictures"
        assert NUMBER.sub("#", there) == NUMBER.sub("#", drawn), hint
        # A tenth of a pixel: the last digit of a float32 depends on the machine.
        numbers = (np.array(NUMBER.findall(text), float) for text in (there, drawn))
        np.testing.assert_allclose(*numbers, rtol=0, atol=0.11, err_msg=hint)


def curves(drawings, name, panel=0):
    return {curve: (x, y) for curve, _, _, x, y in drawings[name].panels[panel].drawn}


def test_the_curves_are_those_of_the_formulas(drawings):
    def near(actual, exact):
        np.testing.assert_allclose(actual, exact, 2e-5, 1e-7)

    for x, y in curves(drawings, "log-loss").values():
        near(y, -np.log(x))
    (o, loss), (_, tangent) = curves(drawings, "gradient").values()
    near(loss, np.log1p(2 * np.exp(-o)))
    near(tangent, np.log(3) - 2 / 3 * o)
    p = oracles.softmax(np.stack([o, 0 * o, 0 * o], -1))
    for (_, y), exact in zip(
        curves(drawings, "gradient", 1).values(), (p[:, 0] - 1, p[:, 1], 0 * o), strict=True
    ):
        np.testing.assert_allclose(y, exact, 2e-5, 2e-7)
    under, of = curves(drawings, "variance").values()
    near(under[1], under[0] * (1 - under[0]))
    near(of[1], (of[0] - 0.5) ** 2)
    for name, (b, y) in curves(drawings, "real-softmax").items():
        if name != "max":
            lam = float(name.removeprefix("λ = "))
            near(y, oracles.smooth_max(np.stack([0 * b, b], -1), temperature=1 / lam))
            assert np.all(y >= np.maximum(0, b))
    for (lam, y), exact in zip(
        curves(drawings, "real-softmax", 1).values(),
        (
            lambda lam: np.log(10) / lam,
            lambda lam: np.log(2) / lam,
            lambda lam: np.log1p(np.exp(-2 * lam)) / lam,
        ),
        strict=True,
    ):
        np.testing.assert_allclose(y, exact(lam), 2e-5)
    for name, (b, y) in curves(drawings, "soft-min").items():
        if name != "min":
            lam = float(name.removeprefix("λ = "))
            near(y, -oracles.smooth_max(np.stack([0 * b, -b], -1), temperature=1 / lam))
            assert np.all(y <= np.minimum(0, b))
    *three, (d, two) = curves(drawings, "neither").values()
    p = oracles.softmax(np.stack([d / 2, -d / 2, 0 * d], -1))
    for (_, y), exact in zip(three, p.T, strict=True):
        near(y, exact)
    near(two, 1 / (1 + np.exp(-d)))
    (lam, right), (_, wrong), (last, plain) = curves(drawings, "miscoded").values()
    near(right, [oracles.smooth_max(np.array([2.0, 4.0]), temperature=1 / v) for v in lam])
    near(wrong, (np.log(lam) + np.log(np.exp(2) + np.exp(4))) / lam)
    near(plain, [4.0])
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(4 * (last[0] + np.arange(2)))).tolist() == [False, True]
    (x, g), (_, tangent), (_, touch) = curves(drawings, "log-partition").values()
    near(g, np.log1p(np.exp(x)))
    near(tangent, touch + oracles.softmax(np.array([1.0, 0.0]))[0] * (x - 1))
    assert np.all(tangent <= g + 1e-6)
    rows = curves(drawings, "temperature")
    temperatures = rows["logit 2"][0]
    p = np.array([oracles.softmax(np.array([2.0, 1, 0]), temperature=t) for t in temperatures])
    near(np.stack([rows[f"logit {k}"][1] for k in (2, 1, 0)], -1), p)


def test_softjax_stays_on_the_exact_loss_of_a_confident_row(drawings):
    lines = curves(drawings, "confident-row")
    gap, ours = lines["softjax"]
    np.testing.assert_allclose(ours, np.log1p(np.exp(-gap)), 1e-5)
    # What the picture says of jax.nn: nothing is left where the loss is below half an ulp of 1.
    theirs = lines["jax.nn (then 0)"][1]
    assert np.all(theirs[gap >= 18] == 0)
    assert np.all(theirs[gap <= 16] > 0)


def test_the_hessian_is_near_the_covariance_of_the_draws(drawings):
    hessian, covariance = (panel.values for panel in drawings["covariance"].panels)
    np.testing.assert_allclose(hessian, oracles.hessian(np.log([0.7, 0.2, 0.1])), 1e-5, 1e-7)
    # Five standard errors of a covariance of 10,000 draws, each entry at most 1/2 / 100.
    np.testing.assert_allclose(hessian, covariance, atol=0.025)


def boxes(root):
    """Each text with its estimated box, in pixels; what is turned by a quarter is left out."""
    for group in root.iter(f"{SVG}g"):
        if "rotate" in group.get("transform", ""):
            continue
        down = float(group.get("transform").split(",")[1].rstrip(")"))
        for text in group.findall(f"{SVG}text"):
            x, y = float(text.get("x")), float(text.get("y")) + down
            width = EM * FONT * len(text.text)
            left = {"start": x, "end": x - width}.get(text.get("class"), x - width / 2)
            yield text.text, (left, y - FONT, left + width, y)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_and_told_in_words_and_nothing_in_it_overlaps(name, drawings):
    text = drawings[name].text()
    assert len(text) < 12_000
    root = ElementTree.fromstring(text)
    assert len(root.find(f"{SVG}desc").text) > 80
    width, height = float(root.get("width")), float(root.get("height"))
    placed = list(boxes(root))
    assert len(placed) > 10
    for words, (left, top, right, bottom) in placed:
        assert 0 <= left <= right <= width, words
        assert 0 <= top <= bottom <= height, words
    for (words, a), (others, b) in itertools.combinations(placed, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{words} overlaps {others}"


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_every_colour_stands_out_from_the_card(which):
    """At least 4.5 to 1, what WCAG 2 asks of text."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    card = luminance(COLORS["card"][which])
    for name, pair in COLORS.items():
        if name not in ("card", "grid"):
            low, high = sorted([card, luminance(pair[which])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_the_pages_show_every_picture_with_a_text_in_its_place():
    page = (Path(FOLDER).parent / "thread.md").read_text("utf-8")
    shown = dict(re.findall(r"!\[([^\]]*)\]\(pictures/([\w-]+)\.svg\)", page))
    assert set(shown.values()) == set(PICTURES)
    assert all(len(words) > 30 for words in shown)


def test_numbers_are_short():
    shown = ["0", "0.25", "-2", "10⁻⁹", "1000", "10⁻⁴"]
    assert [number(value) for value in (0, 0.25, -2, 1e-9, 1000, 1e-4)] == shown


def test_a_panel_places_its_corners():
    panel = Panel("", Axis("x", [0, 2]), Axis("y", [1, 100], logarithmic=True))
    assert panel.place(0, 1) == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f}"
    assert panel.place(2, 100) == f"{WIDTH - RIGHT:.1f},{TOP:.1f}"
    middle = (HEIGHT - BOTTOM + TOP) / 2
    assert panel.place(1, 10) == f"{(LEFT + WIDTH - RIGHT) / 2:.1f},{middle:.1f}"
