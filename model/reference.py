"""The constructors of the systems that this project takes in, under their own names, onto the core.

Weights are initialized as in GPT-2, by torch's seed. Where their documents leave it open: a call without targets
returns the logits alone, and targets (or labels) are compared as they stand, so give the tokens that come next.
B batch, T sequence, V vocabulary.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from model import generate as generation
from model import transformer
from model.config import BaseModelConfig, ModelConfig
from model.flow_matching.config import FlowMatchingConfig
from model.flow_matching.model import FlowMatching
from model.image_codes.config import ImageCodesConfig
from model.image_codes.model import ImageCodes
from model.initialize import initialize
from model.models import parse_model
from model.spellings import in_our_words
from model.transformer import LossFunction

C = TypeVar("C", bound=BaseModelConfig)
Settings = BaseModelConfig | Mapping[str, Any] | SimpleNamespace
"""A configuration: ours, or keys and values in our words or theirs (`model.aliases`)."""


class TransformerConfig(ModelConfig):
    """Of Transformer: the defaults of a modern small model (RMSNorm, RoPE, SwiGLU, grouped queries)."""

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return in_our_words({"type": "Transformer", **values})


class GPTConfig(ImageCodesConfig):
    """Of GPT: seq_len is H x W, embed_dim the width; without classes unless class_conditional is true."""

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return in_our_words({"type": "GPT", **values})


class Transformer(transformer.Transformer):
    """`Transformer(TransformerConfig(...))`: tokens (B, T) -> logits (B, T, V); printed, its size and settings."""

    def __init__(self, config: Settings) -> None:
        super().__init__(_read(config, "Transformer", ModelConfig))
        _initialize(self)


class _Decoder(transformer.Transformer):
    """A decoder that generates, with a loss function of its own."""

    def __init__(self, config: ModelConfig, loss_func: LossFunction = F.cross_entropy) -> None:
        super().__init__(config)
        self.loss_func = loss_func
        _initialize(self)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        """tokens (B, T) int64, or one-hot (B, T, V) -> logits (B, T, V); with targets (B, T): (logits, loss)."""
        return super().forward(tokens, targets, **{"loss_func": self.loss_func, **options})

    def generate(self, tokens: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        """tokens (B, T) -> (B, T + max_new_tokens); settings such as temperature and top_k: `model.generate`."""
        return generation.generate(self, tokens, max_new_tokens, **settings)


class GPTCausal(_Decoder):
    """A causal transformer with RoPE, squared ReLU and RMSNorm."""

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        dropout: float = 0.0,
        max_seq_len: int = 2048,
        loss_func: LossFunction = F.cross_entropy,
    ) -> None:
        settings = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "dropout": dropout}
        sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
        super().__init__(_read(settings | sizes, "GPTCausal", ModelConfig), loss_func)


class GPTModel(_Decoder):
    """A decoder of exchangeable components, by a namespace with `attention_type`, `ffn_class` and the like."""

    def __init__(self, config: Settings) -> None:
        super().__init__(_read(config, "GPTModel", ModelConfig))

    def get_num_params(self, non_embedding: bool = False) -> int:
        """All parameters, a tied one once; non_embedding leaves out those of the positions."""
        left_out = sum(p.numel() for p in self.positions.parameters()) if non_embedding else 0
        return sum(p.numel() for p in self.parameters()) - left_out


class FlowMatchingTransformer(FlowMatching):
    """A bidirectional transformer of noised tokens and a time; see also `sample(t, xt, temperature)`."""

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        dropout: float = 0.0,
        max_seq_len: int = 2048,
        time_embed_dim: int = 256,
        loss_func: LossFunction = F.cross_entropy,
    ) -> None:
        settings = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "dropout": dropout}
        sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "time_embed_dim": time_embed_dim}
        super().__init__(_read(settings | sizes, "FlowMatchingTransformer", FlowMatchingConfig))
        self.loss_func = loss_func
        _initialize(self)

    def forward(self, t: Tensor, xt: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        """Times (B,) in [0, 1], distributions (B, T, V) -> logits (B, T, V); with targets: (logits, loss)."""
        return super().forward(t, xt, targets, **{"loss_func": self.loss_func, **options})


class GPT(ImageCodes):
    """`GPT(GPTConfig(...))`: a decoder of pictures' codes, told their class where it is class-conditional."""

    def __init__(self, config: Settings) -> None:
        super().__init__(_read(config, "GPT", ImageCodesConfig))
        _initialize(self)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, labels: Tensor | None = None, **options: Any
    ) -> Any:
        """tokens (B, T), classes (B,) -> logits (B, T, V); with labels (B, T), the targets: (logits, loss)."""
        return super().forward(tokens, targets if labels is None else labels, **options)


def generate(
    model: GPT,
    start: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """start (B, T), classes (B,) -> codes (B, T + max_new_tokens)."""
    return model.generate(start, max_new_tokens, temperature, top_k, top_p, classes)


def _read(config: Settings, name: str, kind: type[C]) -> C:
    """The configuration of a constructor; ValueError where it is another model's."""
    if isinstance(config, BaseModelConfig):
        ours = config
    else:
        ours = parse_model(
            {"type": name, **(vars(config) if isinstance(config, SimpleNamespace) else config)}
        )
    expected = kind.model_fields["type"].default
    if not isinstance(ours, kind) or ours.type != expected:
        raise ValueError(f"{name} takes a configuration of type {expected}, not {ours.type}")
    return ours


def _initialize(model: Any) -> None:
    seed = torch.randint(2**62, (), device="cpu")
    initialize(model, model.config, int(seed))
