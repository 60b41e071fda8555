"""The smallest model: the last token alone decides, and there are no blocks."""

from typing import Literal

from torch import Tensor, nn

from model.config import BaseModelConfig, known
from model.cost import Cost
from model.model import Model
from model.models import Place
from model.weights import Weight

PLACE = Place("tests.model.bigram:BigramConfig", "tests.model.bigram:Bigram")


class BigramConfig(BaseModelConfig):
    type: Literal["bigram"] = "bigram"


class Bigram(Model):
    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(known(config.vocab_size), known(config.vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def weights(self) -> dict[str, Weight]:
        return {"table.weight": Weight("replicated", "embedding")}

    @staticmethod
    def cost(config: BigramConfig, seq_len: int) -> Cost:
        return Cost(parameters=known(config.vocab_size) ** 2)
