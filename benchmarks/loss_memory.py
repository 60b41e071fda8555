"""Peak memory of the loss, forward and backward, beyond that of its inputs: whole logits against chunks.

python -m benchmarks.loss_memory
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.loss import mean_loss, token_loss_sum

VOCABULARY, TOKENS, WIDTH = 50_304, 8192, 768


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean loss from the logits of all tokens."""
    return mean_loss(hidden @ weight.t(), targets)


def chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean loss as the model computes it."""
    return token_loss_sum(hidden, weight, targets) / len(targets)


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "chunks": chunks}


def main() -> None:
    """Print both, and their ratio."""
    print(
        f"V {VOCABULARY:,}, {TOKENS:,} tokens, D {WIDTH}, fp32, gradients of hidden states and head included"
    )
    peaks = {path: peak_bytes(path, VOCABULARY, TOKENS, WIDTH) for path in PATHS}
    for path, peak in peaks.items():
        print(f"{path:8} {peak / 1e6:7,.0f} MB")
    print(f"ratio    {peaks['chunks'] / peaks['plain']:7.3f}")


def peak_bytes(path: str, vocabulary: int, tokens: int, width: int) -> int:
    """The peak in a fresh process, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "benchmarks.loss_memory", path, str(vocabulary), str(tokens), str(width)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return int(done.stdout)


def measure(path: str, vocabulary: int, tokens: int, width: int) -> int:
    """The peak in this process, in bytes. Linux."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    PATHS[path](hidden[:2], weight[:2], targets[:2] % 2).backward()  # what the first use of a kernel takes
    hidden.grad = weight.grad = None
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    PATHS[path](hidden, weight, targets).backward()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(f"{name}:")).split()[1]
    return int(kilobytes) * 1024


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(measure(sys.argv[1], *map(int, sys.argv[2:])))
