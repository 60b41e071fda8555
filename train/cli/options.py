"""Values of options that several commands take."""


def number_of(name: str, text: str | None) -> float | None:
    """The number that `--name 300M` means; None where it is left out.

    Raises:
        ConfigError: it is no positive number.
    """
    from train.counts import parse_count
    from train.errors import ConfigError

    if text is None:
        return None
    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None
