"""Real data that comes with softjax, as NumPy arrays."""

from softjax.datasets._digits import Digits as Digits
from softjax.datasets._digits import load_digits as load_digits
