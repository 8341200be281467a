"""The table of `--summary`, for fits in memory and streamed fits."""

import contextlib
from collections.abc import Callable

from rich.console import Console

from softjax import processes, regression, tables
from softjax.cli._app import Task
from softjax.regression.inference import Summary
from softjax.regression.inference._optimum import NoCovarianceError

# So many matrices of the covariance's size are in memory together.
MATRICES = 4


def summary_text(
    console: Console,
    result: regression.FitResult,
    task: Task,
    odds_ratios: bool,
    summary: Callable[[], Summary],
) -> str | None:
    """The table of coefficients or odds ratios and statistics, for the standardised features.

    None, with the reason printed, if there are no standard errors.
    """
    count = (len(task.feature_names) + 1) * len(task.class_names)
    needed = processes.gather(tables.lacking_memory(MATRICES * 8 * count**2))
    why, table = "standard errors need the optimum, and the fit has not converged", None
    if any(needed):
        size = next(filter(None, needed))
        why = f"the covariance of {count} coefficients needs {size}; --drop leaves columns out"
    elif result.stop_reason == regression.CONVERGED:
        why = "some features are collinear: their columns, or the columns of their categories, "
        why += "determine one another; leave some out by --drop, or take a larger --l2"
    with contextlib.suppress(NoCovarianceError):
        table = None if any(needed) else summary()
    if table is None:
        console.print(f"No summary was printed: {why}.", markup=False, soft_wrap=True)
        return None
    per = "one standard deviation of a number or truth value" if task.columns else "one unit"
    if any(column.levels is not None for column in task.columns):
        per += ", and for a category against its reference"
    what = "odds ratios" if odds_ratios else "coefficients"
    return f"{table.text}\nThe {what} are for {per}."
