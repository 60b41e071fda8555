"""Which keys a query sees. T queries, S keys; the queries are the last T of the S positions."""

from typing import NamedTuple

import torch

from model.config import AttentionConfig


class Mask(NamedTuple):
    """What the attention kernel is told. allowed: (T, S) bool, True where seen; None: not needed."""

    is_causal: bool
    allowed: torch.Tensor | None


def make_mask(config: AttentionConfig, queries: int, keys: int, device: torch.device) -> Mask:
    """The mask of one forward.

    A (T, S) tensor is made only where the kernel's own flag does not do. A single query sees all keys; what
    its window leaves out is cut off before.
    """
    if config.mask_type == "bidirectional" or queries == 1:
        return Mask(is_causal=False, allowed=None)
    window = config.window_size
    if queries == keys and (window is None or window >= keys):
        return Mask(is_causal=True, allowed=None)
    places = torch.arange(keys, device=device)
    distance = places[-queries:].unsqueeze(1) - places
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return Mask(is_causal=False, allowed=allowed)


def mean_visible_keys(config: AttentionConfig, seq_len: int) -> float:
    """Keys that a query sees on average over a sequence; causal counted as half."""
    if config.mask_type == "bidirectional":
        return float(seq_len)
    window = min(config.window_size or seq_len, seq_len)
    return window - window * window / (2 * seq_len)
