"""The summary of a fit as text, as rows, and as a table of HTML or LaTeX."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._foreign import column_names
from softjax._labels import Labels
from softjax.regression._features import Features, same_order
from softjax.regression._model import SoftmaxRegression, refuse_other_params
from softjax.regression._rows import checked_rows
from softjax.regression.inference import _estimates as estimates
from softjax.regression.inference._covariance import covariance_of_rows
from softjax.regression.inference._effects import average_effects_of
from softjax.regression.inference._goodness import GoodnessOfFit, goodness_of_rows
from softjax.regression.inference._optimum import centred_problem, of_features
from softjax.regression.inference._rank import Determined, determined

SUMMARY = "regression.inference.summary"


class Summary(NamedTuple):
    """The summary table of a fit; `print` shows its text.

    Attributes:
        rows: one dictionary per coefficient: class, feature, coefficient (or odds_ratio, or
            marginal_effect), standard_error, z, p_value, lower, upper. pandas, csv and json accept
            this list of rows.
        goodness_of_fit: the figures above the table, the result of `goodness_of_fit`.
        text: the figures and the table as text.
        level: the confidence level of the intervals.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> summary = softjax.regression.inference.summary(params, x, labels)
        >>> [(row["class"], row["feature"], round(row["z"], 2)) for row in summary.rows]
        [('1', 'x0', 0.84), ('1', 'bias', -0.69)]
    """

    rows: list[dict[str, Any]]
    goodness_of_fit: GoodnessOfFit
    text: str
    level: float

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:  # a notebook calls this
        return self.to_html()

    def to_frame(self) -> Any:
        """The rows as a DataFrame of pandas, which must be installed, by class and feature."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index(["class", "feature"])

    def to_html(self) -> str:
        """The rows as an HTML table, with the figures above the table as its caption."""
        head, *body = self._cells()
        lines = ["<table>", f"<caption>{html.escape(self._caption())}</caption>", "<thead>"]
        for tag, row in [("th", head), *(("td", row) for row in body)]:
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            lines += [f"<tr>{cells}</tr>"] + ["</thead>", "<tbody>"] * (tag == "th")
        return "\n".join([*lines, "</tbody>", "</table>"])

    def to_latex(self) -> str:
        """The rows as a LaTeX `tabular`, with the figures above the table as comments."""
        head, *body = ([_latex(cell) for cell in row] for row in self._cells())
        lines = [f"% {line}" for line in self._caption().splitlines()]
        lines += ["\\begin{tabular}{ll" + "r" * (len(head) - 2) + "}", "\\hline"]
        lines += [" & ".join(head) + r" \\", "\\hline"]
        lines += [" & ".join(row) + r" \\" for row in body]
        return "\n".join([*lines, "\\hline", "\\end{tabular}"])

    def _caption(self) -> str:
        return self.text.split("\n---")[0]

    def _cells(self) -> list[list[str]]:
        """The names of the columns, and the rows as text."""
        titles = _titles(self.level)
        table = [[titles.get(name, name) for name in self.rows[0]]] if self.rows else [[]]
        for row in self.rows:
            cells = {n: v if isinstance(v, str) else f"{v:.4g}" for n, v in row.items()}
            table.append(list((cells | {"p_value": _p_value(row["p_value"], ".4g")}).values()))
        return table


@on_auto_axes
def summary(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    reference: int | str | None = 0,
    odds_ratios: bool = False,
    marginal_effects: bool = False,
    level: float = 0.95,
    robust: bool | str = False,
    clusters: ArrayLike | None = None,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    feature_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Summary:
    """Summary of a fit: coefficients, standard errors, tests, intervals and goodness of fit.

    The table combines `covariance`, `coefficients` and `goodness_of_fit`, like the summary that
    statsmodels prints for its MNLogit.

    Derivative: none, since the result is text.
    Edge cases: see `covariance`.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        reference: the class that the others are compared with, given as its number or its name in
            `class_names`; None compares each class with the mean of all classes.
        odds_ratios: whether the table shows odds ratios against the reference in place of their
            logarithms, the coefficients; see `inference.odds_ratios`.
        marginal_effects: whether the table shows the average marginal effects on the probabilities
            of all classes, which need no reference, in place of the coefficients; see
            `inference.average_marginal_effects`.
        level: the confidence level, in (0, 1).
        robust: see `covariance`.
        clusters: see `covariance`.
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit; without an intercept the table has no bias.
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        class_weights: real [K], >= 0, those of the fit; see `covariance`.
        offset: real [N, K], as in the fit.
        feature_names: D names; None for those of a DataFrame, else x0, x1, ...
        class_names: K names; None for 0, 1, ...

    Returns:
        `Summary`.

    Raises:
        TypeError, ValueError: see `covariance`; also too many or too few names, odds ratios
            without a reference, and odds ratios together with marginal effects.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> summary = softjax.regression.inference.summary(params, x, labels)
        >>> print(summary.text.splitlines()[0])
        Softmax regression: 4 examples, 2 classes, 2 parameters

    Source: J. S. Long, "Regression Models for Categorical and Limited Dependent Variables" (1997),
        chapter 6.
    """
    function = SUMMARY
    refuse_other_params(function, params)
    same_order(function, features, clusters=clusters)
    d, k = jnp.shape(params.kernel)
    if feature_names is None:
        feature_names = column_names(features) or None
    feature_names = _names(function, "feature_names", feature_names, d, "x")
    class_names = _names(function, "class_names", class_names, k, "")
    if isinstance(reference, str):
        if class_names.count(reference) != 1:
            expected = f"one of the class names {', '.join(class_names)}"
            raise ValueError(_checks.message(function, "reference", expected, repr(reference)))
        reference = class_names.index(reference)
    data = checked_rows(
        function, params, features, labels, sample_weights, class_weights, offset, fit_intercept
    )
    found = determined(data)
    centred, rows, mean = centred_problem(params, data.dense())
    v = covariance_of_rows(function, centred, rows, robust, clusters, l2, found)
    effects = None
    if _checks.flag(function, "marginal_effects", marginal_effects):
        if odds_ratios:
            expected = "False for a table of marginal effects"
            raise ValueError(_checks.message(function, "odds_ratios", expected, True))
        estimates.check_level(function, level)
        effects = average_effects_of(function, centred, v, rows, level)
    class_weighted = class_weights is not None
    return summary_of(
        params,
        of_features(v, mean),
        goodness_of_rows(params, data, found),
        found,
        kind_of_covariance(robust, clusters is not None, class_weighted, l2),
        feature_names,
        class_names,
        reference=reference,
        odds_ratios=odds_ratios,
        level=level,
        fit_intercept=fit_intercept,
        class_weighted=class_weighted,
        effects=effects,
    )


def summary_of(
    params: SoftmaxRegression,
    v: Array,
    fit: GoodnessOfFit,
    found: Determined,
    kind: str,
    feature_names: list[str],
    class_names: list[str],
    *,
    reference: int | None = 0,
    odds_ratios: bool = False,
    level: float = 0.95,
    fit_intercept: bool = True,
    class_weighted: bool = False,
    effects: estimates.Estimates | None = None,
) -> Summary:
    """The summary of the statistics of a fit; `kind` describes the covariance `v`.

    Average marginal effects [D, K], if given, are shown in place of the coefficients.
    """
    d, k = jnp.shape(params.kernel)
    if effects is not None:
        table = effects
    elif not odds_ratios:
        table = estimates.coefficients(params, v, reference=reference, level=level)
    elif reference is None:
        expected = "a class, since an odds ratio compares two classes"
        raise ValueError(_checks.message(SUMMARY, "reference", expected, None))
    else:
        table = estimates.odds_ratios(params, v, reference=reference, level=level)
    shown, names = list(class_names), list(feature_names)
    if effects is not None:
        quantity, against = "marginal_effect", ""
        line = "Average marginal effects on the probability of each class"
    else:
        quantity = "odds_ratio" if odds_ratios else "coefficient"
        against = "the mean of all classes" if reference is None else class_names[reference]
        line = f"Each class is compared with: {against}"
        names += ["bias"] * bool(fit_intercept)
        if reference is not None:
            del shown[estimates.class_index(SUMMARY, "reference", reference, k)]
    rows = _rows(table, quantity, shown, names)
    figures = jax.tree.map(np.asarray, fit)  # which NumPy compares without a compilation
    head = [*_head(figures, k, kind, class_weighted), line]
    if figures.num_parameters < (d + bool(fit_intercept)) * (k - 1):
        head += _without_information(found, feature_names)
    return Summary(rows, fit, "\n".join([*head, *_table(rows, against, level)]), level)


def _names(
    function: str, argument: str, names: Sequence[str] | None, count: int, prefix: str
) -> list[str]:
    if names is None:
        return [f"{prefix}{i}" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        got = repr(names) if isinstance(names, str) else len(names)
        raise ValueError(_checks.message(function, argument, f"{count} names", got))
    return [str(name) for name in names]


def _rows(
    table: estimates.Estimates,
    quantity: str,
    class_names: Sequence[str],
    feature_names: Sequence[str],
) -> list[dict[str, Any]]:
    """A dictionary for each coefficient or odds ratio, which is its `quantity`."""
    names = (quantity, *estimates.Estimates._fields[1:])
    columns = dict(zip(names, map(np.asarray, table), strict=True))
    return [
        {"class": of_class, "feature": feature}
        | {name: column[j, c].item() for name, column in columns.items()}
        for c, of_class in enumerate(class_names)
        for j, feature in enumerate(feature_names)
    ]


def _head(fit: GoodnessOfFit, num_classes: int, kind: str, class_weighted: bool) -> list[str]:
    n, test = fit.num_examples.item(), fit.likelihood_ratio
    count = f"{n:.0f}" if n.is_integer() and n < 2**53 else f"{n:g}"
    size = f"{num_classes} classes, {fit.num_parameters} parameters"
    null = f"(null model: {fit.null_log_likelihood:.6g})"
    degrees = f"{int(test.degrees_of_freedom)} degrees of freedom"
    p = f"p = {test.p_value:.3g}" if test.p_value != 0 else "p < 1e-37"
    figures = [
        f"Log-likelihood: {fit.log_likelihood:.6g} {null}, pseudo-R2: {fit.pseudo_r2:.4g}",
        f"Likelihood ratio: {test.statistic:.5g} on {degrees}, {p}",
        f"AIC: {fit.aic:.6g}, BIC: {fit.bic:.6g}",
    ]
    if class_weighted:
        figures = [
            f"Log-likelihood: {fit.log_likelihood:.6g} {null}, without the class weights",
            "Likelihood ratio, AIC and BIC: none, since class weights move the fit off its maximum",
        ]
    return [
        f"Softmax regression: {count} examples, {size}",
        *figures,
        f"Covariance: {kind}",
    ]


def _without_information(found: Determined, names: Sequence[str]) -> list[str]:
    """Which features are constant, and which are collinear; only a penalty sets their effects."""
    constant = [name for name, varies in zip(names, found.varies, strict=True) if not varies]
    columns = zip(names, found.varies & ~found.counts, strict=True)
    collinear = [name for name, other in columns if other]
    lines = []
    if constant:
        lines.append(f"Constant, so that they tell nothing: {', '.join(constant)}")
    if collinear:
        lines.append(f"Combinations of the other features: {', '.join(collinear)}")
    return lines


def _titles(level: float) -> dict[str, str]:
    """The titles of the columns of numbers; those of the bounds are quantiles, as [0.025."""
    tail = (1 - level) / 2
    return {
        "coefficient": "coefficient",
        "odds_ratio": "odds ratio",
        "marginal_effect": "effect",
        "standard_error": "std err",
        "z": "z",
        "p_value": "P>|z|",
        "lower": f"[{tail:.3g}",
        "upper": f"{1 - tail:.3g}]",
    }


def kind_of_covariance(
    robust: bool | str, clustered: bool, class_weighted: bool, l2: ArrayLike
) -> str:
    kind = "clustered" if clustered else "robust" if robust or class_weighted else "model-based"
    if isinstance(robust, str) and not clustered:
        kind = f"robust ({robust})"
    if class_weighted:
        kind += ", of a fit with class weights"
    strengths = np.unique(np.asarray(l2))
    if not strengths.any():
        return kind
    spoken = f"{strengths[0]:g}" + (f" to {strengths[-1]:g}" if len(strengths) > 1 else "")
    return f"{kind}, for the penalised fit (l2 = {spoken})"


def _table(rows: list[dict[str, Any]], against: str, level: float) -> list[str]:
    titles = _titles(level)
    width = max([len("feature"), *(len(row["feature"]) for row in rows)])
    lines = []
    previous = None
    for row in rows:
        numbers = {name: cell for name, cell in row.items() if name in titles}
        if row["class"] != previous:
            previous = row["class"]
            title = f"Class {previous}" + (f" against {against}" if against else "")
            lines += ["-" * (width + 72), title]
            lines.append(f"{'feature':<{width}}" + "".join(f"{titles[n]:>12}" for n in numbers))
        cells = {n: f"{number:#.4g}" for n, number in numbers.items()}
        cells["p_value"] = _p_value(row["p_value"], "#.3g")
        lines.append(f"{row['feature']:<{width}}" + "".join(f"{c:>12}" for c in cells.values()))
    return lines


def _p_value(p: float, form: str) -> str:
    """A p-value as text. One that is 0 is smaller than the smallest number, which is above 0."""
    return "<1e-37" if p == 0 else format(p, form)


def _latex(text: str) -> str:
    """The text, in which characters with a special meaning in LaTeX are escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"<": "$<$", ">": "$>$", "|": "$|$"}
    special |= {"[": "{[}", "*": "{*}"}  # behind the end of a row they would be its options
    return "".join(special.get(character, character) for character in text)
