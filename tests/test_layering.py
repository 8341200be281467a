"""Imports go downwards only, and `import softjax` brings nothing that the core does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softjax

PACKAGE = Path(softjax.__file__).parent
ROOT = PACKAGE.parent
LAYERS = (
    {"_checks", "_numerics", "_sharding"},
    {"_labels", "_logsumexp", "_losses", "_smooth_extrema", "_softmax"},
    {"derivatives", "information"},
    {"_cross_entropy", "_linear_cross_entropy", "calibration", "choice"},
    {"regression"},
    {"accuracy", "datasets", "parallel", "plots", "processes", "tables"},
    {"checkpoints", "streaming"},
    {"cli", "launch", "__main__"},
)
# Of the extras. What jax itself imports where it is installed, as scipy, is not ours to avoid.
EXTRAS = {"typer", "rich", "matplotlib", "mpmath", "scipy", "pandas", "pyarrow", "sklearn", "orbax"}

pytestmark = pytest.mark.x64_once


def layer(module: str) -> int:
    found = [n for n, names in enumerate(LAYERS) if module in names]
    assert len(found) == 1, f"softjax.{module} is in {len(found)} rows of LAYERS: give it one"
    return found[0]


def modules() -> dict[str, list[Path]]:
    """The files of every module or subpackage directly below softjax."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first != "__init__":
            found.setdefault(first, []).append(file)
    return found


def imported(file: Path) -> set[str]:
    """The modules directly below softjax that a file imports, at any place in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.split(".")[1] for name in names if name.startswith("softjax.")}
    return {name for name in below if name in modules()}


def below(module: str) -> set[str]:
    return set().union(*(imported(file) for file in modules()[module])) - {module}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downwards(module):
    for other in below(module):
        assert layer(other) <= layer(module), f"{module} imports {other}, of a layer above it"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_never_come_back(module):
    """Within one layer too: no module is among those that it imports, at any remove."""
    reached, fresh = set(), below(module)
    while fresh:
        reached |= fresh
        fresh = set().union(*map(below, fresh)) - reached
    assert module not in reached


def test_the_init_file_only_names():
    documentation, *imports = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(documentation, ast.Expr)
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in node.names)


def test_importing_softjax_imports_no_extra():
    def extras_of(*names: str) -> set[str]:
        program = f"import sys, {', '.join(names)}; print(*({EXTRAS!r} & set(sys.modules)))"
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return set(run.stdout.split())

    ours = extras_of("softjax")
    assert ours <= {"scipy"}
    assert ours <= extras_of("jax", "optax", "chex")
