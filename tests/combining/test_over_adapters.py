"""AdapterFusion and ScaLearn: the papers' formulas by brute force, their counts, files that know their adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine import tiny
from engine.small import randomise
from torch import Tensor, nn

import inlay
from inlay.combining.adapter_fusion import AdapterFusion, FusionPiece
from inlay.combining.scalearn import ScaLearn, ScalePiece
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, CheckpointError, ConfigError, InlayError, UnsupportedError
from inlay.pieces.bottlenecks.bottleneck import Bottleneck

IDS = torch.arange(2, 22).reshape(2, 10)
NAMES = ("law", "poems", "web")
Make = Callable[..., Any]
every = pytest.mark.parametrize("cls", [AdapterFusion, ScaLearn])


def model(name: str = "bert", method: inlay.Method | None = None, seeds: tuple[int, ...] = (0, 1, 2)) -> nn.Module:
    """A tiny model with frozen adapters whose every tensor matters, none of them active."""
    base = tiny.build(name).requires_grad_(False)
    for adapter, seed in zip(NAMES, seeds, strict=True):
        torch.manual_seed(seed)
        inlay.attach(base, method or inlay.Adapter(bottleneck=4, activation="gelu"), adapter)
        randomise(base, adapter)
    inlay.trainable(base)
    inlay.activate(base)
    return base


def over(base: nn.Module, method: inlay.Method, spread: float = 0.3) -> nn.Module:
    """The model with `method` made of its adapters active, all of its tensors moved."""
    inlay.attach(base, method, "both")
    inlay.activate(base, "both")
    with torch.no_grad():
        for parameter in adapters_of(base).get("both").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return base


def bottleneck(base: nn.Module, host: nn.Module, name: str) -> Bottleneck:
    (found,) = (m for m in host.get_submodule(f"inlays.{name}").modules() if isinstance(m, Bottleneck))
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)  # fp32 sums in another order


def attended(piece: FusionPiece, h: Tensor, changes: list[Tensor]) -> Tensor:
    """The paper's formula, adapter by adapter."""
    q = piece.query(h)
    scores = torch.stack([(q * piece.key(u)).sum(-1) for u in changes], -1)
    weights = scores.softmax(-1)
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    return sum(weights[..., n, None] * piece.value(u) for n, u in enumerate(changes))  # type: ignore[return-value]


def scaled(piece: ScalePiece, h: Tensor, changes: list[Tensor]) -> Tensor:
    return sum(scale * u for scale, u in zip(piece.scales, changes, strict=True))  # type: ignore[return-value]


FORMULAS: dict[type, Make] = {FusionPiece: attended, ScalePiece: scaled}
METHODS = [
    AdapterFusion(adapters=NAMES),
    AdapterFusion(adapters=NAMES, compat="authors"),
    ScaLearn(adapters=NAMES),
    ScaLearn(adapters=NAMES, uniform=True, shared=True),
]


def piece_at(host: nn.Module) -> Any:
    return next(iter(host.get_submodule("inlays.both").children()))


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_on_a_norm_the_sum_goes_into_the_residual_addition(method: inlay.Method) -> None:
    base = over(model(), method)
    host, t = base.encoder.layer[0].output.LayerNorm, torch.randn(2, 5, 32)
    piece = piece_at(host)
    normal = lambda x: F.layer_norm(x, (32,), host.weight, host.bias, host.eps)  # noqa: E731
    changes = [bottleneck(base, host, name)(normal(t)) for name in NAMES]
    expected = normal(t + FORMULAS[type(piece)](piece, normal(t), changes))
    found = host(t)
    close(found, expected)
    parameters = list(piece.parameters())
    direction = torch.randn_like(found)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    ours = torch.autograd.grad((found * direction).sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, 1e-4)  # sums over 10 tokens and 3 adapters


@pytest.mark.parametrize("method", METHODS[::2])
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_after_or_beside_a_network(method: inlay.Method, placement: str) -> None:
    base = over(model("llama", inlay.Adapter(bottleneck=4, placement=placement)), method)
    mlp, x = base.layers[0].mlp, torch.randn(2, 5, 32)
    with inlay.disabled(base):
        h = mlp(x)
    changes = [bottleneck(base, mlp, name)(h if placement == "pfeiffer" else x) for name in NAMES]
    piece = piece_at(mlp)
    close(mlp(x), h + FORMULAS[type(piece)](piece, h, changes))


@pytest.mark.parametrize("source", [inlay.LoRA(r=2, targets="query"), inlay.OFT(block_size=4, targets="query")])
@pytest.mark.parametrize("method", METHODS[::2])
def test_of_adapters_that_change_a_linear(method: inlay.Method, source: inlay.Method) -> None:
    base = over(model("llama", source), method)
    linear, x = base.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
    with inlay.disabled(base):
        h = linear(x)
    changes = []
    for name in NAMES:
        with inlay.using(base, name):
            changes.append(linear(x) - h)
    piece = piece_at(linear)
    close(linear(x), h + FORMULAS[type(piece)](piece, h, changes), 1e-4)  # differences of outputs


def test_in_half_precision_what_a_lora_adds_is_no_difference_of_rounded_outputs() -> None:
    """(h + u) − h in bfloat16 would be off by 2⁻⁸ of h, which may be more than u."""
    seen: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(32, 32))
        nn.init.constant_(base[0].bias, 30.0)  # type: ignore[arg-type]
        base = base.to(dtype).eval()
        for name in NAMES[:2]:
            inlay.attach(base, inlay.LoRA(r=2, alpha=2, init="random", targets="0"), name)
        inlay.trainable(base)
        inlay.attach(base, ScaLearn(adapters=NAMES[:2]), "both")
        inlay.activate(base, "both")
        (piece,) = (module for module in base.modules() if isinstance(module, ScalePiece))
        held = seen[dtype] = []

        def watched(h: Tensor, changes: list[Tensor], held: list[Tensor] = held, mix: Any = piece.mix) -> Any:
            held.extend(changes)
            return mix(h, changes)

        piece.mix = watched  # type: ignore[method-assign]
        base(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype))
    for whole, half in zip(*seen.values(), strict=True):
        assert (half.float() - whole).abs().mean() < 0.02 * whole.abs().mean()


def test_fusion_of_one_adapter_starts_as_that_adapter_and_of_several_between_them() -> None:
    base = model()
    with inlay.using(base, "law"):
        alone = base(IDS)[0]
    for compat in (None, "authors"):
        inlay.attach(base, AdapterFusion(adapters=("law",), compat=compat), "both")
        inlay.activate(base, "both")
        close(base(IDS)[0], alone, 1e-4)  # W_v is the identity but for entries of 10⁻⁶
        value = piece_at(base.encoder.layer[0].output.LayerNorm).value.weight - torch.eye(32)
        assert 0 < value.abs().max() < 1e-5
        inlay.detach(base, "both")


def test_one_scale_of_one_is_the_adapter_and_equal_scales_are_shared_ones() -> None:
    base = model()
    with inlay.using(base, "law"):
        alone = base(IDS)[0]
    inlay.attach(base, ScaLearn(adapters=("law",)), "both")
    inlay.activate(base, "both")
    with torch.no_grad():
        for parameter in adapters_of(base).get("both").parameters():
            parameter.fill_(1.0)
    assert torch.equal(base(IDS)[0], alone)
    inlay.detach(base, "both")
    for uniform in (False, True):
        torch.manual_seed(0)
        inlay.attach(base, ScaLearn(adapters=NAMES, uniform=uniform, shared=True), "shared")
        inlay.attach(base, ScaLearn(adapters=NAMES, uniform=uniform), "own")
        (scales,) = adapters_of(base).get("shared").parameters()
        with torch.no_grad():
            for parameter in adapters_of(base).get("own").parameters():
                parameter.copy_(scales)
        outputs = []
        for name in ("shared", "own"):
            inlay.activate(base, name)
            outputs.append(base(IDS)[0])
        assert torch.equal(*outputs)
        inlay.activate(base)
        inlay.detach(base, "shared")
        inlay.detach(base, "own")


def test_the_scales_start_as_the_paper_has_them_and_drop_in_training() -> None:
    base = model()
    inlay.attach(base, ScaLearn(adapters=NAMES), "both")
    scales = torch.cat([p.flatten() for p in adapters_of(base).get("both").parameters()])
    assert abs(scales.mean() - 2 / 3) < 1e-3
    assert 0.0005 < scales.std() < 0.002  # 192 draws
    pieces = [piece for _, piece in adapters_of(base).get("both").pieces()]
    assert all(isinstance(piece, ScalePiece) and piece.dropout == 0.3 for piece in pieces)
    h = torch.ones(4, 32)
    torch.manual_seed(0)
    dropped = pieces[0].train().mix(h, [torch.ones(4, 32)] * 3)  # type: ignore[operator]
    assert len(dropped[0].unique()) > 4  # one mask, on ω
    assert torch.equal(dropped[0], dropped[3])


# -- counts ------------------------------------------------------------------------------------------------------------


def test_counts_of_the_papers_on_bert_base() -> None:
    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig())
    tasks = tuple(f"task-{n}" for n in range(8))
    for task in tasks:
        inlay.attach(base, inlay.Adapter(reduction_factor=16), task)
    inlay.trainable(base)
    for method, count in (
        (ScaLearn(adapters=tasks), 73_728),
        (ScaLearn(adapters=tasks, uniform=True), 96),
        (ScaLearn(adapters=tasks, shared=True), 6_144),
        (ScaLearn(adapters=tasks, uniform=True, shared=True), 8),
        (AdapterFusion(adapters=tasks), 21_233_664),
        (AdapterFusion(adapters=tasks, compat="authors"), 21_252_096),
    ):
        inlay.attach(base, method, "over")
        assert inlay.summary(base).trainable_parameters == count
        inlay.detach(base, "over")


# -- training ----------------------------------------------------------------------------------------------------------


def steps(base: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        loss = base(IDS)[0].square().mean()
        loss = loss + sum(c.extra_loss() for c in inlay.controllers(base))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def learners(base: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in base.parameters() if parameter.requires_grad]


@every
def test_only_it_learns_and_a_resumed_run_is_the_same_run(cls: Make, tmp_path: Path) -> None:
    base = model().train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    inlay.attach(base, cls(adapters=NAMES), "both")
    inlay.activate(base, "both")
    own = {id(parameter) for parameter in adapters_of(base).get("both").parameters()}
    assert {id(parameter) for parameter in learners(base)} == own
    optimizer = torch.optim.AdamW(learners(base), lr=0.01, weight_decay=0.1)
    torch.manual_seed(5)
    steps(base, optimizer, 2)
    inlay.save(base, tmp_path, "both")
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    steps(base, optimizer, 2)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())

    again = inlay.load(model().train(), tmp_path, "both", trainable=True)
    inlay.activate(again, "both")
    optimizer = torch.optim.AdamW(learners(again), lr=0.01, weight_decay=0.1)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    steps(again, optimizer, 2)
    for mine, other in zip(learners(base), learners(again), strict=True):
        assert torch.equal(mine, other)


def test_the_values_are_drawn_to_the_identity() -> None:
    base = over(model(), AdapterFusion(adapters=NAMES))
    (controller,) = inlay.controllers(base)
    values = [piece.value.weight for _, piece in adapters_of(base).get("both").pieces()]  # type: ignore[union-attr]
    expected = sum(0.01 * (torch.eye(32) - value).norm() ** 2 for value in values)  # type: ignore[operator, arg-type]
    loss = controller.extra_loss()
    assert loss is not None
    close(loss, expected)  # type: ignore[arg-type]
    inlay.detach(base, "both")
    inlay.attach(base, AdapterFusion(adapters=NAMES, regularisation=0.0), "both")
    assert inlay.controllers(base) == []


@every
def test_checkpointed_compiled_copied_and_in_bfloat16(cls: Make) -> None:
    base = over(model(), cls(adapters=NAMES))
    plain = base(IDS)[0]
    assert torch.equal(copy.deepcopy(base)(IDS)[0], plain)
    place, t = base.encoder.layer[0].output.LayerNorm, torch.randn(2, 5, 32)
    close(torch.compile(place, fullgraph=True, backend="eager")(t), place(t))
    plain.square().mean().backward()
    expected = [parameter.grad.clone() for parameter in learners(base)]  # type: ignore[union-attr]
    base.zero_grad()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    base.train()
    for module in base.modules():
        if isinstance(module, nn.Dropout | ScalePiece):
            module.eval()
    base(IDS)[0].square().mean().backward()
    for parameter, gradient in zip(learners(base), expected, strict=True):
        close(parameter.grad, gradient)  # type: ignore[arg-type]
    base.eval()
    with torch.autocast("cpu", torch.bfloat16):
        close(base(IDS)[0].float(), plain, 0.1)  # bf16 has 8 bits, through two blocks
    half = tiny.build("bert").to(torch.bfloat16)
    for name in NAMES:
        inlay.attach(half, inlay.Adapter(bottleneck=4), name)
    half = over(half, cls(adapters=NAMES))
    assert half(IDS)[0].dtype == torch.bfloat16
    assert {p.dtype for p in adapters_of(half).get("both").parameters()} == {torch.float32}


def test_the_head_is_its_own() -> None:
    base: Any = tiny.build("bert", "sequence")
    for name in NAMES[:2]:
        inlay.attach(base, inlay.Adapter(bottleneck=4), name)
        randomise(base, name)
    inlay.activate(base)
    inlay.attach(base, ScaLearn(adapters=NAMES[:2]), "both")
    inlay.activate(base, "both")
    before = base(IDS).logits
    with torch.no_grad():
        for _, piece in adapters_of(base).get("law").pieces():
            if piece.replaces:
                piece.value.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(base(IDS).logits, before)
    with torch.no_grad():
        for _, piece in adapters_of(base).get("both").pieces():
            if piece.replaces:
                piece.value.zero_()  # type: ignore[operator, union-attr]
    assert not base(IDS).logits.any()


# -- files -------------------------------------------------------------------------------------------------------------


@every
def test_a_file_says_which_adapters_it_is_made_of(cls: Make, tmp_path: Path) -> None:
    base = over(model(), cls(adapters=NAMES))
    inlay.save(base, tmp_path / "both", "both")
    for name in NAMES:
        inlay.save(base, tmp_path / name, name)
    fresh = tiny.build("bert")
    with pytest.raises(AdapterError, match="'law', which is not loaded"):
        inlay.load(fresh, tmp_path / "both", "both")
    for name in NAMES[:2]:
        inlay.load(fresh, tmp_path / name, name)
    with pytest.raises(AdapterError, match=r"'web', which is not loaded \(loaded: 'law', 'poems'\)"):
        inlay.load(fresh, tmp_path / "both", "both")
    assert list(adapters_of(fresh).loaded) == ["law", "poems"]
    inlay.load(fresh, tmp_path / "law", "web")
    with pytest.raises(CheckpointError, match="another adapter than the 'web' that is loaded"):
        inlay.load(fresh, tmp_path / "both", "both")
    inlay.detach(fresh, "web")
    inlay.load(fresh, tmp_path / "web", "web")
    inlay.load(fresh, tmp_path / "both", "both")
    inlay.activate(fresh, "both")
    assert torch.equal(fresh(IDS)[0], base(IDS)[0])
    with inlay.disabled(fresh):
        assert torch.equal(fresh(IDS)[0], tiny.build("bert")(IDS)[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ConfigError, "name loaded adapters"),
        ({"adapters": "law"}, ConfigError, "name loaded adapters"),
        ({"adapters": (1,)}, ConfigError, "name loaded adapters"),
        ({"adapters": ("law", "law")}, ConfigError, "twice"),
        ({"adapters": ("law",), "targets": "query"}, ConfigError, "exclude or layers"),
        ({"adapters": ("law", "poem")}, AdapterError, "did you mean 'poems'"),
        ({"adapters": ("law", "query")}, UnsupportedError, "do not sit at the same places"),
        ({"adapters": ("prompt",)}, UnsupportedError, "cannot take in the adapter 'prompt'"),
        ({"adapters": ("houlsby",)}, UnsupportedError, "TrainedCopy"),
    ],
)
def test_what_cannot_be_put_together(cls: Make, fields: dict[str, Any], error: type[InlayError], message: str) -> None:
    base = model()
    inlay.attach(base, inlay.LoRA(r=1, targets="query"), "query")
    inlay.attach(base, inlay.PromptTuning(num_virtual_tokens=2), "prompt")
    inlay.attach(base, inlay.Adapter(bottleneck=4, placement="houlsby"), "houlsby")
    with pytest.raises(error, match=message):
        inlay.attach(base, cls(**fields), "both")
    assert "both" not in adapters_of(base).loaded


def test_numbers_that_cannot_be() -> None:
    for act, message in (
        (lambda: AdapterFusion(adapters=NAMES, regularisation=-1), r"regularisation=-1\): .* at least 0"),
        (lambda: AdapterFusion(adapters=NAMES, regularisation="a"), r"regularisation='a'"),  # type: ignore[arg-type]
        (lambda: ScaLearn(adapters=NAMES, dropout=1.0), r"ScaLearn\(dropout=1\.0\): a probability in \[0, 1\)"),
        (lambda: ScaLearn(adapters=NAMES, dropout="a"), r"ScaLearn\(dropout='a'\)"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=message):
            act()


def test_an_adapter_that_runs_by_itself_too_or_is_gone() -> None:
    base = over(model(), ScaLearn(adapters=NAMES))
    inlay.activate(base, "law", "both")
    with pytest.raises(AdapterError, match=r"inlay.activate\(model, 'both'\)"):
        base(IDS)
    inlay.activate(base, "both")
    inlay.detach(base, "poems")
    with pytest.raises(AdapterError, match="'poems' is not loaded any more"):
        base(IDS)
    for cls, fields in ((ScaLearn, {"dropout": 1.0}), (AdapterFusion, {"compat": "paper"})):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            cls(adapters=NAMES, **fields)  # type: ignore[arg-type]


def test_places_can_be_left_out_and_widths_must_agree_to_share() -> None:
    base = model("llama", inlay.LoRA(r=1, targets="query,value"))
    inlay.attach(base, ScaLearn(adapters=NAMES, layers=0), "one")
    assert inlay.summary(base).trainable_parameters == 3 * (32 + 16)
    with pytest.raises(UnsupportedError, match="another width"):
        inlay.attach(base, ScaLearn(adapters=NAMES, shared=True), "both")
    inlay.attach(base, ScaLearn(adapters=NAMES, shared=True, exclude="v_proj"), "both")
    assert sum(p.numel() for p in adapters_of(base).get("both").parameters()) == 3 * 32
