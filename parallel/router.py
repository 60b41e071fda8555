"""Routing of sequences whose tokens several ranks share: their losses and capacities are of whole sequences."""

from typing import Protocol

from torch import Tensor

from model.router import Router, Routing


class Shares(Protocol):
    """How ranks share tokens out."""

    def split(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> this rank's tokens."""

    def join(self, x: Tensor) -> Tensor:
        """The inverse."""


def route_whole_sequences(router: Router, tokens: Shares) -> None:
    """Route by all tokens' logits, which are small, and keep what is said of this rank's tokens.

    Each rank computes the auxiliary losses of whole sequences; the join's backward keeps what is of its own tokens.
    """
    route = router.route

    def routed(logits: Tensor) -> tuple[Tensor, Tensor, Routing]:
        weights, chosen, routing = route(tokens.join(logits))
        return tokens.split(weights), tokens.split(chosen), routing

    router.route = routed  # type: ignore[method-assign]
