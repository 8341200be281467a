"""The project as a new user finds it: commands, documents, packaging."""

import contextlib
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_documentation import FloatChecker

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
MODULES = (
    "",
    ".derivatives",
    ".information",
    ".choice",
    ".calibration",
    ".regression",
    ".regression.inference",
    ".datasets",
    ".streaming",
    ".checkpoints",
    ".models",
    ".plots",
    ".sklearn",
)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- commands ---


def test_the_first_two_commands_of_the_readme_fit_and_test():
    fit, test = (block.strip() for block in fenced(README, "bash")[:2])
    assert fit.endswith("&& .venv/bin/softjax fit digits")
    assert test.endswith("&& .venv/bin/python -m pytest -n 2")
    for command in (fit, test):
        assert command.startswith("python3 -m venv --without-pip .venv && python3 -m pip ")


def test_ci_runs_the_test_command_of_the_readme():
    test = fenced(README, "bash")[1].strip()
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert "set -euo pipefail" in lines
    # Alone in a subshell: `set -e` does not see a failure inside of a chain of &&.
    place = lines.index(test)
    assert (lines[place - 1], lines[place + 1]) == ("(", ")")


# --- documents ---


# tests/thread runs the examples of thread.md.
WITH_EXAMPLES = [path for path in DOCUMENTS if path.name != "thread.md"]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_the_examples_of_a_document_run_as_they_stand(path, full_compilation):
    # The examples share one namespace, as if a reader typed them; fences are no part of the output.
    source, names = "\n".join(fenced(path.read_text(), "python")), {}
    runner = doctest.DocTestRunner(FloatChecker())
    for example in doctest.DocTestParser().get_examples(source):
        test = doctest.DocTest([example], {}, path.name, str(path), 0, source)
        test.globs = names
        # XLA:CPU without optimisations compiles Firth's solver wrongly: a sum over the examples,
        # which is fused with a product, has an entry of -inf, while all that is summed is finite.
        with full_compilation() if "firth" in example.source else contextlib.nullcontext():
            runner.run(test, clear_globs=False)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_of_a_document_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def where_others_lose() -> list[tuple[str, str, str]]:
    """The rows of the README's table: expression, result of the peers, result of softjax."""
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \| `(.+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 10
    return rows


@pytest.mark.parametrize(("expression", "peer", "ours"), where_others_lose())
def test_where_others_lose(expression, peer, ours):
    peers = {
        "logsumexp": jax.nn.logsumexp,
        "softmax": jax.nn.softmax,
        "cross_entropy": lambda logits, label: (
            optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(label))
        ),
    }
    own = {name: getattr(softjax, name) for name in peers}
    for functions, cell in ((own, ours), (peers, peer)):
        names = {
            **functions,
            "a": lambda values, dtype=jnp.float32: jnp.asarray(values, dtype),
            "eigvalsh": lambda matrix: np.linalg.eigvalsh(np.asarray(matrix, np.float64)),
            "inf": np.inf,
            **{name: getattr(jax, name) for name in ("grad", "hessian")},
            **{name: getattr(jnp, name) for name in ("zeros", "bfloat16", "float16", "int8")},
        }
        if cell == "ValueError":
            with pytest.raises(ValueError, match="got -1"):
                eval(expression, names)
            continue
        expected = eval(cell, {"nan": np.nan, "inf": np.inf})
        # The cells have three digits; what is written as 0 is 0, or lost 1e-12 in eigvalsh.
        got = np.asarray(eval(expression, names), np.float64)
        np.testing.assert_allclose(got, expected, rtol=5e-3, atol=1e-20)


def public_names(module: ModuleType) -> dict[str, Callable]:
    """The functions and classes that a module defines or takes in from below it."""
    return {
        name: value
        for name, value in ((name, getattr(module, name)) for name in dir(module))
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(module.__name__)
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_docs_with_an_example(name):
    module = importlib.import_module(f"softjax{name}")
    api = (ROOT / "docs" / "api.md").read_text().splitlines()
    rows = []
    for name, value in public_names(module).items():
        docstring = inspect.getdoc(value)
        assert docstring, name
        assert ">>> " in docstring, f"{name} has no example"
        source = Path(inspect.getfile(inspect.unwrap(value))).relative_to(
            Path(softjax.__file__).parents[1]
        )
        summary = docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        rows.append(f"| [`{module.__name__}.{name}`](../{source}) | {summary} |")
    missing = [row for row in rows if row not in api]
    assert not missing, "\n".join(["docs/api.md lacks", *missing])


def public_modules() -> list[str]:
    """All modules of the package whose names have no underscore."""
    found = pkgutil.walk_packages(softjax.__path__, "softjax.")
    return ["softjax", *(module.name for module in found if "._" not in module.name)]


@pytest.mark.parametrize("name", public_modules())
def test_a_module_names_all_that_is_public_in_it(name):
    """`import *`, editors and the site show what is in `__all__`, and nothing else."""
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert not public.startswith("_")
        assert hasattr(module, public)
    missing = {
        key
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and not key.startswith("_")
    } - set(module.__all__)
    assert not missing, f"{missing}: in `__all__`, or with an underscore"


def test_contributing_says_where_each_file_is_tested():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("## Where a file is tested")[2].partition("\n## ")[0]
    _, *rows = re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)
    sources, tests = (set(re.findall(r"`([\w/]+)`", " ".join(c))) for c in zip(*rows, strict=True))
    modules = {
        path.stem
        for path in (ROOT / "softjax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__", "__main__"} - sources == set()
    assert [name for name in tests if not any((ROOT / "tests").glob(f"{name}*"))] == []


# --- packaging ---


def test_the_citation_names_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [softjax.__version__]


def test_every_address_of_the_project_is_one():
    assert PROJECT["urls"]
    for address in PROJECT["urls"].values():
        assert address.startswith("https://")


def test_the_core_depends_on_jax_and_optax_and_chex_only():
    names = {re.split("[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names == {"jax", "jaxlib", "optax", "chex"}


def test_all_brings_every_extra_but_the_accelerators_and_torch():
    extras = PROJECT["optional-dependencies"]
    large = {"cuda12", "cuda13", "tpu", "aot-tpu", "aot-gpu", "torch"}
    names = [name for name in extras if name not in {"all", *large}]
    assert extras["all"] == [f"softjax-regression[{','.join(names)}]"]


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("softjax_regression-*.whl")
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    package = {path for path in files if path.parts[0] == "softjax"}
    others = {path.parts[0] for path in files} - {"softjax"}
    assert others == {f"softjax_regression-{softjax.__version__}.dist-info"}
    assert Path("softjax/py.typed") in package
    tree = {path.relative_to(ROOT) for path in (ROOT / "softjax").rglob("*") if path.is_file()}
    assert package == {path for path in tree if "__pycache__" not in path.parts}
