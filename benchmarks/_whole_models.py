"""The same adapter in HF peft and here, in a whole model: for methods that one linear is not enough for.

The model is a small Llama with labels; x is added to its embeddings of tokens, so that all its blocks are gone through
backwards and the gradient of x can be compared, whatever the adapter's own parameters are called.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _protocol as protocol
import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.prompts.entry import prompt_of

SHAPE = protocol.Shape(layers=2, hidden=256, mlp=704, heads=4, vocabulary=4096, length=64)
VIRTUAL, INVOCATION, TARGETS = 20, [7, 8], ["q_proj", "v_proj"]
Call = Callable[[nn.Module, Tensor], Tensor]


class Pair(NamedTuple):
    """The adapter in both libraries, the base of both, x, and how the models are called with it."""

    theirs: nn.Module
    ours: nn.Module
    bare: nn.Module
    x: Tensor
    call: Call


@torch.no_grad()
def moved(theirs: nn.Module) -> Any:
    """peft's model with every trained number away from its start, where some methods do nothing yet."""
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return theirs


def through_file(build: Callable[[], nn.Module], theirs: nn.Module) -> nn.Module:
    """Inlay's model that has read what peft's has saved."""
    with tempfile.TemporaryDirectory() as folder:
        moved(theirs).save_pretrained(folder, save_embedding_layers=False)
        return inlay.load(build(), folder, trainable=True)


# -- the model ---------------------------------------------------------------------------------------------------------


def base(tied: bool = False) -> Any:
    """The Llama, always with the same weights; `tied`: its head reads the table of tokens."""
    model: Any = protocol.llama(SHAPE, torch.float32).eval()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def text() -> Tensor:
    """Tokens, each text with those that invoke an aLoRA after a third of it."""
    ids = protocol.batch(SHAPE)
    third = SHAPE.length // 3
    ids[:, third : third + len(INVOCATION)] = torch.tensor(INVOCATION)
    return ids


def paired(theirs: Any, ours: Any, *, tied: bool = False, prepended: int = 0, **more: Any) -> Pair:
    """The pair, with x in the embeddings of all three models; where a prompt comes first, in what the first block
    reads, because peft embeds the text alone and Inlay the places of the prompt too.
    """
    x = torch.zeros(SHAPE.batch, prepended + SHAPE.length, SHAPE.hidden).requires_grad_()
    bare = base(tied).requires_grad_(False)
    ids = text()
    for model in (theirs.get_base_model(), ours, bare):
        if prepended and model is not bare:
            model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + x, *args[1:]))
        else:
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + x[:, prepended:])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(**call, **({} if model is bare else more)).loss
        return found

    return Pair(theirs, ours, bare, x, loss)


# -- the methods -------------------------------------------------------------------------------------------------------


def from_config(config: peft.PeftConfig, **more: Any) -> Pair:
    """peft's model of a config, and its file here."""
    build = functools.partial(base, more.get("tied", False))
    theirs = peft.get_peft_model(build(), config)
    return paired(theirs, through_file(build, theirs), **more)


def prompt_encoder(config: peft.PromptEncoderConfig) -> Pair:
    """P-tuning with its encoder, which peft saves not: copied from model to model."""
    theirs = moved(peft.get_peft_model(base(), config))
    method = inlay.PTuning(num_virtual_tokens=VIRTUAL, hidden_size=config.encoder_hidden_size, encoder="mlp")
    ours = inlay.attach(base(), method)
    here = dict(prompt_of(adapters_of(ours).get("default").placed[0]).named_parameters())
    with torch.no_grad():
        for key, parameter in theirs.prompt_encoder["default"].named_parameters():
            here[key.replace("embedding.weight", "embedding").replace("mlp_head", "mlp")].copy_(parameter)
    return paired(theirs, ours, prepended=VIRTUAL)


def loras(folder: Path, names: Sequence[str]) -> list[str]:
    """Folders of LoRAs with one direction each that stands out, as trained ones have."""
    for number, name in enumerate(names):
        torch.manual_seed(number)
        model = inlay.attach(base(), inlay.LoRA(r=8, targets="query,value", init="random"))
        with torch.no_grad():
            for _, piece in adapters_of(model).get("default").pieces():
                piece.get_parameter("lora_A")[0] *= 3
                piece.get_parameter("lora_B")[:, 0] *= 2
        inlay.save(model, folder / name)
    return [str(folder / name) for name in names]


def mixed(folder: Path, names: Sequence[str], mixture: Path) -> nn.Module:
    """Inlay's model with LoRAs and what mixes them."""
    ours = base().requires_grad_(False)
    for name in names:
        inlay.load(ours, folder / name, name)
    inlay.load(ours, mixture, "mix", trainable=True)
    inlay.activate(ours, "mix")
    return ours


def arrow(config: peft.ArrowConfig) -> Pair:
    """Three LoRAs and one of general knowledge behind a router of nothing but their own directions; none is trained."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        *tasks, general = loras(folder, ["task_0", "task_1", "task_2", "gks_0"])
        theirs = peft.create_arrow_model(base(), tasks, config, general_adapter_paths=[general])
        theirs.requires_grad_(False)
        theirs.save_pretrained(folder / "mix", selected_adapters=["arrow_router"])
        ours = mixed(folder, ["task_0", "task_1", "task_2", "gks_0"], folder / "mix" / "arrow_router")
    return paired(theirs, ours.requires_grad_(False))


def xlora(config: peft.XLoraConfig) -> Pair:
    """Three frozen LoRAs and the classifier that weighs them for each token."""
    with tempfile.TemporaryDirectory() as name:
        folder, names = Path(name), ["0", "1", "2"]
        config.adapters = dict(zip(names, loras(folder, names), strict=True))
        theirs = moved(peft.get_peft_model(base(), config))
        theirs.save_pretrained(folder / "mix")
        tensors = {key: value for key, value in theirs.state_dict().items() if "internal_xlora_classifier" in key}
        save_file(tensors, folder / "mix" / "adapter_model.safetensors")  # what peft writes there are the LoRAs
        return paired(theirs, mixed(folder, names, folder / "mix"))


LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PROMPT: dict[str, Any] = {**LM, "num_virtual_tokens": VIRTUAL}
CONFIGS: dict[str, Callable[[], Any]] = {
    "alora": lambda: peft.LoraConfig(r=16, alora_invocation_tokens=INVOCATION, target_modules=TARGETS, **LM),
    "weight_tied_lora": lambda: peft.LoraConfig(
        r=16, ensure_weight_tying=True, target_modules=["embed_tokens", *TARGETS], **LM
    ),
    "arrow": lambda: peft.ArrowConfig(rng_seed=0, use_gks=True, top_k=2),
    "xlora": lambda: peft.XLoraConfig(hidden_size=SHAPE.hidden, **LM),
    "shadow": lambda: peft.ShadowConfig(r=8, **LM),
    "layer_norm": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **LM),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(16)), **LM),
    "prompt_tuning": lambda: peft.PromptTuningConfig(**PROMPT),
    "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=128, **PROMPT),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(**PROMPT),
    "cartridge": lambda: peft.CartridgeConfig(**PROMPT),
    "multitask_prompt_tuning": lambda: peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **PROMPT),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=list(range(VIRTUAL)), cpt_mask=[1] * VIRTUAL, cpt_tokens_type_mask=[1, 2, 3, 4] * (VIRTUAL // 4),
        opt_projection_epsilon=3.0, opt_projection_format_epsilon=3.0, **LM,
    ),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(adapter_len=10, adapter_layers=2, **LM),
}  # fmt: skip
PAIRS: dict[str, Callable[[Any], Pair]] = {
    "p_tuning": prompt_encoder,
    "arrow": arrow,
    "xlora": xlora,
    "weight_tied_lora": functools.partial(from_config, tied=True),
    "prompt_tuning": functools.partial(from_config, prepended=VIRTUAL),
    "multitask_prompt_tuning": functools.partial(from_config, prepended=VIRTUAL, task_ids=torch.tensor([0, 2, 1, 1])),
    "cpt": functools.partial(from_config, prepended=VIRTUAL),
}
"""How a method's pair is made, where a config and its file are not all."""


def pair(kind: str) -> Pair:
    """Both libraries' models with this method's adapter."""
    return PAIRS.get(kind, from_config)(CONFIGS[kind]())
