"""The size of the parts of this repository, and the number of functions that a call passes through.

    python tools/structure.py                  # this checkout
    python tools/structure.py --against main   # beside another revision

It prints one table. The table has the lines and files of each folder, and the longest function,
without its docstring. For some calls it counts the names that a reader must know to follow the call
to its result: the distinct functions of softjax that Python enters while JAX traces the call for
the first time, and the files that define them. It also counts functions of more than 60 lines,
functions that are not public and take more than eight arguments, and files of more than 400 lines.
The tool needs only the dependencies of softjax.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The folders that are counted, and their files that people write.
FOLDERS = ("softjax", "tests", "benchmarks", "pictures", "tools", "docs", "examples")
SUFFIXES = {".py", ".md"}
LONG_FILE, LONG_FUNCTION = 400, 60
MANY_ARGUMENTS = 8

SETUP = """
import importlib.util, jax, numpy as np, optax, softjax
# What a call would import only when it runs is no step of the call.
for name in ("regression", "streaming", "training"):
    if importlib.util.find_spec("softjax." + name):
        importlib.import_module("softjax." + name)
features = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
labels = np.arange(12) % 3
kernel = np.ones((3, 3), np.float32)
"""
# Each call is made once in a new process, in which no function has been traced.
CALLS = {
    # Labels by chance, which some direction separates: NumPy's fit, and the compiled one after it.
    "fit": "softjax.regression.fit(features, labels)",
    "fit with a penalty": "softjax.regression.fit(features, labels, l2=0.1)",
    "train": """
if hasattr(softjax.regression, "train"):
    softjax.regression.train(
        features, labels, optimizer=optax.adam(1e-2), batch_size=4, epochs=2
    )
else:  # Before, only data that need not fit into memory had a trainer.
    softjax.streaming.train(
        lambda step: (features, labels), num_classes=3, optimizer=optax.adam(1e-2), steps=2
    )
""",
    "linear_cross_entropy": """
jax.value_and_grad(
    lambda x, w: softjax.linear_cross_entropy(x, w, labels).mean(), argnums=(0, 1)
)(features, kernel)
""",
    "cross_entropy": """
jax.value_and_grad(lambda z: softjax.cross_entropy(z, labels).mean())(features)
""",
}
# Only functions are counted; the bodies of classes and modules run during the import.
PROGRAM = """
import inspect, json, sys, threading
sys.path.insert(0, sys.argv[1])
exec(sys.argv[3])
code, seen = compile(sys.argv[4], "call", "exec"), set()
def enter(frame, event, argument):
    code = frame.f_code
    of_function = code.co_flags & inspect.CO_OPTIMIZED
    if event == "call" and of_function and code.co_filename.startswith(sys.argv[2]):
        seen.add((code.co_filename, code.co_qualname, code.co_name))
threading.setprofile(enter)
sys.setprofile(enter)
exec(code)
sys.setprofile(None)
threading.setprofile(None)
print(json.dumps(sorted(seen)))
"""

Row = tuple[str, str]


def sources(folder: Path) -> list[Path]:
    """The files of a folder that people write, in order."""
    return sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())


def lines(file: Path) -> int:
    """The number of lines of a file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of lines of a function from its `def` to its end, without its docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of arguments of a function, without `self` and `cls`."""
    args = function.args
    named = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    starred = [a for a in (args.vararg, args.kwarg) if a is not None]
    return len([name for name in named if name not in ("self", "cls")]) + len(starred)


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, including nested ones."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def public(file: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is public: its file, or a package above it, exports the name.

    `__init__` is public if its class is.
    """
    name = function.name
    if name == "__init__":
        tree = ast.parse(file.read_text(encoding="utf-8"))
        holders = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        lines = [node.name for node in holders if function.lineno in {n.lineno for n in node.body}]
        name = lines[0] if lines else name
    folder = file.parent
    exporters = [file]
    while (folder / "__init__.py").exists():
        exporters.append(folder / "__init__.py")
        folder = folder.parent
    return any(name in exported(exporter) for exporter in exporters)


def exported(file: Path) -> set[str]:
    """The names that a file exports: those in `__all__`, or in `from a import b as b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):  # TYPE_CHECKING too
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, ast.Assign) and "__all__" in [
            target.id for target in node.targets if isinstance(target, ast.Name)
        ]:
            names |= set(ast.literal_eval(node.value))
    return names


def sizes(root: Path) -> Iterator[Row]:
    """The lines and files of each folder, and of each folder below `softjax`."""
    for name in FOLDERS:
        folder = root / name
        found = sources(folder) if folder.is_dir() else []
        yield name, f"{sum(map(lines, found)):,} in {len(found)}"
        if name == "softjax":
            parts: dict[str, list[Path]] = {}
            for file in found:
                parts.setdefault(file.parent.relative_to(root).as_posix(), []).append(file)
            for part, files in sorted(parts.items()):
                label = f"  {part}/" if part != "softjax" else "  softjax/*.py"
                yield label, f"{sum(map(lines, files)):,} in {len(files)}"


def shape(root: Path) -> Iterator[Row]:
    """The longest function of `softjax`, the functions with many arguments, and the long files."""
    package = [file for file in sources(root / "softjax") if file.suffix == ".py"]
    every = [(file, function) for file in package for function in functions(file)]
    file, longest = max(every, key=lambda pair: length(pair[1]))
    where = file.relative_to(root).as_posix()
    yield "longest function", f"{length(longest)} lines, {longest.name} in {where}"
    above = sum(length(function) > LONG_FUNCTION for _, function in every)
    yield f"functions above {LONG_FUNCTION} lines", str(above)
    many = [pair for pair in every if arguments(pair[1]) > MANY_ARGUMENTS]
    inner = sum(not public(file, function) for file, function in many)
    yield f"not public, more than {MANY_ARGUMENTS} arguments", str(inner)
    for name in ("softjax", "tests", "benchmarks"):
        files = [file for file in sources(root / name) if file.suffix == ".py"]
        large = sum(lines(file) > LONG_FILE for file in files)
        yield f"files of {name} above {LONG_FILE} lines", str(large)


def entered(root: Path, call: str, setup: str = SETUP, package: str = "softjax") -> set[Row]:
    """The functions of a package, as (file, name), that a new process enters during a call.

    Comprehensions and lambdas are not counted, since they have no name that a reader must know.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    inside = str(root / package) + os.sep
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), inside, setup, call],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{call.strip()} in {root} failed:\n{done.stderr}")
    seen = json.loads(done.stdout.splitlines()[-1])
    return {(file, path) for file, path, name in seen if not name.startswith("<")}


def calls(root: Path) -> Iterator[Row]:
    """The names and files from each call to its result."""
    for name, call in CALLS.items():
        seen = entered(root, call)
        yield f"{name}: names", f"{len(seen)} in {len({file for file, _ in seen})} files"


def names(root: Path, call: str) -> str:
    """A line for each file that a call enters, with the functions that it enters there."""
    files: dict[str, list[str]] = {}
    for file, name in sorted(entered(root, CALLS[call])):
        files.setdefault(Path(file).relative_to(root).as_posix(), []).append(name)
    return "\n".join(f"{file} ({len(own)}): {', '.join(own)}" for file, own in files.items())


def measured(root: Path) -> dict[str, str]:
    """All rows of the table of one checkout."""
    return dict([*sizes(root), *calls(root), *shape(root)])


def table(columns: dict[str, dict[str, str]]) -> str:
    """A markdown table of one row for each measure and one column for each revision."""
    newest_first = reversed(list(columns.values()))
    rows = list(dict.fromkeys(name for column in newest_first for name in column))
    cells = [
        ["", *columns],
        *([name, *(c.get(name, "-") for c in columns.values())] for name in rows),
    ]
    wide = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    text = [
        "| " + " | ".join(f"{c:{w}}" for c, w in zip(row, wide, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *text[1:]])


def main() -> None:
    """Prints the table of this checkout, and optionally of another revision beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", metavar="REVISION", help="a revision to compare with")
    parser.add_argument("--names", choices=CALLS, help="list the functions that a call enters")
    arguments = parser.parse_args()
    if arguments.names is not None:
        print(names(ROOT, arguments.names))
        return
    revision = arguments.against
    columns = {}
    if revision is not None:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder).resolve() / "tree"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "-q", "--detach", str(tree), revision], check=True)
            try:
                columns[revision] = measured(tree)
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    columns["this checkout"] = measured(ROOT)
    print(table(columns))


if __name__ == "__main__":
    main()
