"""What this device reaches, as the lines of configs/hardware/ that can be measured on one device.

python -m benchmarks.device
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parallel.config import Precision
from parallel.fsdp import COMPUTE_DTYPE
from parallel.planner.work import FLASH_BACKWARD

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp32", "fp64")
SIZES = {"cpu": (512, 1024), "cuda": (2048, 4096, 8192)}
"""Of square products; the best is the peak."""
TOKENS, D_MODEL, D_FF = 2048, 768, 2048
"""Of a feed-forward layer's products in training."""
FEW = (8, 16, 32, 64)
"""Tokens with which products are slow."""
BATCH, HEADS, LENGTH, HEAD_DIM = 2, 12, 1024, 64
"""Of attention."""
NUMBERS = 2**26
"""In the tensors that are added and copied."""
ROUNDS, SECONDS = 3, 1.0
"""That something is measured at least."""


def main() -> None:
    """Print the lines."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = COMPUTE_DTYPE[precision]
    peaks = {name: peak(device, COMPUTE_DTYPE[name]) for name in PRECISIONS}
    best = peaks[precision]
    copied, added = memory_rates(device)
    print("peak_tflops:", "{" + ", ".join(f"{name}: {rate / 1e12:.3g}" for name, rate in peaks.items()) + "}")
    print(f"matmul_efficiency: {min(1.0, training_rate(device, dtype) / best):.2f}")
    print(f"half_rate_size: {half_rate_size(device, dtype):.0f}")
    print(f"attention_efficiency: {attention_rate(device, dtype) / best:.2f}")
    print(f"memory_gb_per_s: {copied / 1e9:.3g}")
    print(f"memory_efficiency: {min(1.0, added / copied):.2f}")
    print(f"launch_us: {launch(device) * 1e6:.1f}")


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the square product that is fastest."""
    return max(product_rate(size, size, size, device, dtype) for size in SIZES[device.type])


def product_rate(n: int, d: int, f: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of (n, d) times (d, f)."""
    a, b = torch.randn(n, d, device=device).to(dtype), torch.randn(d, f, device=device).to(dtype)
    return 2 * n * d * f / seconds(lambda: a @ b, device)


def training_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a linear layer, forward and backward."""
    x = torch.randn(TOKENS, D_MODEL, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(D_FF, D_MODEL, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(TOKENS, D_FF, device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), gradient)

    return 6 * TOKENS * D_MODEL * D_FF / seconds(step, device)


def half_rate_size(device: torch.device, dtype: torch.dtype) -> float:
    """The `h` of rate(n) = n / (n + h) times that of many tokens, n being few."""
    whole = product_rate(TOKENS, D_MODEL, D_FF, device, dtype)
    return median(n * max(0.0, whole / product_rate(n, D_MODEL, D_FF, device, dtype) - 1) for n in FEW)


def attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of causal attention, forward and backward, half of the square being counted."""
    shape = (BATCH, HEADS, LENGTH, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), gradient)

    forward = 2 * 2 * BATCH * HEADS * HEAD_DIM * LENGTH * (LENGTH + 1) / 2
    return forward * (1 + FLASH_BACKWARD) / seconds(step, device)


def memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second that copying and adding read and write."""
    a, b, c = (torch.ones(NUMBERS, device=device) for _ in range(3))
    size = a.nbytes
    return 2 * size / seconds(lambda: a.copy_(b), device), 3 * size / seconds(
        lambda: torch.add(a, b, out=c), device
    )


def launch(device: torch.device) -> float:
    """Seconds that the host takes to start a small operator."""
    one, times = torch.ones(1, device=device), 1000

    def start() -> None:
        for _ in range(times):
            one.add_(1)

    return seconds(start, device) / times


def seconds(run: Callable[[], Tensor | None], device: torch.device) -> float:
    """Median of some rounds, after one that warms up."""
    taken: list[float] = []
    while len(taken) <= ROUNDS or sum(taken) < SECONDS:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


if __name__ == "__main__":
    main()
