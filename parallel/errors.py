"""What goes wrong by the user's doing when a model is laid over processes."""


class LayoutError(Exception):
    """The layout doesn't fit the processes or the machine. The message is one line that says what would."""
