"""Imports obey the table in CONTRIBUTING.md, and `import softjax` needs no extra."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import softjax

PACKAGE = Path(softjax.__file__).parent
ROOT = PACKAGE.parent
TABLE = re.findall(r"^\| \d \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
LAYERS = [set(re.findall(r"`(\w+)`", row)) for row in TABLE]
# Of the extras. What jax itself imports where it is installed, as scipy, is not ours to avoid.
EXTRAS = {"typer", "rich", "matplotlib", "mpmath", "scipy", "pandas", "pyarrow", "sklearn", "orbax"}

pytestmark = pytest.mark.x64_once


def layer(module: str) -> int:
    found = [n for n, names in enumerate(LAYERS) if module in names]
    assert len(found) == 1, f"softjax.{module} is in {len(found)} rows of the table: give it one"
    return found[0]


@cache
def modules() -> dict[str, list[Path]]:
    """The files of every module or subpackage directly below softjax."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first != "__init__":
            found.setdefault(first, []).append(file)
    return found


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imported(file: Path) -> set[str]:
    """The modules directly below softjax that a file imports, at any place in it.

    Imports below `if TYPE_CHECKING:` in an `__init__.py` do not run: a name that is loaded by its
    first use has its type there.
    """
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    if file.name == "__init__.py":
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.split(".")[1] for name in names if name.startswith("softjax.")}
    return {name for name in below if name in modules()}


@cache
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


def test_the_table_has_no_module_more():
    assert set().union(*LAYERS) == set(modules())


# The rows of the files inside a package: {package: [names of row 0, names of row 1, ...]}.
INSIDE: dict[str, list[set[str]]] = {}
for package, _, row in re.findall(
    r"^\| `(\w+)` (\d) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
):
    INSIDE.setdefault(package, []).append(set(re.findall(r"`(\w+)`", row)))


@cache
def inside(package: str) -> dict[str, set[str]]:
    """Each file and folder of a package, and which others of the package it imports."""
    folder, prefix = PACKAGE / package, f"softjax.{package}."
    found: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        nodes = ast.walk(ast.parse(file.read_text()))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        below = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
        found.setdefault(own, set()).update(below - {own})
    del found["__init__"]
    return {own: below & set(found) for own, below in found.items()}


@pytest.mark.parametrize("package", sorted(INSIDE))
def test_imports_inside_a_package_go_downwards(package):
    rows = {name: n for n, names in enumerate(INSIDE[package]) for name in names}
    assert set(rows) == set(inside(package)), "give each file one row in CONTRIBUTING.md"
    assert len(rows) == sum(map(len, INSIDE[package]))
    for name, below in inside(package).items():
        for other in below:
            assert rows[other] <= rows[name], f"{name} imports {other}, of a later row"


@pytest.mark.parametrize("package", sorted(INSIDE))
def test_imports_inside_a_package_never_come_back(package):
    sorter = graphlib.TopologicalSorter(inside(package))
    sorter.prepare()  # raises where files import each other


def test_the_init_file_only_names():
    """It imports names, and those below TYPE_CHECKING are what it loads on first use."""
    documentation, *body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(documentation, ast.Expr)
    (version,) = [node for node in body if isinstance(node, ast.Assign)]
    assert ast.unparse(version) == f"__version__ = {softjax.__version__!r}"
    body.remove(version)
    imports = [node for node in body if not isinstance(node, ast.If)]
    (choice,) = [node for node in body if isinstance(node, ast.If)]
    own = [node for node in imports + choice.body if node.module.startswith("softjax")]
    assert all(isinstance(node, ast.ImportFrom) for node in imports + choice.body)
    assert all(alias.asname == alias.name for node in own for alias in node.names)
    modules = {alias.name: node.module for node in choice.body for alias in node.names}
    lazy = {name: f"softjax.{module}" for name, module in softjax._MODULE_OF.items()}
    assert modules == lazy | dict.fromkeys(softjax._SUBMODULES, "softjax")
    for name, module in modules.items():
        found = importlib.import_module("softjax." + name if module == "softjax" else module)
        assert getattr(softjax, name) is (found if module == "softjax" else getattr(found, name))


def test_importing_softjax_loads_the_normalizers_and_the_losses_alone():
    """The rest is loaded by its first use, and is listed before."""
    program = """if True:
        import sys, softjax
        lazy = {*softjax._SUBMODULES, *softjax._MODULE_OF}
        heavy = ("regression", "streaming", "_linear_cross_entropy", "derivatives")
        assert not {f"softjax.{name}" for name in heavy} & set(sys.modules)
        assert lazy <= set(dir(softjax)) and not lazy & set(vars(softjax))
        softjax.regression.fit, softjax.linear_cross_entropy
        assert {"regression", "linear_cross_entropy"} <= set(vars(softjax))
        from softjax import LinearOutputs, streaming
        assert not hasattr(softjax, "linear_regression")
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_softjax_imports_no_extra():
    extras = f"print(*({EXTRAS!r} & set(sys.modules)))"
    everything = "import softjax; [getattr(softjax, name) for name in dir(softjax)]"
    program = f"import sys, jax, optax, chex; {extras}; {everything}; {extras}"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    theirs, ours = (set(line.split()) for line in run.stdout.splitlines())
    assert ours <= {"scipy"}
    assert ours <= theirs
