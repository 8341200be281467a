"""Generates passengers.csv: invented passengers of a ship, with categories and missing cells.

    python -m softjax.datasets._passengers FILE

None of the passengers is real. Every cell is drawn here from uniform random numbers only, so that
every version of NumPy generates the same file.
"""

import csv
import sys
from io import StringIO
from pathlib import Path

import numpy as np

ROWS, SEED = 800, 1912
HEADER = ("id", "deck", "sex", "age", "family", "fare", "harbour", "survived")


def passengers() -> str:
    """The contents of the file as text.

        logit of survived = -0.3 + deck + 2.4 female - 0.03 age - 0.35 family

    with deck 1.2, 0.2 and -0.9 for upper, middle and lower. A share of 0.18 of the ages and of 0.02
    of the harbours is missing.
    """
    u = np.random.default_rng(SEED).random((ROWS, 9))
    place = np.searchsorted([0.25, 0.47], u[:, 0])
    female = u[:, 1] < 0.37
    age = np.round(np.clip(8 + 45 * (u[:, 2] + u[:, 3] * u[:, 4]) - 4 * place, 1, 80))
    family = np.minimum(-np.log(u[:, 4] + 1e-3) * 0.8, 7).astype(int)
    fare = np.round(np.exp(np.array([4.1, 3.0, 2.3])[place] + 0.8 * (u[:, 5] - 0.5)), 2)
    harbour = np.searchsorted([0.7, 0.9], u[:, 6])
    logit = -0.3 + np.array([1.2, 0.2, -0.9])[place] + 2.4 * female - 0.03 * age - 0.35 * family
    survived = u[:, 7] < 1 / (1 + np.exp(-logit))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for i in range(ROWS):
        writer.writerow(
            [
                i + 1,
                ("upper", "middle", "lower")[place[i]],
                "female" if female[i] else "male",
                "" if u[i, 8] < 0.18 else int(age[i]),
                family[i],
                fare[i],
                "" if u[i, 8] > 0.98 else ("Queensport", "Northhaven", "Saint Mary")[harbour[i]],
                "yes" if survived[i] else "no",
            ]
        )
    return text.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(passengers(), encoding="utf-8")
