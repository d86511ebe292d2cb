"""The pieces of a shadow: on the module that runs the blocks, on each block, and on the model that makes a loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import task_type
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.prompts.calls import named
from inlay.engine.prompts.entry import arguments_of
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels.shadow import Layers, corrected, moved
from inlay.pieces.shadow.places import size, smaller, table_name, take_out_embedding
from inlay.pieces.shadow.pretrained import read
from inlay.pieces.shadow.trajectory import Trajectory, put_back, take_own

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
OWN = (
    "input_ids", "inputs_embeds", "past_key_values", "use_cache", "labels", "return_dict", "output_hidden_states",
    "output_attentions", "output_router_logits",
)  # fmt: skip
"""Arguments that are the model's own affair."""
HALF = (torch.float16, torch.bfloat16)


def untrained(module: nn.Module) -> None:
    """Turn a module's parameters into buffers: nothing reads them, and HF peft's file has them."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())


class NetworkPiece(Piece):
    """On the module that runs the blocks: s⁰ = P network(text), the network's layers and the projection trained."""

    def __init__(self, method: Any, site: Site, blocks: Sequence[nn.Module], trajectory: Trajectory) -> None:
        super().__init__()
        holder: Any = site.module
        self.trajectory, self.blocks = trajectory, tuple(blocks)  # a tuple hides them from registration
        self.arguments = arguments_of(holder)
        self.caches = "past_key_values" in self.arguments and bool(getattr(holder.config, "is_decoder", True))
        width = size(holder.config, "hidden_size")
        projection: nn.Module | None = None
        self.shared: str | None = None
        """The name of the table of tokens in the network, where it reads the model's instead."""
        self.frozen: str | None = None
        """The same, where the table is a pretrained network's own, which is not trained."""
        if method.pretrained is not None:
            self.shadow_backbone, projection = read(method.pretrained, width, site)
            self.frozen = table_name(self.shadow_backbone)
            untrained(self.shadow_backbone.get_submodule(self.frozen))
        else:
            self.shadow_backbone = smaller(holder, {field: getattr(method, field) for field in SIZES}, site)
            if method.share_embeddings and size(self.shadow_backbone.config, "hidden_size") == width:
                self.shared = take_out_embedding(self.shadow_backbone)
        own = size(self.shadow_backbone.config, "hidden_size")
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        fresh = nn.Identity() if own == width else nn.Linear(own, width, bias=False, **place)
        self.shadow_projection = fresh if projection is None else projection
        arguments = arguments_of(self.shadow_backbone)
        self.reads = tuple(name for name in ("attention_mask", "position_ids") if name in arguments)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call, holder = named(self.arguments, args, kwargs), inner.module
        cache, mark = call.get("past_key_values"), self.trajectory.mark
        wanted = call.get("use_cache")
        wanted = getattr(holder.config, "use_cache", False) and not self.training if wanted is None else wanted
        own = take_own(cache, self.shadow_backbone, mark) if self.caches and (wanted or cache is not None) else None
        try:
            with self.trajectory.run(self.first_state(call, own, holder), self.blocks):
                output = inner(*args, **kwargs)
        finally:
            if cache is not None and own is not None:
                put_back(cache, own, mark)
        if cache is None and own is not None:
            values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
            for made in [value for value in values if hasattr(value, "get_seq_length")]:
                put_back(made, own, mark)
        return output

    def first_state(self, call: Mapping[str, Any], own: Any, holder: Any) -> Tensor:
        """s⁰: what the network makes of the text, in the model's width."""
        given = {name: value for name, value in call.items() if value is not None and self.takes(name)}
        dtype, embeds = next(self.shadow_backbone.parameters()).dtype, call.get("inputs_embeds")
        if embeds is not None and self.shared is None:
            raise UnsupportedError(
                "Shadow's network reads token ids with a table of its own, and was given inputs_embeds: pass input_ids"
            )
        if embeds is None and (self.shared or self.frozen) is not None:
            reader = holder if self.frozen is None else self.shadow_backbone
            embeds = reader.get_input_embeddings()(call["input_ids"])
        base = next(holder.parameters()).dtype
        if embeds is None:
            given["input_ids"] = call["input_ids"]
        else:
            embeds = embeds.to(dtype)
            if self.training and torch.is_grad_enabled() and self.is_checkpointed():
                # The older kind gives nothing a gradient whose input needs none.
                embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
            given["inputs_embeds"] = embeds
        if own is not None:
            given |= {"past_key_values": own, "use_cache": True}
        elif self.caches:
            given["use_cache"] = False
        # The network is kept in fp32 beside a base in half precision, and runs as the base does.
        half = base in HALF and dtype not in HALF
        with torch.autocast(base_device(embeds, call), base) if half else contextlib.nullcontext():
            state: Tensor = self.shadow_projection(self.shadow_backbone(**given).last_hidden_state)
        return state

    def file_tensors(self) -> dict[str, Tensor]:
        """With the table of a pretrained network, which HF peft's file has too."""
        if self.frozen is None:
            return dict(self.named_parameters())
        table: Any = self.shadow_backbone.get_submodule(self.frozen)
        return {f"shadow_backbone.{self.frozen}.weight": table.weight, **dict(self.named_parameters())}

    def takes(self, name: str) -> bool:
        """Whether an argument of the model's is the network's too; one of another class takes few."""
        return name in self.reads if self.frozen is not None else name not in OWN

    def is_checkpointed(self) -> bool:
        """Whether the network's own blocks are."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.shadow_backbone.modules())


def base_device(embeds: Tensor | None, call: Mapping[str, Any]) -> str:
    """The kind of device that a call's text is on."""
    return (call["input_ids"] if embeds is None else embeds).device.type


class BlockPiece(Piece):
    """On a block: what goes in is corrected by the state, which what comes out moves. The last block moves nothing."""

    def __init__(self, method: Any, site: Site, width: int, trajectory: Trajectory, last: bool) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        hidden = method.update_hidden_size or method.r
        self.trajectory, self.last = trajectory, last
        self.alpha, self.dropout = float(method.alpha), float(method.dropout)
        self.shadow_down = nn.Linear(width, method.r, bias=False, **place)
        self.shadow_up = nn.Linear(method.r, width, bias=False, **place)
        nn.init.zeros_(self.shadow_up.weight)
        for name in ("shadow_update_transform", "shadow_update_gate"):
            network = nn.Sequential(nn.Linear(width, hidden, **place), nn.GELU(), nn.Linear(hidden, width, **place))
            if last:
                untrained(network)
            setattr(self, name, network)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        s, trajectory = self.trajectory.now(), self.trajectory
        if id(inner.module) in trajectory.checkpointed:
            output, trajectory.state = self.checkpointed(inner, s, args, kwargs)
        else:
            output, trajectory.state = self.run(inner, s, args, kwargs)
        return output

    def run(self, inner: Any, s: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The block's output and the state after it."""
        h, put = hidden_of(args, kwargs)
        rate = self.dropout if self.training else 0.0
        h = corrected(h, s, self.shadow_down.weight, self.shadow_up.weight, self.alpha, rate)
        args, kwargs = put(h)
        output = inner(*args, **kwargs)
        out = output[0] if isinstance(output, tuple) else output
        return output, s if self.last else moved(s.to(h.dtype), out, self.layers("transform"), self.layers("gate"))

    def layers(self, which: str) -> Layers:
        """The tensors of T or of G."""
        network: Any = getattr(self, f"shadow_update_{which}")
        return Layers(network[0].weight, network[0].bias, network[2].weight, network[2].bias)

    def checkpointed(self, inner: Any, s: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """`run` under the block's checkpoint, of either kind: hidden states and state go in and come out as tensors."""
        if any(isinstance(piece, BlockPiece) for piece in further_in(inner)):
            raise UnsupportedError(
                "two active Shadow adapters cannot be trained with gradient checkpointing of the blocks: activate one"
            )
        h, put = hidden_of(*without_caches(args, kwargs))
        several = False

        def step(h: Tensor, s: Tensor) -> tuple[Any, ...]:
            nonlocal several
            output, after = self.run(inner, s, *put(h))
            several = isinstance(output, tuple)
            return (after, *(output if several else (output,)))

        after, *rest = inner.module._gradient_checkpointing_func(step, h, s)
        return tuple(rest) if several else rest[0], after

    def file_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def further_in(inner: Any) -> list[Piece]:
    """The pieces between one and the base."""
    found = []
    while inner is not None and inner.piece is not None:
        found.append(inner.piece)
        inner = inner.inner
    return found


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """A block's hidden states (its first argument), and a function that gives its arguments with others in place."""
    if args:
        return args[0], lambda h: ((h, *args[1:]), kwargs)
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], lambda h: ((), {**kwargs, name: h})


def without_caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without a cache, which a block that is computed again would write to a second time."""
    plain = {name: None if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}
    if plain.get("use_cache"):
        plain["use_cache"] = False
    return tuple(None if hasattr(value, "get_seq_length") else value for value in args), plain


class LossPiece(Piece):
    """On the model: where it computes a loss from labels, λ times the loss of its head on s⁰ is added.

    A causal language model's own head serves both; of a classifier's, which pools the last token, there is a copy.
    """

    def __init__(self, weight: float, site: Site, trajectory: Trajectory) -> None:
        super().__init__()
        self.trajectory, self.loss_weight = trajectory, float(weight)
        self.arguments = arguments_of(site.module)
        self.classifies = task_type(site.module) == "SEQ_CLS"
        if self.classifies:
            head: Any = copy.deepcopy(site.module.score).requires_grad_()
            self.shadow_head = head.to(dtype=trainable_dtype(site.dtype))
            if not weight:
                untrained(self.shadow_head)

    @staticmethod
    def fits(model: Any, width: int) -> bool:
        """Whether there is such a head, on what the blocks give."""
        kind = task_type(model) if hasattr(model, "loss_function") else None
        if kind == "SEQ_CLS":
            return isinstance(getattr(model, "score", None), nn.Linear)
        return kind == "CAUSAL_LM" and getattr(model.get_output_embeddings(), "in_features", None) == width

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call, model = named(self.arguments, args, kwargs), inner.module
        self.trajectory.awaited = bool(self.loss_weight) and call.get("labels") is not None
        try:
            output = inner(*args, **kwargs)
            first = self.trajectory.first
        finally:
            self.trajectory.awaited, self.trajectory.first = False, None
        plain = isinstance(output, tuple)
        own = output[0] if plain else getattr(output, "loss", None)
        if first is None or own is None:
            return output
        loss = self.classified(first, call, model) if self.classifies else self.continued(first, call, model)
        own = own + self.loss_weight * loss.to(own)
        if plain:
            return (own, *output[1:])
        output.loss = own
        return output

    def continued(self, first: Tensor, call: Mapping[str, Any], model: Any) -> Tensor:
        """The language model's loss on head(s⁰)."""
        names = ("num_items_in_batch", "shift_labels", "ignore_index")
        given = {name: call[name] for name in names if call.get(name) is not None}
        head = model.get_output_embeddings()
        first = first[:, -call["labels"].shape[-1] :]  # a prompt may stand before the text
        logits = head(first.to(head.weight.dtype))
        loss: Tensor = model.loss_function(
            logits=logits, labels=call["labels"], vocab_size=model.config.get_text_config().vocab_size, **given
        )
        return loss

    def classified(self, first: Tensor, call: Mapping[str, Any], model: Any) -> Tensor:
        """The classifier's loss on the copy of its head at s⁰ of the last token that is no padding."""
        mask = call.get("attention_mask")
        first = first if mask is None else first[:, -mask.shape[-1] :]  # a prompt may stand before the text
        rows = torch.arange(first.shape[0], device=first.device)
        last = torch.full_like(rows, first.shape[1] - 1)
        if mask is not None:
            last = (mask.ne(0) * torch.arange(mask.shape[-1], device=mask.device)).argmax(-1)
        logits = self.shadow_head(first[rows, last].to(self.shadow_head.weight.dtype))
        loss: Tensor = model.loss_function(labels=call["labels"], pooled_logits=logits, config=model.config)
        return loss

    def file_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}
