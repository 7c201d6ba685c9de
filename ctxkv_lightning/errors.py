"""The one exception a user is meant to read."""

EXIT_CODE = 2


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where and what to do.

    The front doors print it without a traceback and exit with `EXIT_CODE`.
    """
