"""What devices can do: the catalogue in configs/hardware/."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from parallel.config import Precision
from parallel.errors import LayoutError

FOLDER = Path(__file__).parents[2] / "configs" / "hardware"
GIB, GB = 2**30, 1e9


class Device(BaseModel):
    """One GPU, or one process of a CPU, and what connects it with others. Data-sheet rates; efficiencies are
    what of them was seen to be reached."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """As it is called in print."""
    type: Literal["cpu", "cuda"] = "cuda"
    """What torch calls it; ROCm's devices are cuda to it, too."""
    memory_gib: PositiveFloat
    """GiB that a process can use."""
    reserved_gib: float = Field(ge=0)
    """GiB of these that are gone before the first tensor: driver, libraries, communicators."""
    fragmentation: float = Field(ge=0, lt=1)
    """What the allocator holds and can't use, as a share of what tensors take."""
    peak_tflops: dict[Precision, PositiveFloat]
    """Dense matrix products, TFLOP/s."""
    matmul_efficiency: float = Field(gt=0, le=1)
    """Share of the peak that large matrix products reach."""
    half_rate_size: float = Field(ge=0)
    """Rows or columns of a product on one device with which it reaches half of that."""
    attention_efficiency: float = Field(gt=0, le=1)
    """The same of attention's kernel, forward and backward together."""
    memory_gb_per_s: PositiveFloat
    """Of the device's memory, GB/s."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of it that element-wise operators reach."""
    launch_us: float = Field(ge=0)
    """Microseconds that the host takes to start a kernel."""
    devices_per_node: PositiveInt
    """Connected by the fast link."""
    link_gb_per_s: PositiveFloat
    """A device to the others of its node, GB/s in one direction."""
    network_gb_per_s: PositiveFloat
    """A device to other nodes, GB/s in one direction."""
    host_gb_per_s: PositiveFloat
    """Between a device and its host, GB/s in one direction."""
    host_memory_gb_per_s: PositiveFloat
    """Of the host's memory, a device's share of it, GB/s."""
    link_efficiency: float = Field(gt=0, le=1)
    """Share of both that large collectives reach."""
    link_latency_us: float = Field(ge=0)
    """Microseconds of one step of a collective within a node."""
    network_latency_us: float = Field(ge=0)
    """The same between nodes."""
    watts: PositiveFloat
    """Of a device at full power."""
    dollars_per_hour: float = Field(ge=0)
    """Rent of a device, on demand."""

    @property
    def memory_bytes(self) -> int:
        """What there is."""
        return round(self.memory_gib * GIB)

    @property
    def memory_rate(self) -> float:
        """Bytes/s that element-wise operators reach."""
        return self.memory_gb_per_s * GB * self.memory_efficiency

    @property
    def host_memory_rate(self) -> float:
        """The same on the host."""
        return self.host_memory_gb_per_s * GB * self.memory_efficiency

    @property
    def host_rate(self) -> float:
        """Bytes/s of copies between a device and its host."""
        return self.host_gb_per_s * GB * self.link_efficiency

    @property
    def link_rate(self) -> float:
        """Bytes/s of large collectives within a node."""
        return self.link_gb_per_s * GB * self.link_efficiency

    @property
    def network_rate(self) -> float:
        """The same between nodes."""
        return self.network_gb_per_s * GB * self.link_efficiency

    def peak_flops(self, precision: Precision) -> float:
        """FLOP/s of dense matrix products; of fp8, those of 8-bit floats.

        Raises LayoutError where the device has none in this precision.
        """
        if precision not in self.peak_tflops:
            raise LayoutError(
                f"precision={precision}: the catalogue has no rate for it on {self.name}: use precision="
                f"{' or '.join(self.peak_tflops)}"
            )
        return self.peak_tflops[precision] * 1e12


def device_names() -> list[str]:
    """Those of the catalogue."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_device(name: str) -> Device:
    """A device of the catalogue by its name, such as `h100-80gb`, or of a file.

    Raises:
        LayoutError: there is none, or the file says something else.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name.lower()}.yaml"
    if not path.is_file():
        raise LayoutError(
            f"there is no device {name!r} in configs/hardware: use {', '.join(device_names())}, or the path of a "
            f"YAML file like these"
        )
    try:
        return Device.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise LayoutError(
            f"{path}: {' '.join(str(error).split())}: write it like those in {FOLDER}"
        ) from None
