"""Checkpoints of a training run, by orbax: what is read again is exactly what was saved.

Each holds the state, the history and the configuration of a run. Orbax writes beside the place and
renames when all is there, so that what is found is whole, unless the disk has spoiled it since:
then the digests of its files say so, and the checkpoint before is the one to use.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from softjax import _checks, processes
from softjax.tables import DataError

__all__ = ["Checkpoints", "Saved"]

KEPT = 3
DIGESTS = "sha256.json"


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: of the state.
        leaves: the arrays of the state by their paths.
        history: of the run so far.

    Example:
        >>> import numpy as np
        >>> from softjax.checkpoints import Saved
        >>> Saved(7, {".kernel": np.ones(2)}, []).step
        7
    """

    step: int
    leaves: dict[str, np.ndarray]
    history: list[dict[str, float]]

    def state_like(self, state: Any) -> Any:
        """The state, in the structure of one that begins."""
        paths, structure = jax.tree_util.tree_flatten_with_path(state)
        begun = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        saved, now = (
            {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
            for leaves in (self.leaves, begun)
        )
        if saved != now:
            difference = "; ".join(_checks.differences(saved, now))
            raise DataError(f"the checkpoint of step {self.step} is of another run: {difference}.")
        return jax.tree.unflatten(structure, [self.leaves[name] for name in begun])


class Checkpoints:
    """The checkpoints of a run in a directory, the last few of them.

    Process 0 writes and reads; the others get from it what it has read. Needs the extra
    `checkpoint`.

    Args:
        directory: made where it is not there.
        configuration: what makes the run what it is, as JSON can hold it: a run of another one
            does not go on from here.

    Raises:
        softjax.tables.DataError: orbax is missing.
        OSError: nothing can be written there.

    Example:
        >>> import tempfile, numpy as np
        >>> from softjax.checkpoints import Checkpoints
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), {"seed": 1})
        >>> checkpoints.save(7, {"kernel": np.ones(2)}, [])
        >>> checkpoints.restore().step
        7
    """

    def __init__(self, directory: str | Path, configuration: Mapping[str, Any] | None = None):
        self.directory = Path(directory).absolute()
        self.configuration = dict(configuration or {})
        self.last_step: int | None = None
        self._manager: Any = None
        processes.of_first(self._open)

    def restore(self, batches: Mapping[str, Any] | None = None) -> Saved | None:
        """The last checkpoint that is whole, on every process; None where there is none.

        Args:
            batches: what determines the batches, to be compared with the configuration.

        Returns:
            `Saved`, or None.

        Raises:
            softjax.tables.DataError: it is of a run of another configuration, or none of those
                that there are is whole.
        """
        if batches:
            self.configuration["batches"] = dict(batches)
        saved = processes.of_first(self._last_good)
        self.last_step = None if saved is None else saved.step
        return saved

    def save(self, step: int, state: Any, history: list[dict[str, float]]) -> None:
        """Writes a checkpoint, unless the last is of the same step.

        Args:
            step: of the state.
            state: a pytree of arrays that process 0 has whole.
            history: of the run so far.

        Raises:
            softjax.tables.DataError: it cannot be written. Those before are as they were.
        """
        if step == self.last_step:
            return
        if self._manager is not None:
            self._write(step, state, history)
        self.last_step = step

    def _open(self) -> None:
        """Only process 0 has a manager; it must not wait for the others."""
        try:
            import orbax.checkpoint as ocp
        except ModuleNotFoundError:
            needs = _checks.needs_extra("a checkpoint", "orbax-checkpoint", "checkpoint")
            raise DataError(f"{self.directory}: {needs}.") from None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is an error is also raised
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):  # raises where nothing can be written
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
        leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}
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
            kept = "none" if self.last_step is None else f"that of step {self.last_step}"
            raise DataError(
                f"{self.directory}: the checkpoint of step {step} cannot be written; the last one "
                f"is {kept}: {_first_line(error)}"
            ) from error

    def _reserve(self, size: int) -> None:
        """Raises where the disk has no room for so many bytes, which orbax says in many words."""
        if hasattr(os, "posix_fallocate") and size:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def _last_good(self) -> Saved | None:
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step)
            except DataError:
                raise
            except Exception as error:
                aside = self._aside(step)
                self._manager.reload()
                print(
                    f"softjax: {aside}: the checkpoint of step {step} is spoiled and was put "
                    f"aside: {_first_line(error)}",
                    file=sys.stderr,
                )
        if steps:
            raise DataError(f"{self.directory}: none of the {len(steps)} checkpoints is whole.")
        return None

    def _aside(self, step: int) -> Path:
        """Gives a spoiled checkpoint another name, under which it is kept and not found."""
        for number in count():
            aside = self.directory / (f"bad-{step}.{number}" if number else f"bad-{step}")
            if not aside.exists():
                break
        os.replace(self.directory / str(step), aside)
        return aside

    def _read(self, step: int) -> Saved:
        path, arguments = self.directory / str(step), self._ocp.args
        # They come last, and are missing where the process died just before: then all is there.
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
            raise ValueError("its record is not one of this step of a run")
        configuration = json.loads(json.dumps(self.configuration))
        if record["configuration"] != configuration:
            difference = "; ".join(_checks.differences(record["configuration"], configuration))
            raise DataError(f"{self.directory}: holds another run: {difference}.")
        return Saved(record["step"], leaves, record["history"])


def _is_record(record: Any, step: int) -> bool:
    """Whether it holds what `save` was given: without digests nothing else vouches for it."""
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
    """SHA-256 of all files below a folder, but for that of the digests."""
    files = [
        file for file in path.rglob("*") if file.is_file() and file.name not in (DIGESTS, "new")
    ]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
