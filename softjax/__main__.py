"""The command `softjax`, which can also be run as `python -m softjax`."""

import sys
from io import TextIOWrapper

from softjax import _checks, _interrupt

__all__ = ["main"]


def main() -> None:
    """Runs the command line, or prints which extra it needs."""
    _interrupt.install()
    if isinstance(sys.stdout, TextIOWrapper):  # escapes characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from softjax.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "mpmath"):
            raise
        needs = _checks.needs_extra("the command line", error.name, "cli")
        sys.exit(f"softjax: {needs}.")
    from softjax.processes import ending_together

    try:
        with ending_together():
            app()
    finally:
        _interrupt.finish()


if __name__ == "__main__":
    main()
