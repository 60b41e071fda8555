"""The catalogue, and how long collectives take on it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import LayoutError
from parallel.hardware import GPU_PEAK_TFLOPS
from parallel.planner.hardware import FOLDER, device_names, load_device
from parallel.planner.topology import seconds
from parallel.planner.traffic import Exchange

GPU = load_device("h100-80gb")
GB = 1e9


def exchange(kind: Any = "all_gather", ranks: int = 8, stride: int = 1, size: float = GB) -> Exchange:
    return Exchange(kind, "dp_shard", ranks, stride, 1, size, "layer")


@pytest.mark.parametrize("name", device_names())
def test_every_number_is_there_and_says_where_it_comes_from(name: str) -> None:
    device = load_device(name)
    assert device.peak_flops("bf16") > 1e11
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines()[3:]:
        assert "#" in line or line.split(":")[0] in ("devices_per_node", "fragmentation", "memory_gib"), line


@pytest.mark.parametrize("name", ["a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200"])
def test_peaks_are_those_that_runs_are_held_against(name: str) -> None:
    assert load_device(name).peak_tflops["bf16"] == GPU_PEAK_TFLOPS[name.partition("-")[0].upper()][0]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((FOLDER / "h200.yaml").read_text().replace("name: H200", "name: Own"))
    assert load_device(str(own)).name == "Own"
    own.write_text("name: Own\nmemory_gib: -1\n")
    with pytest.raises(LayoutError, match=r"own.yaml: .*write it like those in"):
        load_device(str(own))


def test_an_unknown_device_is_told() -> None:
    with pytest.raises(LayoutError, match="no device 'h1000' .* h100-80gb.* or the path of a YAML file"):
        load_device("h1000")
    with pytest.raises(LayoutError, match="precision=fp64: .* use precision=bf16 or"):
        GPU.peak_flops("fp64")


def test_a_collective_within_a_node_takes_its_bytes_over_the_link() -> None:
    rate = GPU.link_gb_per_s * GB * GPU.link_efficiency
    assert seconds(exchange(), GPU) == pytest.approx(7 / 8 * GB / rate, rel=0.02)
    assert seconds(exchange("all_reduce"), GPU) == pytest.approx(2 * seconds(exchange(), GPU))


def test_between_nodes_every_member_uses_its_own_card() -> None:
    """Two nodes of eight: half of the bytes come from the other one, over eight cards."""
    rate = GPU.network_gb_per_s * GB * GPU.link_efficiency
    one_each = seconds(exchange(ranks=2, stride=8, size=100 * GB), GPU)
    assert one_each == pytest.approx(50 * GB / rate, rel=0.01)
    together = seconds(exchange(ranks=16, size=100 * GB), GPU)
    assert together == pytest.approx(max(50 * GB / 8 / rate, 15 / 16 * 100 * GB / (360 * GB)), rel=0.01)


@given(
    st.sampled_from(["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]),
    st.integers(1, 10).map(lambda n: 2**n),
    st.integers(0, 6).map(lambda n: 2**n),
    st.floats(1, 1e11),
)
def test_more_bytes_and_slower_links_take_longer(kind: Any, ranks: int, stride: int, size: float) -> None:
    this = exchange(kind, ranks, stride, size)
    assert 0 < seconds(this, GPU) <= seconds(exchange(kind, ranks, stride, 2 * size), GPU)
    slower = GPU.model_copy(update={"network_gb_per_s": 10.0, "link_gb_per_s": 100.0})
    assert seconds(this, GPU) <= seconds(this, slower)
