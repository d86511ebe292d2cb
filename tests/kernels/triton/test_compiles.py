"""Every kernel compiles for Ampere and Hopper, without such a device: the interpreter takes more than the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALLEST = 99 * 1024
"""Bytes of shared memory that a program may have on the smallest device of the kind (compute capability 8.6)."""


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_all.py")), "80", "90"],
        env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 11
    assert all(int(shared) <= SMALLEST for _, _, shared in lines), lines
