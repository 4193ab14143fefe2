"""The one exception that a person is meant to read."""


class InputError(Exception):
    """Bad input: a single line with the value, what is allowed and what to change. Ends a stage with exit status 2."""
