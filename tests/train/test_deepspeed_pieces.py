"""Weights in pieces."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from train.deepspeed_checkpoint.pieces import Row, Stored, Weights


@given(st.data(), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_cut_of_a_row_is_that_of_its_parts_joined(data: st.DataObject, lengths: list[int]) -> None:
    joined = torch.arange(float(sum(lengths)))
    row = Row(joined.split(lengths))
    start = data.draw(st.integers(0, len(joined)))
    count = data.draw(st.integers(0, len(joined) - start))
    assert len(row) == len(joined)
    assert torch.equal(Stored((count,), row.cut(start, count)).join(), joined[start : start + count])


def test_what_is_in_one_piece_is_not_copied() -> None:
    parts = torch.arange(6.0), torch.arange(4.0)
    row = Row(parts)
    weights = Weights({"one": Stored((2, 2), row.cut(1, 4)), "two": Stored((4,), row.cut(4, 4))})
    assert weights["one"].data_ptr() == parts[0][1:].data_ptr()
    assert weights["two"].tolist() == [4.0, 5.0, 0.0, 1.0]
    assert list(weights) == ["one", "two"] and "three" not in weights
