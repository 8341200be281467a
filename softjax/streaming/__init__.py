"""Training on data that need not fit into memory, by one process or many."""

from softjax.streaming._batches import Batch as Batch
from softjax.streaming._batches import Batches as Batches
from softjax.streaming._fit import fit as fit
from softjax.streaming._rows import ArrayRows as ArrayRows
from softjax.streaming._rows import open_rows as open_rows
from softjax.streaming._train import NonFiniteError as NonFiniteError
from softjax.streaming._train import Preempted as Preempted
from softjax.streaming._train import train as train

__all__ = [
    "ArrayRows",
    "Batch",
    "Batches",
    "NonFiniteError",
    "Preempted",
    "fit",
    "open_rows",
    "train",
]
