"""Five hundred problems by one solver: fits that report "converged" must satisfy the stopping rule.

A case is one program, since all its problems have one shape. `tests` has fewer problems of the same
kinds.
"""

import jax
import numpy as np

from tests.campaign import Failure, Outcome
from tests.regression import test_regression_convergence as rule

NAME = "convergence"
FIGURE = "how many of the problems have not converged, of all"

PROBLEMS = 500


def run(rng: np.random.Generator) -> Outcome:
    solver = str(rng.choice(rule.SOLVERS))
    first = int(rng.integers(1 << 30))
    with jax.enable_x64(True):
        drawn, results = solved(solver, first)
        # The solvers without l1 hold each other to the smallest objective.
        others = [solved(other, first)[1] for other in rule.SOLVERS[:3]]
    best = [min(result[1] for result in same) for same in zip(*others, strict=True)]
    try:
        converged = rule.count_converged(solver, drawn, results, best)
    except AssertionError as error:
        raise Failure(f"{solver}, problems from {first} on: {error}") from error
    return Outcome(1 - converged / PROBLEMS, solver)


def solved(solver: str, first: int) -> tuple[list, list]:
    drawn = [rule.random_problem_for(solver, first + i) for i in range(PROBLEMS)]
    return drawn, list(zip(*rule.fits(solver, drawn), strict=True))
