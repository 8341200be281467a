"""The command line within a test, for several test modules."""

from typer.testing import CliRunner

from softjax import cli


def run(*arguments, **options):
    return CliRunner(**options).invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result, status=2):
    """The line that a command which failed has said."""
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("softjax: ")
    return line
