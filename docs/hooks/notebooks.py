"""One page for each notebook in examples/, with its outputs and pictures.

The notebooks run while the site is built, two at a time. Their outputs are kept in build/notebooks
until the notebook or the package changes. With NOTEBOOKS=unexecuted in the environment the pages
show only the code.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "docs" / "hooks" / "run_notebook.py"
NOTE = """\
!!! note "This page is a notebook"
    It is `examples/{script.name}` in the repository, and runs each time the site is built.
    [Download it for Jupyter]({script.stem}.ipynb)."""
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def on_files(files: Files, config) -> Files:
    """Adds the pages, the pictures, and the notebooks to download."""
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(_folder, SCRIPTS))
    for script, folder in zip(SCRIPTS, folders, strict=True):
        text = script.read_text()
        notebook = jupytext.reads(text, fmt="py:percent")
        cells = _unexecuted(notebook) if folder is None else _read(folder, script)
        page = f"notebooks/{script.stem}.md"
        files.append(File.generated(config, page, content=_page(script, cells)))
        for name in (name for cell in cells for name, _ in cell.get("pictures", ())):
            content = (folder / name).read_bytes()
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        content = jupytext.writes(notebook, fmt="ipynb")
        files.append(File.generated(config, f"notebooks/{script.stem}.ipynb", content=content))
    return files


def _folder(script: Path) -> Path | None:
    """The folder with the outputs of a notebook, which is run if there are none yet."""
    if os.environ.get("NOTEBOOKS") == "unexecuted":
        return None
    digest = hashlib.sha256()
    for path in (script, RUNNER, *sorted((ROOT / "softjax").rglob("*.py"))):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "notebooks" / f"{script.stem}-{digest.hexdigest()[:16]}"
    if not (folder / f"{script.stem}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(RUNNER), str(script), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PluginError(f"{script.name} failed:\n{done.stdout}{done.stderr}")
    return folder


def _read(folder: Path, script: Path) -> list[dict[str, Any]]:
    return json.loads((folder / f"{script.stem}.json").read_text())


def _unexecuted(notebook: Any) -> list[dict[str, Any]]:
    kinds = {"markdown": "markdown", "code": "code"}
    return [{kinds[cell.cell_type]: cell.source} for cell in notebook.cells]


def _page(script: Path, cells: list[dict[str, Any]]) -> str:
    """The notebook as Markdown; a line below its title tells where to download it."""
    title, *rest = cells
    parts = [
        title["markdown"],
        NOTE.format(script=script),
    ]
    for cell in rest:
        if "markdown" in cell:
            parts.append(cell["markdown"])
            continue
        parts.append(f"```python\n{cell['code']}\n```")
        if cell.get("output"):
            parts.append(f"```{{ .text .output }}\n{cell['output'].rstrip()}\n```")
        parts += [f"![{alt}]({name})" for name, alt in cell.get("pictures", ())]
    return "\n\n".join(parts)
