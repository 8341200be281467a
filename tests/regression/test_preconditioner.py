"""The preconditioner of the Hessian: its properties, and the passes that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softjax import regression
from softjax.regression import _preconditioner, _standardised
from softjax.regression._objective import centred
from softjax.regression._problem import Data

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]


def clustered(examples, width, classes):
    """Features in clusters, one around a centre of each class, and the classes."""
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(classes, width)), rng.integers(classes, size=examples)
    noise = rng.normal(size=(examples, width)) * np.geomspace(2, 0.2, width)
    return 0.5 * centres[y] + noise, y


@jax.jit
def both(data, p):
    """The inverse of the preconditioner and the Hessian, as matrices, at probabilities [K, N]."""
    problem = data.problem()
    s = _standardised.standardise(problem, problem.gradient_bound())
    built = _preconditioner.build(s, problem.weights, p)
    shape = data.num_classes, data.features.shape[1] + 1
    unit = jnp.eye(shape[0] * shape[1], dtype=p.dtype).reshape(-1, *shape)
    one = jnp.ones((), p.dtype)
    inverse = jax.vmap(lambda g: _preconditioner.precondition(built, centred(g), one))(unit)
    hessian = jax.vmap(lambda v: problem.hessian_times(p, centred(v)))(unit)
    return tuple(a.reshape(len(unit), -1) for a in (inverse, hessian))


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("constant", [1.0, 0.0])
@pytest.mark.parametrize("l2", [0.0, 1e-3, 10.0])
def test_the_preconditioner_is_positive_definite_and_near_the_inverse_hessian(constant, l2):
    """For any weights and probabilities; a class may have hardly any, and a feature be its own."""
    rng = np.random.default_rng(1)
    for width, classes in ((3, 4), (3, 2)):
        for _ in range(4):
            x, y = clustered(60, width, classes)
            x = (x * 10.0 ** rng.integers(-3, 4, width) + rng.normal(size=width)).astype(np.float64)
            weights = rng.uniform(size=60) * (rng.uniform(size=60) < 0.7)
            p = rng.dirichlet(np.full(classes, rng.choice([0.1, 1, 10])), 60).T
            zero = jnp.zeros(())
            data = Data(
                num_classes=classes,
                features=jnp.asarray(x),
                labels=y,
                weights=jnp.asarray(weights / weights.mean()),
                l2=jnp.asarray(l2),
                l1=zero,
                constant=jnp.asarray(constant),
            )
            inverse, hessian = map(np.asarray, both(data, jnp.asarray(p)))
            # In units in which the Hessian has the diagonal 1.
            size = np.sqrt(np.where(np.diag(hessian) > 0, np.diag(hessian), 1))
            inverse = size[:, None] * inverse * size
            np.testing.assert_allclose(inverse, inverse.T, atol=1e-4 * np.abs(inverse).max())
            values = np.linalg.eigvalsh((inverse + inverse.T) / 2)
            rank = (classes - 1) * (width + int(constant))
            assert values[-rank] > 0
            assert values[0] > -1e-5 * values[-1]


@pytest.mark.x64_once
def test_a_feature_may_be_constant_among_the_examples_that_weigh():
    """The last one is certain, and all others have the same feature."""
    x, p = np.array([[0.0], [0.0], [0.0], [1.0]]), np.array([[0.5, 0.5, 0.5, 0.0]])
    zero = jnp.zeros(())
    labels = jnp.asarray([0, 1, 0, 1])
    data = Data(num_classes=2, features=jnp.asarray(x), labels=labels, l2=zero, l1=zero)
    inverse, _ = map(np.asarray, both(data, jnp.asarray(np.concatenate([p, 1 - p]))))
    assert np.isfinite(inverse).all()
    assert np.linalg.eigvalsh((inverse + inverse.T) / 2)[-1] > 0
    assert regression.fit(x, np.array([0, 1, 0, 1])).stop_reason == "quasi-separated"


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(("solver", "most"), [("newton-cg", 64), ("lbfgs", 42)])
def test_clusters_of_classes_take_few_passes(solver, most):
    """Around one mean for all classes they would take 158 and 68."""
    x, y = clustered(1200, 24, 12)
    fit = regression.fit(x, y, solver=solver, l2=1e-3, tol=1e-6)
    assert fit.converged
    assert fit.passes <= most
