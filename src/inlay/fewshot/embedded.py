"""The embedded model: MiniLM with a masked-language-model head, the base of a few-shot run that names none.

MiniLM as it can be installed (extra `demo`) is a sentence encoder without such a head. The head and a LoRA for its body
were trained by `examples/minilm_masked_lm.py` and lie beside this file; put together once, they are an ordinary
transformers folder in the user's cache, which every other command takes as well.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoTokenizer

from inlay.engine.adapters import merge
from inlay.engine.checkpoint import load
from inlay.engine.files import WEIGHTS
from inlay.engine.host import CHILD
from inlay.tasks.loading import quiet
from inlay.train.demo import demonstration_model
from inlay.train.files import is_complete, staged

HEAD = Path(__file__).parent / "minilm"
"""The adapter that makes MiniLM a masked language model."""


def embedded_model() -> Path:
    """The folder of the embedded model, made when it is first asked for. MissingExtraError without MiniLM."""
    body = demonstration_model()
    digest = hashlib.sha256((HEAD / WEIGHTS).read_bytes()).hexdigest()[:12]
    place = cache_folder() / f"minilm-masked-lm-{digest}"
    if not is_complete(place):
        with quiet():
            model = AutoModelForMaskedLM.from_pretrained(body)
            load(model, HEAD)
            merge(model)
            plain = {name: tensor for name, tensor in model.state_dict().items() if CHILD not in name.split(".")}
            with staged(place, "putting the embedded model together in", marker=True) as folder:
                model.save_pretrained(folder, state_dict=plain)
                AutoTokenizer.from_pretrained(body).save_pretrained(folder)
    return place


def cache_folder() -> Path:
    """Where the library keeps what it can make again: $INLAY_CACHE, or inlay/ in the user's cache folder."""
    given = os.environ.get("INLAY_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inlay"
