"""What published laws say of tokens, batch, learning rate and warm-up. C: FLOPs of the whole training."""

import math

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal (Hoffmann et al. 2022, table 3)."""
OVERTRAINED = 200.0
"""Tokens a parameter of a model that is smaller than optimal, to be cheap in use; Llama 3 70B was given 213."""
LARGEST_CORPUS = 15e12
"""Tokens; what Llama 3 was trained on (Grattafiori et al. 2024)."""
LARGEST_BATCH = 4608 * 4096.0
"""Tokens, of DeepSeek LLM 67B (table 2): beyond it the law was not tried."""
SMALLEST_BUDGET = 1e17
"""FLOPs that the laws were found from; the rates that they give below are too high (docs/scaling.md)."""
MOST_WARMUP_STEPS = 2000
"""Of DeepSeek LLM (section 2.3)."""


def batch_tokens(flops: float) -> float:
    """The best batch, tokens: 0.2920 C^0.3271 (DeepSeek LLM, Bi et al. 2024, equation 1), up to 18.9 M."""
    return min(0.2920 * flops**0.3271, LARGEST_BATCH)


def batch_sequences(flops: float, seq_len: int) -> int:
    """The same in sequences: the nearest power of 2, which ranks can share out."""
    return int(2 ** max(0, round(math.log2(batch_tokens(flops) / seq_len))))


def peak_learning_rate(flops: float) -> float:
    """The best peak rate of AdamW: 0.3118 C^-0.1250 (the same); under the law's range that of 1e17."""
    return 0.3118 * max(flops, SMALLEST_BUDGET) ** -0.1250


def warmup_steps(steps: float) -> int:
    """A twentieth of the steps, up to 2,000."""
    return min(MOST_WARMUP_STEPS, max(1, round(steps / 20)))


def overtrained_tokens(params: float) -> float:
    """200 a parameter, as far as there are so many."""
    return min(OVERTRAINED * params, LARGEST_CORPUS)
