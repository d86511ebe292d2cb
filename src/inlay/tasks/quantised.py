"""How a base model is held in memory: as it was saved, or quantised by bitsandbytes as it is read (QLoRA).

    4bit    NF4 with double quantisation: 4.13 bits a weight (Dettmers et al. 2023, arXiv:2305.14314)
    8bit    LLM.int8: 8 bits a weight, outlier columns in 16 (Dettmers et al. 2022, arXiv:2208.07339)

Linears are quantised; heads, poolers, norms and embeddings are not.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from inlay.errors import ConfigError, MissingExtraError, did_you_mean

LOADS = ("auto", "4bit", "8bit")
COMPUTE = {"auto": "bfloat16", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
"""By a run's dtype: in which a quantised base computes."""


def loading(load: str, dtype: str) -> dict[str, Any]:
    """What `Task.load_model` is to be given. Raises MissingExtraError where bitsandbytes is not installed."""
    plain = {} if dtype == "auto" else {"dtype": dtype}
    if check_load(load) == "auto":
        return plain
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quant", f"load={load}")
    import torch
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, COMPUTE[dtype])
    if load == "8bit":
        config: Any = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    else:
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return {"quantization_config": config, "dtype": compute}


def left_whole(auto: Any, model: str) -> list[str]:
    """The paths of the heads and poolers that `auto` gives this model, found without its weights.

    They may not be in the model's file: then they are trained, and a quantised weight cannot be.
    """
    import torch
    from transformers import AutoConfig

    from inlay.engine.roles import heads

    with torch.device("meta"):
        skeleton = auto.from_config(AutoConfig.from_pretrained(model))
    poolers = {path for path, _ in skeleton.named_modules() if path.rpartition(".")[2] == "pooler"}
    return sorted({*heads(skeleton), *poolers, *getattr(auto, "left_whole", ())})


def check_load(load: Any) -> str:
    """The word itself; ConfigError for one that there is not."""
    if load not in LOADS:
        raise ConfigError(f"load must be one of {', '.join(LOADS)}; got {load!r}{did_you_mean(str(load), LOADS)}")
    return str(load)
