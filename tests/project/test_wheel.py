"""The sdist and its wheel, in an environment with only the declared dependencies."""

import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_project import ROOT

import softjax

pytestmark = pytest.mark.x64_once


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel that the sdist builds, unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("softjax_regression-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    assert (source / "LICENSE").is_file()
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("softjax_regression-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def declared(requirements: list[str], extra: str = "") -> set[str]:
    """The distributions that requirements bring, and what those bring in turn."""
    names: set[str] = set()
    waiting = [(text, extra) for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name in names:
            continue
        names.add(requirement.name)
        below = metadata.distribution(requirement.name).requires or []
        waiting += [(other, one) for other in below for one in (*requirement.extras, "")]
    return names


def environment(folder: Path, installed: Path, extra: str = "") -> Path:
    """A folder from which Python imports the wheel and its declared dependencies, and no more."""
    (found,) = metadata.distributions(name="softjax-regression", path=[str(installed)])
    folder.mkdir()
    for path in installed.iterdir():
        (folder / path.name).symlink_to(path)
    for name in declared(found.requires, extra):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "/")}
        for top in tops - {"__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def python(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that sees the folder and the standard library."""
    program = f"import sys; sys.path.append({str(folder)!r})\n{program}"
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_wheel_of_the_sdist_runs_with_the_core_dependencies_alone(installed, tmp_path):
    folder = environment(tmp_path / "core", installed)
    program = """
import importlib.util, jax, softjax
assert not [name for name in ("typer", "scipy.stats", "matplotlib") if name in sys.modules]
assert importlib.util.find_spec("typer") is None
digits = softjax.datasets.load_digits()
params = softjax.regression.init(64, 10)
loss = softjax.regression.objective(params, digits.test_features, digits.test_labels)
print(softjax.__file__, softjax.__version__, round(float(loss), 4))  # log 10
from softjax.__main__ import main
main()
"""
    done = python(folder, program)
    assert done.stdout.split() == [
        str(folder / "softjax" / "__init__.py"),
        softjax.__version__,
        "2.3026",
    ]
    assert "cli" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_the_command_runs_with_the_extra_cli_alone(installed, tmp_path):
    folder = environment(tmp_path / "cli", installed, "cli")
    program = 'sys.argv = ["softjax", "--help"]; from softjax.__main__ import main; main()'
    done = python(folder, program)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout
