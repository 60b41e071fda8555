"""What goes wrong by the user's doing in the model core."""


class ConversionError(Exception):
    """A model that the other side can't hold. The message is one line that says why."""
