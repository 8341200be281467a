"""The tables for users of other libraries: both columns of a row are equal."""

import inspect
import re
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_project import ROOT, fenced

import softjax

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]

FOLDER = ROOT / "docs" / "coming_from"
PAIR = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)


def pairs(page: str) -> tuple[str, list[tuple[str, str]]]:
    """The session that a page begins with, and the rows of its first table."""
    text = (FOLDER / page).read_text()
    session = fenced(text, "python")[0]
    code = "\n".join(re.findall(r"^(?:>>>|\.\.\.) (.*)$", session, re.MULTILINE))
    table = text.partition("```\n\n| ")[2].partition("\n\n")[0]
    rows = PAIR.findall(table)
    assert len(rows) == table.count("\n| `")
    return code, rows


def same(peer: Any, ours: Any) -> None:
    # In float32, where the peer loses some digits of a difference.
    np.testing.assert_allclose(np.asarray(peer), np.asarray(ours), rtol=1e-5, atol=2e-6)


def rows_of(page: str):
    return pytest.mark.parametrize(("peer", "ours"), pairs(page)[1])


@rows_of("jax_and_optax.md")
def test_jax_and_optax(peer, ours):
    names: dict[str, Any] = {}
    exec(pairs("jax_and_optax.md")[0], names)
    same(eval(peer, names), eval(ours, names))


@rows_of("jaxopt.md")
def test_jaxopt(peer, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is no longer maintained, and what it uses of JAX
        names: dict[str, Any] = {"jaxopt": pytest.importorskip("jaxopt")}
        exec(pairs("jaxopt.md")[0], names)
        same(eval(peer, names), eval(ours, names))


@rows_of("torch.md")
def test_torch(peer, ours):
    torch = pytest.importorskip("torch")
    names: dict[str, Any] = {}
    exec(pairs("torch.md")[0], names)
    tensors = {
        name: torch.tensor(np.asarray(value))
        for name, value in names.items()
        if isinstance(value, jnp.ndarray)
    }
    tensors = {n: v.long() if v.dtype == torch.int32 else v for n, v in tensors.items()}
    functional = torch.nn.functional
    if "linear_cross_entropy" in peer and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    same(eval(peer, {"torch": torch, "F": functional} | tensors), eval(ours, names))


def test_the_names_of_softjax_beside_liger_and_cce_exist():
    text = (FOLDER / "liger_and_cce.md").read_text()
    rows = re.findall(r"^\| [^|]*\| [^|]*\| ([^|]*) \|$", text, re.MULTILINE)[1:]
    assert len(rows) > 12
    parameters = inspect.signature(softjax.linear_cross_entropy).parameters
    values = {"none", "mean", "class_weighted_mean"}
    for row in rows:
        for code in re.findall(r"`([^`]+)`", row):
            for name in re.findall(r"[a-z][a-z_]+", code):
                assert name in parameters or hasattr(softjax, name) or name in values, code
