"""Why a fit stopped: a number in a compiled program, a word for people."""

RUNNING, CONVERGED, PRECISION_FLOOR, SEPARATED, NON_FINITE, CALLBACK, QUASI_SEPARATED = range(7)

# A fit that is still running has come to its limit.
REASONS = (
    "step limit",
    "converged",
    "precision floor",
    "separated",
    "non-finite objective",
    "callback",
    "quasi-separated",
)
