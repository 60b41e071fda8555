"""The kinds of self-attention by their names."""

from model.attention import Attention
from model.complex_attention import ComplexAttention
from model.linear_attention import LinearAttention

ATTENTION: dict[str, type[Attention] | type[LinearAttention]] = {
    "mha": Attention,
    "gqa": Attention,
    "mqa": Attention,
    "complex": ComplexAttention,
    "linear": LinearAttention,
}
