"""Generation, token by token. B batch, T prompt, V vocabulary."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.cache import KeyValueCache
from model.transformer import Trunk


def generate(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Prompt tokens (B, T) int64 -> (B, T + n), n <= max_new_tokens; see `stream`."""
    new = stream(
        model,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
        vocab_size=vocab_size,
        generator=generator,
        use_cache=use_cache,
        inputs=inputs,
    )
    return torch.cat([tokens, *new], dim=1)


def stream(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield each new (B, 1) as it comes.

    temperature 0 takes the likeliest token. A row that made stop_token goes on with stop_tokens; the end is
    when all rows have. Only tokens below vocab_size are drawn, since the model's own may be padded. inputs:
    what the model takes beside the tokens. Dropout is off. Of a sharded model every rank must ask for the same.
    Raises ValueError, before anything is generated, if the model or an argument can't do it.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p)

    def run() -> Iterator[Tensor]:
        cache, seen, unread = None, tokens, tokens
        if use_cache:
            cache = model.make_cache(tokens.shape[1] + max_new_tokens)
        stopped = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = _last_logits(model, seen if cache is None else unread, cache, inputs or {})[
                :, :vocab_size
            ]
            unread = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop_token is not None:
                unread = unread.masked_fill(stopped, stop_token)
                stopped |= unread == stop_token
            yield unread
            if stop_token is not None and bool(stopped.all()):
                return
            if cache is None:
                seen = torch.cat((seen, unread), dim=1)

    return run()


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V) -> tokens (B, 1).

    Softmax of logits / temperature; of the top_k likeliest tokens, the fewest likeliest whose probabilities
    reach top_p (Holtzman et al. 2020). Ties at the edge of top_k all stay.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        edge = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(likelier >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


@torch.no_grad()
def _last_logits(
    model: Trunk, tokens: Tensor, cache: KeyValueCache | None, inputs: Mapping[str, Tensor]
) -> Tensor:
    """(B, V) logits of the last token. Not compiled: every step has another shape."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            return model(tokens=tokens, **inputs, cache=cache, last_only=True)[:, -1]
    finally:
        model.train(training)


def _check(
    model: Trunk,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if model.config.attention.mask_type == "bidirectional":
        raise ValueError(
            "model.attention.mask_type=bidirectional can't generate token by token: it takes a model trained "
            "with mask_type causal or sliding_window"
        )
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"a prompt has the shape (batch, length) and at least one token, not {tuple(tokens.shape)}"
        )
    for name, value, fine, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 (the likeliest token) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            raise ValueError(f"{name}={value}: it must be {allowed}")
    limit, wanted = model.positions.limit, tokens.shape[1] + max_new_tokens
    if limit is not None and wanted > limit + 1:  # the last token is made, and not read
        raise ValueError(
            f"a prompt of {tokens.shape[1]} and max_new_tokens={max_new_tokens} make {wanted} tokens, past "
            f"the {limit} learned positions of this model (model.max_seq_len): shorten one of them"
        )
