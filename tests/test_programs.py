"""Every public function inside other programs: a table of functions times modes of JAX.

A mode is a setting of JAX, or a transformation, under which a program must compute the same result.
"""

import contextlib
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import softjax
from softjax import calibration, choice, derivatives, information, regression
from softjax.regression._problem import Data
from softjax.regression._solve import SOLVERS, solver_of

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.every_platform]

N, D, K = 12, 3, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, K)).astype("f4")
H = RNG.normal(size=(N, D)).astype("f4")
W = RNG.normal(size=(D, K)).astype("f4")
B = RNG.normal(size=K).astype("f4")
Y = RNG.integers(K, size=N).astype("i4")
Y[:K] = np.arange(K)
Q = RNG.dirichlet(np.ones(K), size=N).astype("f4")
V = RNG.random(N).astype("f4") + 0.5
MASK = RNG.random((N, K)) < 0.8
MASK[np.arange(N), Y] = True
TOP = np.stack([Y, (Y + 1) % K], -1)
SHARES = np.full((N, 2), 0.5, "f4")
PARAMS = regression.SoftmaxRegression


class Variable:
    """An array in an object, as the variables of Flax."""

    def __init__(self, value: Any):
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


class Program(NamedTuple):
    """A function of arrays; the first is real, and its gradient is asked for."""

    call: Callable[..., Any]
    arguments: tuple[np.ndarray, ...]


def linear(reduction: Any, **options: Any) -> Callable:
    def call(h, w, y, b, v):
        softcap = jnp.asarray(3.0, h.dtype)
        return softjax.linear_cross_entropy(
            h, w, y, b, reduction=reduction, weights=v, softcap=softcap, **options
        )

    return call


def top_k(x, index, shares):
    return softjax.cross_entropy(x, softjax.TopKLabels(index, shares))


def distilled(h, w, index, shares):
    """The divergences from a teacher with all classes and from one with its top k."""
    heads, top = softjax.LinearHead(2 * h, w), softjax.TopKLabels(index, shares)
    options = {"reduction": "mean", "temperature": h[0, 0] ** 2}
    return [softjax.linear_distillation_loss(h, w, teacher, **options) for teacher in (heads, top)]


def fitted(solver: str, **options: Any) -> Callable:
    def call(h, y, v):
        result = regression.fit(
            h, y, sample_weights=v, solver=solver, num_classes=K, max_steps=3, **options
        )
        return result.params, result.objective

    return call


HEAD = H, W, Y, B, V
MODEL = H, W, B
CORE = {
    "logsumexp": Program(lambda x: softjax.logsumexp(x, -1, return_sign=True), (X,)),
    "logsumexp, factors": Program(lambda x, b: softjax.logsumexp(x, -1, b), (X, X**2)),
    "logsumexp, where": Program(lambda x, m: softjax.logsumexp(x, -1, where=m), (X, MASK)),
    "logmeanexp": Program(lambda x: softjax.logmeanexp(x, -1), (X,)),
    "softmax": Program(softjax.softmax, (X,)),
    "softmax, temperature": Program(lambda x: softjax.softmax(x, temperature=0.5), (X,)),
    "log_softmax": Program(softjax.log_softmax, (X,)),
    "log_softmax, where": Program(lambda x, m: softjax.log_softmax(x, where=m), (X, MASK)),
    "softmin": Program(softjax.softmin, (X,)),
    "smooth_max": Program(lambda x: softjax.smooth_max(x, -1, temperature=0.5), (X,)),
    "smooth_min": Program(lambda x: softjax.smooth_min(x, -1), (X,)),
    "smooth_max_bounds": Program(lambda x: softjax.smooth_max_bounds(x, -1), (X,)),
    "cross_entropy": Program(softjax.cross_entropy, (X, Y)),
    "cross_entropy, options": Program(
        lambda x, y, m, c: softjax.cross_entropy(
            x, y, where=m, class_weights=c, label_smoothing=0.1, z_loss=0.1, ignore_index=0
        ),
        (X, Y, MASK, Q[0]),
    ),
    "cross_entropy, distribution": Program(softjax.cross_entropy, (X, Q)),
    "cross_entropy, top k": Program(top_k, (X, TOP, SHARES)),
    "weighted_mean": Program(softjax.weighted_mean, (X[:, 0], V)),
    "information.entropy": Program(information.entropy, (X,)),
    "information.cross_entropy": Program(information.cross_entropy, (X, Q)),
    "information.kl_divergence": Program(information.kl_divergence, (X, Q)),
    "information.surprisal": Program(information.surprisal, (X, Y)),
    "information.perplexity": Program(information.perplexity, (X,)),
    "information.joint_entropy": Program(lambda x: information.joint_entropy(x, 3), (X,)),
    "information.temper": Program(lambda x: information.temper(x, 0.5), (X,)),
    "derivatives.softmax_jacobian": Program(derivatives.softmax_jacobian, (X,)),
    "derivatives.softmax_jvp": Program(derivatives.softmax_jvp, (X, Q)),
    "derivatives.logsumexp_hessian": Program(derivatives.logsumexp_hessian, (X,)),
    "derivatives.logsumexp_hessian_sqrt": Program(derivatives.logsumexp_hessian_sqrt, (X,)),
    "derivatives.logsumexp_hessian_pinv": Program(derivatives.logsumexp_hessian_pinv, (X,)),
    "derivatives.log_partition_cumulants": Program(derivatives.log_partition_cumulants, (X, Q)),
    "derivatives.cross_entropy_gradient": Program(derivatives.cross_entropy_gradient, (X, Y)),
    "derivatives.cross_entropy_hvp": Program(derivatives.cross_entropy_hvp, (X, Y, Q)),
    "choice.bradley_terry_probability": Program(
        choice.bradley_terry_probability, (V, X[:, 0], X[:, 1])
    ),
    "choice.bradley_terry_loss": Program(choice.bradley_terry_loss, (V, X[:, 0], Y % 2)),
    "choice.plackett_luce_loss": Program(choice.plackett_luce_loss, (X, TOP)),
}
LINEAR = {
    "linear_cross_entropy, none": Program(linear("none", label_smoothing=0.1), HEAD),
    "linear_cross_entropy, sum": Program(linear("sum", z_loss=0.1, ignore_index=0), HEAD),
    "linear_cross_entropy, mean": Program(linear("mean", class_weights=Q[0]), HEAD),
    "linear_cross_entropy, distribution": Program(
        lambda q, h, w: softjax.linear_cross_entropy(
            h, w, q, class_weights=q[0], label_smoothing=q[0, 0]
        ),
        (Q, H, W),
    ),
    "linear_cross_entropy, top k": Program(
        lambda h, w, i, p: softjax.linear_cross_entropy(
            h, w, softjax.TopKLabels(i, p), reduction="mean"
        ),
        (H, W, TOP, SHARES),
    ),
    "linear_distillation_loss": Program(distilled, (H, W, TOP, SHARES)),
    "linear_logsumexp": Program(softjax.linear_logsumexp, MODEL),
    "linear_cross_entropy_outputs": Program(
        lambda h, w, y, b: softjax.linear_cross_entropy_outputs(h, w, y, b, top_k=2), HEAD[:4]
    ),
    "linear_cross_entropy_ggn_vp": Program(
        lambda h, w, b: softjax.linear_cross_entropy_ggn_vp(h, w, (h, w, b), b), MODEL
    ),
}
REGRESSION = {
    "regression.predict": Program(lambda h, w, b: regression.predict(PARAMS(w, b), h), MODEL),
    "regression.predict_proba": Program(
        lambda h, w, b: regression.predict_proba(PARAMS(w, b), h), MODEL
    ),
    "regression.predict_log_proba": Program(
        lambda h, w, b: regression.predict_log_proba(PARAMS(w, b), h), MODEL
    ),
    "regression.objective": Program(
        lambda h, w, y, b, v: regression.objective(PARAMS(w, b), h, y, l2=0.1, sample_weights=v),
        HEAD,
    ),
    "regression.gradient": Program(
        lambda h, w, y, b, v: regression.gradient(PARAMS(w, b), h, y, l2=0.1, sample_weights=v),
        HEAD,
    ),
    "regression.hessian": Program(
        lambda h, w, y, b, v: regression.hessian(PARAMS(w, b), h, y, l2=0.1, sample_weights=v),
        HEAD,
    ),
    "regression.hvp": Program(
        lambda h, w, y, b: regression.hvp(PARAMS(w, b), PARAMS(w, b), h, y, class_weights=b**2),
        HEAD[:4],
    ),
    "regression.fisher_information": Program(
        lambda h, w, b: regression.fisher_information(PARAMS(w, b), h), MODEL
    ),
    "regression.lipschitz_constant": Program(
        lambda h, y: regression.lipschitz_constant(h, y, K, l2=0.1), (H, Y)
    ),
    "calibrate_temperature": Program(calibration.calibrate_temperature, (X, Y)),
    "expected_calibration_error": Program(calibration.expected_calibration_error, (Q, Y)),
    "expected_calibration_error, adaptive": Program(
        lambda q, y: calibration.expected_calibration_error(q, y, num_bins=3, adaptive=True),
        (Q, Y),
    ),
}
FITS = {
    "fit, newton-cg": Program(fitted("newton-cg", l2=0.1), (H, Y, V)),
    "fit, unpenalised": Program(fitted("newton-cg"), (H, Y, V)),
    "fit, wide": Program(fitted("newton-cg", l2=0.1), (X.T[:, :10], Y[:K], V[:K])),
    "fit, newton": Program(fitted("newton", l2=0.1), (H, Y, V)),
    "fit, lbfgs": Program(fitted("lbfgs", l2=0.1), (H, Y, V)),
    "fit, proximal": Program(fitted("proximal", l1=0.01), (H, Y, V)),
    "fit, firth": Program(fitted("firth"), (H, Y, V)),
    "calibrate_vector": Program(calibration.calibrate_vector, (X, Y)),
}
PROGRAMS = CORE | LINEAR | REGRESSION | FITS


# Their programs loop over chunks of as many rows as there are.
OF_SO_MANY_ROWS = (
    "regression.hessian",
    "regression.fisher_information",
    "regression.lipschitz_constant",
    *FITS,
)
# Their results are -inf where a class is masked.
MASKED = "cross_entropy, options"
INFINITE = ("log_softmax, where",)


def sum_of(tree: Any) -> jax.Array:
    """A number that all real results of a program take part in."""
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum((jnp.sum(a) for a in leaves), jnp.zeros(()))


def with_gradient(program: Program) -> Callable:
    """The results and the gradient of their sum by the first argument."""

    def call(first, *others):
        def total(first):
            results = program.call(first, *others)
            return sum_of(results), results

        gradient, results = jax.grad(total, has_aux=True)(first)
        return results, gradient

    return call


def within_shard_map(function: Callable, count: int) -> Callable:
    """`function` on two devices, of halves of the first argument and of all of the others."""

    def call(*arguments):
        return jax.tree.map(lambda a: a[None], function(*arguments))

    in_specs = P("d"), *(P(),) * (count - 1)
    mesh = mesh_of("auto", d=2)
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P("d"))


@pytest.mark.x64_once
@pytest.mark.parametrize("name", PROGRAMS)
def test_traces_within_a_shard_map_that_checks_types_and_promotes_no_rank(name):
    """All arguments but the first may be variables."""
    program = PROGRAMS[name]
    first, *others = program.arguments
    function = with_gradient(program)
    if name in CORE | LINEAR:

        def function(first, *others, function=function):
            return function(first, *map(Variable, others))

    if name in FITS and name not in ("fit, unpenalised", "fit, firth"):
        function = program.call  # the derivative of the optimum is that of the others
    over_devices = within_shard_map(function, len(program.arguments))
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(over_devices, np.concatenate([first, first]), *others)


@pytest.mark.x64_once
def test_the_forms_for_long_rows_trace_while_jax_checks_its_own_work():
    """With these checks, JAX 0.10 refuses static arguments of a `custom_jvp` by name."""

    def call(x):
        return jax.jvp(softjax.softmax, (x,), (x,)), derivatives.logsumexp_hvp(x, x)

    with jax.enable_checks(True):
        jax.eval_shape(call, jax.ShapeDtypeStruct((2, 20_000), "float32"))


@pytest.mark.x64_once
def test_an_option_may_be_a_traced_variable():
    def results(t):
        return (
            softjax.softmax(X, temperature=t),
            softjax.smooth_max(X, temperature=t),
            softjax.cross_entropy(X, Y, label_smoothing=t, z_loss=t),
            softjax.linear_cross_entropy(H, W, Y, softcap=t, temperature=t, label_smoothing=t),
            information.temper(X, t),
        )

    t = np.float32(0.5)
    expected = jax.jit(results)(t)
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(lambda t: results(Variable(t)))(t), expected
    )
    below: Any = Variable(-t)
    above: Any = Variable(Y + 1)
    for function in (softjax.softmax, softjax.smooth_max):
        with pytest.raises(ValueError, match=r"`temperature` must be > 0, got -0.5"):
            function(X, temperature=below)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 4\), got 4"):
        softjax.cross_entropy(X, above)


@pytest.mark.x64_once
def test_is_within_a_shard_map_what_it_is_outside():
    """The gradient by what is the same on all devices is the sum of theirs."""
    program = PROGRAMS["linear_cross_entropy, mean"]
    first, kernel, *others = program.arguments

    def slope(first, kernel, *others):
        def total(kernel):
            return program.call(first, kernel, *others)

        return jax.value_and_grad(total)(kernel)

    over_devices = jax.jit(within_shard_map(slope, len(program.arguments)))
    values, slopes = over_devices(np.concatenate([first, 2 * first]), kernel, *others)
    outside = [jax.jit(slope)(a, kernel, *others) for a in (first, 2 * first)]
    np.testing.assert_allclose(values, [value for value, _ in outside], rtol=1e-5)
    expected = sum(gradient for _, gradient in outside)
    for gradient in slopes:
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_tracer_leaks(reduction):
    def total(kernel):
        return jnp.sum(softjax.linear_cross_entropy(H, kernel, Y, reduction=reduction))

    gc.freeze()  # JAX collects garbage after each trace: only what is made from here on
    try:
        with jax.checking_leaks():
            jax.eval_shape(jax.grad(total), W)
    finally:
        gc.unfreeze()


def one_program(names, gradients):
    """One program of several, whose arguments are shared, and these: [name][place]."""
    programs = {name: PROGRAMS[name] for name in names}
    calls = {
        name: with_gradient(program) if gradients else program.call
        for name, program in programs.items()
    }

    def call(arguments):
        return {name: calls[name](*arguments[name]) for name in names}

    return call, {name: program.arguments for name, program in programs.items()}


@pytest.mark.x64_once
def test_any_number_of_rows_is_exported():
    """Of all functions and their gradients in one program, for all platforms."""
    call, arguments = one_program([n for n in PROGRAMS if n not in OF_SO_MANY_ROWS], True)
    (rows,) = export.symbolic_shape("n")
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (rows, *a.shape[1:]) if a.shape[0] == N else a.shape, a.dtype
        ),
        arguments,
    )
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(call), platforms=platforms)(shapes)
    assert exported.platforms == platforms


@pytest.mark.x64_once
def test_the_length_of_a_row_may_be_open_in_an_exported_program():
    """Any axis of the normalizers and the number of classes of a loss, also in derivatives."""

    def call(x):
        labels = jnp.zeros(x.shape[0], jnp.int32)
        p, y = softjax.softmax(x, axis=0), softjax.logsumexp(x, axis=0)
        slope = jax.grad(lambda x: jnp.sum(softjax.log_softmax(x, axis=0)[0]))(x)
        return p, y, softjax.logmeanexp(x), softjax.cross_entropy(x, labels), slope

    shape = export.symbolic_shape("n, k")
    exported = export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    e = np.exp(np.asarray(x, np.float64))
    p = e / e.sum(0)
    expected = (p.copy(), np.log(e.sum(0)), np.log(e.mean()), np.log(e.sum(1)) - x[:, 0], -p)
    expected[-1][0] += 1
    for actual, desired in zip(exported.call(x), expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.x64_once
def test_nothing_finite_stops_the_search_for_nan_and_no_transfer_is_hidden():
    """All results are looked at; nor does an eager function that takes no number transfer any.

    JAX checks its own work, too.
    """
    names = [name for name in PROGRAMS if name not in (*INFINITE, *FITS)]
    call, arguments = one_program([*names, "fit, newton-cg"], False)
    arguments = jax.device_put(arguments)
    plain = ("softmax", "log_softmax", "cross_entropy", "information.entropy", "regression.predict")
    with contextlib.ExitStack() as stack:
        for setting in (jax.debug_nans, jax.debug_infs, jax.enable_checks):
            stack.enter_context(setting(True))
        stack.enter_context(jax.transfer_guard("disallow"))
        jax.block_until_ready(jax.jit(call)(arguments))
        for name in plain:
            PROGRAMS[name].call(*arguments[name])


@pytest.mark.x64_once
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in FITS])
def test_nothing_that_is_computed_on_the_way_is_nan(name):
    program = PROGRAMS[name]
    arguments = tuple(map(jnp.asarray, program.arguments))
    with jax.debug_nans(True), jax.disable_jit():
        program.call(*arguments)


@pytest.mark.x64_once
def test_no_state_of_a_fit_is_infinite():
    l2, l1 = np.zeros((2, 1), np.float32)
    data = Data(num_classes=K, features=H, labels=Y, l2=l2, l1=l1)
    for solver in SOLVERS:
        for leaf in jax.tree.leaves(
            solver_of(solver, data).start(data, np.zeros((K, D + 1), np.float32))
        ):
            assert np.isfinite(leaf).all()


IN_LOOPS = (
    "logsumexp",
    "softmax",
    "log_softmax",
    "smooth_max",
    "cross_entropy",
    "information.kl_divergence",
    "linear_cross_entropy, mean",
)


@pytest.mark.x64_once
def test_second_derivatives_of_a_loop_are_those_of_its_steps():
    """JAX evaluates a part of a loop in advance, in which `jax.custom_jvp` loses its rules."""
    firsts = {name: np.round(PROGRAMS[name].arguments[0]) for name in IN_LOOPS}  # with ties
    directions = {name: np.cos(np.arange(x.size)).reshape(x.shape) for name, x in firsts.items()}
    scales = jnp.asarray([1.0, -0.5])

    def step(sums, scale, firsts):
        def added(name):
            x = scale * firsts[name] + 0.1 * sums[name]
            result = jax.tree.leaves(PROGRAMS[name].call(x, *PROGRAMS[name].arguments[1:]))[0]
            return jnp.sin(jnp.vdot(jnp.cos(jnp.arange(result.size)), result))

        return {name: sums[name] + added(name) for name in IN_LOOPS}

    def by_loop(firsts, sums):
        return jax.lax.scan(lambda s, scale: (step(s, scale, firsts), None), sums, scales)[0]

    def by_steps(firsts, sums):
        return step(step(sums, scales[0], firsts), scales[1], firsts)

    def products(function):
        """H v of each function."""

        def total(firsts):
            return sum(function(firsts, dict.fromkeys(IN_LOOPS, jnp.zeros(()))).values())

        def slope(firsts):
            return sum_of(jax.tree.map(jnp.vdot, jax.grad(total)(firsts), directions))

        return jax.jit(jax.grad(slope))(firsts)

    actual, desired = products(by_loop), products(by_steps)
    for name in IN_LOOPS:
        scale = np.abs(desired[name]).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(
            actual[name], desired[name], rtol=0, atol=1e-5 * scale, err_msg=name
        )


@pytest.mark.x64_once
@pytest.mark.parametrize("name", IN_LOOPS)
def test_checkify_finds_what_is_computed_within(name):
    first, *others = map(jnp.asarray, PROGRAMS[name].arguments)
    checked = checkify.checkify(PROGRAMS[name].call, errors=checkify.float_checks)
    for x, message in ((first, None), (first.at[0, 0].set(jnp.nan), "nan generated")):
        found = jax.jit(checked)(x, *others)[0].get()
        assert found is None if message is None else message in found
