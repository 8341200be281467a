"""Leverage, distances, covariances for few examples, odds ratios and formats of a summary."""

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from statsmodels.discrete.discrete_model import MNLogit

from softjax import regression
from softjax.regression import inference

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]
N, D, K = 40, 2, 3


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) + 1
    labels = np.argmax(x @ rng.normal(size=(D, K)) + rng.gumbel(size=(N, K)), 1)
    return x, labels


def fitted(table, l2=0.0, **options):
    return regression.fit(*table, l2=l2, tol=1e-10, **options).params


class ByMatrices:
    """The textbook's matrices, one example after the other, against class 0."""

    def __init__(self, params, x, labels, l2=0.0, intercept=True):
        ones = np.ones((N, 1)) if intercept else np.zeros((N, 0))
        self.x = np.concatenate([x, ones], 1)
        z = np.asarray(regression.logits(params, x))
        p = np.exp(z - z.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True))[:, 1:]
        self.residual = np.eye(K)[labels][:, 1:] - p
        self.a = [np.diag(row) - np.outer(row, row) for row in p]
        self.rows = [np.kron(row[:, None], np.eye(K - 1)) for row in self.x]
        self.information = sum(r @ a @ r.T for r, a in zip(self.rows, self.a, strict=True))
        centring = np.eye(K - 1) - 1 / K
        on_kernel = np.diag(np.append(np.ones(x.shape[1]), np.zeros(int(intercept))))
        self.inverse = np.linalg.inv(self.information + N * l2 * np.kron(on_kernel, centring))
        self.b = [r.T @ self.inverse @ r for r in self.rows]

    def scores(self, power):
        left = [np.eye(K - 1) - a @ b for a, b in zip(self.a, self.b, strict=True)]
        each = zip(self.rows, left, self.residual, strict=True)
        power = -power
        return [r @ np.real(scipy.linalg.fractional_matrix_power(m, power)) @ e for r, m, e in each]


def against_the_first(v, intercept=True):
    """The covariance of theta_k - theta_0."""
    size = D + intercept
    v = np.asarray(v).reshape(D + 1, K, D + 1, K)[:size, :, :size]
    v = v - v[:, :1]
    v = (v - v[..., :1])[:, 1:, :, 1:]
    return v.reshape(size * (K - 1), -1)


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_leverage_and_cooks_distance_are_those_of_the_matrices(table, l2):
    params = fitted(table, l2)
    found = inference.influence(params, *table, l2=l2)
    textbook = ByMatrices(params, *table, l2)
    leverage = [np.trace(a @ b) for a, b in zip(textbook.a, textbook.b, strict=True)]
    np.testing.assert_allclose(found.leverage, leverage, rtol=1e-8)
    parameters = (D + 1) * (K - 1)
    if l2 == 0:
        np.testing.assert_allclose(np.sum(found.leverage), parameters, rtol=1e-8)
    moved = [textbook.inverse @ score for score in textbook.scores(1)]
    distance = [d @ textbook.information @ d / parameters for d in moved]
    np.testing.assert_allclose(found.cooks_distance, distance, rtol=1e-7)


def test_the_influence_of_a_row_of_weight_two_is_that_of_both_and_of_zero_none(table):
    x, labels = table
    weights = np.ones(N)
    weights[:2] = 0, 2
    params = fitted(table, sample_weights=weights)
    found = inference.influence(params, x, labels, sample_weights=weights)
    assert found.leverage[0] == found.cooks_distance[0] == 0
    twice = np.r_[1, np.arange(1, N)]
    both = inference.influence(params, x[twice], labels[twice])
    np.testing.assert_allclose(found.leverage[1], 2 * both.leverage[0], rtol=1e-7)


@pytest.mark.parametrize(("kind", "power"), [("HC0", 0), ("HC2", 0.5), ("HC3", 1)])
@pytest.mark.parametrize("intercept", [True, False])
def test_covariances_for_few_examples(table, kind, power, intercept):
    params = fitted(table, fit_intercept=intercept)
    v = inference.covariance(params, *table, robust=kind, fit_intercept=intercept)
    textbook = ByMatrices(params, *table, intercept=intercept)
    meat = sum(np.outer(score, score) for score in textbook.scores(power))
    expected = textbook.inverse @ meat @ textbook.inverse
    np.testing.assert_allclose(against_the_first(v, intercept), expected, rtol=1e-7)


def test_hc1_is_that_of_statsmodels(table):
    x, labels = table
    params = fitted(table)
    v = inference.covariance(params, x, labels, robust="HC1")
    peer = MNLogit(labels, np.column_stack([x, np.ones(N)])).fit(disp=0, cov_type="HC1", tol=1e-12)
    plain = inference.covariance(params, x, labels, robust=True)
    np.testing.assert_allclose(v, plain * N / (N - (D + 1) * (K - 1)), rtol=1e-12)
    errors = inference.coefficients(params, v, reference=0).standard_error
    ratio = np.asarray(errors) / peer.bse
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


@pytest.mark.x64_once
def test_a_row_of_counts_is_one_example_of_hc1():
    rng = np.random.default_rng(2)
    x, counts = rng.normal(size=(40, 2)), rng.multinomial(25, [0.2, 0.3, 0.5], 40) * 1.0
    params = regression.fit(x, counts).params
    kinds = (inference.covariance(params, x, counts, robust=kind) for kind in ("HC0", "HC1"))
    plain, corrected = map(np.asarray, kinds)
    np.testing.assert_allclose(corrected, plain * 40 / (40 - 6), rtol=1e-5)


def test_frequencies_are_rows_in_every_kind(table):
    x, labels = table
    weights = np.tile([0, 1, 2, 1], N // 4)  # as many 0 as 2: N rows, of the same programs
    params = fitted(table, sample_weights=weights)
    rows = np.repeat(np.arange(N), weights)
    for kind in ("HC1", "HC2", "HC3"):
        v = inference.covariance(params, x, labels, robust=kind, sample_weights=weights)
        once = {"robust": kind, "sample_weights": np.ones(N, int)}
        expected = inference.covariance(params, x[rows], labels[rows], **once)
        np.testing.assert_allclose(v, expected, rtol=1e-7, atol=1e-12)


def test_odds_ratios_are_exponentials(table):
    params = fitted(table)
    v = inference.covariance(params, *table)
    logs = inference.coefficients(params, v, reference=1, level=0.9)
    ratios = inference.odds_ratios(params, v, reference=1, level=0.9)
    for name in ("value", "lower", "upper"):
        np.testing.assert_allclose(getattr(ratios, name), np.exp(getattr(logs, name)))
    np.testing.assert_allclose(ratios.standard_error, ratios.value * logs.standard_error)
    np.testing.assert_array_equal(ratios.p_value, logs.p_value)


def test_the_forms_of_a_summary(table):
    params = fitted(table)
    names = {"feature_names": ["a_1", "b<2"], "class_names": ["x & y", "no", "50 %"]}
    summary = inference.summary(params, *table, reference="no", robust="HC3", **names)
    assert [row["class"] for row in summary.rows] == ["x & y"] * 3 + ["50 %"] * 3
    assert "against no" in summary.text
    assert "robust (HC3)" in summary.text
    frame = summary.to_frame()
    assert frame.loc[("50 %", "a_1"), "z"] == summary.rows[3]["z"]
    page = summary.to_html()
    assert page == summary._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == 7
    assert "<td>x &amp; y</td>" in page
    assert "<td>b&lt;2</td>" in page
    text = summary.to_latex()
    assert text.count(r" \\") == 7
    assert r"x \& y & a\_1" in text
    assert r"50 \%" in text
    by_number = inference.summary(params, *table, reference=1, robust="HC3", **names)
    assert by_number.text == summary.text
    features = pd.DataFrame(table[0], columns=names.pop("feature_names"))
    of_frame = inference.summary(params, features, table[1], reference=1, robust="HC3", **names)
    assert of_frame.text == summary.text


def test_no_name_of_a_class_is_an_option_of_a_row_of_latex(table):
    r"""LaTeX reads [ and * behind the \\ of a row as an option of it, also on the next line."""
    names = ["[0,30)", "*", "[30,60)", "- [x] *"][: np.shape(fitted(table).kernel)[1]]
    for reference in range(len(names)):
        text = inference.summary(
            fitted(table), *table, reference=reference, class_names=names
        ).to_latex()
        rows = text.split(r"\\")[1:]
        assert len(rows) > 3
        assert not any(row.lstrip().startswith(("[", "*")) for row in rows)
    assert "\n{[}0,30)" in text


def test_a_p_value_that_underflows_is_not_0():
    x = np.repeat([0.0, 1.0], 4000)[:, None]
    labels = (np.arange(8000) % 20 < 10 + 9 * np.sign(x[:, 0] - 0.5)).astype(int)
    summary = inference.summary(fitted((x, labels)), x, labels)
    assert "degrees of freedom, p < 1e-37" in summary.text
    assert summary.text.count("<1e-37") == summary.to_latex().count("$<$1e-37") == 2


def test_a_summary_of_odds_ratios(table):
    params = fitted(table)
    summary = inference.summary(params, *table, reference=2, odds_ratios=True, level=0.9)
    v = inference.covariance(params, *table)
    ratios = inference.odds_ratios(params, v, reference=2, level=0.9)
    for name, column in ratios._asdict().items():
        shown = [row["odds_ratio" if name == "value" else name] for row in summary.rows]
        np.testing.assert_array_equal(shown, np.asarray(column).T.ravel())
    for form in (summary.text, summary.to_html(), summary.to_latex().replace("{[}", "[")):
        assert all(title in form for title in ("odds ratio", "[0.05", "0.95]"))
    with pytest.raises(ValueError, match="`reference` must be a class, since an odds ratio"):
        inference.summary(params, *table, reference=None, odds_ratios=True)


def test_refusals(table):
    params = fitted(table)
    with pytest.raises(ValueError, match="`robust`"):
        inference.covariance(params, *table, robust="HC4")
    with pytest.raises(ValueError, match="`robust`"):
        inference.covariance(params, *table, robust="HC3", clusters=np.arange(N) // 4)
    with pytest.raises(ValueError, match="`reference`"):
        inference.summary(params, *table, reference="other")
    x, labels = table
    few, some = x[:6], np.arange(6) % K
    start = fitted((few, some), l2=0.1)
    with pytest.raises(ValueError, match="`robust`"):
        inference.covariance(start, few, some, l2=0.1, robust="HC1")
    with pytest.raises(ValueError, match="at the optimum"):
        inference.influence(regression.init(D, K), x, labels)


def test_corrections_for_few_examples_count_what_the_examples_determine(table):
    """A constant and a repeated feature, which only a penalty allows, are no parameters."""
    x, labels = table
    wide = np.column_stack([x, 3 * x[:, 0], np.full(N, 3.3)])
    params = fitted((wide, labels), 0.01)
    given = {"l2": 0.01, "feature_names": [*"abcd"]}
    plain, corrected = (
        inference.covariance(params, wide, labels, robust=kind, l2=0.01) for kind in ("HC0", "HC1")
    )
    k = (D + 1) * (K - 1)
    np.testing.assert_allclose(corrected, plain * N / (N - k), rtol=1e-12)
    found = inference.influence(params, wide, labels, l2=0.01)
    # The sum of squares over k is that of the moves, which do not count parameters.
    textbook = ByMatrices(params, wide, labels, 0.01)
    distance = [
        d @ textbook.information @ d / k for d in (textbook.inverse @ s for s in textbook.scores(1))
    ]
    np.testing.assert_allclose(found.cooks_distance, distance, rtol=1e-7)
    summary = inference.summary(params, wide, labels, **given)
    for line in ("Constant, so that they tell nothing: d", "Combinations of the other features: c"):
        assert f"\n{line}\n" in summary.text
        assert line in summary.to_html()
    for row in summary.rows:
        assert np.isnan(row["z"]) == (row["feature"] == "d")
