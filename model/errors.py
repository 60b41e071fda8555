"""What goes wrong by the user's doing in the model core."""


class ConversionError(Exception):
    """A model that the other side can't hold. The message is one line that says why."""


def require(name: str, value: object, fine: bool, allowed: str) -> None:
    """Raise ValueError in one line unless the value of an argument is fine."""
    if not fine:
        raise ValueError(f"{name}={value}: it must be {allowed}")
