"""Random cases against references of their own: `python -m tests.campaign --minutes 10 --seed 0`.

Each kind of case is a module with a name, a line that says what its figure is, and a function
`run` that draws one case from a generator of random numbers and gives an `Outcome`. Every case has
a generator of its own, of the seed, the kind and the number of the case, so that a failure comes
again alone, by the command that its line ends with.
"""

from typing import NamedTuple


class Outcome(NamedTuple):
    """A case that was as expected.

    Attributes:
        figure: the error, in the unit of the kind.
        label: what happened, in a word or two; the campaign counts them.
    """

    figure: float
    label: str


class Failure(Exception):
    """What was tried, what came and what was expected, in one line."""
