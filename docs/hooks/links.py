"""Links that lead out of docs/ are changed to copies of the files in the site."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
DOCTEST = re.compile(r"^```python\n(?=>>> )", re.MULTILINE)
# The marks of `python -m benchmarks docs`, which would end a paragraph at the start of a line.
MARK = re.compile(r"<!-- (?:benchmarks: [\w -]+|end) -->")
PAGES = {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md")} | {"README.md": "index.md"}


def on_files(files: Files, config) -> Files:
    """Adds the documents at the root, and the other files to which a document links."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        if file.abs_src_path is None:
            continue
        for _, target, _ in LINK.findall(Path(file.abs_src_path).read_text()):
            path = _path(file, target)
            if path is None or _page(path):
                continue
            if files.get_file_from_path(_copy(path)) is None:
                content = (ROOT / path).read_bytes()
                files.append(File.generated(config, _copy(path), content=content))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Changes links to the copies, colours examples as sessions, and removes the marks."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # which would show one line
    here = PurePosixPath(page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        path = _path(page.file, match[2])
        if path is None:
            return match[0]
        target = _page(path) or _copy(path)
        return match[1] + "/".join([".."] * len(here.parts) + [target]) + match[3]

    return DOCTEST.sub("```pycon\n", LINK.sub(link, MARK.sub("", markdown)))


def _path(file: File, target: str) -> str | None:
    """The file of the repository, relative to its root, to which a link leads; None for others."""
    if "://" in target or file.abs_src_path is None:
        return None
    path = (Path(file.abs_src_path).parent / target).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_file() else None


def _page(path: str) -> str | None:
    """The page of the site that shows a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/"):
        return f"notebooks/{Path(path).stem}.md"
    return PAGES.get(path)


def _copy(path: str) -> str:
    """The path of the copy of a file, with an ending that every browser shows as text."""
    return f"files/{path}.txt"
