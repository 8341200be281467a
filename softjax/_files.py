"""Files are written completely or not at all, and output paths are tested before work begins."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from softjax import _interrupt


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which is renamed to `path` when it is complete.

    If writing fails, an existing file at `path` is kept. A device or a pipe is written directly.

    Raises:
        OSError: the file cannot be written; the error names `path`.
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
    """Raises the OSError that writing this file would raise, before the work begins."""
    target = _real(path)
    with _naming(path):
        if target.is_file() or not target.exists():
            _draft(target).unlink()


def _real(path: Path) -> Path:
    """The target of a symbolic link, so that the link is kept; an error if it is a folder."""
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
    """Makes an OSError in this context name `path` instead of its temporary file."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
