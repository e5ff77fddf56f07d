"""Every error that a user of lazycompress can cause derives from `LazyCompressError`.

A message is one line that says what is wrong, where, what there was, and what to do.
"""

from __future__ import annotations

#: Longest message. What a line quotes (a value, another library's error) may be of any length.
LONGEST = 480


class LazyCompressError(Exception):
    """Base of every error that the input of lazycompress can cause.

    Args:
        message: white space is made single spaces; of a long message the middle is left out, as what to do stands at its end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, LONGEST))


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


def shortened(text: str, longest: int) -> str:
    """A text as one line of at most so many characters: of a longer one the middle is left out."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    end = (longest - 5) // 3
    return f"{line[: longest - 5 - end]} ... {line[-end:]}"


def shown(value: object) -> str:
    """A value as a message quotes it: what Python writes for it, if that is short."""
    try:
        return shortened(repr(value), 80)
    except Exception:  # a number of 5000 digits, an object whose own repr fails
        return f"a value of type {type(value).__name__}"
