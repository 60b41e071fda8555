"""Pictures as sequences of a codebook's indices, row by row, after a start token (van den Oord et al. 2017).

B batch, T sequence, D d_model, V codes and the start token.
"""

import torch
from torch import Tensor, nn

from model.cache import KeyValueCache
from model.config import known
from model.cost import Cost
from model.generate import generate
from model.image_codes.config import ImageCodesConfig
from model.part import Part
from model.transformer import Trunk, trunk_cost
from model.weights import Weight


class ImageCodes(Trunk):
    """A decoder; to all of its embeddings that of the picture's class is added."""

    config: ImageCodesConfig
    entrance = ("embedding", "embedding_norm", "classes")

    def __init__(self, config: ImageCodesConfig) -> None:
        super().__init__(config)
        if config.class_conditional and config.num_classes is None:
            raise ValueError("model.num_classes is unset: give the data's number of classes, 10 for example")
        self.classes = ClassEmbedding(config) if config.class_conditional else None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T), classes (B,) int64 -> logits (B, T, V), or (B, 1, V) with last_only.

        With targets (B, T): (logits, loss), the mean over targets that are not IGNORE_INDEX.
        padding (B, T) bool: tokens that no token sees. With a cache: tokens go on from those that it holds.
        Raises ValueError past the learned positions, and where classes are missing or not asked for.
        """
        hidden = self._run(self._embed(tokens, classes), cache, None, padding)
        return self._logits(hidden, targets, last_only=last_only)

    def loss_sum(
        self, tokens: Tensor, targets: Tensor, classes: Tensor | None = None, *, part: Part | None = None
    ) -> Tensor:
        """Sum of the losses over targets (B, T) that are not IGNORE_INDEX, for tokens (B, T), classes (B,).

        part: the sum over this part of the sequences alone.
        """
        x = self.start(tokens, targets, classes, part=part)
        return self.finish(self.middle(x, part=part), targets, part)

    def start(
        self, tokens: Tensor, targets: Tensor, classes: Tensor | None = None, *, part: Part | None = None
    ) -> Tensor:
        """What of loss_sum comes before the blocks, which are not told the targets."""
        embeddings = self._embed(tokens if part is None else part.of(tokens), classes)
        return self._enter(embeddings, None if part is None else part.runs)

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        classes = {} if self.classes is None else {"classes": torch.zeros(batch, dtype=torch.int64)}
        return super().example(batch, length) | classes

    def generate(
        self,
        start: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        classes: Tensor | None = None,
        *,
        num_codes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """start (B, T), classes (B,) int64 -> (B, T + max_new_tokens); only tokens below num_codes are drawn."""
        return generate(
            self,
            start,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            vocab_size=num_codes,
            generator=generator,
            inputs={} if classes is None else {"classes": classes},
        )

    def _embed(self, tokens: Tensor, classes: Tensor | None) -> Tensor:
        x = self.embed(tokens)
        if self.classes is None:
            if classes is not None:
                raise ValueError(
                    "a model with model.class_conditional=false takes no classes: leave them out"
                )
            return x
        if classes is None:
            raise ValueError("a class-conditional model needs classes: give one for each sequence")
        return x + self.classes(classes).unsqueeze(1)

    @staticmethod
    def cost(config: ImageCodesConfig, seq_len: int) -> Cost:
        table = known(config.num_classes) * config.d_model if config.class_conditional else 0
        return trunk_cost(config, seq_len) + Cost(parameters=table, embedding=table)


class ClassEmbedding(nn.Embedding):
    """A vector for each class."""

    def __init__(self, config: ImageCodesConfig) -> None:
        super().__init__(known(config.num_classes), config.d_model)

    def weights(self) -> dict[str, Weight]:
        return {"weight": Weight("replicated", "normal", wide="out")}
