"""Arrow against HF peft's, against matrices formed in full, and through files of either library."""

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
from engine.small import Net, randomise
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.combining.arrow import Arrow, ArrowPiece
from inlay.combining.low_rank import Change, main_direction
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, CheckpointError, ConfigError, InlayError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 17).reshape(2, 7)
TASKS = ("task_0", "task_1", "task_2")
GENERAL = ("gks_0", "gks_1")
PLACES = 4
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""fp32 outputs of order one: one product of ranks side by side instead of three."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of five LoRAs, with a first direction well above the second: peft's 15 iterations then find it."""
    folder = tmp_path_factory.mktemp("library")
    for number, name in enumerate((*TASKS, *GENERAL)):
        torch.manual_seed(number)
        base = inlay.attach(tiny.build("llama", "causal"), inlay.LoRA(r=2, alpha=2 + number, targets="query,down"))
        randomise(base)
        with torch.no_grad():
            for _, piece in adapters_of(base).get("default").pieces():
                piece.get_parameter("lora_A")[0] *= 3
                piece.get_parameter("lora_B")[:, 0] *= 2
        inlay.save(base, folder / name)
    return folder


def loaded(library: Path, names: tuple[str, ...] = (*TASKS, *GENERAL)) -> Any:
    """The model with the LoRAs in it, frozen and inactive."""
    base = tiny.build("llama", "causal").requires_grad_(False)
    for name in names:
        inlay.load(base, library / name, name)
    inlay.activate(base)
    return base


def routed(library: Path, **fields: Any) -> Any:
    base = loaded(library)
    inlay.attach(base, Arrow(**{"adapters": TASKS, **fields}), "router")
    inlay.activate(base, "router")
    return base


def of_peft(library: Path, general: int = 0, **fields: Any) -> Any:
    return peft.create_arrow_model(
        tiny.build("llama", "causal"),
        [str(library / name) for name in TASKS],
        peft.ArrowConfig(rng_seed=0, use_gks=bool(general), **fields),
        general_adapter_paths=[str(library / name) for name in GENERAL[:general]] or None,
    ).eval()


def loss(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    weighed: Tensor = (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()
    return weighed


def pieces_of(base: Any) -> list[ArrowPiece]:
    return [piece for _, piece in adapters_of(base).get("router").pieces() if isinstance(piece, ArrowPiece)]


# -- HF peft -----------------------------------------------------------------------------------------------------------

FIELDS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (0, {"top_k": 1}),
    (0, {"top_k": 2, "router_temperature": 0.3}),
    (1, {"top_k": 2}),
    (2, {"top_k": 3, "router_temperature": 2.0}),
]


@pytest.mark.parametrize(("general", "fields"), FIELDS)
def test_outputs_gradients_and_files_are_hf_pefts(
    general: int, fields: dict[str, Any], library: Path, tmp_path: Path
) -> None:
    theirs = of_peft(library, general, **fields)
    theirs.set_requires_grad(TASKS[0])
    expected = theirs(input_ids=IDS).logits
    loss(theirs).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    theirs.save_pretrained(tmp_path, selected_adapters=["arrow_router"])

    ours = inlay.load(loaded(library), tmp_path / "arrow_router", "router")
    inlay.activate(ours, "router")
    inlay.trainable(ours, TASKS[0])
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, **CLOSE)
    loss(ours).backward()
    sites = adapters_of(ours).get(TASKS[0]).pieces()
    named = {
        f"base_model.model.{site.path}.{name}.{TASKS[0]}.weight": p.grad
        for site, piece in sites
        for name, p in piece.named_parameters()
    }
    assert named.keys() == gradients.keys()
    for name, gradient in named.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4)  # sums of 900 terms of order one


def test_what_peft_writes_it_cannot_read(library: Path, tmp_path: Path) -> None:
    """peft 0.21.2 drops the names of the adapters when it reads a router, and has written over the task adapters."""
    theirs = of_peft(library, general=1)
    theirs(input_ids=IDS)
    theirs.save_pretrained(tmp_path)
    before, after = (load_file(folder / TASKS[0] / "adapter_model.safetensors") for folder in (library, tmp_path))
    assert all(not torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'copy'"):
        peft.PeftModel.from_pretrained(tiny.build("llama", "causal"), tmp_path / "arrow_router")
    config = tmp_path / "arrow_router" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_dropout": 0.1}))
    with pytest.raises(UnsupportedError, match="lora_dropout"):
        inlay.load(loaded(library), tmp_path / "arrow_router", "router")


# -- the formula -------------------------------------------------------------------------------------------------------


def differences(base: Any, linear: torch.nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """ΔW of each adapter at a linear, in full."""
    found = {}
    for name in names:
        for site, piece in adapters_of(base).get(name).pieces():
            if site.module is linear:
                found[name] = piece.weight(torch.zeros(site.out_features, site.in_features))
    return [found[name] for name in names]


@pytest.mark.parametrize("general", [(), ("b",), ("b", "c")])
@pytest.mark.parametrize("top_k", [1, 2, None])
def test_each_token_has_the_sum_over_its_nearest_adapters(general: tuple[str, ...], top_k: int | None) -> None:
    base: Any = Net()
    for number, name in enumerate(("law", "poems", "web", "b", "c")):
        torch.manual_seed(number)
        method = inlay.LoRA(
            r=1 + number % 3, alpha=3, targets="first,second", init="pissa" if number == 1 else "kaiming"
        )
        inlay.attach(base, method, name)
        randomise(base, name)
    inlay.trainable(base)
    inlay.activate(base)
    inlay.attach(base, Arrow(adapters=("law", "poems", "web"), general=general, top_k=top_k, temperature=0.7), "router")
    x = torch.randn(3, 5, 8)
    with inlay.disabled(base):
        expected = base.first(x)
    tasks = differences(base, base.first, ("law", "poems", "web"))
    mean = sum(differences(base, base.first, general), torch.zeros(12, 8)) / max(len(general), 1)
    tasks = [task - mean for task in tasks]
    vectors = [torch.linalg.svd(task).Vh[0] for task in tasks]
    for place in ((i, j) for i in range(3) for j in range(5)):
        scores = torch.stack([(x[place] @ vector).abs() for vector in vectors])
        best = scores.argsort(descending=True)[: top_k or 3]
        for share, n in zip((scores[best] / 0.7).softmax(-1), best, strict=True):
            expected[place] += share * (tasks[n] @ x[place])
    inlay.activate(base, "router")
    torch.testing.assert_close(base.first(x), expected, rtol=1e-4, atol=1e-5)  # singular vectors in fp32


def test_a_main_direction_is_that_of_the_matrix_and_zero_of_none() -> None:
    torch.manual_seed(0)
    for r, wide, out in ((2, 7, 5), (6, 4, 9), (1, 3, 3)):
        a, b = torch.randn(r, wide), torch.randn(out, r)
        vector = main_direction(Change(a, b))
        assert torch.allclose((vector @ torch.linalg.svd(b @ a).Vh[0]).abs(), torch.ones(()), atol=1e-5)
        torch.testing.assert_close(main_direction(Change(matrix=b @ a)).abs(), vector.abs(), rtol=1e-4, atol=1e-5)
        assert not main_direction(Change(a, torch.zeros(out, r))).any()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has; views of others are not counted."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {one.data_ptr() for one in args if isinstance(one, Tensor)}
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor) and one.data_ptr() not in given:
                self.most = max(self.most, one.numel())
        return made


def test_no_matrix_of_the_weights_size_is_made() -> None:
    base: Any = torch.nn.Sequential(torch.nn.Linear(96, 128))
    for name in ("law", "poems", "web"):
        inlay.attach(base, inlay.LoRA(r=2, targets="0", init="random"), name)
    inlay.activate(base)
    with Largest() as seen:
        inlay.attach(base, Arrow(adapters=("law", "poems"), general=("web",)), "router")
        inlay.activate(base, "router")
        base(torch.randn(4, 96)).sum().backward()
    assert 4 * 128 <= seen.most < 12 * 128


@pytest.mark.parametrize(
    ("name", "head", "targets"),
    [("gpt2", "causal", "c_attn"), ("t5", "trunk", "query,up"), ("vit", "image", "all-linear")],
)
def test_one_adapter_is_that_adapter(name: str, head: str, targets: str) -> None:
    base: Any = tiny.build(name, head).requires_grad_(False)
    inlay.attach(base, inlay.LoRA(r=2, targets=targets), "law", modules_to_save=[])
    randomise(base, "law")
    inlay.trainable(base)
    torch.manual_seed(0)
    pixels, ids = {"pixel_values": torch.randn(2, 3, 16, 16)}, {"input_ids": IDS}
    given: dict[str, Tensor] = pixels if name == "vit" else ids | ({"decoder_input_ids": IDS} if name == "t5" else {})
    expected = base(**given)[0]
    inlay.activate(base)
    inlay.attach(base, Arrow(adapters=("law",)), "router", modules_to_save=[])
    inlay.activate(base, "router")
    torch.testing.assert_close(base(**given)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_token(library: Path) -> None:
    base = routed(library, top_k=2)
    torch.manual_seed(0)
    for piece in pieces_of(base):
        w = piece.weights(torch.randn(4, 6, piece.prototypes.shape[1]))
        assert ((w > 0).sum(-1) == 2).all()
        torch.testing.assert_close(w.sum(-1), torch.ones(4, 6))
    assert inlay.summary(base).trainable_parameters == sum(3 * width for width in (32, 48, 32, 48))
    sharp = pieces_of(routed(library, temperature=1e-4))[0].weights(torch.randn(9, 32))
    assert torch.equal(sharp, torch.nn.functional.one_hot(sharp.argmax(-1), 3).float())


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_the_prototypes_learn_and_a_resumed_run_is_the_same_run(library: Path, tmp_path: Path) -> None:
    base = routed(library, general=GENERAL).train()
    before = {name: value.clone() for name, value in base.state_dict().items() if ".router." not in name}

    def steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    own = [piece.prototypes for piece in pieces_of(base)]
    start = [prototypes.detach().clone() for prototypes in own]
    assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in own}
    optimizer = torch.optim.AdamW(own, lr=0.01)
    steps(base, optimizer)
    inlay.save(base, tmp_path, "router")
    state = copy.deepcopy(optimizer.state_dict())
    steps(base, optimizer)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert not any(torch.equal(a, b) for a, b in zip(own, start, strict=True))
    again = inlay.load(loaded(library).train(), tmp_path, "router", trainable=True)
    inlay.activate(again, "router")
    optimizer = torch.optim.AdamW([piece.prototypes for piece in pieces_of(again)], lr=0.01)
    optimizer.load_state_dict(state)
    steps(again, optimizer)
    assert all(torch.equal(a, piece.prototypes) for a, piece in zip(own, pieces_of(again), strict=True))


def test_checkpointed_copied_pickled_compiled_and_in_bfloat16(library: Path) -> None:
    base = routed(library, general=GENERAL)
    loss(base).backward()
    expected = [piece.prototypes.grad.clone() for piece in pieces_of(base)]  # type: ignore[union-attr]
    plain = base(IDS).logits
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(twin(IDS).logits, plain)
    torch.testing.assert_close(torch.compile(base, fullgraph=True, backend="eager")(IDS).logits, plain)
    base.zero_grad()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    loss(base.train()).backward()
    for piece, gradient in zip(pieces_of(base), expected, strict=True):
        torch.testing.assert_close(piece.prototypes.grad, gradient, **CLOSE)
    half = loaded(library).to(torch.bfloat16)
    inlay.attach(half, Arrow(adapters=TASKS), "router")
    inlay.activate(half, "router")
    assert {piece.prototypes.dtype for piece in pieces_of(half)} == {torch.float32}
    assert half(IDS).logits.dtype == torch.bfloat16
    fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    base.eval()
    assert torch.equal(base.generate(IDS, use_cache=True, **fixed), base.generate(IDS, use_cache=False, **fixed))


# -- files and refusals ------------------------------------------------------------------------------------------------


def test_a_file_knows_its_adapters(library: Path, tmp_path: Path) -> None:
    base = routed(library, general=GENERAL, top_k=2, temperature=0.5)
    inlay.save(base, tmp_path, "router")
    again = inlay.load(loaded(library), tmp_path, "router")
    inlay.activate(again, "router")
    assert torch.equal(again(IDS).logits, base(IDS).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with inlay.disabled(again):
        assert torch.equal(again(IDS).logits, tiny.build("llama", "causal")(IDS).logits)
    other = loaded(library, TASKS)
    inlay.load(other, library / TASKS[0], GENERAL[0])
    with pytest.raises(AdapterError, match="'gks_1', which is not loaded"):
        inlay.load(other, tmp_path, "router")
    inlay.load(other, library / GENERAL[1], GENERAL[1])
    with pytest.raises(CheckpointError, match="another adapter than the 'gks_0'"):
        inlay.load(other, tmp_path, "router")
    with pytest.raises(UnsupportedError, match="cannot merge: ArrowPiece"):
        inlay.merge(again)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"top_k": 0}, ConfigError, "top_k=0"),
        ({"top_k": 4}, ConfigError, "from 1 to 3"),
        ({"temperature": 0.0}, ConfigError, "temperature"),
        ({"temperature": float("inf")}, ConfigError, "temperature=inf"),
        ({"general": "gks_0"}, ConfigError, "general="),
        ({"general": (TASKS[1],)}, ConfigError, "none of"),
        ({"compat": "authors"}, ConfigError, "where `general` is given"),
        ({"overrides": {"query": {"top_k": 1}}}, ConfigError, "no overrides"),
        ({"adapters": ("task_0", "task_4")}, AdapterError, "not loaded"),
        ({"adapters": ("task_0", "turned")}, UnsupportedError, "inlay.to_lora"),
        ({"adapters": ("task_0",), "general": ("wide",), "compat": "authors"}, UnsupportedError, "one rank"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[InlayError], message: str, library: Path) -> None:
    base = loaded(library)
    inlay.attach(base, inlay.OFT(block_size=4, targets="query,down"), "turned")
    inlay.attach(base, inlay.LoRA(r=3, targets="query,down"), "wide")
    inlay.activate(base)
    with pytest.raises(error, match=message):
        inlay.attach(base, Arrow(**{"adapters": TASKS, **fields}), "router")
    assert "router" not in adapters_of(base).loaded
