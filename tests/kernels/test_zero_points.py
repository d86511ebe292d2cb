"""Group-wise quantised weights: how far codes are from the weight, and that a change by groups leaves them alone."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import ConfigError
from inlay.kernels.zero_points import folded, grouped

G = torch.Generator().manual_seed(0)


def weight() -> torch.Tensor:
    return torch.randn(5, 12, generator=G, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_entry_is_further_off_than_half_a_step(bits: int) -> None:
    w = weight()
    found = grouped(w, bits, 4)
    assert (found.codes.dtype, found.codes.shape, found.zeros.shape) == (torch.uint8, (5, 12), (5, 3))
    assert found.codes.max() == 2**bits - 1
    steps = found.scales.repeat_interleave(4, 1)
    assert ((found.values() - w).abs() <= steps * (0.5 + 1e-9)).all()


@pytest.mark.parametrize("groups", [3, 1])
def test_a_change_by_groups_leaves_the_codes_and_adds_up_exactly(groups: int) -> None:
    before, change = grouped(weight(), 4, 4), torch.randn(5, groups, generator=G, dtype=torch.float64)
    after = folded(before, change)
    assert after.codes is before.codes
    assert after.scales is before.scales
    torch.testing.assert_close(after.values(), before.values() + change.repeat_interleave(12 // groups, 1))


def test_a_group_of_equal_entries_has_its_value() -> None:
    same = torch.full((2, 4), 0.75)
    torch.testing.assert_close(grouped(same, 4, 4).values(), same)


def test_what_does_not_fit_is_refused() -> None:
    found = grouped(weight(), 4, 6)
    for change in (torch.zeros(5, 4), torch.zeros(4, 2)):
        with pytest.raises(ConfigError, match="does not fold into a weight of 5 by 2"):
            folded(found, change)
    with pytest.raises(ConfigError, match="group_size=5 does not divide the 12"):
        grouped(weight(), 4, 5)
    with pytest.raises(ConfigError, match="bits=9"):
        grouped(weight(), 9, 4)
