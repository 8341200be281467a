"""The summary of an estimator."""

import pickle

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
from flowers import TWO, WEIGHTS, D, N, X, Y, fitted, frame
from sklearn.exceptions import ConvergenceWarning

from softjax import regression
from softjax.regression.inference import _covariance
from softjax.sklearn import SoftmaxClassifier
from softjax.sklearn._examples import bucket

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def test_the_summary_has_the_names_of_the_data(classifier):
    named = SoftmaxClassifier().fit(frame(), Y, WEIGHTS)
    table = named.summary(reference="rose")
    assert [row["feature"] for row in table.rows] == [*"abcd", "bias"] * 2
    assert [row["class"] for row in table.rows[::5]] == ["lily", "tulip"]
    with jax.enable_x64(True):
        labels = np.unique(Y, return_inverse=True)[1]
        options = {"l2": named.l2_, "sample_weights": WEIGHTS, "reference": 1}
        expected = regression.inference.summary(named.params_, X, labels, **options)
    for row, other in zip(table.rows, expected.rows, strict=True):
        assert row["standard_error"] == pytest.approx(other["standard_error"], rel=1e-9)
    for reference, against in ((None, "the mean of all classes"), (..., "lily"), ("rose", "rose")):
        ours = named.summary(reference=reference)
        assert f"Each class is compared with: {against}\n" in ours.text
        assert f"Each class is compared with: {against}</caption>" in ours.to_html()
        assert f"% Each class is compared with: {against}\n" in ours.to_latex()
        assert len(ours.rows) == (D + 1) * (3 if reference is None else 2)
    assert named.summary().text == named.summary(reference="lily").text
    bare = SoftmaxClassifier(fit_intercept=False).fit(frame(), Y).summary()
    assert [row["feature"] for row in bare.rows] == [*"abcd"] * 2
    again = pickle.loads(pickle.dumps(named))
    with pytest.raises(ValueError, match="pass the X and y of the fit"):
        again.summary()
    text = again.summary(frame(), Y, WEIGHTS, reference="rose").text
    assert text == table.text
    given = classifier.summary(X, Y, feature_names=[*"pqrs"], odds_ratios=True)
    assert [row["feature"] for row in given.rows] == [*"pqrs", "bias"] * 2
    assert all(row["odds_ratio"] > 0 for row in given.rows)
    clusters = np.arange(N) % 7
    for options in ({"robust": "HC3"}, {"clusters": clusters}, {"robust": "HC1"}):
        with jax.enable_x64(True):
            l2 = {"l2": named.l2_, "sample_weights": WEIGHTS}
            expected = regression.inference.summary(named.params_, X, labels, **l2, **options)
        for row, other in zip(named.summary(**options).rows, expected.rows, strict=True):
            assert row["standard_error"] == pytest.approx(other["standard_error"], rel=1e-9)
    programs = _covariance._covariance._cache_size()
    short = SoftmaxClassifier().fit(X[:-3], Y[:-3])
    assert bucket(N - 3) == bucket(N)
    short.summary()
    SoftmaxClassifier().fit(X[:-9], Y[:-9]).summary()
    assert _covariance._covariance._cache_size() == programs  # for all numbers of rows
    with pytest.raises(ValueError, match=r"clusters must be of shape \(\d+,\), got shape \(2,\)"):
        named.summary(clusters=[1, 2])
    two = fitted(TWO).summary(robust=True)
    assert "Class yes against no" in two.text
    with pytest.raises(ValueError, match="reference must be one of"):
        named.summary(reference="oak")
    with pytest.raises(ValueError, match="previously unseen labels"):
        named.summary(frame(), np.where(Y == "rose", "oak", Y))
    with pytest.raises(ValueError, match=r"with l1, which selects .* fit with l2 alone"):
        fitted(TWO, l1_ratio=0.5).summary()


@pytest.mark.parametrize("y", [Y, TWO])
def test_the_marginal_effects_have_the_names_of_the_data(y):
    """Their rows are those of `inference.average_marginal_effects`, for all classes."""
    model = SoftmaxClassifier().fit(frame(), y, WEIGHTS)
    table = model.summary(marginal_effects=True, robust=True, level=0.9)
    names = model.classes_.tolist()
    assert [row["class"] for row in table.rows] == np.repeat(names, D).tolist()
    assert [row["feature"] for row in table.rows] == [*"abcd"] * len(names)
    assert "Average marginal effects on the probability of each class\n" in table.text
    assert f"Class {names[0]}\n" in table.text
    inference, params = regression.inference, model.params_
    with jax.enable_x64(True):
        labels = np.unique(y, return_inverse=True)[1]
        l2 = {"l2": model.l2_, "sample_weights": WEIGHTS}
        v = inference.covariance(params, X, labels, robust=True, **l2)
        options = {"sample_weights": WEIGHTS, "level": 0.9}
        expected = inference.average_marginal_effects(params, v, X, **options)
    for name, column in expected._asdict().items():
        key = "marginal_effect" if name == "value" else name
        found = np.reshape([row[key] for row in table.rows], (-1, D)).T
        np.testing.assert_allclose(found, column, rtol=1e-7)
    assert "<th>effect</th>" in table.to_html()
    with pytest.raises(ValueError, match="`odds_ratios` must be False for a table of marginal"):
        model.summary(marginal_effects=True, odds_ratios=True)


def test_a_summary_of_other_data_says_so():
    changed = X.copy()
    model = SoftmaxClassifier().fit(changed, Y)
    others = {"y": np.roll(Y, 1)}, {"sample_weight": 1 + 9.0 * (Y == "rose")}, {"X": 3 * X}
    for given in others:
        with pytest.raises(ValueError, match="are not those of the fit, or have changed since it"):
            model.summary(**{"X": X, "y": Y} | given)
    changed *= 3
    with pytest.raises(ValueError, match="are not those of the fit, or have changed since it"):
        model.summary()
    with pytest.warns(ConvergenceWarning):
        stopped = SoftmaxClassifier(max_iter=1).fit(X, Y)
    with pytest.raises(ValueError, match="the fit has not converged: it took all the steps"):
        stopped.summary()


def test_weights_of_classes_are_no_examples_in_a_summary():
    """Equal weights of all classes change neither a coefficient nor a standard error."""
    plain = SoftmaxClassifier(l2=0.01, tol=1e-12).fit(X, Y)
    weights = dict.fromkeys(plain.classes_, 20.0)
    equal = SoftmaxClassifier(l2=0.01, class_weight=weights, tol=1e-12).fit(X, Y)
    for row, other in zip(equal.summary().rows, plain.summary(robust=True).rows, strict=True):
        assert row["standard_error"] == pytest.approx(other["standard_error"], rel=1e-6)
    table = SoftmaxClassifier(class_weight="balanced").fit(X, Y).summary()
    assert "robust, of a fit with class weights" in table.text
    assert "Likelihood ratio, AIC and BIC: none" in table.text
    assert np.isnan(np.asarray(table.goodness_of_fit.aic))
    assert int(table.goodness_of_fit.num_examples) == len(Y)
