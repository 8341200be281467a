"""`softjax fit` for data in memory: held-out rows, choice of the penalty, fit and report."""

import csv
import io
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softjax import regression, tables
from softjax._scores import scores
from softjax.cli._app import (
    FOLDS,
    SUMMARY,
    FitProgress,
    Optimizer,
    Task,
    check_finite,
    optax_optimizer,
    print_columns,
    print_result,
    rate_of,
    remedies_offered,
    task_of,
    write,
    write_text,
)
from softjax.cli._options import progress_bar, reading
from softjax.cli._plan import Plan
from softjax.cli._split import Parts, Split, digits, held_out_part, imputed, too_few
from softjax.cli._summary import summary_text
from softjax.tables import DataError, Dataset


def run(plan: Plan) -> None:
    """Fits, writes the files and prints the results."""
    console = Console()
    parts = _load(console, plan)
    train, test = parts.train, parts.test
    mean, scale = _standardisation(train, parts.image_shape is not None)
    x_train = ((train.features - mean) / scale).astype(np.float32)
    task = task_of(parts, mean, scale, Path(plan.data).name)
    console.print(f"{len(train.labels)} examples to fit, {held_out_part(len(test.labels))}.")
    print_columns(console, train.columns, train.class_names, train.skipped)
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    weights = plan.weights_of(train.class_names, counts)
    penalty, curve = plan.penalties[0], None
    if len(plan.penalties) > 1:
        penalty, curve = _chosen_penalty(console, x_train, train, weights, plan)
    result, limit = _fitted(console, x_train, train, weights, penalty, task, plan)
    check_finite(plan.out, task, result)
    written = write(console, plan.out, task, result)
    more = [] if curve is None else [write_text(plan.out / FOLDS, curve)]
    text = None
    if plan.summary:

        def summary() -> regression.inference.Summary:
            return regression.inference.summary(
                result.params,
                x_train,
                train.labels,
                odds_ratios=plan.odds_ratios,
                l2=penalty,
                class_weights=weights,
                feature_names=train.feature_names,
                class_names=train.class_names,
            )

        text = summary_text(console, result, task, plan.odds_ratios, summary)
        if text is not None:
            more.append(write_text(plan.out / SUMMARY, f"{text}\n"))
    print_result(console, result, written, limit, more)
    if plan.l1 > 0:
        zero = np.asarray(result.params.kernel) == 0
        console.print(f"{zero.sum()} of {zero.size} coefficients are 0.", highlight=False)
    if text is not None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _fitted(
    console: Console,
    features: np.ndarray,
    train: Dataset,
    weights: np.ndarray | None,
    penalty: float,
    task: Task,
    plan: Plan,
) -> tuple[regression.FitResult, str | None]:
    """The result of the fit, and the option that limits its steps."""
    steps, epochs, limit = plan.max_steps, plan.epochs, "--max-steps"
    if plan.first_order:
        epochs = epochs or 300
        a_pass = 1 if plan.batch_size is None else -(-len(train.labels) // plan.batch_size)
        steps = epochs * a_pass
        limit = "--epochs" if plan.by_lbfgs else None
    of_optax = None
    if plan.optimizer not in (None, Optimizer.LBFGS):
        of_optax = optax_optimizer(plan.optimizer, rate_of(plan.optimizer, plan.learning_rate))
    with FitProgress(console, steps, plan.out, task) as progress:
        result = regression.fit(
            features,
            train.labels,
            solver=plan.solver,
            num_classes=len(train.class_names),
            l2=penalty,
            l1=plan.l1,
            class_weights=weights,
            max_steps=plan.max_steps,
            optimizer=of_optax,
            batch_size=plan.batch_size,
            epochs=epochs,
            seed=plan.seed,
            validation=task.held_out,
            callback=progress.show,
        )
    return result, limit


def _load(console: Console, plan: Plan) -> Parts:
    """Loads the digits or a file, and splits the examples."""
    if plan.data == "digits":
        return digits()
    path, label = plan.file_and_label()
    with remedies_offered(), reading(console, plan.reading) as options:
        whole = tables.dataset(
            path, label, plan.skip_nonfinite, keep_missing=plan.impute, reading=options
        )
    for says in (tables.like_identifiers, tables.constant_columns):
        doubt = says(whole.columns, whole.features)
        if doubt:
            console.print(doubt, markup=False, highlight=False, soft_wrap=True)
    count = len(whole.labels)
    split = Split(count, plan.test_fraction, plan.seed)
    split.see(whole.rows, whole.class_names, whole.labels)
    held_out = np.isin(whole.rows, split.held_out())
    if plan.test_fraction > 0 and not held_out.any():
        raise DataError(too_few(plan.data, count, plan.test_fraction))
    train, test = whole.part(~held_out), whole.part(held_out)
    if plan.impute:
        missing = int(np.isnan(whole.features).any(axis=1).sum())
        x = train.features
        present, sums = np.sum(~np.isnan(x), axis=0), np.nansum(x, axis=0)
        columns = tables.with_fills(
            path, train.columns, present, sums, lambda place: np.nanmedian(x[:, place])
        )
        train, test = (
            part._replace(columns=columns, features=tables.filled(columns, part.features))
            for part in (train, test)
        )
        console.print(imputed(missing), soft_wrap=True)
    return Parts(train, test, None)


def _standardisation(train: Dataset, as_they_are: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each feature: 0 and 1 for categories, and the scale 1 for constants."""
    features = train.features
    if as_they_are:
        return np.zeros(features.shape[1]), np.ones(features.shape[1])
    scale = np.where(np.ptp(features, axis=0) > 0, features.std(axis=0), 1)
    coded = [c.levels is not None for c in train.columns for _ in c.features]
    mean = np.where(coded, 0, features.mean(axis=0))
    return mean, np.where((scale > 0) & ~np.array(coded, bool), scale, 1)


def _chosen_penalty(
    console: Console, features: np.ndarray, train: Dataset, weights: np.ndarray | None, plan: Plan
) -> tuple[float, str]:
    """The penalty with the smallest mean loss on the held-out folds, and all figures as CSV."""
    folds = plan.folds or 5
    if folds > len(train.labels):
        raise DataError(
            f"{plan.data}: {len(train.labels)} examples to fit are too few for {folds} folds."
        )
    grid = np.sort(plan.penalties)
    with progress_bar(console, f"{folds} folds") as progress:

        def show(event: regression.ManyEvent) -> None:
            progress.update(progress.task_ids[0], completed=event.done, total=event.count)

        validated = regression.cross_validate(
            features,
            train.labels,
            l2=grid,
            folds=folds,
            seed=plan.seed,
            num_classes=len(train.class_names),
            class_weights=weights,
            callback=show if console.is_terminal else None,
        )
    best = int(np.argmin(validated.mean_loss))
    curve = _curve(validated, features, train)
    counts = np.bincount(train.labels)
    most, majority = train.class_names[int(counts.argmax())], counts.max() / len(train.labels)
    caption = f"accuracy of {most!r} alone: {majority:.4f}"
    table = Table(
        title=f"{folds} folds", title_justify="left", box=box.SIMPLE_HEAD, caption=escape(caption)
    )
    for column in ("l2", "loss, nats", "standard error", "accuracy", "mean F1", ""):
        table.add_column(column)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("loss", "standard_error", "accuracy", "macro_f1", "majority_accuracy")
    writer.writerow(["l2", *names, "chosen"])
    for k, (l2, figures) in enumerate(zip(grid.tolist(), curve.tolist(), strict=True)):
        chosen = "chosen" if k == best else ""
        table.add_row(f"{l2:g}", *(f"{figure:.4f}" for figure in figures), chosen)
        writer.writerow([l2, *figures, majority.item(), int(k == best)])
    console.print(table)
    return float(grid[best]), text.getvalue()


def _curve(
    validated: regression.CrossValidation, features: np.ndarray, train: Dataset
) -> np.ndarray:
    """The loss, its standard error, the accuracy and the mean F1 at each penalty, [P, 4].

    F1 is computed from all examples, each predicted by the fit from which it was held out.
    """
    folds = np.asarray(validated.folds)
    kernels, biases = map(np.asarray, validated.fits.params)
    f1 = []
    for kernel, bias in zip(kernels, biases, strict=True):
        predicted = np.empty_like(train.labels)
        for fold in range(len(kernel)):
            held_out = folds == fold
            logits = features[held_out] @ kernel[fold] + bias[fold]
            predicted[held_out] = np.argmax(logits, axis=1)
        f1.append(scores(train.labels, predicted, len(train.class_names)).macro_f1)
    figures = (validated.mean_loss, validated.standard_error, validated.mean_accuracy, f1)
    return np.stack([np.asarray(values, np.float64) for values in figures], axis=1)
