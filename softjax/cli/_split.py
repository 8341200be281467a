"""The held-out rows: the same share of every class of a file, or the ones of the digits."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from softjax import processes
from softjax.datasets import load_digits
from softjax.tables import Dataset

# The number of candidates is about SPARE times the number of rows to hold out, so that there are
# enough candidates in each class.
SPARE = 20


class Parts(NamedTuple):
    """The examples to fit, the held-out examples, and the image shape if the data are digits."""

    train: Dataset
    test: Dataset
    image_shape: tuple[int, int] | None


def digits() -> Parts:
    """The digits, with their own held-out part."""
    data = load_digits()
    width = data.train_features.shape[1]
    names = [str(pixel) for pixel in range(width)]  # like the columns of a .npy file
    classes = [str(k) for k in range(10)]
    train, test = (
        Dataset(features, labels, names, classes, np.arange(len(labels)))
        for features, labels in (
            (data.train_features, data.train_labels),
            (data.test_features, data.test_labels),
        )
    )
    return Parts(train, test, data.image_shape)


class Split:
    """Draws the rows to hold out from rows that one or several processes read in runs.

    Every row has a pseudo-random key that depends only on the seed and the number of the row. In
    each class the rows with the smallest keys are held out. The choice therefore does not depend on
    how the rows are divided into runs. At most `most` rows are held out.
    """

    def __init__(self, num_rows: int, fraction: float, seed: int, most: int | None = None):
        self.fraction, self.seed = fraction, seed
        self.most = num_rows if most is None else most
        wanted = self._wanted(num_rows)
        self.share = min(SPARE * wanted / max(num_rows, 1), 1.0)
        self.counts: Counter[str] = Counter()
        self.candidates: dict[str, list[np.ndarray]] = {}

    def see(self, rows: np.ndarray, names: list[str], codes: np.ndarray) -> None:
        """Adds rows whose labels are `names[codes]`."""
        found = np.bincount(codes, minlength=len(names)).tolist()
        self.counts.update(dict(zip(names, found, strict=True)))
        near = _keys(rows, self.seed) <= np.uint64(self.share * (2**64 - 2**12))
        for code in np.unique(codes[near]):
            self.candidates.setdefault(names[code], []).append(rows[near & (codes == code)])

    def held_out(self) -> np.ndarray:
        """The numbers of the rows to hold out, in order; the same on every process.

        The number for each class is proportional to its size, rounded so that the total is exact.
        At least one row of every class is left to fit.
        """
        counts: Counter[str] = Counter()
        candidates: dict[str, list[np.ndarray]] = {}
        for part_counts, part in processes.gather((self.counts, self.candidates)):
            counts.update(part_counts)
            for name, rows in part.items():
                candidates.setdefault(name, []).extend(rows)
        total = sum(counts.values())
        wanted = self._wanted(total)
        drawn, rest = [], []
        for name, parts in candidates.items():
            rows = np.concatenate(parts)
            keys = _keys(rows, self.seed)
            order = np.argsort(keys)
            share = counts[name] * wanted / total
            taken = min(int(share), counts[name] - 1, len(rows))
            drawn.append(rows[order[:taken]])
            if taken < min(counts[name] - 1, len(rows)):
                # Among classes with equal remainders the key of a row decides, not their order.
                rest.append((int(share) - share, int(keys[order[0]]), rows[order[taken]]))
        missing = max(wanted - sum(map(len, drawn)), 0)
        drawn.append(np.array([row for _, _, row in sorted(rest)[:missing]], np.int64))
        return np.sort(np.concatenate(drawn))

    def _wanted(self, num_rows: int) -> int:
        return min(round(self.fraction * num_rows), self.most)


def _keys(rows: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 of the row numbers: distinct keys of 64 bits.

    Source: G. L. Steele, D. Lea and C. H. Flood, "Fast Splittable Pseudorandom Number Generators"
    (2014), figure 17.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def held_out_part(count: int) -> str:
    """The part of a sentence that says how many examples are held out."""
    return f"{count} held out" if count else "none held out, so that no metrics are reported"


def imputed(count: int) -> str:
    """The line that says how many rows have missing cells, and what fills them."""
    what = "medians and most frequent categories of the examples to fit"
    return f"Missing cells of {count} row{'s'[: count != 1]} are imputed by {what}."


def too_few(data: str, num_rows: int, fraction: float) -> str:
    """The error message if no row can be held out."""
    return (
        f"{data}: {num_rows} rows cannot be split: with a share of {fraction} held out, a row of "
        f"each class must be left to fit."
    )
