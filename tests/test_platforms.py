"""Forms that are chosen during lowering can be differentiated, batched and exported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import softjax
from softjax._platforms import Choice, lowered_for_platform, platform_dependent, tracing_for

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.every_platform, pytest.mark.x64_once]

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
V = np.cos(X)
FACTORS = Choice(2.0, 3.0, 5.0)


def plain(factor, x):
    """A sum over rows that is not linear, and where its largest term is."""
    y = jnp.sum(factor * jnp.sin(x) * x[:1], 0)
    return {"sum": y, "place": jnp.argmax(y).astype(jnp.int32)}


def chosen(x):
    like = jax.eval_shape(lambda x: plain(2.0, x), x)
    return lowered_for_platform(plain, FACTORS, like, x)


def derivatives(function):
    """The function gives values, both modes and both orders of the second derivative of the sum."""

    def f(x):
        return jnp.sum(function(x)["sum"] ** 2)

    def all_of_them(x, v):
        batch = jnp.stack([x, 2 * x])
        return {
            "value": function(x),
            "jvp": jax.jvp(lambda x: function(x)["sum"], (x,), (v,)),
            "gradient": jax.value_and_grad(f)(x),
            "forward over reverse": jax.jvp(jax.grad(f), (x,), (v,))[1],
            "reverse over reverse": jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
            "batch": jax.vmap(jax.grad(f))(batch),
            "checkpoint": jax.grad(jax.checkpoint(f))(x),
            "scan": jax.lax.scan(lambda c, x: (c, jax.grad(f)(x)), 0, batch)[1],
        }

    return all_of_them


def test_every_derivative_is_that_of_the_function():
    actual = jax.jit(derivatives(chosen))(X, V)
    desired = jax.jit(derivatives(lambda x: plain(2.0, x)))(X, V)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), actual, desired
    )
    assert actual["value"]["place"].dtype == jnp.int32
    with jax.disable_jit():
        assert jnp.all(chosen(X)["sum"] == plain(2.0, X)["sum"])


def test_one_form_is_traced_where_it_is_lowered():
    """A gradient traces it once too, and the trace of the program around it does not."""
    seen = []

    def recorded(factor, x):
        seen.append(factor)
        within = platform_dependent(x, cpu=lambda x: x, default=lambda x: seen.append("other") or x)
        return jnp.sum(factor * within**2)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: lowered_for_platform(recorded, FACTORS, x[0, 0], x))(x)

    traced = gradient.trace(X)
    assert seen == []
    for platform, factor in [("tpu", 5.0), ("cuda", 3.0), ("cpu", 2.0)]:
        traced.lower(lowering_platforms=(platform,))
        assert set(seen) - {"other"} == {factor}
        assert ("other" in seen) == (platform != "cpu")
        seen.clear()
    assert jnp.all(gradient(X) == 4 * X)


def test_one_program_for_several_platforms_has_all_forms():
    exported = export.export(jax.jit(chosen), platforms=("cpu", "tpu"))(X)
    np.testing.assert_array_equal(exported.call(X)["sum"], jax.jit(chosen)(X)["sum"])
    text = exported.mlir_module()
    assert "dense<2.0" in text
    assert "dense<5.0" in text
    assert "dense<3.0" not in text


def test_a_platform_may_be_named():
    for platform, factor in [("cpu", 2.0), ("cuda", 3.0), ("rocm", 3.0), ("tpu", 5.0)]:
        with tracing_for(platform):
            np.testing.assert_array_equal(
                jax.jit(chosen)(X)["sum"], jax.jit(plain)(factor, X)["sum"]
            )


@pytest.mark.parametrize("is_outside", [True, False])
def test_the_precision_of_a_product_is_the_one_that_was_set_around_it(is_outside):
    """The setting may end before the program is lowered."""

    def set_around(function):
        def call(*operands):
            with jax.default_matmul_precision("highest"):
                return function(*operands)

        return call

    def loss(hidden, kernel):
        return softjax.linear_cross_entropy(hidden, kernel, np.zeros(4, int), reduction="mean")

    both = (0, 1)
    gradient = jax.grad(set_around(loss), both) if is_outside else set_around(jax.grad(loss, both))
    text = jax.jit(gradient).lower(X, np.ones((3, 5), np.float32)).as_text()
    precisions = re.findall(r"precision = \[(\w+), (\w+)\]", text)
    assert len(precisions) == text.count("dot_general") >= 3
    assert set(precisions) == {("HIGHEST", "HIGHEST")}


def test_a_fit_traces_the_forms_of_its_platform_alone(compiled_fits, monkeypatch):
    def all_forms(*operands, default, **forms):
        raise AssertionError("the forms of all platforms are traced")

    monkeypatch.setattr(jax.lax, "platform_dependent", all_forms)
    jax.clear_caches()
    x = np.stack([np.sin(np.arange(30.0)), np.cos(np.arange(30.0))], 1).astype(np.float32)
    for solver in ("newton-cg", "lbfgs"):
        fit = softjax.regression.fit(x, np.arange(30) % 3, l2=0.1, solver=solver)
        assert fit.stop_reason == "converged"
