"""Why a fit stopped: numbers for a compiled program, words for people."""

RUNNING, CONVERGED, PRECISION_FLOOR, SEPARATED, NON_FINITE, CALLBACK = range(6)
REASONS = (
    "step limit",
    "converged",
    "precision floor",
    "separated",
    "non-finite objective",
    "callback",
)
