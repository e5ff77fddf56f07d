"""Every error that a user of lazycompress can cause derives from `LazyCompressError`.

A message is one line that says what is wrong, where, what there was, and what to do.
"""

from __future__ import annotations


class LazyCompressError(Exception):
    """Base of every error that the input of lazycompress can cause."""


class RecipeError(LazyCompressError):
    """A recipe has an unknown key, a bad value, or asks for something that does not exist."""


class InputError(LazyCompressError):
    """The example inputs or the sampler do not fit the model."""


class CaptureError(LazyCompressError):
    """`torch.export` could not turn the model into a graph."""


class LocateError(LazyCompressError):
    """The model has no residual transformer branches."""


class ExportError(LazyCompressError):
    """A lazy model could not be written, or a written one could not be read."""


class ComposeError(LazyCompressError):
    """A model could not be quantized, compressed or pruned as its recipe says."""


class MissingExtraError(LazyCompressError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'lazycompress[{extra}]'")
