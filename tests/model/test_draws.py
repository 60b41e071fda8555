"""Random numbers by sequence."""

import torch

from model.draws import _bits, integers, uniform


def test_is_splitmix64() -> None:
    # the first numbers of the published generator from seed 0
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % 2**64 for number in _bits(torch.tensor([0]), 3, 0)[0].tolist()] == wanted


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    seeds = torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(0))
    whole = integers(seeds, 7, 1000)
    assert torch.equal(integers(seeds[20:30].flip(0), 7, 1000).flip(0), whole[20:30])
    assert torch.equal(integers(seeds, 3, 1000), whole[:, :3])
    assert not torch.equal(integers(seeds, 7, 1000, stream=1), whole)


def test_numbers_are_evenly_spread_and_independent() -> None:
    numbers = uniform(torch.arange(400), 500)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    counts = numbers.flatten().histc(20, 0, 1)
    assert ((counts - 10_000).abs() < 5 * 10_000**0.5).all()
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), uniform(torch.arange(400), 500, stream=1)):
        together = torch.corrcoef(torch.stack((numbers.flatten(), other.flatten())))[0, 1]
        assert together.abs() < 5 / 200_000**0.5
    places = integers(torch.arange(400), 500, 7).flatten().bincount(minlength=7)
    assert len(places) == 7 and ((places - 200_000 / 7).abs() < 5 * (200_000 / 7) ** 0.5).all()
