"""The hosts of the property matrix: tiny models of every kind, built once, copied for each test; ways to look at them.

Every parameter is random (biases and norms too), so that outputs are of the order of one and a piece that forgets a
bias or a norm shows. No host has dropout: training mode computes what evaluation mode does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from engine.tiny import Plain, build, build_transformer_encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.piece import Method

Inputs = dict[str, Tensor]


class ConvNet(nn.Module):
    """Convolutions over one, two and three dimensions: grouped, strided, dilated, with circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(8, 6, (3, 2), padding=1, stride=(1, 2), dilation=(1, 2), bias=False)
        self.norm = nn.GroupNorm(2, 6)
        self.space = nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1), padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x).unflatten(-1, (4, 3))
        x = torch.relu(self.norm(self.plane(x)))
        result: Tensor = self.space(x.unsqueeze(2)).flatten(1)
        return result


class TiedNet(nn.Module):
    """An embedding whose weight is the output's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.unembed = nn.Linear(8, 11, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.unembed(torch.tanh(self.mix(self.embed(ids))))
        return result


@dataclass(frozen=True)
class Host:
    """A model to set pieces into: how to make it, what it reads, and how large its new head is."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    head: int = 0
    """Parameters of the untrained head, which is trained with every adapter."""
    checkpoints: bool = False
    """Whether the model has transformers' own gradient checkpointing."""


def _tokens(vocabulary: int = 64, length: int = 7, low: int = 3) -> Tensor:
    return torch.randint(low, vocabulary, (2, length))


def _text(padding: str | None = "right") -> Inputs:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(5, None) if padding == "right" else slice(None, 2)] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

HOSTS = {
    host.name: host
    for host in (
        Host("bert", lambda: build("bert", "sequence", **_NO_DROPOUT), _text, head=32 * 2 + 2, checkpoints=True),
        Host("llama", lambda: build("llama", "causal"), lambda: _text("left"), checkpoints=True),
        Host(
            "gpt2",
            lambda: build("gpt2", "causal", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
            _text,
            checkpoints=True,
        ),
        Host(
            "t5",
            lambda: build("t5", "conditional", dropout_rate=0.0),
            lambda: {**_text(), "decoder_input_ids": _tokens(length=5)},
            checkpoints=True,
        ),
        Host(
            "vit",
            lambda: build("vit", "image", num_labels=3, **_NO_DROPOUT),
            lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
            head=32 * 3 + 3,
            checkpoints=True,
        ),
        Host("mixtral", lambda: build("mixtral", "causal"), _text, checkpoints=True),
        Host("conv", ConvNet, lambda: {"x": torch.randn(2, 4, 12)}),
        Host("tied", TiedNet, lambda: {"ids": _tokens(11, 5, low=0)}),
        Host("torch", build_transformer_encoder, lambda: {"src": torch.randn(2, 5, 12)}),
        Host("plain", Plain, lambda: {"tokens": _tokens(11, 6, low=0)}),
    )
}


# (in, out) of every linear outside heads. Width 32, inner width 48, 2 layers, but for the last two. llama and mixtral
# have 2 of 4 heads for keys and values; gpt2 has query, key and value in one; t5 has 6 attentions, 4 feed-forwards.
SQUARE, FFN, GATED = [(32, 32)], [(32, 48), (48, 32)], [(32, 48), (32, 48), (48, 32)]
GROUPED = [(32, 32), (32, 16), (32, 16), (32, 32)]
MULTIHEAD = [(12, 36), (12, 12)]
LINEARS = {
    "bert": 2 * (4 * SQUARE + FFN) + SQUARE,
    "llama": 2 * (GROUPED + GATED),
    "gpt2": 2 * [(32, 96), (32, 32), *FFN],
    "t5": 6 * 4 * SQUARE + 4 * FFN,
    "vit": 2 * (4 * SQUARE + FFN),
    "torch": 2 * [*MULTIHEAD, (12, 20), (20, 12)],
    "plain": 3 * [*MULTIHEAD, (12, 16), (16, 12)] + [(12, 5)],
}


def total(shapes: list[tuple[int, int]], count: Callable[[int, int], int]) -> int:
    """The sum of a formula over linears."""
    return sum(count(*shape) for shape in shapes)


def linears(count: Callable[[int, int], int]) -> dict[str, Any]:
    """Claims of a method that sits at every linear and has `count(in, out)` parameters there."""
    return {host: ("all-linear", total(shapes, count)) for host, shapes in LINEARS.items()}


@dataclass(frozen=True)
class Row:
    """A method, the hosts that it claims, and what is expected of it there."""

    name: str
    method: Method
    claims: dict[str, Any]
    """Host -> number of parameters, or (targets, number): a formula of the host's sizes, not of the library's."""
    identity: float = 0.0
    """Largest change of an output at the start, relative to the largest output; 0 means the very bits of the base."""
    mergeable: bool = True
    peft: bool | str = True
    """Whether HF peft can read the adapter's file, or as what, if not under the method's own name."""
    targets: bool = True
    """Whether the method has targets."""
    compiled: tuple[str, ...] | None = None
    """Hosts to compile, which takes seconds each; None: the first, () where another row compiles the same pieces."""
    drawn: bool = False
    """Whether training draws noise: a recomputed forward is then compared with training from the same seed."""
    carried: bool = False
    """Whether what is frozen is found in the base's weights and may jump when these are rounded (signs, clusters): then
    the same adapter on a rounded base is the one from its file, not one whose numbers belong to another basis."""
    refuses: dict[str, str | None] = field(default_factory=dict)
    """Host -> targets there (None: the method's own) that it refuses, with an error of one sentence."""

    @property
    def first(self) -> str:
        """The host that stands for the others where a check is expensive."""
        return next(iter(self.claims))

    def at(self, host: str) -> Method:
        """The method with the targets that the row gives for a host."""
        claim = self.claims[host]
        return self.method.replace(targets=claim[0]) if isinstance(claim, tuple) else self.method

    def parameters(self, host: str) -> int:
        """What the row's formula gives, and the host's new head."""
        claim = self.claims[host]
        number = claim[1] if isinstance(claim, tuple) else claim
        return number(fresh(host)) if callable(number) else number + HOSTS[host].head

    def attached(self, host: str, perturbed: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh host with the method in it, moved away from its start unless told otherwise."""
        torch.manual_seed(0)
        model = inlay.attach(fresh(host).to(dtype), self.at(host))
        return perturb(model) if perturbed else model


@functools.cache
def _base(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = HOSTS[name].make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def fresh(name: str) -> nn.Module:
    """A copy of the host `name` in evaluation mode; every copy, in every process, has the same bits."""
    return copy.deepcopy(_base(name)).requires_grad_(True)


@functools.cache
def inputs(name: str) -> Inputs:
    """What the host `name` is given, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return HOSTS[name].inputs()


@functools.cache
def base_output(name: str, fused: bool = True) -> Tensor:
    """What the bare host computes, frozen: torch chooses other kernels for weights that require gradients."""
    return output(_base(name), name, fused)


def forward(model: nn.Module, name: str) -> Tensor:
    """The model's main output: logits, or the tensor that it returns."""
    given = inputs(name)
    if next(model.parameters()).dtype == torch.bfloat16:
        given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    result = model(**given)
    return result if isinstance(result, Tensor) else result.logits


def output(model: nn.Module, name: str, fused: bool = True) -> Tensor:
    """What the model computes, without gradients.

    `fused=False` keeps torch from its fused attention, which rounds otherwise, and which it leaves where pieces sit.
    """
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad():
            return forward(model, name)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def loss_of(value: Tensor) -> Tensor:
    """A scalar that every entry of an output pulls at differently."""
    weights = torch.linspace(-1, 1.3, value.numel()).view(value.shape)
    return (value.float() * weights).sum() + value.float().square().mean()


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The gradient of each parameter that gets one."""
    model.zero_grad()
    loss_of(forward(model, name)).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: nn.Module, host: Host, reentrant: bool) -> dict[str, Tensor]:
    """`gradients` under gradient checkpointing: the model's own where it has one, else one checkpoint around it."""
    model.train().zero_grad()
    if host.checkpoints:
        # transformers renamed it; the floor of the supported versions has the old name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if model.main_input_name != "input_ids":
            # The older kind needs an input that requires a gradient; transformers sees to it for texts alone.
            model.enable_input_require_grads()
        return gradients(model, host.name)
    # The older kind only differentiates through tensors that it is given, so one that requires a gradient goes in.
    value = checkpoint(
        lambda _: forward(model, host.name), torch.ones((), requires_grad=True), use_reentrant=reentrant
    )
    loss_of(value).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def perturb(model: nn.Module, name: str = "default", std: float = 0.1) -> nn.Module:
    """Move the adapter away from its start, as training would; always by the same amounts."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in adapters_of(model).get(name).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=std)
    return model


@dataclass(frozen=True)
class Snapshot:
    """All that can be seen of a model from outside: what attach and detach together must leave as it was."""

    classes: dict[str, type]
    attributes: dict[str, list[str]]
    hooks: dict[str, int]
    state: dict[str, bytes]
    required_grad: dict[str, bool]
    training: dict[str, bool]
    identities: dict[str, int]


def snapshot(model: nn.Module) -> Snapshot:
    """The model's classes, attributes, hooks, bits and flags, by path."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Snapshot(
        classes={path: type(module) for path, module in modules.items()},
        attributes={path: sorted(vars(module)) for path, module in modules.items()},
        hooks={path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in modules.items()},
        state={key: bits(value) for key, value in model.state_dict().items()},
        required_grad={key: parameter.requires_grad for key, parameter in parameters.items()},
        training={path: module.training for path, module in modules.items()},
        identities={key: id(parameter) for key, parameter in parameters.items()},
    )


def bits(tensor: Tensor) -> bytes:
    """The very bits of a tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def base_bits(model: nn.Module) -> dict[str, bytes]:
    """The bits of everything that is not a piece."""
    return {key: bits(value) for key, value in model.state_dict().items() if "inlays" not in key.split(".")}


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry (sums in another order, through a few layers), or at 0 in every bit."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` on average, relative to the average entry: for half precision."""
    assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()
