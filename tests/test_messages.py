"""Errors say what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import softjax
from softjax import calibration, regression

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]

X, Y, S = jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0]), jnp.zeros(4)
LINE, CLASSES = np.arange(6.0)[:, None], np.array([0, 1, 0, 1, 0, 1])


def test_arguments_of_a_fit_are_refused_by_their_names():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 2
    result = regression.fit(x, y, max_steps=0)
    params = result.params
    for arguments, said in (
        (
            {"init": (params.kernel, params.bias)},
            "`init` must be a SoftmaxRegression, got tuple",
        ),
        ({"init": result}, "`init` must be a SoftmaxRegression, got FitResult; pass its `params`"),
        (
            {"optimizer": "adam"},
            "`optimizer` must be an optax optimizer, .* 'adam'",
        ),
    ):
        with pytest.raises(TypeError, match=said):
            regression.fit(x, y, **arguments)
    for labels in (np.array(["a", "b"])[y], ["a", "b"] * 3):
        with pytest.raises(TypeError, match=r"`labels` .*numpy\.unique"):
            regression.fit(x, labels)
    with pytest.raises(ValueError, match=r"`class_weights` must be K numbers, .* got 'balanced'"):
        regression.fit(x, y, class_weights="balanced")
    key = jax.random.PRNGKey(3)
    of_key, of_array = (
        regression.bootstrap(x, y, l2=1.0, resamples=2, seed=seed)
        for seed in (key, np.asarray(key))
    )
    jax.tree.map(np.testing.assert_array_equal, of_key, of_array)
    for seed in ("3", 0.5, None, np.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="`seed` must be an integer"):
            regression.bootstrap(x, y, resamples=2, seed=seed)


KINDS_OF_ERRORS = (TypeError, ValueError, IndexError, softjax.streaming.NonFiniteError)


def test_messages_say_what_to_do():
    rows, one_hot = np.ones((4, 1)), np.eye(3, dtype=int)[Y]
    line = regression.fit(LINE, CLASSES).params
    path = regression.fit_path(LINE, CLASSES, l1=np.array([0.5, 0.2]), folds=None)
    head = (X, jnp.ones((3, 5)), softjax.TopKLabels(Y[:, None], jnp.ones((4, 1))))
    adam = optax.adam(0.1)
    for said, call in {
        "got ndarray; wrap arrays in ArrayRows": lambda: softjax.streaming.Batches(rows, 2),
        "`features` must be .* at least one example, got shape": lambda: (
            softjax.streaming.ArrayRows(rows[:0], Y[:0])
        ),
        r"`labels` must be whole numbers in \[0, 3\), got 0\.5 at": lambda: softjax.streaming.fit(
            softjax.streaming.ArrayRows(rows, np.asarray(Y) + 0.5), num_classes=3
        ),
        "`temperature` must be an array of real numbers, got text": lambda: softjax.softmax(
            X, temperature="a"
        ),
        r"`temperature` must be a scalar, .*\(2, 1\); x / T has a temperature": lambda: (
            softjax.softmax(X, temperature=[[1.0], [2.0]])
        ),
        "`labels` must be class indices .* got text": lambda: softjax.cross_entropy(
            X, ["a", "b", "a", "b"]
        ),
        "`x` must be an array of real numbers, got text": lambda: softjax.softmax([[1.0, "a"]]),
        "`checkpoints` must be .*, got 'folder'": lambda: regression.train(
            rows, Y, optimizer=adam, steps=1, checkpoints="folder"
        ),
        "`data` must be a path, a table with named columns or a list of records, got": lambda: (
            softjax.models.Model(np.eye(2), np.zeros(2), ["a", "b"], ["x", "y"]).predict(rows)
        ),
        r"must be floating, such as labels\.astype\(float\)": lambda: softjax.cross_entropy(
            X, one_hot
        ),
        r"dtype bool; .* as labels\.astype\(float\)": lambda: softjax.cross_entropy(
            X, one_hot == 1
        ),
        r"of shape \(2, 5, 4\), got shape \(2, 4, 4\); .*, pass axis=1\.": lambda: (
            softjax.cross_entropy(
                jnp.ones((2, 5, 4, 4)), np.zeros((2, 4, 4), int), weights=np.ones(9)
            )
        ),
        r"pass axis=0 or axis=1\.": lambda: softjax.cross_entropy(
            jnp.ones((5, 5, 4)), np.zeros((5, 4), int)
        ),
        r"`labels` must be of shape \(4,\), got shape \(3,\)\.$": lambda: (
            softjax.derivatives.cross_entropy_hvp(
                jnp.ones((4, 3)), np.zeros(3, int), jnp.ones((4, 3))
            )
        ),
        r"truth values of shape \(4, 3\); .* as labels\.astype\(float\)": lambda: regression.fit(
            rows, one_hot == 1
        ),
        "`labels` must be class indices .*integers or truth values of shape": lambda: (
            regression.fit(rows, one_hot)
        ),
        "`l2` must be a finite number >= 0, got '0.1'": lambda: regression.fit(rows, Y, l2="0.1"),
        "`beta` must be left out unless": lambda: softjax.linear_distillation_loss(*head, beta=0.3),
        "`l1` must be an array of penalties .* got a scalar": lambda: regression.fit_path(
            rows, Y, l1=0.1
        ),
        "`l2` must be an array of penalties .* got a scalar": lambda: regression.fit_path(
            rows, Y, l2=0.1
        ),
        "`folds` must be a number or an array": lambda: regression.fit_path(
            rows, Y, l2=[0.1], folds=None
        ),
        r"`features` must be of shape \(examples, 2\); one example is x\[None\], got": (
            lambda: regression.inference.marginal_effects(regression.init(2, 3), np.zeros(2))
        ),
        r"offset or `l2` \(with penalty factors, l2 \* factors\) are other ones": lambda: (
            regression.inference.covariance(
                regression.fit(LINE, CLASSES, l2=1.0).params, LINE, CLASSES
            )
        ),
        r"softjax\.regression\.PathResult\.best: `folds` must be .* got None": lambda: path.best,
        r"`index` must be in \[-2, 2\), .* got 2": lambda: path.params_at(2),
        r"`index` must be in \[-2, 2\), .* got -3": lambda: path.params_at(-3),
        r"`index` must be an integer, got 0\.2": lambda: path.params_at(0.2),
        r"`columns` must be a sequence of indices, such as \[2\]": lambda: (
            regression.inference.average_changes(line, np.eye(4), LINE, 2)
        ),
        r"one restriction is r\[None\], got shape \(2, 2\)": lambda: regression.inference.wald_test(
            line, np.eye(4), np.zeros((2, 2))
        ),
        r"`labels` must be of an integer dtype .* float32 of shape \(4,\)": lambda: (
            softjax.linear_cross_entropy(*head[:2], S, ignore_index=-100)
        ),
        "more axes than the logits, the first argument": lambda: softjax.cross_entropy(Y, X - 1),
        "`axis` must be None or \\(\\) for an array of rank 0": lambda: softjax.softmax(3.0),
        r"`logits` must be of at least one example, got shape \(0, 3\)": lambda: (
            calibration.calibrate_temperature(X[:0], Y[:0])
        ),
        r"`logits` must be of at least one example, got shape \(0, 2\)": lambda: (
            calibration.calibrate_vector(X[:0, :2], Y[:0])
        ),
        "with at least one example": lambda: regression.fit(rows[:0], Y[:0]),
        "`reduction` must be left out unless there is one label for each": lambda: (
            softjax.linear_cross_entropy_outputs(*head[:2], Y[:, None], reduction="mean")
        ),
        "`l1` must be 0 with `optimizer`, `batch_size` or `epochs`": lambda: regression.fit(
            LINE, CLASSES, l1=0.1, epochs=3
        ),
        r"has labels other than 0, \.\.\., 1 in row 2\.": lambda: regression.train(
            softjax.streaming.Batches(softjax.streaming.ArrayRows(rows, Y), 4),
            num_classes=2,
            optimizer=adam,
            steps=1,
        ),
    }.items():
        with pytest.raises(Exception, match=said) as caught:
            call()
        assert isinstance(caught.value, KINDS_OF_ERRORS)
