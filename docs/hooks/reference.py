"""One page for each public name, in the order and under the headings of docs/api.md."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

API = Path(__file__).parents[1] / "api.md"
HEADING = re.compile(r"^## (.+)$")
ROW = re.compile(r"^\| \[`(softjax[\w.]*)`\]\([^)]*\)", re.MULTILINE)


def groups() -> dict[str, list[str]]:
    """The headings of docs/api.md, and the full names below each."""
    found: dict[str, list[str]] = {}
    for line in API.read_text().splitlines():
        if heading := HEADING.match(line):
            found[heading[1].split(":")[0]] = []
        elif row := ROW.match(line):
            list(found.values())[-1].append(row[1])
    return found


def page(name: str) -> str:
    """The page of a name, from the root of the documents."""
    return f"reference/{name}.md"


def on_config(config):
    """Puts the pages of the names below docs/api.md in the navigation."""
    sections = [
        {title: [{name.rsplit(".", 1)[1]: page(name)} for name in names]}
        for title, names in groups().items()
    ]
    for item in config.nav:
        if item == {"Reference": "api.md"}:
            item["Reference"] = ["api.md", *sections]
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages, which mkdocstrings fills."""
    for names in groups().values():
        for name in names:
            short = name.rsplit(".", 1)[1]
            text = f"---\ntitle: {short}\n---\n\n::: {name}\n"
            files.append(File.generated(config, page(name), content=text))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """In docs/api.md, changes the links from source files to the pages of the names."""
    if page.file.src_uri != "api.md":
        return markdown
    return ROW.sub(lambda row: f"| [`{row[1]}`](reference/{row[1]}.md)", markdown)
