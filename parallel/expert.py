"""Expert parallelism: each rank has some of the experts, and is sent the tokens that are routed to them.

N rows, D d_model, X experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.experts import Experts
from model.moe import inverse, take_rows
from parallel.collectives import exchange_rows, share_of
from parallel.cut import Cut, keep_share
from parallel.twin import is_twin


def share_experts(model: nn.Module, cuts: dict[str, Cut], group: dist.ProcessGroup) -> None:
    """Leave each rank its share of the experts, on the meta device, and send rows to where their experts are."""
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            for name, _ in list(module.named_parameters()):
                keep_share(module, name, 0, group.rank(), group.size())
                full = f"{prefix}.{name}"
                cuts[full] = Cut(cuts[full].shape, 0, expert=True, partial=cuts[full].partial)
            _send_rows(module, group)


def _send_rows(experts: Experts, group: dist.ProcessGroup) -> None:
    compute = experts.forward

    def forward(rows: Tensor, counts: Tensor) -> Tensor:
        to_send = counts.view(group.size(), -1)
        to_receive = torch.empty_like(to_send)
        if is_twin(rows):
            sent = received = _evenly(len(rows), group.size())
        else:
            dist.all_to_all_single(to_receive, to_send.contiguous(), group=group)
            # how much comes from where must be known to the host
            sent, received = to_send.sum(dim=1).tolist(), to_receive.sum(dim=1).tolist()
        arrived = exchange_rows(rows, received, sent, group)
        order = _by_expert(to_receive, len(arrived))
        back = inverse(order)
        made = compute(take_rows(arrived, order, back), to_receive.sum(dim=0))
        return exchange_rows(take_rows(made, back, order), sent, received, group)

    experts.forward = forward  # type: ignore[method-assign]


def _evenly(rows: int, ranks: int) -> list[int]:
    """How many each rank gets of rows whose experts are not known."""
    shares = (share_of(rows, rank, ranks) for rank in range(ranks))
    return [stop - start for start, stop in shares]


def _by_expert(received: Tensor, rows: int) -> Tensor:
    """The order that puts so many rows, which came rank by rank and there expert by expert, together by expert.

    received (ranks, experts) int64: how many came of each.
    """
    ranks, experts = received.shape
    expert = torch.arange(experts, device=received.device).repeat(ranks)
    return expert.repeat_interleave(received.flatten(), output_size=rows).argsort(stable=True)
