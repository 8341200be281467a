"""The goodness of fit of a model, and the summary of a fit as text and as rows."""

import html
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import ClassIndices, Labels
from softjax._losses import expected_loss, index_loss
from softjax._softmax import softmax_core
from softjax._weights import sums_by_class
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import (
    EXACT,
    Rows,
    checked_rows,
    counted,
    logits_of,
    masses,
    times,
    with_offset,
)
from softjax.regression.inference._covariance import covariance
from softjax.regression.inference._estimates import (
    ChiSquareTest,
    Estimates,
    chi_square_test,
    class_index,
    coefficients,
)

if TYPE_CHECKING:
    from softjax.regression._features import Features

# With an offset, Newton's method fits the bias of the null model. It takes at most NULL_STEPS steps
# and stops when the expected class shares agree with the shares of the labels up to NULL_TOLERANCE
# roundings.
NULL_STEPS, NULL_TOLERANCE = 100, 64


class GoodnessOfFit(NamedTuple):
    """The goodness of fit of a softmax regression, compared with a model without features.

    Attributes:
        log_likelihood: sum_i w_i log p_i(y_i), nats.
        null_log_likelihood: log-likelihood of the null model. With a bias and without an offset it
            is sum_k n_k log(n_k / n); `goodness_of_fit` defines the other cases.
        num_examples: n = sum_i w_i, where counts in the labels count too.
        num_parameters: k = (D + 1) (K - 1), the number of independent parameters; D (K - 1) without
            an intercept.
        degrees_of_freedom: n - k, the degrees of freedom of the residuals.
        aic: 2 k - 2 log_likelihood.
        bic: k log n - 2 log_likelihood.
        pseudo_r2: McFadden's 1 - log_likelihood / null_log_likelihood.
        likelihood_ratio: the test against the null model, with D (K - 1) degrees of freedom.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> fit = softjax.regression.inference.goodness_of_fit(params, x, labels)
        >>> int(fit.num_parameters), round(float(fit.pseudo_r2), 3)
        (2, 0.153)
    """

    log_likelihood: Array
    null_log_likelihood: Array
    num_examples: Array
    num_parameters: Array
    degrees_of_freedom: Array
    aic: Array
    bic: Array
    pseudo_r2: Array
    likelihood_ratio: ChiSquareTest


class Summary(NamedTuple):
    """The summary table of a fit; `print` shows its text.

    Attributes:
        rows: one dictionary per coefficient: class, feature, coefficient, standard_error, z,
            p_value, lower, upper. pandas, csv and json accept this list of rows.
        goodness_of_fit: the figures above the table.
        text: the figures and the table as text.

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
        titles = {"standard_error": "std err", "p_value": "P>|z|"}
        table = [[titles.get(name, name) for name in self.rows[0]]] if self.rows else [[]]
        for row in self.rows:
            cells = (v if isinstance(v, str) else f"{v:.4g}" for v in row.values())
            table.append(list(cells))
        return table


@on_auto_axes
def log_likelihood(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Log-likelihood of a softmax regression: the sum over the examples, without a penalty.

        l = sum_i w_i sum_k y_ik log p_ik

    If the labels are counts, the multinomial coefficients are left out; they do not depend on the
    parameters.

    Derivative: w_i (y_i - p_i sum_k y_ik) with respect to the logits; both modes, any order.
    Edge cases: a row of weight 0 is ignored, even if it contains NaN.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        offset: real [N, K], nats; None for zeros.

    Returns:
        A scalar, nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(2, 4)
        >>> inference = softjax.regression.inference
        >>> inference.log_likelihood(params, jnp.ones((3, 2)), jnp.array([0, 1, 3]))  # -3 log 4
        Array(-4.158883, dtype=float32)

    Source: A. Agresti, "Categorical Data Analysis" (2013), section 8.1.4.
    """
    function = "regression.inference.log_likelihood"
    rows = checked_rows(function, params, features, labels, sample_weights, offset=offset)
    return _log_likelihood(params, rows)


@on_auto_axes
def goodness_of_fit(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> GoodnessOfFit:
    """Goodness of fit of a softmax regression: log-likelihoods, AIC, BIC, pseudo-R2.

    The formulas are those of maximum likelihood. A penalised fit has fewer effective parameters
    than these formulas count, so that AIC, BIC and the test are then only approximate. The null
    model has no features; it has a bias and an offset if the model has them, as in R's `glm`.

    Derivative: not supported.
    Edge cases: if the labels contain one class only, pseudo-R2 is NaN (0 / 0) or below 0.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        offset: real [N, K], as in the fit.

    Returns:
        `GoodnessOfFit`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> fit = softjax.regression.inference.goodness_of_fit(params, x, labels)
        >>> round(float(fit.aic), 3)
        8.695

    Source: D. McFadden, "Conditional logit analysis of qualitative choice behavior" (1974),
        section 4; H. Akaike (1974); G. Schwarz (1978).
    """
    function = "regression.inference.goodness_of_fit"
    rows = checked_rows(
        function,
        params,
        features,
        labels,
        sample_weights,
        offset=offset,
        fit_intercept=fit_intercept,
    )
    return _goodness_of_fit(params, rows._replace(constant=1), bool(fit_intercept))


@on_auto_axes
def summary(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    reference: int | str | None = 0,
    level: float = 0.95,
    robust: bool | str = False,
    clusters: ArrayLike | None = None,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
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
        level: the confidence level, in (0, 1).
        robust: see `covariance`.
        clusters: see `covariance`.
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit; without an intercept the table has no bias.
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        offset: real [N, K], as in the fit.
        feature_names: D names; None for x0, x1, ...
        class_names: K names; None for 0, 1, ...

    Returns:
        `Summary`.

    Raises:
        TypeError, ValueError: see `covariance`; also too many or too few names.

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
    function = "regression.inference.summary"
    d, k = jnp.shape(params.kernel)
    feature_names = _names(function, "feature_names", feature_names, d, "x")
    class_names = _names(function, "class_names", class_names, k, "")
    if isinstance(reference, str):
        if class_names.count(reference) != 1:
            expected = f"one of the class names {', '.join(class_names)}"
            raise ValueError(_checks.message(function, "reference", expected, repr(reference)))
        reference = class_names.index(reference)
    v = covariance(
        params,
        features,
        labels,
        robust=robust,
        clusters=clusters,
        l2=l2,
        fit_intercept=fit_intercept,
        sample_weights=sample_weights,
        offset=offset,
    )
    table = coefficients(params, v, reference=reference, level=level)
    fit = goodness_of_fit(
        params,
        features,
        labels,
        fit_intercept=fit_intercept,
        sample_weights=sample_weights,
        offset=offset,
    )
    shown = list(class_names)
    if reference is not None:
        del shown[class_index(function, "reference", reference, k)]
    rows = _rows(table, shown, feature_names + ["bias"] * bool(fit_intercept))
    kind = "clustered" if clusters is not None else "robust" if robust else "model-based"
    kind = f"robust ({robust})" if isinstance(robust, str) and clusters is None else kind
    strengths = np.unique(np.asarray(l2))
    spoken = f"{strengths[0]:g}" + (f" to {strengths[-1]:g}" if len(strengths) > 1 else "")
    penalty = "" if not strengths.any() else f", for the penalised fit (l2 = {spoken})"
    against = "the mean of all" if reference is None else class_names[reference]
    head = _head(fit, k, f"{kind}{penalty}")
    return Summary(rows, fit, "\n".join([*head, *_table(rows, against, level)]))


def _rows(
    table: Estimates, class_names: Sequence[str], feature_names: Sequence[str]
) -> list[dict[str, Any]]:
    """A dictionary for each coefficient."""
    names = ("coefficient", *Estimates._fields[1:])
    columns = dict(zip(names, map(np.asarray, table), strict=True))
    return [
        {"class": of_class, "feature": feature}
        | {name: column[j, c].item() for name, column in columns.items()}
        for c, of_class in enumerate(class_names)
        for j, feature in enumerate(feature_names)
    ]


@partial(jax.jit, static_argnames="fit_intercept")
def _goodness_of_fit(params: SoftmaxRegression, rows: Rows, fit_intercept: bool) -> GoodnessOfFit:
    d, k = params.kernel.shape
    log_likelihood = _log_likelihood(params, rows)
    counts = _class_counts(rows, k)
    n = jnp.sum(counts)
    null = _null_log_likelihood(rows, counts, fit_intercept)
    size = (d + fit_intercept) * (k - 1)
    return GoodnessOfFit(
        log_likelihood,
        null,
        n,
        jnp.asarray(size),
        n - size,
        2 * size - 2 * log_likelihood,
        size * jnp.log(n) - 2 * log_likelihood,
        1 - log_likelihood / null,
        chi_square_test(2 * jnp.maximum(log_likelihood - null, 0), jnp.asarray(d * (k - 1))),
    )


def _null_log_likelihood(rows: Rows, counts: Array, fit_intercept: bool) -> Array:
    """The largest log-likelihood of a model with only the bias and the offset of this model."""
    k, n = len(counts), jnp.sum(counts)
    if rows.offset is None:
        shares = counts / n if fit_intercept else jnp.full_like(counts, 1 / k)
        return jnp.sum(jnp.where(counts > 0, counts * jnp.log(shares), 0))
    x = jnp.zeros((len(rows.offset), 0), counts.dtype)
    null = rows._replace(x=x, offset=with_offset(rows, jnp.zeros_like(rows.offset)))

    def log_likelihood(bias):
        return _log_likelihood(SoftmaxRegression(jnp.zeros((0, k), bias.dtype), bias), null)

    if not fit_intercept:
        return log_likelihood(jnp.zeros_like(counts))
    weights = times(
        jnp.ones(len(x), x.dtype) if rows.w is None else rows.w,
        masses(rows.targets, None, x.dtype),
    )
    # The bias of a class without examples would be log 0, so such a class is left out.
    present = counts > 0
    least = jnp.finfo(counts.dtype).min / 8

    def matched(bias):
        """Adds log(counts / expected counts) to the bias, which never lowers the likelihood."""
        p = softmax_core(null.offset + bias, (1,))
        expected = weights @ p
        return jnp.where(present, bias + jnp.log(counts / expected), least), p, expected

    def step(carry):
        bias, _, steps = carry
        next_bias, p, expected = matched(bias)
        h = jnp.diag(jnp.where(present, expected, 1)) - jnp.matmul(
            p.T, weights[:, None] * p, precision=EXACT
        )
        h += jnp.mean(expected) / k
        newton = bias + jnp.where(present, jnp.linalg.solve(h, counts - expected), 0)
        better = log_likelihood(newton) > log_likelihood(next_bias)
        missing = jnp.max(jnp.abs(counts - expected)) / n
        return jnp.where(better, newton, next_bias), missing, steps + 1

    def unmatched(carry):
        _, missing, steps = carry
        return (missing > NULL_TOLERANCE * jnp.finfo(counts.dtype).eps) & (steps < NULL_STEPS)

    bias = jnp.where(present, jnp.log(counts / n), least)
    start = (bias, jnp.full_like(n, jnp.inf), jnp.zeros((), jnp.int32))
    return log_likelihood(lax.while_loop(unmatched, step, start)[0])


@jax.jit
def _log_likelihood(params: SoftmaxRegression, rows: Rows) -> Array:
    x, _ = counted(rows.x, rows.w)
    z = logits_of(rows, x, params)
    if isinstance(rows.targets, ClassIndices):
        losses = masses(rows.targets, None, z.dtype) * index_loss(z, rows.targets.index, None)
    else:
        losses = expected_loss(z, rows.targets)
    return -jnp.sum(losses if rows.w is None else times(rows.w, losses))


def _class_counts(rows: Rows, num_classes: int) -> Array:
    dtype, examples = rows.x.dtype, rows.x.shape[0]
    weights = jnp.ones(examples, dtype) if rows.w is None else rows.w
    if isinstance(rows.targets, ClassIndices):
        if rows.w is None and rows.targets.bad is None:
            ones = jnp.ones(examples, jnp.int32)
            return sums_by_class(rows.targets.index, ones, num_classes).astype(dtype)
        counts = times(weights, masses(rows.targets, None, dtype))
        return sums_by_class(rows.targets.index, counts, num_classes)
    return jnp.sum(times(weights[:, None], rows.targets), 0)


def _names(
    function: str, argument: str, names: Sequence[str] | None, count: int, prefix: str
) -> list[str]:
    if names is None:
        return [f"{prefix}{i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(_checks.message(function, argument, f"{count} names", len(names)))
    return [str(name) for name in names]


def _latex(text: str) -> str:
    """The text, in which characters with a special meaning in LaTeX are escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"<": "$<$", ">": "$>$", "|": "$|$"}
    return "".join(special.get(character, character) for character in text)


def _head(fit: GoodnessOfFit, num_classes: int, kind: str) -> list[str]:
    n, test = float(fit.num_examples), fit.likelihood_ratio
    size = f"{num_classes} classes, {fit.num_parameters} parameters"
    null = f"(null model: {fit.null_log_likelihood:.6g})"
    degrees = f"{int(test.degrees_of_freedom)} degrees of freedom"
    return [
        f"Softmax regression: {n:g} examples, {size}",
        f"Log-likelihood: {fit.log_likelihood:.6g} {null}, pseudo-R2: {fit.pseudo_r2:.4g}",
        f"Likelihood ratio: {test.statistic:.5g} on {degrees}, p = {test.p_value:.3g}",
        f"AIC: {fit.aic:.6g}, BIC: {fit.bic:.6g}",
        f"Covariance: {kind}",
    ]


def _table(rows: list[dict[str, Any]], against: str, level: float) -> list[str]:
    tail = (1 - level) / 2
    bounds = f"[{tail:.3g}", f"{1 - tail:.3g}]"
    titles = ("coefficient", "std err", "z", "P>|z|", *bounds)
    width = max([len("feature"), *(len(row["feature"]) for row in rows)])
    lines = []
    previous = None
    for row in rows:
        if row["class"] != previous:
            previous = row["class"]
            lines += ["-" * (width + 72), f"Class {previous} against {against}"]
            lines.append(f"{'feature':<{width}}" + "".join(f"{title:>12}" for title in titles))
        numbers = [row[name] for name in ("coefficient", "standard_error", "z")]
        cells = [f"{number:>#12.4g}" for number in numbers]
        cells.append(f"{row['p_value']:>#12.3g}")
        cells += [f"{row[name]:>#12.4g}" for name in ("lower", "upper")]
        lines.append(f"{row['feature']:<{width}}" + "".join(cells))
    return lines
