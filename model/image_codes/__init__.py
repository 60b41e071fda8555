"""A decoder over the codes of pictures, given their class."""
