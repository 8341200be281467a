"""What a fit says on the way, and what it gives back."""

from typing import Any, NamedTuple

import numpy as np

from softjax.regression import _status
from softjax.regression._model import SoftmaxRegression

# Why a fit stopped.
(
    STEP_LIMIT,
    CONVERGED,
    PRECISION_FLOOR,
    SEPARATED,
    NON_FINITE,
    CALLBACK,
    QUASI_SEPARATED,
) = _status.REASONS


class Event(NamedTuple):
    """What a fit has come to, after a chunk of steps.

    Attributes:
        step: the number of steps taken.
        epoch: the number of passes over the data; of minibatches, else `step`.
        objective: at `params`; with minibatches its mean over the batches of the chunk.
        gradient_norm: the largest entry of the gradient at `params`, of one batch with minibatches;
            relative to what it can be at most, but for the solver "optax".
        seconds: since the fit began, compilation included.
        params: kernel [D, K] and bias [K].
        validation_loss: the mean loss on the validation data, without penalty or weights.
        validation_accuracy: the share of right predictions there.

    Example:
        >>> import numpy as np, softjax
        >>> seen = []
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> _ = softjax.regression.fit(x, y, max_steps=1, callback=lambda e: seen.append(e.step))
        >>> seen
        [0, 1]
    """

    step: int
    epoch: float
    objective: float
    gradient_norm: float
    seconds: float
    params: SoftmaxRegression
    validation_loss: float | None
    validation_accuracy: float | None


class Progress(NamedTuple):
    """What a solver has come to, as numbers of the host."""

    params: SoftmaxRegression
    objective: float
    gradient_norm: float
    step: int
    status: int


class FitResult(NamedTuple):
    """A fitted softmax regression: a pytree of numbers, or of arrays where the fit was traced.

    Attributes:
        params: kernel [D, K] and bias [K].
        objective: at `params`, over all examples, nats.
        status: the place of `stop_reason` in (STEP_LIMIT, CONVERGED, PRECISION_FLOOR, SEPARATED,
            NON_FINITE, CALLBACK, QUASI_SEPARATED).
        steps: the number of steps taken.
        passes: products with the features; None for the solver "optax".
        gradient_norm: as in `Event`.
        separated: whether `params` put every example's own class strictly on top. Without a
            penalty there is no optimum then: the loss falls to 0 as the parameters grow.
        history: one dictionary an event, without `params`; `validation_*` where there is such data.
            A fit that nobody watches has one event, its last.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> result = softjax.regression.fit(x, y, max_steps=1)
        >>> result.stop_reason, result.steps, len(result.history)
        ('step limit', 1, 1)
    """

    params: SoftmaxRegression
    objective: Any
    status: Any
    steps: Any
    passes: Any
    gradient_norm: Any
    separated: Any
    history: list[dict[str, float]]

    @property
    def converged(self) -> Any:
        """Whether the gradient, and what Newton's model still promises, became small enough."""
        return self.status == _status.CONVERGED

    @property
    def stop_reason(self) -> Any:
        """In words; a list of them where fits are stacked.

        CONVERGED; PRECISION_FLOOR, rounding hides what is left; SEPARATED, these data have no
        optimum without a penalty, and `params` are far on the way; QUASI_SEPARATED, the same, but
        that some examples cannot be told apart: some parameters grow for ever, the loss stays above
        0; STEP_LIMIT; CALLBACK; NON_FINITE, `params` are those before that step.
        """
        return np.take(_status.REASONS, np.asarray(self.status)).tolist()
