"""4-bit weights against bitsandbytes: decoded to the bit, and multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay.errors import ConfigError
from inlay.kernels.triton import nf4

functional: Any = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes, the layout's oracle")
LAYOUTS = [("nf4", False), ("nf4", True), ("fp4", False)]


def quantised(rows: int, columns: int, kind: str = "nf4", nested: bool = False) -> tuple[nf4.Quantised, Any]:
    """A random weight, and what bitsandbytes decodes it to in a dtype."""
    codes, state = functional.quantize_4bit(
        torch.randn(rows, columns), blocksize=64, quant_type=kind, compress_statistics=nested
    )

    def decoded(dtype: torch.dtype) -> torch.Tensor:
        state.dtype = dtype
        return functional.dequantize_4bit(codes, state)

    return nf4.Quantised.from_bitsandbytes(codes, state), decoded


@pytest.mark.parametrize(("kind", "nested"), LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 192), (7, 50), (300, 64)])
def test_decodes_to_the_bits_of_bitsandbytes(rows: int, columns: int, kind: str, nested: bool) -> None:
    weight, decoded = quantised(rows, columns, kind, nested)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nf4.decode(weight, dtype), nf4.reference(weight, dtype))
    # Where absmax is quantised itself, the product and the sum that give it may be fused there: one step of float32.
    close = {"rtol": 2**-22, "atol": 0.0} if nested else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(nf4.decode(weight, torch.float32), decoded(torch.float32), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "nested"), LAYOUTS)
def test_product_is_that_of_the_decoded_weight(kind: str, nested: bool, dtype: torch.dtype) -> None:
    weight, decoded = quantised(37, 320, kind, nested)
    x = torch.randn(3, 320).to(dtype)
    exact = x.double() @ decoded(dtype).double().T
    # float32: sums of 320 products; bfloat16: the sum rounded once.
    close = {"rtol": 1e-5, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(nf4.linear(x, weight).double(), exact, **close)


@pytest.mark.parametrize(("rows", "columns"), [(nf4.MOST_ROWS + 1, 64), (2, 50), (0, 64)])
def test_many_rows_and_odd_widths_take_the_decoded_weight(rows: int, columns: int) -> None:
    weight, decoded = quantised(9, columns)
    x = torch.randn(rows, columns)
    torch.testing.assert_close(nf4.linear(x, weight), x @ decoded(torch.float32).T, rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_fit_are_refused() -> None:
    weight, _ = quantised(4, 64)
    with pytest.raises(ConfigError, match=r"codes of a 4-bit weight \(4, 128\) has 128 entries of torch.uint8.*256"):
        nf4.Quantised(weight.codes, weight.absmax, weight.table, (4, 128))
    with pytest.raises(ConfigError, match=r"absmax2 of a 4-bit weight \(4, 64\) is not given"):
        nf4.Quantised(
            weight.codes, weight.absmax.byte(), weight.table, (4, 64), levels=torch.ones(256), offset=torch.ones(1)
        )
    with pytest.raises(ConfigError, match="blocks of 48 entries"):
        nf4.Quantised(weight.codes, weight.absmax, weight.table, (4, 64), block=48)
    with pytest.raises(ConfigError, match=r"x has the shape \(2, 63\)"):
        nf4.linear(torch.ones(2, 63), weight)
