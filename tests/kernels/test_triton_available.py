"""Whether the Triton kernels may be used is answered without triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from inlay.kernels import triton as fused


def test_not_for_tensors_on_cpu() -> None:
    assert not fused.available(torch.ones(2, 3))


def test_asking_imports_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it fails
        "import torch, inlay\n"
        "from inlay.kernels import low_rank, triton\n"
        "assert not triton.available(torch.ones(2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class OnCuda:
    """What `available` asks of a tensor, on a device that is not there."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_by_dtype_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_installed", lambda: True)
    assert not fused.available(OnCuda(torch.bfloat16), 8)  # type: ignore[arg-type]  # nobody has asked for them
    monkeypatch.setattr(fused, "ASKED", True)
    answers = {
        (dtype, rank): fused.available(OnCuda(dtype), rank)  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int8)
        for rank in (1, 64, 256, 257)
    }
    assert [answers[torch.bfloat16, rank] for rank in (1, 64, 256, 257)] == [True, True, True, False]
    assert [answers[torch.float32, rank] for rank in (1, 64, 256, 257)] == [True, True, False, False]
    assert not any(answer for (dtype, _), answer in answers.items() if dtype in (torch.float64, torch.int8))
    monkeypatch.setattr(fused, "_installed", lambda: False)
    assert not fused.available(OnCuda(torch.bfloat16), 8)  # type: ignore[arg-type]
