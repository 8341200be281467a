"""linear_logsumexp, linear_cross_entropy_outputs and linear_cross_entropy_ggn_vp in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax

pytestmark = pytest.mark.compiled_quickly

INF, NAN = np.inf, np.nan
N, D, V = 9, 3, 7  # two pieces of rows, of 5 and of 4
OPTIONS = [{}, {"softcap": 2.0, "temperature": 0.7}]


def head(dtype, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal(s).astype(dtype) for s in ((N, D), (D, V), V))
    return tuple(map(jnp.asarray, arrays))


def scaled_logits(hidden, kernel, bias, softcap=None, temperature=1.0):
    """The logits that the losses are of, and their derivative by hidden @ kernel, in float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    if softcap is None:
        return z / temperature, np.full_like(z, 1 / temperature)
    t = np.tanh(z / softcap)
    return softcap * t / temperature, (1 - t**2) / temperature


def close(actual, desired, roundings=64.0):
    """Within some roundings of the largest entry."""
    atol = roundings * float(jnp.finfo(actual.dtype).eps) * np.abs(desired).max(initial=1e-30)
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, rtol=0, atol=atol)


# The outputs


@pytest.mark.x64_once
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "options"])
def test_outputs_and_their_gradients(options, dtype):
    """Each output has a cotangent of its own for every row."""
    point, labels = head(dtype), np.arange(N) % V
    x, slope = scaled_logits(*point, **options)
    log_p, p = oracles.log_softmax(x), oracles.softmax(x)
    order = np.argsort(-x, -1, kind="stable")[:, :2]
    entropy = -(p * log_p).sum(-1)
    a, b, c, e = np.random.default_rng(1).standard_normal((4, N)).astype(dtype)

    @jax.jit
    def run(*point):
        def f(hidden, kernel, bias):
            arguments = hidden.reshape(3, 3, D), kernel, labels.reshape(3, 3), bias
            outputs = softjax.linear_cross_entropy_outputs(*arguments, top_k=2, **options)
            top = outputs.top_log_probabilities[..., 1]
            terms = (outputs.log_probability, outputs.logsumexp, outputs.entropy, top)
            total = sum(
                jnp.sum(weight * term.reshape(-1))
                for weight, term in zip((a, b, c, e), terms, strict=True)
            )
            return total, outputs

        ones = jax.tree.map(jnp.ones_like, point)
        slope_along = jax.jvp(lambda *point: f(*point)[0], point, ones)[1]
        return *jax.grad(f, (0, 1, 2), has_aux=True)(*point), slope_along

    gradients, outputs, slope_along = run(*point)
    outputs = jax.tree.map(lambda a: a.reshape(N, *a.shape[2:]), outputs)
    close(outputs.log_probability, log_p[np.arange(N), labels])
    close(outputs.logsumexp, oracles.logsumexp(x))
    close(outputs.entropy, entropy)
    close(outputs.top_log_probabilities, np.take_along_axis(log_p, order, -1))
    np.testing.assert_array_equal(outputs.top_classes, order)
    assert outputs.top_classes.dtype == jnp.int32

    one_hot = np.eye(V)
    g = a[:, None] * (one_hot[labels] - p) + b[:, None] * p
    g += c[:, None] * -p * (log_p + entropy[:, None]) + e[:, None] * (one_hot[order[:, 1]] - p)
    expected = products(g * slope, point)
    for actual, desired in zip(gradients, expected, strict=True):
        close(actual, desired, 400)
    close(slope_along, np.asarray(sum(map(np.sum, expected))), 4000)


def products(g, point):
    """The gradients by hidden, kernel and bias of what has the gradient g by hidden @ kernel."""
    hidden, kernel, _ = (np.asarray(a, np.float64) for a in point)
    return g @ kernel.T, hidden.T @ g, g.sum(0)


@pytest.mark.x64_once
@pytest.mark.parametrize("budget", [None, 1])
def test_logsumexp_and_its_derivatives(budget, dtype):
    """The budget of one byte takes the rows one by one."""
    point, options = head(dtype), OPTIONS[1]
    x, slope = scaled_logits(*point, **options)
    p = oracles.softmax(x)

    @jax.jit
    def run(*point):
        def f(*point):
            losses = softjax.linear_logsumexp(*point, **options, max_temp_bytes=budget)
            return jnp.sum(losses), losses

        return jax.grad(f, (0, 1, 2), has_aux=True)(*point)

    gradients, losses = run(*point)
    close(losses, oracles.logsumexp(x))
    for actual, desired in zip(gradients, products(p * slope, point), strict=True):
        close(actual, desired)


@pytest.mark.x64_once(True)
def test_second_derivatives_of_the_outputs(dtype):
    """The Hessian of logsumexp by the bias is diag(p) - p p^T; that of the entropy as plain."""
    hidden, kernel, bias = head(dtype)

    def plain_entropy(bias):
        return jnp.sum(softjax.information.entropy(hidden @ kernel + bias))

    def entropy(bias):
        return jnp.sum(softjax.linear_cross_entropy_outputs(hidden, kernel, bias=bias).entropy)

    def log_partition(bias):
        return jnp.sum(softjax.linear_logsumexp(hidden, kernel, bias))

    x, _ = scaled_logits(hidden, kernel, bias)
    close(jax.jit(jax.hessian(log_partition))(bias), oracles.hessian(x).sum(0))
    actual, desired = (jax.jit(jax.jacfwd(jax.grad(f)))(bias) for f in (entropy, plain_entropy))
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-12)


@pytest.mark.x64_once
def test_outputs_at_the_edges():
    kernel = jnp.zeros((2, 4))
    outputs = softjax.linear_cross_entropy_outputs(jnp.ones((3, 2)), kernel, top_k=4)
    assert outputs.log_probability is None
    np.testing.assert_array_equal(outputs.top_classes, [[0, 1, 2, 3]] * 3)  # ties, in order
    np.testing.assert_allclose(outputs.entropy, np.log(4), rtol=1e-6)
    signs = jnp.asarray([[-1.0, 1, -1, 1]] * 2)  # logits of -0, 0, -0, 0
    outputs = softjax.linear_cross_entropy_outputs(jnp.zeros((3, 2)), signs, top_k=4)
    np.testing.assert_array_equal(outputs.top_classes, [[0, 1, 2, 3]] * 3)

    # No class: no mass anywhere, and no gradient.
    empty = jnp.full(4, -INF)
    none_left = softjax.linear_cross_entropy_outputs(
        jnp.ones((1, 2)), kernel, np.zeros(1, int), empty
    )
    assert none_left.log_probability == none_left.logsumexp == -INF
    assert none_left.entropy == 0
    gradient = jax.grad(lambda h: jnp.sum(softjax.linear_logsumexp(h, kernel, empty)))
    np.testing.assert_array_equal(gradient(jnp.ones((1, 2))), 0)

    # A traced bad label spoils its own log-probability only.
    run = jax.jit(lambda y: softjax.linear_cross_entropy_outputs(jnp.ones((3, 2)), kernel, y))
    outputs = run(jnp.asarray([0, 4, -1]))
    np.testing.assert_array_equal(np.isnan(outputs.log_probability), [False, True, True])
    np.testing.assert_allclose(outputs.logsumexp, np.log(4), rtol=1e-6)

    no_rows = softjax.linear_cross_entropy_outputs(jnp.ones((0, 2)), kernel, jnp.zeros(0, int))
    assert [a.shape for a in no_rows] == [(0,), (0,), (0,), (0, 1), (0, 1), (0,)]


@pytest.mark.x64_once(True)
def test_log_probabilities_at_many_labels(dtype):
    """Three labels a position, one of them twice, some ignored; with their gradients."""
    point = head(dtype)
    labels = np.random.default_rng(2).integers(V, size=(N, 3))
    labels[:, 2] = labels[:, 0]
    labels[::2, 1] = -1
    kept = labels >= 0
    x, slope = scaled_logits(*point, **OPTIONS[1])
    at = np.maximum(labels, 0)
    log_p = np.where(kept, np.take_along_axis(oracles.log_softmax(x), at, -1), 0)
    c = np.random.default_rng(3).standard_normal((N, 3))

    @jax.jit
    def run(*point):
        def f(hidden, kernel, bias):
            outputs = softjax.linear_cross_entropy_outputs(
                hidden, kernel, labels, bias, ignore_index=-1, **OPTIONS[1]
            )
            return jnp.sum(c * outputs.log_probability), outputs

        return jax.grad(f, (0, 1, 2), has_aux=True)(*point)

    gradients, outputs = run(*point)
    assert outputs.loss is None
    close(outputs.log_probability, log_p)
    one_hot = np.eye(V)[at] - oracles.softmax(x)[:, None]
    g = slope * np.einsum("nk,nkv->nv", c * kept, one_hot)
    for actual, desired in zip(gradients, products(g, point), strict=True):
        close(actual, desired, 400)


@pytest.mark.x64_once(True)
def test_the_loss_among_the_outputs_is_that_of_linear_cross_entropy(dtype):
    (hidden, kernel, bias), labels = head(dtype), np.arange(N) % V - 1
    options = {"class_weights": np.arange(V) / 4, "z_loss": 0.01, **OPTIONS[1]}
    options = {name: jnp.asarray(option, dtype) for name, option in options.items()}

    def run(loss):
        return jax.jit(jax.value_and_grad(lambda *point: jnp.sum(jnp.sin(loss(*point))), (0, 1, 2)))

    def of_outputs(hidden, kernel, options):
        arguments = hidden, kernel, labels, bias
        return softjax.linear_cross_entropy_outputs(*arguments, ignore_index=-1, **options).loss

    def losses(hidden, kernel, options):
        arguments = hidden, kernel, labels, bias
        return softjax.linear_cross_entropy(*arguments, ignore_index=-1, **options)

    programs = run(of_outputs), run(losses)
    for smoothing in (0.1, 0.0, 1.0):  # the derivatives by masses of 0 are not 0
        options["label_smoothing"] = jnp.asarray(smoothing, dtype)
        point = hidden, kernel, options
        (value, gradients), expected = (f(*point) for f in programs)
        close(value, expected[0])
        jax.tree.map(close, gradients, expected[1])


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    ("reduction", "options"),
    [("mean", {}), ("class_weighted_mean", {"max_temp_bytes": 1}), ("sum", {"max_active": 7})],
)
def test_a_reduced_loss_has_all_outputs_beside_it(reduction, options):
    """Those of all logits, in every mode; by pieces of classes, and packed."""
    point, labels = head("float64"), np.arange(N) % V - 1
    weights = np.where(np.arange(N) == 3, 0, np.arange(N) + 1.0)
    part = (labels >= 0) & (weights > 0)
    costs, factors = np.arange(V) / 4, np.linspace(-1, 2, N)
    direction = jax.tree.map(jnp.cos, point)
    of_loss = {"ignore_index": -1, "label_smoothing": 0.1, "class_weights": costs, "z_loss": 0.01}
    arguments = {"top_k": 3, **of_loss, **OPTIONS[1]}
    over = {"sum": 1, "mean": weights[part].sum()}.get(
        reduction, (weights * costs[labels])[part].sum()
    )

    def by_hand(hidden, kernel, bias):
        cap, temperature = OPTIONS[1].values()
        x = cap * jnp.tanh((hidden @ kernel + bias) / cap) / temperature
        lse = jax.nn.logsumexp(x, -1)
        log_p = x - lse[:, None]
        of_labels = jnp.where(labels >= 0, log_p[np.arange(N), labels], 0)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        losses = softjax.cross_entropy(x, labels, **of_loss)
        loss = jnp.sum(jnp.where(part, weights * losses, 0)) / over
        return softjax.LinearOutputs(of_labels, lse, entropy, *jax.lax.top_k(log_p, 3), loss)

    def at_once(*point):
        return softjax.linear_cross_entropy_outputs(
            *point[:2], labels, point[2], reduction=reduction, weights=weights,
            **arguments, **options,
        )  # fmt: skip

    @partial(jax.jit, static_argnums=0)
    def modes(function, *point):
        def f(*point):
            outputs = function(*point)
            if options.get("max_active"):  # the others are 0
                keep = outputs._replace(loss=True)
                keep = jax.tree.map(lambda a: part[(...,) + (None,) * (jnp.ndim(a) - 1)], keep)
                outputs = jax.tree.map(
                    lambda a, k: jnp.where(k, a, 0) if a.ndim else a, outputs, keep
                )
            log_p, lse, entropy, top, _, loss = outputs
            slopes = jnp.sum(factors * (jnp.sin(log_p) + lse**2 + entropy + top @ jnp.arange(3.0)))
            return jnp.cos(loss) + slopes, outputs

        gradient = jax.grad(f, (0, 1, 2), has_aux=True)
        return jax.jvp(gradient, point, direction)

    actual, desired = modes(at_once, *point), modes(by_hand, *point)
    compared = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if a.dtype != jax.dtypes.float0:
            compared(a, b)

    def of_loss_alone(*point):
        outputs = at_once(*point)
        return outputs.loss, outputs

    spoiled = np.where(part[:, None], point[0], NAN)
    gradient = jax.jit(jax.grad(of_loss_alone, (0, 1), has_aux=True))
    slopes, outputs = gradient(spoiled, *point[1:])
    assert all(np.isfinite(a).all() for a in (*slopes, outputs.loss, outputs.logsumexp))


# The curvature


@pytest.mark.x64_once
def test_ggn_product(dtype):
    """G v = J^T H J v, symmetric, and an example of weight 0 takes no part."""
    (hidden, kernel, bias), v, u = head(dtype), head(dtype, 1), head(dtype, 2)
    weights = np.arange(N).astype(dtype)
    for options in OPTIONS:
        run = jax.jit(partial(softjax.linear_cross_entropy_ggn_vp, weights=weights, **options))
        of_v, of_u = (run(hidden.at[0].set(NAN), kernel, t, bias) for t in (v, u))
        x, slope = scaled_logits(hidden, kernel, bias, **options)
        h_dot, w_dot, b_dot = (np.asarray(a, np.float64) for a in v)
        x_dot = slope * (h_dot @ np.asarray(kernel) + np.asarray(hidden) @ w_dot + b_dot)
        g = (weights / weights.sum())[:, None] * np.einsum("nkl,nl->nk", oracles.hessian(x), x_dot)
        for actual, desired in zip(of_v, products(slope * g, (hidden, kernel, bias)), strict=True):
            close(actual, desired)
        inner = [sum(map(jnp.vdot, a, b)) for a, b in ((of_v, u), (of_u, v))]
        np.testing.assert_allclose(*inner, rtol=1e3 * float(jnp.finfo(dtype).eps))


@pytest.mark.x64_once(True)
def test_ggn_product_differentiates(dtype):
    """By kernel and tangent, as the plain form: logits, jvp, the covariance, vjp."""
    (hidden, kernel, _), (_, v, _), (_, u, _) = (head(dtype, seed) for seed in range(3))

    def plain(kernel, v):
        logits = partial(jnp.matmul, hidden)
        z, z_dot = jax.jvp(logits, (kernel,), (v,))
        p = jax.nn.softmax(z)
        g = p * (z_dot - jnp.sum(p * z_dot, -1, keepdims=True))
        return jax.vjp(logits, kernel)[1](g)[0]

    def fused(kernel, v):
        tangents = (None, v, None)
        product = softjax.linear_cross_entropy_ggn_vp(hidden, kernel, tangents, reduction="sum")
        assert product[0] is product[2] is None
        return product[1]

    def derivatives(product):
        def f(kernel, v):
            return jnp.vdot(product(kernel, v), u)

        along = jax.jvp(f, (kernel, v), (u, u))[1]
        return jax.value_and_grad(f, (0, 1))(kernel, v), along

    actual, desired = (jax.jit(partial(derivatives, f))() for f in (fused, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), actual, desired)


# All of them


@pytest.mark.x64_once
def test_lists_and_integers_are_taken_as_arrays():
    hidden, kernel = np.array([[1, 2], [0, 3]]), np.array([[1, 0, 2], [0, 1, 1]])
    wide = hidden.astype("f4"), kernel.astype("f4")
    for labels in (np.array([2, 0]), np.array([[0, 1], [2, 2]])):
        expected = softjax.linear_cross_entropy_outputs(*wide, labels)
        for given in (labels.tolist(), tuple(labels.tolist())):
            actual = softjax.linear_cross_entropy_outputs(hidden.tolist(), kernel.tolist(), given)
            jax.tree.map(np.testing.assert_array_equal, actual, expected)
    v = (*wide, None)
    expected = softjax.linear_cross_entropy_ggn_vp(*wide, v)
    for arguments in ((hidden, kernel), (hidden.tolist(), kernel.tolist())):
        actual = softjax.linear_cross_entropy_ggn_vp(*arguments, v)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.x64_once
def test_misuse():
    h, w, y = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32)

    def misuse(error, match, name, *args, **options):
        with pytest.raises(error, match=rf"softjax\.{name}: {match}"):
            getattr(softjax, name)(*args, **options)

    name = "linear_logsumexp"
    misuse(ValueError, r"`kernel` must be of shape \(3, V\)", name, h, w.T)
    misuse(ValueError, "`temperature` must be > 0", name, h, w, temperature=0.0)
    misuse(ValueError, "`max_temp_bytes` must be >= 1", name, h, w, max_temp_bytes=0)
    name = "linear_cross_entropy_outputs"
    misuse(TypeError, r"`labels` must be class indices \(integer\)", name, h, w, jnp.zeros((4, 5)))
    misuse(ValueError, r"`labels` must be of shape \(4,\), got shape \(1,\)", name, h, w, y[:1])
    misuse(ValueError, r"`labels` must be in \[0, 5\), got 5 at \(0,\)", name, h, w, y + 5)
    misuse(ValueError, "`softcap` must be > 0", name, h, w, y, softcap=-1.0)
    for option in ({"label_smoothing": 0.1}, {"class_weights": np.ones(5)}, {"z_loss": 0.1}):
        misuse(ValueError, f"`{next(iter(option))}` must be left out", name, h, w, **option)
        ids = jnp.zeros((4, 2), jnp.int32)
        misuse(ValueError, f"`{next(iter(option))}` must be left out", name, h, w, ids, **option)
    for k in (0, 6, 1.0, True):
        misuse(ValueError, r"`top_k` must be an integer in \[1, 5\]", name, h, w, y, top_k=k)
    name = "linear_cross_entropy_ggn_vp"
    misuse(
        ValueError,
        "`reduction` must be 'sum' or 'mean', got 'none'",
        name,
        h,
        w,
        (),
        reduction="none",
    )
    misuse(
        TypeError, r"`tangents` must be a tuple \(hidden, kernel, bias\)", name, h, w, [h, w, None]
    )
    misuse(ValueError, "`tangents` must be None for bias", name, h, w, (None, None, w[0]))
    misuse(
        ValueError, r"`tangents of kernel` must be of shape \(3, 5\)", name, h, w, (None, h, None)
    )
    misuse(ValueError, "`weights` must be >= 0", name, h, w, (h, w, None), weights=-jnp.ones(4))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "class_weighted_mean"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.x64_once
def test_an_example_without_weight_or_label_may_have_any_features(reduction, bad):
    """Without a reduction its loss was NaN, and so were the gradients of the head."""
    hidden, kernel, bias = head("float32", 0)
    labels, weights = np.arange(len(hidden)) % V, np.ones(len(hidden), np.float32)
    weights[1], labels[2] = 0, -1
    options = {"weights": weights, "ignore_index": -1, "reduction": reduction}

    def total(hidden, kernel, function):
        every = function(hidden, kernel, labels, bias, **options)
        return jnp.sum(getattr(every, "loss", every))

    spoiled = np.array(hidden)
    spoiled[1:3] = bad
    for function in (softjax.linear_cross_entropy_outputs, softjax.linear_cross_entropy):
        gradients = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
        found, expected = (gradients(h, kernel, function) for h in (spoiled, hidden))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )
        assert not found[1][0][1:3].any()


@pytest.mark.x64_once
def test_the_second_call_does_not_compile(caplog):
    """Other values, the same shapes, without a jit around it; gradients too."""

    def calls(seed):
        hidden, kernel, bias = head("float32", seed)
        labels = jnp.asarray(np.random.default_rng(seed).integers(V, size=N))
        options = {"softcap": 3.0 + seed, "temperature": 0.5 + seed}
        for reduction in ("none", "mean"):

            def loss(kernel, reduction=reduction):
                losses = softjax.linear_cross_entropy(
                    hidden, kernel, labels, bias, reduction=reduction, **options
                )
                return jnp.sum(losses)

            loss(kernel)
            jax.grad(loss)(kernel)
        softjax.linear_logsumexp(hidden, kernel, bias, **options)
        softjax.linear_cross_entropy_outputs(hidden, kernel, labels, bias, **options)
        softjax.linear_cross_entropy_ggn_vp(hidden, kernel, (hidden, kernel, bias), bias, **options)

    calls(0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        calls(1)
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if message.startswith("Compiling")]
