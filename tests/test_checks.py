"""Checks of values: their cost, the places where they run, and the switch for them."""

import gc
import importlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax
from softjax import _checks
from softjax._uncollected import uncollected

pytestmark = pytest.mark.compiled_quickly

LOGITS = np.random.default_rng(0).standard_normal((8, 5), np.float32)
LABELS = np.arange(8, dtype=np.int32) % 5
SHARES = np.full((8, 5), 0.2, np.float32)


def with_bad(array, value):
    """The array with a bad entry in its third row."""
    array = array.copy()
    array[(2,) * array.ndim] = value
    return array


# Calls with a bad value in the third example: each is refused by name, and is NaN unchecked.
BAD_CALLS = {
    "labels": lambda x, put: softjax.cross_entropy(x, put(with_bad(LABELS, 5))),
    "ignore_index": lambda x, put: softjax.cross_entropy(
        x, put(with_bad(LABELS, 7)), ignore_index=-1
    ),
    "indices": lambda x, put: softjax.cross_entropy(
        x, softjax.TopKLabels(put(with_bad(LABELS, -2)[:, None]), jnp.ones((8, 1), x.dtype))
    ),
    "linear": lambda x, put: softjax.linear_cross_entropy(
        x, jnp.eye(5, dtype=x.dtype), put(with_bad(LABELS, 5))
    ),
    "surprisal": lambda x, put: softjax.information.surprisal(x, put(with_bad(LABELS, 9))),
    "outcome": lambda x, put: softjax.choice.bradley_terry_loss(
        x[:, 0], x[:, 1], put(with_bad(LABELS % 2, 2))
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("put", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_an_unchecked_call_gives_what_it_gives_under_a_trace(name, put):
    call, x = BAD_CALLS[name], jnp.asarray(LOGITS)
    with pytest.raises(ValueError, match=r"must be in \[0, \d\), got -?\d at \(2"):
        call(x, put)
    with softjax.checks(False):
        losses = call(x, put)
        with softjax.checks(True), pytest.raises(ValueError, match="must be"):
            call(x, put)
    np.testing.assert_array_equal(np.isnan(losses), np.arange(8) == 2)
    with pytest.raises(ValueError, match="must be"):  # what was compiled unchecked is not reused
        call(x, put)


@pytest.mark.x64_once
def test_temperatures_and_weights_are_checked_and_unchecked():
    x, q = jnp.asarray(LOGITS), jnp.asarray(with_bad(SHARES, -1.0))
    for call in (
        lambda: softjax.softmax(x, temperature=0.0),
        lambda: softjax.smooth_max(x, temperature=-1.0),
        lambda: softjax.cross_entropy(x, q),
        lambda: softjax.cross_entropy(x, LABELS, class_weights=-SHARES[0]),
        lambda: softjax.cross_entropy(x, LABELS, label_smoothing=2.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
        with softjax.checks(False):
            call()
    with softjax.checks(False):
        assert np.isnan(softjax.softmax(x, temperature=0.0)).all()
        with pytest.raises(TypeError, match="must be an integer"):  # no value is looked at
            softjax.cross_entropy(x, LABELS, axis="last")


@pytest.mark.x64_once
def test_only_the_thread_that_enters_is_unchecked():
    raised = []

    def call():
        try:
            softjax.cross_entropy(jnp.asarray(LOGITS), with_bad(LABELS, 5))
        except ValueError as error:
            raised.append(error)

    with softjax.checks(False):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        call()
    assert len(raised) == 1


@pytest.mark.x64_once
def test_an_exception_and_a_decorated_function_leave_checks_as_they_were():
    call = softjax.checks(False)(lambda: softjax.cross_entropy(LOGITS, with_bad(LABELS, 5)))
    assert np.isnan(call()).any()
    with pytest.raises(KeyError), softjax.checks(False):
        raise KeyError
    with pytest.raises(ValueError, match="must be"):
        softjax.cross_entropy(LOGITS, with_bad(LABELS, 5))


@pytest.mark.x64_once
@pytest.mark.parametrize("name", BAD_CALLS)
def test_an_accelerator_says_whether_its_values_are_good(name, monkeypatch):
    """There one boolean is read, and the values only for the message of an error."""
    read = []

    class Reading:
        """NumPy, with a list of the arrays of a device that were read."""

        def __getattr__(self, attribute):
            return getattr(np, attribute)

        def asarray(self, x, *rest):
            if isinstance(x, jax.Array):
                read.append(x)
            return np.asarray(x, *rest)

    monkeypatch.setattr(_checks, "_is_far", lambda x: isinstance(x, jax.Array) and x.size >= 8)
    monkeypatch.setattr(_checks, "np", Reading())
    monkeypatch.setattr("softjax._labels.np", Reading())
    x = jnp.asarray(LOGITS)
    with pytest.raises(ValueError, match=r"must be in \[0, \d\), got -?\d at \(2"):
        BAD_CALLS[name](x, jnp.asarray)
    read.clear()
    labels, shares = jnp.asarray(LABELS), jnp.asarray(SHARES)
    plain = softjax.cross_entropy(x, labels), softjax.cross_entropy(x, shares)
    assert not read
    # Within traces too, where the values of labels from outside are known.
    bad = jnp.asarray(with_bad(LABELS, 5))
    for trace in (jax.jit, lambda f: lambda x: jax.linearize(f, x)[0]):
        found = trace(lambda x: softjax.cross_entropy(x, labels))(x)
        np.testing.assert_allclose(found, plain[0], rtol=1e-6)
        with pytest.raises(ValueError, match="must be"):
            trace(lambda x: softjax.cross_entropy(x, bad))(x)
    assert [array.size for array in read if array is not bad] == []


@pytest.mark.x64_once
def test_an_eager_call_is_one_program():
    """An equation outside of it would be one more dispatch, 10 us on a CPU."""
    labels, shares = jnp.asarray(LABELS), jnp.asarray(SHARES)
    for call in (
        softjax.softmax,
        softjax.log_softmax,
        lambda x: softjax.log_softmax(x, 0),
        lambda x: softjax.logsumexp(x, -1),
        softjax.logmeanexp,
        lambda x: softjax.cross_entropy(x, labels),
        lambda x: softjax.cross_entropy(x, shares),
    ):
        (equation,) = jax.make_jaxpr(call)(jnp.asarray(LOGITS)).eqns
        assert equation.primitive.name in ("jit", "pjit")


@pytest.mark.x64_once
@pytest.mark.parametrize("enabled", [True, False])
def test_imports_leave_the_garbage_collector_as_it_was(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ModuleNotFoundError), uncollected():
            importlib.import_module("softjax.of_no_such_name")
        assert gc.isenabled() == enabled
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
