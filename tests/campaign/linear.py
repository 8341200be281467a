"""The loss of hidden @ kernel + bias, and its gradients, compared with NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import softjax
from tests import oracles
from tests.campaign import Failure, Outcome

NAME = "linear"
FIGURE = "the error over what the rounding of the logits allows"

SIZES = (1, 2, 3, 7, 16, 33, 64, 65, 130, 257)
CLASSES = (2, 3, 10, 63, 257, 1000, 4097)


def run(rng: np.random.Generator) -> Outcome:
    dtype = np.float32 if rng.random() < 0.6 else np.float64
    n, d = (int(rng.choice(SIZES)) for _ in range(2))
    v = int(rng.choice([k for k in CLASSES if n * k <= 300_000]))
    scale = float(rng.choice([0.1, 1.0, 10.0])) / np.sqrt(d)
    hidden = rng.standard_normal((n, d)).astype(dtype)
    kernel = (scale * rng.standard_normal((d, v))).astype(dtype)
    arrays = [hidden, kernel]
    if rng.random() < 0.5:
        arrays.append((3 * rng.standard_normal(v)).astype(dtype))
    labels, dense, options = draw_options(rng, n, v, dtype)
    reduction = str(rng.choice(["none", "sum", "mean"]))
    mode = str(rng.choice(["eager", "jit", "vmap"] if reduction == "none" else ["eager", "jit"]))
    words = f"[{n}, {d}] @ [{d}, {v}] {np.dtype(dtype)} {reduction} {mode} " + str(
        {key: value if np.ndim(value) == 0 else "array" for key, value in options.items()}
    )
    budget = (
        {"max_temp_bytes": int(rng.choice([1, 10_000, 1_000_000]))} if rng.random() < 0.3 else {}
    )

    def losses(*arrays):
        hidden, kernel, *bias = arrays
        return softjax.linear_cross_entropy(
            hidden, kernel, labels, *bias, reduction=reduction, **options, **budget
        )

    def values_and_gradients(*arrays):
        if mode == "vmap":
            return jax.vmap(one_row)(jnp.arange(n)), None
        value, pullback = jax.vjp(losses, *arrays)
        return value, pullback(jnp.ones_like(value))

    def one_row(i):
        weights = options.get("weights")
        own = {**options, **({} if weights is None else {"weights": jnp.asarray(weights)[i]})}
        label = jax.tree.map(lambda part: jnp.asarray(part)[i], labels)
        bias = [jnp.asarray(b) for b in arrays[2:]]
        return softjax.linear_cross_entropy(
            jnp.asarray(hidden)[i], jnp.asarray(kernel), label, *bias, **own, **budget
        )

    compiled = values_and_gradients if mode == "eager" else jax.jit(values_and_gradients)
    value, gradients = compiled(*map(jnp.asarray, arrays))
    share = compare(arrays, dense, options, reduction, value, gradients, words)
    return Outcome(share, mode)


def draw_options(rng, n, v, dtype) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Draws labels, the same labels in the form of the oracles, and options."""
    indices = rng.integers(v, size=n).astype(np.int32)
    labels, dense, options = indices, indices, {}
    how = rng.random()
    if how < 0.2:
        labels = dense = rng.dirichlet(np.ones(v), n).astype(dtype)
    elif how < 0.4:
        k = min(v, 3)
        top = np.stack([rng.permutation(v)[:k] for _ in range(n)]).astype(np.int32)
        shares = rng.dirichlet(np.ones(k), n).astype(dtype)
        labels = softjax.TopKLabels(jnp.asarray(top), jnp.asarray(shares))
        dense = np.zeros((n, v), dtype)
        np.put_along_axis(dense, top, shares, -1)
    elif rng.random() < 0.4:
        options["ignore_index"] = int(indices[0])
    for name, values in (
        ("label_smoothing", (0.125, 0.5)),
        ("z_loss", (0.25,)),
        ("softcap", (2.0, 30.0)),
        ("temperature", (0.5, 3.0)),
    ):
        if rng.random() < 0.3:
            options[name] = float(rng.choice(values))
    if rng.random() < 0.3:
        options["class_weights"] = (rng.integers(0, 5, v) / 4).astype(dtype)
    if rng.random() < 0.3:
        options["weights"] = (rng.integers(0, 3, n)).astype(dtype)
    return labels, dense, options


def compare(arrays, labels, options, reduction, value, gradients, words) -> float:
    """The largest error of value and gradients, divided by the allowed one."""
    hidden, kernel, *bias = (a.astype(np.float64) for a in arrays)
    eps = float(np.finfo(arrays[0].dtype).eps)
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    z = hidden @ kernel + (bias[0] if bias else 0)
    size = np.sqrt(hidden**2 @ kernel**2) + (np.abs(bias[0]) if bias else 0)
    slope = np.full_like(z, 1 / temperature)
    if softcap is not None:
        t = np.tanh(z / softcap)
        z, slope = softcap * t, (1 - t**2) / temperature
    z = z / temperature
    own = ("label_smoothing", "class_weights", "ignore_index", "z_loss")
    of_loss = {name: options[name] for name in own if name in options}
    losses = oracles.cross_entropy(z, labels, **of_loss)
    g = oracles.cross_entropy_gradient(z, labels, **of_loss)
    weights = np.asarray(options.get("weights", np.ones(len(z))), np.float64)
    kept = labels != options["ignore_index"] if "ignore_index" in options else np.ones(len(z), bool)
    weights = np.where(kept, weights, 0)
    if reduction == "mean":
        weights = weights / max(weights.sum(), 1e-300)
    # A logit is off by some roundings of its terms, and the loss by twice that, times its target.
    off = eps * ((4 + np.sqrt(hidden.shape[1])) * size / temperature + 2 * np.abs(z)).max(-1)
    weight = np.max(options.get("class_weights", 1.0), initial=1.0)
    lse = np.abs(oracles.logsumexp(z))
    z_loss = options.get("z_loss", 0.0)
    steep = weight + 2 * z_loss * lse
    roundings = 20 + np.sqrt(z.shape[1])
    of_losses = 2 * off * steep + roundings * eps * np.abs(losses)
    expected, allowed = weights * losses, weights * of_losses
    if reduction != "none":
        expected = expected.sum()
        allowed = allowed.sum() + len(z) ** 0.5 * eps * np.abs(weights * losses).sum()
    worst = share("the loss", value, expected, allowed, words)
    if gradients is None:
        return worst
    g = weights[:, None] * g
    off_g = (2 * off * (steep + 2 * z_loss) + roundings * eps * steep) * weights
    off_g = off_g[:, None] * oracles.softmax(z) + np.abs(g) * 2 * off[:, None]
    parts = [(g * slope) @ kernel.T, hidden.T @ (g * slope), (g * slope).sum(0)]
    total = (off_g + np.abs(g) * eps * (roundings + np.sqrt(len(z)))) * slope
    if softcap is not None:  # 1 - tanh^2 is off by as much as the logits
        total = total + np.abs(g) * 4 * off[:, None] / temperature
    bounds = [total @ np.abs(kernel).T, np.abs(hidden).T @ total, total.sum(0)]
    for name, gradient, part, bound in zip(
        ("hidden", "kernel", "bias"), gradients, parts, bounds, strict=False
    ):
        bound = bound + 1e-30
        worst = max(worst, share(f"the gradient of {name}", gradient, part, bound, words))
    return worst


def share(what, computed, expected, allowed, words) -> float:
    error = np.abs(np.asarray(computed, np.float64) - expected)
    ratio = np.where(error == 0, 0, error / (allowed + 1e-300))
    worst = float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0))
    if not worst <= 1:
        raise Failure(
            f"{words}: {what} is off by {np.nanmax(error):.3g}, {worst:.3g} times what is allowed"
        )
    return worst
