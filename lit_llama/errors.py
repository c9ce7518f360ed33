"""The exception that every mistake of a user raises."""


class UserError(Exception):
    """Something a user can fix. The message is one line: what was found, what was expected and what to do."""
