"""What a component costs, worked out from the configuration alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """parameters; of which look-up tables (embedding), and those that one token passes by (idle), as experts
    that it is not routed to; forward FLOPs for one token (2 per multiply-add)."""

    parameters: int = 0
    embedding: int = 0
    idle: int = 0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.embedding + other.embedding,
            self.idle + other.idle,
            self.flops + other.flops,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.parameters * times, self.embedding * times, self.idle * times, self.flops * times)


def linear_cost(d_in: int, d_out: int, bias: bool = False) -> Cost:
    """A linear layer on every token. Additions of biases are not counted as FLOPs."""
    return Cost(parameters=d_in * d_out + (d_out if bias else 0), flops=2.0 * d_in * d_out)
