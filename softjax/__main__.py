"""The command `softjax`, also as `python -m softjax`."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        from softjax.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        install = "pip install 'softjax-regression[cli]'"
        sys.exit(f"softjax: the command line needs {error.name}: {install}")
    from softjax.processes import ending_together

    with ending_together():
        app()


if __name__ == "__main__":
    main()
