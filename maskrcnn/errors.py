"""The one exception that speaks to the user."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is complete in itself: it names the file, the configuration key or the image, says what is wrong
    and, where it can, what to do. The tools print it without a traceback and exit with status 2.
    """
