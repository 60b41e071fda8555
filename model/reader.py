"""Reading tokens one after another. B batch, T sequence, V vocabulary."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import require
from model.transformer import Trunk


class Reader:
    """A model in the middle of generating some rows, all of one length, the shorter ones padded on the left.

    With a cache a token is read once, else all of them for every new one. Dropout is off. Raises ValueError if
    the model can't generate so many tokens, or not one by one.
    """

    def __init__(
        self,
        model: Trunk,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        padding: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        use_cache: bool = True,
    ) -> None:
        """prompt (B, T) int64, its padding (B, T) bool; inputs: what the model takes beside tokens, row by row."""
        _check(model, prompt, max_new_tokens, padding)
        self._model = model
        self._tokens, self._padding, self._inputs = prompt, padding, dict(inputs or {})
        self._cache = model.make_cache(prompt.shape[1] + max_new_tokens) if use_cache else None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, V): what comes next, after all tokens so far. Not compiled: every step has another shape."""
        model, training = self._model, self._model.training
        padding = {} if self._padding is None else {"padding": self._padding}
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                made = model(
                    tokens=self._tokens, **padding, **self._inputs, cache=self._cache, last_only=True
                )
        finally:
            model.train(training)
        return made[:, -1]

    def add(self, tokens: Tensor) -> None:
        """The next token of each row, (B, 1)."""
        if self._cache is not None:
            self._tokens, self._padding = tokens, None
            return
        self._tokens = torch.cat((self._tokens, tokens), dim=1)
        if self._padding is not None:
            self._padding = F.pad(self._padding, (0, 1))

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64, in this order, of which some may come more than once."""
        self._tokens = self._tokens[rows]
        self._padding = None if self._padding is None else self._padding[rows]
        self._inputs = {name: value[rows] for name, value in self._inputs.items()}
        if self._cache is not None:
            self._cache.reorder(rows)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Token lists -> tokens (B, T) int64 of the longest's length, and which are padding, (B, T) bool, if any.

    Raises ValueError for a prompt without tokens.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt must have at least one token")
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padding = torch.arange(length) < length - lengths.unsqueeze(1)
    return tokens, padding if bool(padding.any()) else None


def _check(model: Trunk, prompt: Tensor, max_new_tokens: int, padding: Tensor | None) -> None:
    if model.config.attention.mask_type == "bidirectional":
        raise ValueError(
            "model.attention.mask_type=bidirectional can't generate token by token: it takes a model trained "
            "with mask_type causal or sliding_window"
        )
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"a prompt has the shape (batch, length) and at least one token, not {tuple(prompt.shape)}"
        )
    if padding is not None and (padding.shape != prompt.shape or bool(padding[:, -1].any())):
        raise ValueError(
            f"padding {tuple(padding.shape)} must have the prompt's shape {tuple(prompt.shape)} and no row that ends "
            f"in padding: pad on the left, as pad_left does"
        )
    require("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more")
    limit, wanted = model.positions.limit, prompt.shape[1] + max_new_tokens
    if limit is not None and wanted > limit + 1:  # the last token is made, and not read
        raise ValueError(
            f"a prompt of {prompt.shape[1]} and max_new_tokens={max_new_tokens} make {wanted} tokens, past "
            f"the {limit} learned positions of this model (model.max_seq_len): shorten one of them"
        )
