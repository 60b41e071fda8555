"""Peak matrix-multiply rates, against which utilization is counted."""

import time

import torch
import torch.distributed as dist

from parallel.config import Precision
from parallel.fsdp import COMPUTE_DTYPE

# Dense tensor-core TFLOP/s of (bf16 and fp16, TF32) from the makers' data sheets.
GPU_PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "A100": (312, 156),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "H200": (989, 494),
    "B200": (2250, 1100),
    "L40S": (362, 183),
    "A10": (125, 62.5),
}
_SIZE = 1024
_MEASURE_SECONDS = 0.3


def peak_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of all ranks' devices together: the data sheet's on a known GPU, else measured here.

    All ranks call it together, so that processes that share a CPU measure their share of it.
    """
    rate = _data_sheet(device, precision) or _measure(device, COMPUTE_DTYPE[precision])
    total = torch.tensor(rate, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _data_sheet(device: torch.device, precision: Precision) -> float | None:
    if device.type != "cuda" or precision == "fp64":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (half, single) in GPU_PEAK_TFLOPS.items():
        if part in name:
            return (single if precision == "fp32" else half) * 1e12
    return None


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    a @ a
    dist.barrier()
    best, deadline = float("inf"), time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best
