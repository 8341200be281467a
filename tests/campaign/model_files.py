"""Broken or inconsistent model files: `softjax predict` prints the error in one line."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign import Failure, Outcome
from tests.campaign.data_files import check, in_a_folder, invoke, odd_array, spoil

NAME = "model-files"
FIGURE = "no figure: exit status 0 with probabilities, or 2 with one line"

CLASSES, FEATURES = ("x", "y", "z"), ("a", "b")
ROWS = 5


def run(rng: np.random.Generator) -> Outcome:
    with in_a_folder():
        arrays: dict[str, Any] = {
            "kernel": rng.normal(size=(2, 3)),
            "bias": rng.normal(size=3),
            "classes": np.array(CLASSES),
            "features": np.array(FEATURES),
        }
        words = change(rng, arrays)
        np.savez("model.npz", **arrays)
        if rng.random() < 0.3:
            words += ", " + spoil(rng, Path("model.npz"))
        rows = np.round(rng.normal(size=(ROWS, 2)), 3)
        with Path("data.csv").open("w", newline="") as file:
            csv.writer(file).writerows([FEATURES, *rows.tolist()])
        if rng.random() < 0.2:
            words += ", data: " + spoil(rng, Path("data.csv"))
        to_file = ["--out", "p.csv"] if rng.random() < 0.5 else []
        result = invoke("predict", "model.npz", "data.csv", "--proba", *to_file)
        check(f"predict, {words}", result)
        if result.exit_code == 0:
            text = Path("p.csv").read_text() if to_file else result.stdout
            check_rows(f"predict, {words}", list(csv.reader(text.splitlines())))
    return Outcome(0.0, "predicted" if result.exit_code == 0 else "refused")


def change(rng: np.random.Generator, arrays: dict[str, Any]) -> str:
    """Changes one of the arrays of a model, or none."""
    name = str(rng.choice(list(arrays)))
    how = str(rng.choice(["nothing", "absent", "shorter", "longer", "odd", "twice", "of rank 2"]))
    array = arrays[name]
    if how == "absent":
        del arrays[name]
    elif how == "shorter":
        arrays[name] = array[:-1]
    elif how == "longer":
        arrays[name] = np.concatenate([array, array[:1]])
    elif how == "odd":
        numbers = array if array.dtype.kind == "f" else np.arange(len(array))
        arrays[name], odd = odd_array(rng, numbers)
        how = f"odd, {odd}"
    elif how == "twice":
        arrays[name] = np.full_like(array, array.flat[0])
    elif how == "of rank 2":
        arrays[name] = array[None]
    return f"{name} {how}"


def check_rows(words: str, rows: list[list[str]]) -> None:
    """A class and the probabilities of all classes in every row."""
    header, *rest = rows
    for row in rest:
        probabilities = np.array(row[1:], float)
        fits = len(row) == len(header) and len(probabilities) > 0
        if not (fits and np.isfinite(probabilities).all() and abs(probabilities.sum() - 1) < 1e-5):
            raise Failure(f"{words}: exit status 0 and the row {row} below {header}")
