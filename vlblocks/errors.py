"""The one exception a user's own mistake raises."""


class UserError(ValueError):
    """A wrong argument, setting or file. The message is one line that names the field or file and the remedy.

    Scripts print it without a traceback and exit with code 2.
    """
