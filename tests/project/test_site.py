"""The site: it is built strictly, has a page for every public name, and needs no network.

The notebooks are not run here. `.ci/run` builds the whole site and then runs these tests on it,
with SITE=build/site in the environment.
"""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_project import MODULES, ROOT, public_names

pytestmark = pytest.mark.x64_once


class Page(HTMLParser):
    """What a page refers to: its links, what it loads, its anchors and its pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.text = path, path.read_text()
        self.links, self.loads, self.anchors, self.pictures = [], [], set(), []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") != "canonical":
            self.loads.append(attributes["href"])
        elif attributes.get("src"):
            self.loads.append(attributes["src"])
        if tag == "img":
            self.pictures.append(attributes)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if "SITE" in os.environ:
        return Path(os.environ["SITE"]).resolve()
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NOTEBOOKS": "unexecuted"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    # The server shows 404.html at any address, so that its links begin at the root.
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_page_with_signature_example_and_source(module, site, pages):
    index = (site / "search" / "search_index.json").read_text()
    for name, value in public_names(importlib.import_module(f"softjax{module}")).items():
        full = f"softjax{module}.{name}"
        page = pages[site / "reference" / f"{full}.html"]
        assert full in page.anchors
        assert 'class="mkdocstrings-source"' in page.text
        assert '<span class="gp">&gt;&gt;&gt; </span>' in page.text, f"{full} shows no example"
        if not isinstance(value, type):
            assert "doc-signature" in page.text
        assert f"reference/{full}.html" in index


def test_every_link_leads_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme in ("https", "data") or link == ".":
                continue
            assert not parts.scheme, f"{path}: {link}"
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html":
                # Material names a section of the search by a fragment of its own.
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"


def test_no_page_loads_anything_from_another_host(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path}: {address}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text()), path


def test_every_picture_has_a_text_alternative(pages):
    for path, page in pages.items():
        for picture in page.pictures:
            assert picture.get("alt"), f"{path}: {picture}"


def test_every_notebook_has_a_page_and_can_be_downloaded(site, pages):
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 7
    for script in scripts:
        page = pages[site / "notebooks" / f"{script.stem}.html"]
        assert f"{script.stem}.ipynb" in page.links
        executed = ' output highlight"' in page.text
        assert executed == ("SITE" in os.environ), f"{script.name} was not run"


def test_every_formula_is_drawn_without_a_script(site, pages):
    mathematics = pages[site / "mathematics.html"].text
    assert mathematics.count("<math ") > 100
    for path, page in pages.items():
        assert "arithmatex" not in page.text, path
        assert "<merror" not in page.text, path
        for math in re.findall(r"<math .*?</math>", page.text, re.DOTALL):
            assert "\\" not in math, f"{path}: {math}"


def test_the_search_of_a_page_that_is_a_file_has_its_index_and_its_worker(site, pages):
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = {")
    assert "assets/iframe-worker.js" in pages[site / "index.html"].loads
