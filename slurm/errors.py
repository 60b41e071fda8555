"""What the user or the cluster got wrong."""


class SlurmError(Exception):
    """A job can't be submitted, or asked about. The message is one line that says what would work."""
