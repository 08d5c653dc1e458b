"""Errors that a user can cause.

Each message is one sentence that names the problem and its solution.
"""


class InputError(ValueError):
    """Something the user gave (a setting, a file, a data set, a model) does not fit."""


class RunError(RuntimeError):
    """A run cannot go on (no disk space, a folder of another run, non-finite numbers)."""
