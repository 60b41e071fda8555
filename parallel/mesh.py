"""The device mesh: which rank stands where in each dimension of the layout."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout


def make_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh with dimensions named as in `Layout`.

    One replica is a mesh of one dimension, over which FSDP2 shards; several are two, over which it is HSDP.
    """
    if layout.dp_replicate == 1:
        return init_device_mesh(device_type, (layout.dp_shard,), mesh_dim_names=("dp_shard",))
    sizes = (layout.dp_replicate, layout.dp_shard)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
