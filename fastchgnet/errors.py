"""The one error a user can cause."""

from __future__ import annotations


class InputError(ValueError):
    """Report bad input in one line: the file, the frame where there is one, and the reason.

    The command line prints the message and exits with status 2; a library caller catches it as a
    ValueError. Nothing else in the package turns exceptions into text.
    """


class ToldElsewhere(InputError):
    """Bad input that another process of the same run reports; this one ends without a word."""


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
