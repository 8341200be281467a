"""The pictures of the questions and answers, `docs/thread.md`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import softjax
from pictures.svg import Axis, Cells, Panel, picture
from softjax import choice, derivatives


@dataclass(frozen=True)
class Drawing:
    """The contents of a picture, in words and in panels."""

    title: str
    description: str
    panels: Sequence[Panel | Cells]

    def text(self) -> str:
        """The SVG file."""
        return picture(self.title, self.description, self.panels)


def log_loss() -> Drawing:
    """The loss against the probability of the true class."""
    panel = Panel(
        "The loss is -log of one probability",
        Axis("probability of the true class", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        Axis("loss, nats", [0, 1, 2, 3, 4, 5]),
    )
    p = np.geomspace(np.exp(-5), 1, 81)
    rows = jnp.log(jnp.asarray(np.stack([p, 1 - p], -1), jnp.float32))
    panel.add("-log p", "blue", p, np.asarray(softjax.cross_entropy(rows, jnp.zeros(81, int))))
    three = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    losses = softjax.cross_entropy(jnp.broadcast_to(three, (3, 3)), jnp.arange(3))
    panel.add("p = 0.7, 0.2, 0.1", "orange", [0.7, 0.2, 0.1], np.asarray(losses), "dots")
    return Drawing(
        "Minus log p against p",
        "The loss is 0 at p = 1, 0.36 at 0.7, 1.61 at 0.2 and 2.30 at 0.1, and it grows without "
        "bound as p falls to 0.",
        [panel],
    )


def gradient() -> Drawing:
    """The loss against the logit of the true class with a tangent, and its gradient."""
    o = np.linspace(-6, 6, 97)
    rows = np.stack([o, np.zeros_like(o), np.zeros_like(o)], -1).astype(np.float32)
    loss = Panel(
        "The loss at the logits (o, 0, 0) of a first class",
        Axis("o: the logit of the true class", [-6, -4, -2, 0, 2, 4, 6]),
        Axis("loss, nats", [0, 1, 2, 3, 4, 5, 6, 7]),
    )
    loss.add("loss", "blue", o, np.asarray(softjax.cross_entropy(rows, jnp.zeros(97, int))))
    at = derivatives.cross_entropy_gradient(jnp.zeros(3), jnp.array(0))
    line = np.log(3) + float(at[0]) * o
    loss.add(f"tangent at 0, slope 1/3 - 1 = {float(at[0]):.2f}", "orange", o, line, "dashed")
    slopes = Panel(
        "Its gradient is softmax(o) - onehot",
        Axis("o: the logit of the true class", [-6, -4, -2, 0, 2, 4, 6]),
        Axis("derivative", [-1, -0.5, 0, 0.5, 1]),
    )
    of_classes = derivatives.cross_entropy_gradient(rows, jnp.zeros(97, int))
    slopes.add("true class: p - 1", "orange", o, np.asarray(of_classes)[:, 0])
    slopes.add("each other: p", "green", o, np.asarray(of_classes)[:, 1])
    slopes.add("all three", "gray", o, np.asarray(of_classes).sum(-1), "dashed")
    return Drawing(
        "The loss and its gradient, softmax minus the one-hot label",
        "Above, the loss falls with the logit o of the true class; its tangent at o = 0 has the "
        "slope 1/3 - 1 = -0.67. Below, the derivative by that logit, p - 1, rises from -1 to 0; "
        "by each of the two others it is its probability, which falls from 1/2 to 0. They sum to "
        "0.",
        [loss, slopes],
    )


def variance() -> Drawing:
    """The variance under the probabilities, and the variance of the probabilities."""
    panel = Panel(
        "Two classes: variance under p, variance of p",
        Axis("p", [0, 0.25, 0.5, 0.75, 1]),
        Axis("variance", [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
    )
    p = np.linspace(0.005, 0.995, 100)
    pairs = np.stack([p, 1 - p], -1)
    hessians = derivatives.logsumexp_hessian(jnp.log(pairs))
    panel.add("under p: p (1 - p)", "blue", p, np.asarray(hessians)[:, 0, 0])
    panel.add("of the list (p, 1 - p)", "orange", p, pairs.var(-1), "dashed")
    return Drawing(
        "Variance under the probabilities against variance of the probabilities",
        "The second derivative p (1 - p) is largest, 1/4, at p = 1/2, and 0 at p = 0 and p = 1. "
        "The variance of the two numbers p and 1 - p does the opposite: 0 at 1/2, 1/4 at the ends.",
        [panel],
    )


def covariance() -> Drawing:
    """The Hessian of the loss beside the covariance of drawn one-hot labels."""
    p = np.array([0.7, 0.2, 0.1])
    hessian = derivatives.logsumexp_hessian(jnp.log(p))
    draws = np.eye(3)[np.random.default_rng(0).choice(3, 10_000, p=p)]
    names = ["class 1", "class 2", "class 3"]
    return Drawing(
        "The Hessian as a covariance",
        "Above, the Hessian of the loss at the probabilities 0.7, 0.2 and 0.1: 0.21, 0.16 and 0.09 "
        "on the diagonal, -0.14, -0.07 and -0.02 beside it. Below, the covariance of 10,000 "
        "one-hot labels that were drawn with these probabilities: nearly the same numbers.",
        [
            Cells("Hessian of the loss, p = (0.7, 0.2, 0.1)", names, np.asarray(hessian)),
            Cells("Covariance of 10,000 drawn labels", names, np.cov(draws.T)),
        ],
    )


def real_softmax() -> Drawing:
    """RealSoftMax above the maximum, and its distance from it."""
    above = Panel(
        "λ⁻¹ RealSoftMax(0, λb) is above max(0, b)",
        Axis("b", [-3, -2, -1, 0, 1, 2, 3]),
        Axis("value", [0, 1, 2, 3, 4]),
    )
    b = np.linspace(-3, 3, 61)
    above.add("max", "gray", [-3, 0, 3], [0, 0, 3])
    for lam, color in ((0.5, "purple"), (1, "blue"), (2, "green"), (5, "orange")):
        pairs = np.stack([np.zeros_like(b), b], -1)
        values = softjax.smooth_max(pairs.astype(np.float32), -1, temperature=1 / lam)
        above.add(f"λ = {lam}", color, b, np.asarray(values))
    gap = Panel(
        "The difference to the maximum",
        Axis("λ", [0.5, 2, 4, 6, 8, 10]),
        Axis("difference", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10], logarithmic=True),
    )
    lams = np.linspace(0.5, 10, 39)
    rows = {
        "10 equal: log 10 / λ": ("purple", [0.0] * 10),
        "2 equal: log 2 / λ": ("blue", [0.0] * 2),
        "2 and 4": ("orange", [0.0, -2.0]),
    }
    for name, (color, row) in rows.items():
        # The maximum is 0, so that float32 can represent the difference.
        gap.add(name, color, lams, _smooth_max(row, lams))
    return Drawing(
        "RealSoftMax above the maximum, for several lambda",
        "Above, curves for lambda = 0.5, 1, 2 and 5 run above the corner of max(0, b) and nearer "
        "to it the larger lambda is; the distance is largest, log 2 / lambda, at b = 0. Below, the "
        "distance on a logarithmic axis: log n / lambda for n equal numbers, which falls slowly, "
        "and for 2 and 4 about exp(-2 lambda) / lambda, which falls below 1e-9 at lambda = 10.",
        [above, gap],
    )


def soft_min() -> Drawing:
    """The soft-min below the minimum, for several lambda."""
    panel = Panel(
        "The soft-min of 0 and b is below min(0, b)",
        Axis("b", [-3, -2, -1, 0, 1, 2, 3]),
        Axis("value", [-4, -3, -2, -1, 0]),
    )
    b = np.linspace(-3, 3, 61)
    panel.add("min", "gray", [-3, 0, 3], [-3, 0, 0])
    pairs = np.stack([np.zeros_like(b), b], -1).astype(np.float32)
    for lam, color in ((0.5, "purple"), (1, "blue"), (2, "green"), (5, "orange")):
        values = softjax.smooth_min(pairs, -1, temperature=1 / lam)
        panel.add(f"λ = {lam}", color, b, np.asarray(values))
    return Drawing(
        "The soft-min below the minimum, for several lambda",
        "Curves for lambda = 0.5, 1, 2 and 5 run below the corner of min(0, b) and nearer to it "
        "the larger lambda is; the distance is largest, log 2 / lambda, at b = 0. It is the "
        "picture of RealSoftMax, turned by half a turn.",
        [panel],
    )


def neither() -> Drawing:
    """The outcomes of a comparison in which neither item may be chosen."""
    panel = Panel(
        "Bradley-Terry with scores d/2, -d/2 and 0 of neither",
        Axis("d: the score of i minus that of j", [-6, -4, -2, 0, 2, 4, 6]),
        Axis("probability", [0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    d = np.linspace(-6, 6, 97, dtype=np.float32)
    p = np.asarray(choice.bradley_terry_probability(d / 2, -d / 2, neither=0.0))
    for name, color, column in zip(
        ("i", "j", "neither"), ("blue", "orange", "green"), p.T, strict=True
    ):
        panel.add(name, color, d, column)
    two = np.asarray(choice.bradley_terry_probability(d / 2, -d / 2))
    panel.add("i, if one is chosen", "gray", d, two[:, 0], "dashed")
    return Drawing(
        "The probabilities of i, j and neither",
        "At equal scores each of the three outcomes has probability 1/3. The probability of i "
        "rises towards 1 with the difference of the scores, that of j falls, and that of neither "
        "is largest in the middle. The dashed curve, without neither, is the sigmoid of d.",
        [panel],
    )


def miscoded() -> Drawing:
    """The formula with lambda in front of the exponentials, and the correct formula."""
    panel = Panel(
        "λ in the exponents, and λ in front of them",
        Axis("λ", [1, 10, 100, 1000], logarithmic=True),
        Axis("value at a = 2, b = 4", [0, 1, 2, 3, 4, 5]),
    )
    lams = np.geomspace(1, 1000, 61)
    panel.add("right", "blue", lams, _smooth_max([2.0, 4.0], lams))
    panel.add("λ in front", "orange", lams, np.log(lams * (np.exp(2) + np.exp(4))) / lams)
    # From lambda = 178 on, e^(4 lambda) overflows float64.
    last = np.array([177.0])
    plain = np.log(np.exp(2 * last) + np.exp(4 * last)) / last
    panel.add("plain NumPy overflows", "purple", last, plain, "dots")
    return Drawing(
        "The right formula tends to 4, the miscoded one to 0",
        "Both begin at 4.13 for lambda = 1. With lambda in the exponents the value falls to 4, the "
        "maximum. With lambda in front of the exponentials it falls to 0. The right formula in "
        "plain NumPy overflows after lambda = 177, the dot.",
        [panel],
    )


def log_partition() -> Drawing:
    """The log-partition function with a tangent, whose slope is a probability."""
    panel = Panel(
        "g(x, 0) = log(eˣ + 1) is above its tangents",
        Axis("x", [-4, -2, 0, 2, 4]),
        Axis("value", [-2, -1, 0, 1, 2, 3, 4, 5]),
    )
    x = np.linspace(-4, 4, 81)
    pairs = np.stack([x, np.zeros_like(x)], -1).astype(np.float32)
    panel.add("g", "blue", x, np.asarray(softjax.logsumexp(pairs, -1)))
    at = jnp.array([1.0, 0.0])
    value, slope = float(softjax.logsumexp(at)), float(softjax.softmax(at)[0])
    panel.add(
        f"tangent at 1, slope p = {slope:.2f}", "orange", x, value + slope * (x - 1), "dashed"
    )
    panel.add("x = 1", "orange", [1], [value], "dots")
    return Drawing(
        "The log-partition function with a tangent",
        "The convex curve log(exp(x) + 1) runs from nearly 0 at x = -4 to 4.02 at x = 4. The "
        "tangent at x = 1 touches it at 1.31, has the slope 0.73, which is the probability of the "
        "first class, and is below the curve everywhere else.",
        [panel],
    )


def temperature() -> Drawing:
    """The softmax against the temperature, between its two limits."""
    panel = Panel(
        "softmax of the logits 2, 1, 0 at temperature T",
        Axis("temperature T", [0.1, 1, 10, 100], logarithmic=True),
        Axis("probability", [0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    temperatures = np.geomspace(0.1, 100, 61)
    logits = jnp.array([2.0, 1.0, 0.0])
    rows = jax.vmap(lambda t: softjax.softmax(logits, temperature=t))(jnp.float32(temperatures))
    for k, color in enumerate(("blue", "green", "orange")):
        panel.add(f"logit {2 - k}", color, temperatures, np.asarray(rows)[:, k])
    panel.add("1/3", "gray", [0.1, 100], [1 / 3, 1 / 3], "dashed")
    return Drawing(
        "Softmax against temperature",
        "At a low temperature the class of the largest logit has probability 1 and the others 0; "
        "at temperature 1 the three have 0.67, 0.24 and 0.09; at a high temperature all have 1/3.",
        [panel],
    )


def confident_row() -> Drawing:
    """The loss of a confident, right prediction in float32."""
    panel = Panel(
        "The loss at the logits (0, -d), float32",
        Axis("d: how much larger the true logit is", [0, 10, 20, 30, 40, 50]),
        Axis("loss", [1e-20, 1e-16, 1e-12, 1e-8, 1e-4, 1], logarithmic=True),
    )
    exact = np.linspace(0.4, 46, 58)
    panel.add("exact", "gray", exact, np.log1p(np.exp(-exact)))
    gaps = np.arange(2.0, 47, 2.0)
    rows = jnp.asarray(np.stack([np.zeros_like(gaps), -gaps], -1), jnp.float32)
    ours = softjax.cross_entropy(rows, jnp.zeros(len(gaps), jnp.int32))
    panel.add("softjax", "blue", gaps, np.asarray(ours), "rings")
    theirs = -np.asarray(jax.nn.log_softmax(rows)[:, 0], np.float64)
    panel.add("jax.nn (then 0)", "orange", gaps, theirs, "dots")
    return Drawing(
        "The loss of a confident row in float32",
        "The exact loss falls as exp(-d). The rings of softjax stay on it down to 1e-20. The dots "
        "of jax.nn.log_softmax end at d = 16, where the loss is 1e-7, the last digit beside 1: "
        "from d = 18 on the loss is exactly 0, and so is its gradient at the true logit.",
        [panel],
    )


def _smooth_max(row: Sequence[float], lams: np.ndarray) -> np.ndarray:
    """The smooth maximum of a row for each lambda."""
    x = jnp.array(row, jnp.float32)
    values = jax.vmap(lambda t: softjax.smooth_max(x, temperature=t))(jnp.float32(1 / lams))
    return np.asarray(values)


PICTURES: dict[str, Callable[[], Drawing]] = {
    "log-loss": log_loss,
    "gradient": gradient,
    "variance": variance,
    "covariance": covariance,
    "neither": neither,
    "real-softmax": real_softmax,
    "soft-min": soft_min,
    "miscoded": miscoded,
    "log-partition": log_partition,
    "temperature": temperature,
    "confident-row": confident_row,
}
