"""How long a collective takes: a fast link within a node, a network between nodes.

A group whose ranks stand `stride` apart has some members on each node. Of what crosses nodes each member's own network
card carries its part, while the fast link carries the rest: the slower of the two decides, as in NCCL's rings and in
hierarchical collectives.
"""

from parallel.planner.hardware import Device
from parallel.planner.traffic import Exchange

MICROSECOND = 1e-6


def seconds(exchange: Exchange, device: Device) -> float:
    """Of one of an exchange's collectives."""
    ranks, size = exchange.ranks, exchange.bytes
    here = max(1, min(ranks, device.devices_per_node // exchange.stride))
    nodes = -(-ranks // here)
    link, network = device.link_rate, device.network_rate
    steps = (here - 1) * device.link_latency_us + (nodes - 1) * device.network_latency_us
    if exchange.kind == "send":
        # in a ring all wait for those who send to another node
        near = here == ranks if exchange.dimension == "cp" else here > 1
        rate, latency = (link, device.link_latency_us) if near else (network, device.network_latency_us)
        return size / rate + latency * MICROSECOND
    if exchange.kind == "all_to_all":
        inside, across = size * (here - 1) / ranks / link, size * (ranks - here) / ranks / network
        # messages to all go out at once
        latency = device.link_latency_us if nodes == 1 else device.network_latency_us
        return max(inside, across) + latency * MICROSECOND
    inside = size * (ranks - 1) / ranks / link if here > 1 else 0.0
    across = size * (1 - 1 / nodes) / here / network if nodes > 1 else 0.0
    once = max(inside, across) + steps * MICROSECOND
    return 2 * once if exchange.kind == "all_reduce" else once
