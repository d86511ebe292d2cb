"""X-LoRA against HF peft's, against its formula, and through files of either library."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from engine.small import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay.combining.xlora import ClassifierPiece, XLoRA
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, CheckpointError, ConfigError, InlayError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 17).reshape(2, 7)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
NAMES = ("0", "1", "2")
PLACES = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 outputs of order one: one product of ranks side by side instead of three."""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of three LoRAs of different ranks."""
    folder = tmp_path_factory.mktemp("experts")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        base = inlay.attach(tiny.build("llama", "causal"), inlay.LoRA(r=2 + number, alpha=8, targets="query,down"))
        randomise(base)
        inlay.save(base, folder / name)
    return folder


def loaded(experts: Path, names: tuple[str, ...] = NAMES, head: str = "causal") -> Any:
    """The model with the LoRAs in it, frozen and inactive."""
    base = tiny.build("llama", head).requires_grad_(False)
    for folder, name in zip(NAMES, names, strict=True):
        inlay.load(base, experts / folder, name)
    inlay.activate(base)
    return base


def mixed(experts: Path, method: XLoRA | None = None, names: tuple[str, ...] = NAMES) -> Any:
    """The same with a classifier over them, moved away from its start."""
    base = loaded(experts, names)
    torch.manual_seed(3)
    inlay.attach(base, method or XLoRA(adapters=names), "mix")
    inlay.activate(base, "mix")
    with torch.no_grad():
        for parameter in adapters_of(base).get("mix").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return base


def of_peft(experts: Path, **fields: Any) -> Any:
    base = tiny.build("llama", "causal")
    base.config.use_cache = False
    torch.manual_seed(5)
    adapters = {name: str(experts / name) for name in NAMES}
    theirs = peft.get_peft_model(
        base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **fields)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return theirs


def classifier_of(theirs: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in theirs.state_dict().items() if "internal_xlora_classifier" in key}


def loss(model: Any) -> Tensor:
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    weighed: Tensor = (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()
    return weighed


def piece_of(base: nn.Module) -> ClassifierPiece:
    return next(piece for _, piece in adapters_of(base).get("mix").pieces() if isinstance(piece, ClassifierPiece))


# -- HF peft -----------------------------------------------------------------------------------------------------------

FIELDS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.5},
    {"xlora_depth": 3, "xlora_size": 8, "global_scaling_weight": 2.0},
    {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "top_k_lora": 2, "scaling_pass_value": 0.4},
    {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "layerwise_scalings": True},
    {"enable_softmax": False, "scaling_pass_value": 1.0},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_outputs_gradients_and_files_are_hf_pefts(fields: dict[str, Any], experts: Path, tmp_path: Path) -> None:
    theirs = of_peft(experts, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    save_file(classifier_of(theirs), tmp_path / "theirs" / "adapter_model.safetensors")  # see the next test
    expected = theirs(input_ids=IDS, attention_mask=MASK).logits
    loss(theirs).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}

    ours = inlay.load(loaded(experts), tmp_path / "theirs", "mix", trainable=True)
    inlay.activate(ours, "mix")
    torch.testing.assert_close(ours(input_ids=IDS, attention_mask=MASK).logits, expected, **CLOSE)
    loss(ours).backward()
    named = {f"base_model.internal_xlora_classifier.{name}": p.grad for name, p in piece_of(ours).named_parameters()}
    assert named.keys() == gradients.keys()
    for name, gradient in named.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4)  # sums of 900 terms of order one

    inlay.save(ours, tmp_path / "ours", "mix")
    left, right = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    said = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours")]
    assert {k: v for k, v in said[0].items() if k not in ("adapters", "auto_mapping")}.items() <= said[1].items()
    assert said[0]["adapters"].keys() == said[1]["adapters"].keys()
    config: Any = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    config.adapters = {name: str(experts / name) for name in NAMES}
    base = tiny.build("llama", "causal")
    base.config.use_cache = False
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours", config=config).eval()
    torch.testing.assert_close(back(input_ids=IDS, attention_mask=MASK).logits, expected, **CLOSE)


def test_what_peft_leaves_out_of_its_file_is_missed_by_name(experts: Path, tmp_path: Path) -> None:
    """peft 0.21.2 takes `.0.` in `layers.0.weight` for the LoRA named "0", and does not save that linear."""
    theirs = of_peft(experts)
    theirs.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "adapter_model.safetensors")
    assert classifier_of(theirs)
    with pytest.raises(CheckpointError, match=r"no tensor 'base_model\.internal_xlora_classifier\.layers\.0\.weight'"):
        inlay.load(loaded(experts), tmp_path, "mix")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_trainable_adapters": True}))
    with pytest.raises(UnsupportedError, match="use_trainable_adapters=True"):
        inlay.load(loaded(experts), tmp_path, "mix")


# -- the formula -------------------------------------------------------------------------------------------------------


def test_a_token_has_the_weighed_sum_of_what_the_adapters_add(experts: Path) -> None:
    names = ("law", "poems", "web")
    base = mixed(experts, names=names)
    hidden = tiny.build("llama")(input_ids=IDS, attention_mask=MASK).last_hidden_state
    weights = piece_of(base).layers(hidden).softmax(-1)
    linear, seen = base.model.layers[0].self_attn.q_proj, []
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    base(input_ids=IDS, attention_mask=MASK)
    handle.remove()
    x, found = seen[-1]
    assert len(seen) == 2
    with inlay.disabled(base):
        expected = h = linear(x)
    for number, name in enumerate(names):
        with inlay.using(base, name):
            expected = expected + weights[..., number, None] * (linear(x) - h)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # differences of outputs


def test_other_adapters_than_plain_loras_of_linears() -> None:
    base: Any = tiny.build("llama", "causal").requires_grad_(False)
    sources = (inlay.OFT(block_size=4, targets="query"), inlay.DoRA(r=2, targets="query"))
    for name, source in zip(("turned", "decomposed"), sources, strict=True):
        inlay.attach(base, source, name)
        randomise(base, name)
    inlay.trainable(base)
    inlay.activate(base)
    inlay.attach(base, XLoRA(adapters=("turned", "decomposed"), top_k=1, softmax_top_k=True, softmax=False), "m")
    with torch.no_grad():
        for parameter in adapters_of(base).get("m").parameters():
            parameter.zero_()
    inlay.activate(base, "m")  # all logits are equal, and the one that top_k chooses has all the weight
    found = base(IDS).logits
    alone = []
    for name in ("turned", "decomposed"):
        with inlay.using(base, name):
            alone.append(base(IDS).logits)
    assert min((found - one).abs().max() for one in alone) < 1e-4


@pytest.mark.parametrize(
    ("name", "head", "targets"),
    [
        ("bert", "sequence", "query,word_embeddings"),
        ("gpt2", "causal", "c_attn"),
        ("llama", "trunk", "down,embed_tokens"),
    ],
)
def test_one_adapter_under_a_softmax_is_that_adapter(name: str, head: str, targets: str) -> None:
    base: Any = tiny.build(name, head).requires_grad_(False)
    inlay.attach(base, inlay.LoRA(r=2, targets=targets), "law", modules_to_save=[])
    randomise(base, "law")
    inlay.trainable(base)
    expected = base(input_ids=IDS, attention_mask=MASK)[0]
    inlay.activate(base)
    inlay.attach(base, XLoRA(adapters=("law",)), "mix", modules_to_save=[])
    inlay.activate(base, "mix")
    torch.testing.assert_close(base(input_ids=IDS, attention_mask=MASK)[0], expected, rtol=1e-4, atol=1e-5)
    base(IDS)[0].sum().backward()  # by position too


def test_the_count_is_the_formulas(experts: Path) -> None:
    for method, count in (
        (XLoRA(adapters=NAMES), 3 * 33),
        (XLoRA(adapters=NAMES, layerwise=True), PLACES * 3 * 33),
        (XLoRA(adapters=NAMES, depth=4, size=8), 8 * 33 + 2 * 8 * 9 + 3 * 9),
    ):
        base = mixed(experts, method)
        assert inlay.summary(base).trainable_parameters == count


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_the_classifier_learns_and_a_resumed_run_is_the_same_run(experts: Path, tmp_path: Path) -> None:
    base = mixed(experts, XLoRA(adapters=NAMES, depth=2, size=8)).train()
    before = {name: value.clone() for name, value in base.state_dict().items() if ".mix." not in name}

    def steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    own = list(piece_of(base).parameters())
    assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in own}
    optimizer = torch.optim.AdamW(own, lr=0.01)
    torch.manual_seed(1)
    steps(base, optimizer)
    inlay.save(base, tmp_path, "mix")
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    steps(base, optimizer)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    again = inlay.load(loaded(experts).train(), tmp_path, "mix", trainable=True)
    inlay.activate(again, "mix")
    optimizer = torch.optim.AdamW(piece_of(again).parameters(), lr=0.01)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    steps(again, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(own, piece_of(again).parameters(), strict=True))


def test_checkpointed_copied_pickled_and_in_bfloat16(experts: Path) -> None:
    base = mixed(experts)
    loss(base).backward()
    expected = [parameter.grad.clone() for parameter in piece_of(base).parameters()]  # type: ignore[union-attr]
    plain = base(IDS).logits
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):  # with the weights of a call still there
        assert torch.equal(twin(IDS).logits, plain)
    base.zero_grad()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    loss(base.train()).backward()
    for parameter, gradient in zip(piece_of(base).parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)
    half = loaded(experts).to(torch.bfloat16)
    inlay.attach(half, XLoRA(adapters=NAMES), "mix")
    inlay.activate(half, "mix")
    assert {parameter.dtype for parameter in piece_of(half).parameters()} == {torch.float32}
    assert half(IDS).logits.dtype == torch.bfloat16
    loss(half).backward()
    assert all(parameter.grad is not None for parameter in piece_of(half).parameters())


def test_blocks_computed_again_have_the_weights_of_their_own_call(experts: Path) -> None:
    """Two calls before one backward, and an evaluation between."""
    base = mixed(experts)

    def gradients() -> list[Tensor]:
        base.zero_grad()
        calls = [base(ids, use_cache=False).logits.square().mean() for ids in (IDS, IDS + 20)]
        with torch.no_grad():
            base(IDS + 10)
        sum(calls).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in piece_of(base).parameters()]  # type: ignore[union-attr]

    expected = gradients()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    base.train()
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_after_a_call_that_failed_a_part_is_refused_too(experts: Path) -> None:
    base = mixed(experts)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    for calls in (1, 2):  # in the first run, and in the one that counts
        seen: list[int] = []
        block = base.model.layers[1]
        handle = block.register_forward_hook(lambda *_, seen=seen, at=calls: fail() if len(seen) == at else None)
        counted = block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(0))
        with pytest.raises(RuntimeError, match="no memory"):
            base(IDS)
        handle.remove()
        counted.remove()
        with pytest.raises(UnsupportedError, match="a part of it was called by itself"):
            base.model.layers[0].self_attn.q_proj(torch.randn(1, 3, 32))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of the run without gradients
def test_the_older_kind_of_checkpointing_is_refused(experts: Path) -> None:
    base = mixed(experts).train()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="use_reentrant=True"):
        loss(base).backward()


# -- files and refusals ------------------------------------------------------------------------------------------------


def test_a_file_knows_its_adapters(experts: Path, tmp_path: Path) -> None:
    names = ("law", "poems", "web")
    base = mixed(experts, names=names)
    inlay.save(base, tmp_path, "mix")
    again = inlay.load(loaded(experts, names), tmp_path, "mix")
    inlay.activate(again, "mix")
    assert torch.equal(again(IDS).logits, base(IDS).logits)
    with inlay.disabled(again):
        assert torch.equal(again(IDS).logits, tiny.build("llama", "causal")(IDS).logits)
    with pytest.raises(CheckpointError, match="another adapter than the 'law'"):
        inlay.load(loaded(experts, ("poems", "law", "web")), tmp_path, "mix")
    with pytest.raises(AdapterError, match="'law', which is not loaded"):
        inlay.load(loaded(experts), tmp_path, "mix")


def test_generates_without_a_cache_and_refuses_one(experts: Path) -> None:
    base = mixed(experts)
    ids = IDS[:1]
    for _ in range(3):
        ids = torch.cat((ids, base(ids).logits[:, -1:].argmax(-1)), dim=-1)
    fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(base.generate(IDS[:1], use_cache=False, **fixed), ids)
    with pytest.raises(UnsupportedError, match=r"generate\(use_cache=False\)"):
        base.generate(IDS[:1], use_cache=True, **fixed)
    with pytest.raises(UnsupportedError, match="a part of it was called by itself"), torch.no_grad():
        base(IDS)
        base.model(IDS)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"depth": 0}, ConfigError, "depth=0"),
        ({"top_k": 4}, ConfigError, "3 adapters to choose from"),
        ({"dropout": 1.0}, ConfigError, "dropout"),
        ({"temperature": 0.0}, ConfigError, "temperature"),
        ({"temperature": None}, ConfigError, "temperature=None"),
        ({"dropout": "a"}, ConfigError, "dropout='a'"),
        ({"scale": "a"}, ConfigError, "scale='a'"),
        ({"depth": True}, ConfigError, "depth=True"),
        ({"overrides": {"query": {"size": 3}}}, ConfigError, "no overrides"),
        ({"adapters": ("0", "4")}, AdapterError, "not loaded"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[InlayError], message: str, experts: Path) -> None:
    base = loaded(experts)
    with pytest.raises(error, match=message):
        inlay.attach(base, XLoRA(**{"adapters": NAMES, **fields}), "mix")
    assert "mix" not in adapters_of(base).loaded


def test_models_that_it_cannot_sit_on() -> None:
    for name in ("t5", "vit"):
        base = tiny.build(name)
        inlay.attach(base, inlay.LoRA(r=1, targets="query"), "law")
        with pytest.raises(UnsupportedError, match="cannot sit on"):
            inlay.attach(base, XLoRA(adapters=("law",)), "mix")
        assert "mix" not in adapters_of(base).loaded
