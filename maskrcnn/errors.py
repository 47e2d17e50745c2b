"""The exception for invalid user input."""


class InputError(ValueError):
    """Invalid user input: a file, an image, a configuration value or a command-line argument.

    The message names the file, image, configuration key or argument, states the problem and, where possible, the
    remedy. Command-line tools print it without a traceback and exit with status 2.
    """
