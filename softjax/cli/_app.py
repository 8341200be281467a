"""The application: its name, its errors, its choices."""

import sys
from enum import StrEnum
from typing import Any

import optax
import typer
from typer.core import TyperGroup

from softjax.tables import DataError


class _OneLineErrors(TyperGroup):
    """What is wrong with a file is one line, and exit status 2."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DataError as error:
            message = str(error)
        except BrokenPipeError:  # the reader of the output has left
            raise
        except OSError as error:
            message = f"{error.filename}: {error.strerror}." if error.filename else str(error)
        print(f"softjax: {message}", file=sys.stderr)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Softmax regression, and how accurate softjax is on this device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Solver(StrEnum):
    """The solvers of `softjax.regression.fit`."""

    AUTO = "auto"
    NEWTON_CG = "newton-cg"
    NEWTON = "newton"
    LBFGS = "lbfgs"
    PROXIMAL = "proximal"
    FIRTH = "firth"
    OPTAX = "optax"


class Optimizer(StrEnum):
    """The optimizers of the command line; `softjax.regression.fit` takes any of optax."""

    LBFGS = "lbfgs"
    ADAM = "adam"
    SGD = "sgd"


LEARNING_RATES = {Optimizer.ADAM: 0.01, Optimizer.SGD: 0.5}


def optax_optimizer(name: Optimizer, learning_rate: float) -> optax.GradientTransformation:
    """The optimizer of a name, but for L-BFGS, which a fit takes without being told."""
    if name is Optimizer.ADAM:
        return optax.adam(learning_rate)
    return optax.sgd(learning_rate, momentum=0.9)


def rate_of(name: Optimizer, learning_rate: float | None) -> float:
    """The learning rate that was given, or that of the optimizer."""
    return LEARNING_RATES[name] if learning_rate is None else learning_rate
