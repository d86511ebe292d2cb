"""Seeds out of seeds: every part of a run draws from its own, whatever order the parts come in."""

from __future__ import annotations

import hashlib
from typing import Any


def derived(seed: int, *names: Any) -> int:
    """A seed in [0, 2³¹) for the part of a run that `names` (texts and numbers) name; the same in every process."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31
