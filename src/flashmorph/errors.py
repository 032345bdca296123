"""The one error that a user is meant to read."""


class UserError(ValueError):
    """Bad input or a state that the user can mend: one sentence that says what is wrong, where, and what is right.

    The command line prints it without a traceback and exits with 2.
    """
