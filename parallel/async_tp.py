"""Asynchronous tensor parallelism: compiled blocks' matrix products and the collectives beside them, in pieces at once.

torch's compiler puts operators in their place that work on a piece while others are on their way, through memory
that the GPUs of a tensor-parallel group share (Wang et al. 2023).
"""

import socket
import warnings
from itertools import combinations

import torch
import torch._inductor.config
import torch.distributed as dist
from torch.distributed._symmetric_memory import enable_symm_mem_for_group

from parallel.errors import LayoutError
from parallel.mesh import Mesh


def use_async_tp(mesh: Mesh) -> None:
    """Have what is compiled from now on take them; called by all ranks.

    Raises:
        LayoutError: the GPUs of a tensor-parallel group don't reach each other's memory.
    """
    check_reach(mesh)
    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # "no need to call this", which the compiler's pass doesn't know yet
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.tp.group_name)


def check_reach(mesh: Mesh) -> None:
    """Raises LayoutError, on all ranks of a tensor-parallel group alike, where they share no memory."""
    if mesh.device_type != "cuda":
        raise LayoutError(
            f"parallel.async_tp=true: the device is a {mesh.device_type}, and GPUs alone share memory: use "
            f"parallel.async_tp=false"
        )
    places: list[tuple[str, int]] = [("", 0)] * mesh.tp.size()
    dist.all_gather_object(places, (socket.gethostname(), torch.cuda.current_device()), group=mesh.tp)
    for (host, device), (other_host, other) in combinations(places, 2):
        if host != other_host:
            raise LayoutError(
                f"parallel.async_tp=true: parallel.tp={mesh.layout.tp} ranks are on {host} and {other_host}, and GPUs "
                f"share memory within a node: use a smaller parallel.tp, or parallel.async_tp=false"
            )
        if not torch.cuda.can_device_access_peer(device, other):
            raise LayoutError(
                f"parallel.async_tp=true: GPU {device} of {host} doesn't reach the memory of GPU {other} "
                f"(nvidia-smi topo -p2p r): use parallel.async_tp=false"
            )
