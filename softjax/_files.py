"""Files that are written whole or not at all, and places that are tried before the work begins."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from softjax import _interrupt


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, that takes its place when all is written.

    Where writing fails, what was at `path` is still there. A device or a pipe is written directly.

    Raises:
        OSError: with `path` as its file name.
    """
    target = _real(path)
    with _naming(path), _interrupt.held_back():
        if target.exists() and not target.is_file():
            yield target
            return
        draft = _draft(target)
        try:
            yield draft
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def try_file(path: Path) -> None:
    """Raises the OSError that writing this file would raise, before there is anything to write."""
    target = _real(path)
    with _naming(path):
        if target.is_file() or not target.exists():
            _draft(target).unlink()


def try_folder(path: Path, *names: str) -> None:
    """Makes a folder, and raises the OSError that writing these files in it would raise."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        try_file(path / name)


def _real(path: Path) -> Path:
    """What a symbolic link leads to, so that it stays one; no folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return target


def _draft(target: Path) -> Path:
    """A new empty file beside the target, with the permissions that it has or would have."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:50]}.", dir=target.parent)
    os.close(descriptor)
    if target.exists():
        mode = target.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(name, mode)
    return Path(name)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError within names `path`, not a draft of it."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
