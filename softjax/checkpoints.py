"""Checkpoints of a training run, written with orbax, that are read exactly as they were saved.

A checkpoint holds the state, the history and the configuration of a run. Orbax writes it under a
temporary name and renames it when it is complete, so that a checkpoint is never half written. If a
file was damaged later, its digest does not match, and the previous checkpoint is used.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softjax import _checks, processes
from softjax._descriptions import data_of, is_random_key
from softjax.regression import SoftmaxRegression
from softjax.tables import DataError
from softjax.tables._errors import differences, first_line

__all__ = ["Checkpoints", "Saved"]

KEPT = 3
DIGESTS = "sha256.json"
TRAINING = "training"  # the key of the settings that a trainer knows itself
REMEDY = (
    "Another folder for the checkpoints starts a new run; in Python, `init` may be the parameters "
    "of this one."
)


class Saved(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        step: the step of the state.
        leaves: the arrays of the state, by their paths in the pytree.
        history: the events of the run so far.

    Example:
        >>> import numpy as np
        >>> from softjax.checkpoints import Saved
        >>> Saved(7, {".kernel": np.ones(2)}, []).step
        7
    """

    step: int
    leaves: dict[str, np.ndarray]
    history: list[dict[str, float]]

    @property
    def params(self) -> SoftmaxRegression:
        """The parameters of a run of `regression.train`, as NumPy arrays."""
        parts: list[Any] = [self.leaves[f".params.{name}"] for name in SoftmaxRegression._fields]
        return SoftmaxRegression(*parts)

    def state_like(self, state: Any) -> Any:
        """The saved state as a pytree with the structure of `state`."""
        paths, structure = jax.tree_util.tree_flatten_with_path(state)
        begun = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        saved, now = (
            {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
            for leaves in (self.leaves, {name: data_of(leaf) for name, leaf in begun.items()})
        )
        if saved != now:
            words = f"the checkpoint of step {self.step} belongs to another run"
            if any(name.startswith(".optimizer_state") for name, _ in saved.items() ^ now.items()):
                words += ": the optimizer differs"
            raise DataError(f"{words}: {_first_of(differences(saved, now))}. {REMEDY}")
        leaves = [_as_begun(leaf, self.leaves[name]) for name, leaf in begun.items()]
        return jax.tree.unflatten(structure, leaves)


class Checkpoints:
    """The last few checkpoints of a run, in a directory.

    Process 0 writes and reads the files, and sends what it has read to the other processes. Needs
    the extra `checkpoint`.

    Args:
        directory: the folder of the checkpoints; it is created if it does not exist.
        configuration: the settings of the run, as values for JSON. A run with other settings cannot
            resume from these checkpoints.

    Raises:
        softjax.tables.DataError: orbax is not installed.
        OSError: the directory cannot be written.

    Example:
        >>> import tempfile, numpy as np
        >>> from softjax.checkpoints import Checkpoints
        >>> folder = tempfile.mkdtemp()
        >>> Checkpoints(folder, {"seed": 1}).save(7, {"kernel": np.ones(2)}, [])
        >>> Checkpoints(folder).restore().step
        7
    """

    def __init__(self, directory: str | Path, configuration: Mapping[str, Any] | None = None):
        self.directory = Path(directory).absolute()
        self.configuration = dict(configuration or {})
        self.last_step: int | None = None
        self._manager: Any = None
        processes.of_first(self._open)

    def restore(self, settings: Mapping[str, Any] | None = None) -> Saved | None:
        """The last undamaged checkpoint, on every process; None if there is no checkpoint.

        Args:
            settings: what a trainer knows of its run, as values for JSON, such as its batches and
                penalties; these settings become part of the configuration. None to read the
                checkpoint of any run: only the configuration of these `Checkpoints` is compared.

        Returns:
            `Saved`, or None.

        Raises:
            softjax.tables.DataError: the checkpoint belongs to a run with another configuration, or
                all checkpoints are damaged.
        """
        self.configuration |= dict(settings or {})
        saved = processes.of_first(lambda: self._last_good(whole=settings is not None))
        self.last_step = None if saved is None else saved.step
        return saved

    def save(self, step: int, state: Any, history: list[dict[str, float]]) -> None:
        """Writes a checkpoint, unless the last one has the same step.

        Args:
            step: the step of the state.
            state: a pytree of arrays, complete on process 0.
            history: the events of the run so far.

        Raises:
            softjax.tables.DataError: it cannot be written. Earlier checkpoints are kept.
        """
        if step == self.last_step:
            return
        if self._manager is not None:
            self._write(step, state, history)
        self.last_step = step

    def _open(self) -> None:
        """Opens the manager on process 0, which must not wait for the other processes."""
        try:
            import orbax.checkpoint as ocp
        except ModuleNotFoundError:
            needs = _checks.needs_extra("a checkpoint", "orbax-checkpoint", "checkpoint")
            raise DataError(f"{self.directory}: {needs}.") from None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised, not only logged
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):  # raises if nothing can be written
            pass
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            enable_async_checkpointing=False,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="softjax"
            ),
        )
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def _write(self, step: int, state: Any, history: list[dict[str, float]]) -> None:
        paths, _ = jax.tree_util.tree_flatten_with_path(state)
        leaves = {jax.tree_util.keystr(path): np.asarray(data_of(leaf)) for path, leaf in paths}
        record = {"step": step, "history": history, "configuration": self.configuration}
        arguments = self._ocp.args
        try:
            self._reserve(sum(leaf.nbytes for leaf in leaves.values()))
            self._manager.save(
                step,
                args=arguments.Composite(
                    state=arguments.StandardSave(leaves), record=arguments.JsonSave(record)
                ),
            )
            path = self.directory / str(step)
            (path / "new").write_text(json.dumps(_digests(path)))
            os.replace(path / "new", path / DIGESTS)
        except Exception as error:
            kept = "no earlier one exists"
            if self.last_step is not None:
                kept = f"the last one is of step {self.last_step}"
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} cannot be written ({kept}): "
                f"{first_line(error)}"
            ) from error

    def _reserve(self, size: int) -> None:
        """Raises a short error if the disk has no room; the error of orbax would be long."""
        if hasattr(os, "posix_fallocate") and size:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def _last_good(self, whole: bool) -> Saved | None:
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step, whole)
            except DataError:
                raise
            except Exception as error:
                aside = self._aside(step)
                self._manager.reload()
                print(
                    f"softjax: {aside}: the checkpoint of step {step} is damaged and was renamed "
                    f"to this: {first_line(error)}",
                    file=sys.stderr,
                )
        if steps:
            raise DataError(f"{self.directory}: all checkpoints are damaged ({len(steps)} found).")
        return None

    def _aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is kept but no longer found."""
        for number in count():
            aside = self.directory / (f"bad-{step}.{number}" if number else f"bad-{step}")
            if not aside.exists():
                break
        os.replace(self.directory / str(step), aside)
        return aside

    def _read(self, step: int, whole: bool) -> Saved:
        """A checkpoint; the `whole` configuration is compared, or the part that is known here."""
        path, arguments = self.directory / str(step), self._ocp.args
        # The digests are written last. They are missing if the process ended just before; the
        # checkpoint itself is complete then.
        if (path / DIGESTS).exists():
            expected = json.loads((path / DIGESTS).read_text())
            spoiled = [name for name, _ in expected.items() ^ _digests(path).items()]
            if spoiled:
                raise ValueError(f"{min(spoiled)} is not what was written")
        read = self._manager.restore(
            step,
            args=arguments.Composite(
                state=arguments.StandardRestore(), record=arguments.JsonRestore()
            ),
        )
        leaves = {name: np.asarray(leaf) for name, leaf in read.state.items()}
        record = read.record
        if not _is_record(record, step):
            raise ValueError("its record does not belong to this step of a run")
        configuration = json.loads(json.dumps(self.configuration))
        then = record["configuration"]
        if not whole:
            then = {name: then.get(name) for name in configuration}
        if then != configuration:
            difference = _difference(then, configuration)
            raise DataError(f"{self.directory}: belongs to another run: {difference}. {REMEDY}")
        return Saved(record["step"], leaves, record["history"])


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What distinguishes two configurations, in words.

    The settings of a trainer are shown only if all that its caller has passed agrees: the latter
    has better names.
    """
    settings, old = now.get(TRAINING, {}), saved.get(TRAINING, {})
    before, after = (
        {name: part for name, part in whole.items() if name != TRAINING} for whole in (saved, now)
    )
    if before != after:
        return "; ".join(differences(before, after))
    if not old:
        return "it was saved by an earlier version, which did not record the settings of the run"
    if old.get("optimizer") != settings.get("optimizer"):
        pair = (old.get("optimizer"), settings.get("optimizer"))
        return f"the optimizer differs: {_first_of(differences(*pair))}"
    return _first_of(differences(old, settings))


def _first_of(found: Iterator[str]) -> str:
    """The first few differences: a chain of functions of another kind differs in everything."""
    shown = list(islice(found, 4))
    return "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")


def _is_record(record: Any, step: int) -> bool:
    """Whether a record has the form that `save` writes; without digests there is no other check."""
    if not isinstance(record, dict) or record.keys() != {"step", "history", "configuration"}:
        return False
    if record["step"] != step or not isinstance(record["configuration"], dict):
        return False
    history = record["history"]
    return isinstance(history, list) and all(
        isinstance(event, dict) and all(isinstance(value, int | float) for value in event.values())
        for event in history
    )


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, except the file of the digests."""
    files = [
        file for file in path.rglob("*") if file.is_file() and file.name not in (DIGESTS, "new")
    ]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def _as_begun(begun: Any, saved: np.ndarray) -> Any:
    """The saved array, or a typed random key if the state has one in this place."""
    if not is_random_key(begun):
        return saved
    return jax.random.wrap_key_data(jnp.asarray(saved), impl=jax.random.key_impl(begun))
