"""One rank of a job of any size, whose step is taken and measured in this process, with tensors that have no values."""
