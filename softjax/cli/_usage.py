"""Errors of the options in one line, in the words of softjax."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import typer

from softjax import processes

# The exception class for wrong usage belongs to click, which some versions of typer contain.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

# The errors of pydantic, which typer uses to read values, by their types.
WORDS = {
    "float_parsing": "expected a number, got {input!r}",
    "int_parsing": "expected a whole number, got {input!r}",
    "greater_than_equal": "must be at least {ge:g}, got {input}",
    "less_than_equal": "must be at most {le:g}, got {input}",
}


@contextlib.contextmanager
def usage_in_one_line() -> Iterator[None]:
    """Prints errors of the options in one line; with several processes only process 0 prints."""
    try:
        yield
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        if processes.given_index(sys.argv) != 0:
            processes.fail(2)
        command = error.ctx.command_path if error.ctx else "softjax"
        error.message = _in_our_words(error)
        words = error.format_message()
        end = "" if words.endswith(("?", ".")) else "."
        processes.fail(2, f"{words}{end} {command} --help lists the options.")


def _in_our_words(error: Any) -> str:
    """The message of a wrong usage; the value that came is in it if typer could not read it."""
    details = getattr(error.__cause__, "errors", list)()
    if not details:
        return error.message
    found = details[0]
    words = WORDS.get(found["type"])
    if words is None:
        return found["msg"].removeprefix("Value error, ")
    return words.format(input=found["input"], **found.get("ctx", {}))
