"""Runs that go on from a checkpoint, bit for bit, and runs that do not."""

import functools

import jax
import numpy as np
import optax
import pytest
from weighted_rows import CLASS_WEIGHTS, FACTORS, OFFSET, SGD, D, K, N, X, Y

from softjax import checkpoints, regression, streaming
from softjax.tables import DataError

pytestmark = pytest.mark.compiled_quickly


@pytest.mark.x64_once
def test_a_run_on_arrays_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from softjax.checkpoints import Checkpoints

    def run(steps, seed=0, features=X, **options):
        checkpoints = Checkpoints(tmp_path, {"rate": 0.1})
        return regression.train(
            features,
            Y,
            optimizer=optax.adam(0.1),
            batch_size=16,
            seed=seed,
            steps=steps,
            every=2,
            checkpoints=checkpoints,
            **options,
        )

    whole = regression.train(X, Y, optimizer=optax.adam(0.1), batch_size=16, steps=9, every=2)
    asked = iter([False, True])
    with pytest.raises(streaming.Preempted) as stopped:
        run(9, preempted=lambda: next(asked))
    assert stopped.value.step == 3  # the end of an epoch
    resumed = run(9)
    for part, other in zip(resumed.params, whole.params, strict=True):
        np.testing.assert_array_equal(part, other)
    with pytest.raises(DataError, match=r"batches\.seed was 0 and is 1"):
        run(9, seed=1)
    with pytest.raises(DataError, match=r"batches\.data\.features was"):
        run(9, features=X + 1)


@pytest.mark.x64_once
def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from softjax.checkpoints import Checkpoints

    settings = {"optimizer": optax.adam(0.01), "steps": 2, "sample_weights": np.ones(N)}

    def run(**options):
        saved = Checkpoints(tmp_path, {"a": 1})
        return regression.train(X, Y, checkpoints=saved, **settings | options)

    begun = run()
    again = run(optimizer=optax.adam(0.01), steps=3)
    assert (begun.steps, again.steps) == (2, 3)  # another function with the same numbers
    weights = np.ones(N)
    weights[1] = 2
    for name, other in {
        "l2": 10.0,
        "penalty_factors": FACTORS,
        "fit_intercept": False,
        "class_weights": CLASS_WEIGHTS,
        "num_classes": 5,
        "init": regression.init(D, K),
        "batch_size": 5,
        "offset": OFFSET,
        "sample_weights": weights,
    }.items():
        with pytest.raises(DataError, match=f"belongs to another run: .*{name[-7:]}"):
            run(**{name: other})
    for other in (optax.adam(1.0), optax.adam(optax.linear_schedule(1, 0, 5)), optax.lbfgs()):
        with pytest.raises(DataError, match=r"another run: the optimizer differs: (init|update)\."):
            run(optimizer=other)
    old = Checkpoints(tmp_path, {"a": 1})
    regression.train(X, Y, checkpoints=old, **settings | {"steps": 4})
    del old.configuration["training"]
    old.save(5, {"kernel": np.ones(2)}, [])
    with pytest.raises(DataError, match="another run: it was saved by an earlier version"):
        run(steps=5)


def test_a_function_is_described_by_what_it_encloses():
    from softjax._descriptions import described

    def scaled(by):
        return jax.jit(lambda x: x * by)

    array = np.arange(3.0)
    assert described(scaled(array)) == described(scaled(array.copy()))
    assert described(scaled(array)) != described(scaled(array + 1))
    assert described(functools.partial(scaled, 1)) != described(functools.partial(scaled, 2))
    assert described(np.nan) == described(float("nan"))
    assert described(object()) == "object"


@pytest.mark.x64_once
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_an_optimizer_may_hold_a_random_key(tmp_path, impl):
    pytest.importorskip("orbax.checkpoint")
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3, impl=impl)), SGD)

    def run(data, steps, name=None):
        saved = None if name is None else checkpoints.Checkpoints(tmp_path / name, {})
        return regression.train(*data, optimizer=noisy, steps=steps, every=2, checkpoints=saved)

    batches = streaming.Batches(streaming.ArrayRows(X, Y), N)
    for name, data in {"arrays": (X, Y), "batches": (batches,)}.items():
        whole = run(data, 6)
        run(data, 2, name)
        for part, other in zip(run(data, 6, name).params, whole.params, strict=True):
            np.testing.assert_array_equal(part, other)
        quiet = regression.train(*data, optimizer=SGD, steps=6)
        assert np.abs(np.asarray(whole.params.kernel - quiet.params.kernel)).max() > 1e-3
