"""The learning rate as a function of the step."""

import math

from train.config import ScheduleConfig


def learning_rate(step: int, peak: float, total_steps: int | None, config: ScheduleConfig) -> float:
    """The rate of optimizer step `step` (from 1).

    A linear warm-up reaches `peak` at `warmup_steps`; then comes the shape of `config.type`, which ends at
    `min_lr_ratio * peak` at `total_steps` and stays there:

    - cosine: half a cosine (Loshchilov & Hutter 2017);
    - linear: a straight line;
    - wsd: `peak` until the last `decay_fraction` of the steps, then a straight line (Hu et al. 2024);
    - constant: `peak`, without an end; `total_steps` may be None.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.type == "constant":
        return peak
    if total_steps is None:
        raise ValueError(f"schedule.type={config.type} needs total_steps")
    start = config.warmup_steps
    if config.type == "wsd":
        start = max(start, round(total_steps * (1 - config.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if config.type == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak * (1 - (1 - config.min_lr_ratio) * progress)
