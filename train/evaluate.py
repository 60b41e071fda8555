"""How good a model is: its loss on the validation split, and a text of its own."""

import torch
import torch.distributed as dist
from torch import Tensor

from data.stream import validation_batches
from data.tokenizer import Tokenizer
from model.generate import generate
from model.transformer import Transformer
from parallel.engine import TorchEngine
from train.config import Config


def validation_loss(engine: TorchEngine, config: Config) -> float:
    """The mean loss over the targets of the validation split, each counted once; all ranks call it together."""
    batches = validation_batches(
        config.data.path,
        config.data.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
        limit=config.evaluation.sequences,
    )
    return engine.evaluate(batches)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(1, T) int64; an empty prompt is the end of a document, after which another begins."""
    return torch.tensor([tokenizer.encode(prompt) or [tokenizer.eos_id]])


@torch.no_grad()
def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int, device: torch.device
) -> str:
    """The prompt and up to `tokens` tokens more; the same on all ranks, which call it together."""
    ids = encode_prompt(tokenizer, prompt).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    full = generate(
        model, ids, tokens, temperature=0.8, top_k=50, stop_token=tokenizer.eos_id, generator=generator
    )
    model.train()
    return prompt + tokenizer.decode(full[0, ids.shape[1] :].tolist())
