"""The one exception that scripts turn into a single clear line."""


class InputError(Exception):
    """Something the user gave is missing or wrong; the message names it and the remedy in one line."""
