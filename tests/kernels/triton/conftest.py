"""The Triton kernels on CPU tensors: in Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


def missing() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed (Linux only: pip install triton)"
    from triton import knobs
    from triton.language import philox
    from triton.runtime.interpreter import InterpretedFunction

    if not knobs.runtime.interpret or not isinstance(philox, InterpretedFunction):
        return "needs Triton's interpreter: set TRITON_INTERPRET=1 before anything imports triton"
    return None


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(missing() or "", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The modules import the kernels at their head, which fails where triton is not there."""
    return _Skipped.from_parent(parent, path=module_path) if missing() else None
