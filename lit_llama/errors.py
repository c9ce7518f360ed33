"""The exceptions that end a script in one line."""


class UserError(Exception):
    """Something a user can fix. The message is one line: what was found, what was expected and what to do."""


class Stopped(UserError):
    """A run was saved and ends because a signal asked for it; `status` is its exit status, as shells count."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
