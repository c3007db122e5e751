"""The two kinds of failure a user of the package can meet.

Every message is one line that says what is wrong, where, and what to do. The command line turns
[`InputError`][msae_plugin.errors.InputError] into exit status 2 and
[`RunFailure`][msae_plugin.errors.RunFailure] into exit status 1 (docs/cli.md).
"""


class InputError(ValueError):
    """The user's input cannot work: a wrong field, file, shape or name."""


class RunFailure(RuntimeError):
    """The input was fine, yet the run could not finish or its result is not valid."""
