"""Every cell of docs/scoreboard.md: the installed peer, softjax, and the exact value."""

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import scipy.special
from test_project import ROOT

import softjax

pytestmark = pytest.mark.x64_once

PAGE = (ROOT / "docs" / "scoreboard.md").read_text()
ROW = re.compile(
    r"^\| \[(\w+) #(\d+)\]\((https://\S+)\) \| `(.+)` \| `(.+)` \| `(.+)` \| (.+) \|$", re.MULTILINE
)
ROWS = ROW.findall(PAGE)
NAMES = {"nan": np.nan, "inf": np.inf, "bool": bool}
TOLERANCE = 6e-4  # the cells have four digits


def test_every_row_of_the_page_is_tested():
    assert len(ROWS) == sum(line.startswith("| [") for line in PAGE.splitlines())
    for _, number, address, *_ in ROWS:
        assert re.search(rf"/(issues|pull)/{number}$", address)


def any_nan(x: Any) -> bool:
    return bool(np.isnan(np.asarray(x)).any())


def common() -> dict[str, Any]:
    """What rows use beside the functions of a library, for libraries of JAX arrays."""
    large = np.random.default_rng(2).uniform(1e10, 2e10, (64, 10))
    return NAMES | {
        "a": lambda values, dtype=jnp.float32: jnp.asarray(values, dtype),
        "grad": jax.grad,
        "jacfwd": jax.jacfwd,
        "jit": jax.jit,
        "total": jnp.sum,
        "any_nan": any_nan,
        "large": jnp.asarray(large, jnp.float32),
        "c": jnp.asarray(1.3, jnp.float32),
        **{name: getattr(jnp, name) for name in ("bfloat16", "float16", "float64")},
    }


def of_jax() -> dict[str, Any]:
    names = ("logsumexp", "softmax", "log_softmax")
    return common() | {name: getattr(jax.nn, name) for name in names}


def of_optax() -> dict[str, Any]:
    def cross_entropy(logits, labels):
        if isinstance(labels, int):
            labels = jnp.asarray(labels)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return optax.losses.softmax_cross_entropy(logits, labels)

    def kl_divergence(p, q):
        logarithms = jax.nn.log_softmax(q), jax.nn.log_softmax(p)
        return optax.losses.kl_divergence_with_log_targets(*logarithms)

    return common() | {
        "cross_entropy": cross_entropy,
        "safe_cross_entropy": optax.losses.safe_softmax_cross_entropy,
        "kl_divergence": kl_divergence,
    }


def of_scipy() -> dict[str, Any]:
    return NAMES | {"a": np.asarray, "float64": np.float64, "logsumexp": scipy.special.logsumexp}


def of_torch() -> dict[str, Any]:
    torch = pytest.importorskip("torch")

    def grad(function: Callable) -> Callable:
        return lambda x: torch.autograd.grad(function(x), x)[0]

    def cross_entropy(logits, label):
        return torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))

    def mean_loss(logits, labels, **options):
        return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), **options)

    return NAMES | {
        "a": lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True),
        "grad": grad,
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "cross_entropy": cross_entropy,
        "mean_loss": mean_loss,
        "entropy": lambda x: torch.distributions.Categorical(logits=x).entropy(),
    }


def of_softjax() -> dict[str, Any]:
    def mean_loss(logits, labels, ignore_index):
        labels = jnp.asarray(labels)
        losses = softjax.cross_entropy(logits, labels, ignore_index=ignore_index)
        return softjax.weighted_mean(losses, labels != ignore_index)

    names = ("logsumexp", "softmax", "log_softmax", "cross_entropy")
    return common() | {
        **{name: getattr(softjax, name) for name in names},
        "safe_cross_entropy": softjax.cross_entropy,
        "entropy": softjax.information.entropy,
        "kl_divergence": softjax.information.kl_divergence,
        "mean_loss": mean_loss,
    }


PEERS = {"jax": of_jax, "optax": of_optax, "scipy": of_scipy, "torch": of_torch}


def check(expression: str, cell: str, names: dict[str, Any]) -> None:
    """The expression has the value in the cell, or raises the error that it names."""
    wide = "float64" in expression
    with jax.enable_x64(wide):
        if cell.endswith("Error"):
            with pytest.raises(ValueError, match="got 4"):
                eval(expression, names)
            return
        got = eval(expression, names)
    got = got.detach().numpy() if hasattr(got, "detach") else got
    expected = np.asarray(eval(cell, dict(NAMES)), np.float64)
    assert_shown(np.asarray(got, np.float64), expected)


def assert_shown(got: np.ndarray, expected: np.ndarray) -> None:
    # What is shown as 0 is 0.
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=0)


VERSIONS = re.compile(r"(\d+\.\d+\.\d+)(?: and (\d+\.\d+\.\d+))?")
# Of a row that a later version of those on the page has fixed, the versions that it shows.
SINCE_FIXED = {"37234": [("0.10.2",)]}
# What #37234 reports is done by an optimisation of the compiler.
QUICKLY = {False: (), True: (pytest.mark.compiled_quickly,)}
every_row = pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=f"{r[0]}-{r[1]}", marks=QUICKLY[r[1] != "37234"]) for r in ROWS],
)


@every_row
def test_peer(row):
    library, number, _, expression, peer, _, _ = row
    names = PEERS[library]()
    installed = metadata.version(library).partition("+")[0]
    shown = SINCE_FIXED.get(number) or VERSIONS.findall(PAGE.partition(f"{library} ")[2])[:1]
    shown = [version for version in shown[0] if version]
    if not any(installed.startswith(version) for version in shown):
        pytest.skip(f"the page has the figures of {library} {shown}, not of {installed}")
    check(expression, peer, names)


@every_row
def test_softjax(row):
    _, _, _, expression, _, ours, _ = row
    check(expression, ours, of_softjax())


EXACT = [match for row in ROWS if (match := re.fullmatch(r"`(.+)` = `(.+)`", row[-1]))]


@pytest.mark.parametrize(("value", "formula"), [match.groups() for match in EXACT])
def test_exact(value, formula):
    names = {"exp": mpmath.exp, "log": mpmath.log, "log1p": mpmath.log1p, "inf": mpmath.inf}
    with mpmath.workprec(200):
        # The numbers of a formula are exact, so that what it divides is too.
        formula = re.sub(r"\d+(?:\.\d+)?", r"mpf('\g<0>')", formula.replace("log1p", "logonep"))
        result = eval(formula, names | {"mpf": mpmath.mpf, "logonep": mpmath.log1p})
    got = [float(x) for x in result] if isinstance(result, list) else float(result)
    assert_shown(np.asarray(got), np.asarray(eval(value, dict(NAMES))))
