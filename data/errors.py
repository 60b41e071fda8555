"""What goes wrong in the data room by the user's doing."""


class InputError(Exception):
    """The input can't be used. The message is one line that says what is wrong, where, and what would work."""


def first_line(error: BaseException) -> str:
    """What a library says, as far as it goes into one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
