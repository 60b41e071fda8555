"""What is a sum of named parts."""


class Parts:
    """A dataclass of numbers that are to be added up."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return vars(self)
