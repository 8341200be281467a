"""The command line: `softjax fit | predict | check`."""

from softjax.cli import _fit as _fit
from softjax.cli import _predict as _predict
from softjax.cli._app import app as app

__all__ = ["app"]
