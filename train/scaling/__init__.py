"""Scaling laws: from the losses of small runs to the size, the data and the loss of a large one."""
