"""Random cases against references without JAX: `python -m tests.campaign --minutes 10 --seed 0`.

Each kind of case is a module with a name, a line that describes its figure, and a function `run`
that draws one case from a random generator and returns an `Outcome`. Every case has its own
generator, which depends on the seed, the kind and the number of the case. A failure can therefore
be repeated alone, with the command at the end of its line.
"""

import sys
from pathlib import Path
from typing import NamedTuple

# Tests import their helpers from this folder, as pytest does.
sys.path.append(str(Path(__file__).parents[1]))


class Outcome(NamedTuple):
    """A case with the expected result.

    Attributes:
        figure: the error, in the unit of the kind.
        label: what happened, in a word or two; the campaign counts them.
    """

    figure: float
    label: str


class Failure(Exception):
    """The input, the result and the expected result, in one line."""
