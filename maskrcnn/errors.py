"""Invalid user input: the exception, and the list of problems in its message."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Invalid user input: a file, an image, a configuration value or a command-line argument.

    The message names the file, image, configuration key or argument, states the problem and, where possible, the
    remedy. Command-line tools print it without a traceback and exit with status 2.
    """


LISTED = 10  # problems that a message lists; it counts the rest


def first_of(problems: Sequence[str]) -> list[str]:
    """Return the first `LISTED` problems, followed by `and N more` if there are others."""
    rest = len(problems) - LISTED
    return [*problems[:LISTED], *([f"and {rest} more"] if rest > 0 else [])]
