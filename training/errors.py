"""The one exception that speaks to the user."""


class UserError(Exception):
    """A mistake or fault that the user can act on, told in one clear line.

    The command line prints the message without a traceback and leaves with exit code 2. Everything else that
    is raised is a bug of the trainer and keeps its traceback.
    """
