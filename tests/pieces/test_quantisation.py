"""LoRA that makes up for what quantising its base lost: LoftQ on codes as they are, LoftQ and QPiSSA on chosen ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.codes import rounded
from inlay.errors import BaseModelError, ConfigError, UnsupportedError
from inlay.pieces.lora.quantised_start import HOW, largest_part, split
from inlay.tasks.loading import quiet

IDS = torch.arange(14).view(2, 7)
EVERY = "attention,ffn"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def spiked(out: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with a few large directions, as trained weights have."""
    draw = torch.Generator().manual_seed(seed)
    thin = torch.randn(out, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    return 0.05 * torch.randn(out, columns, generator=draw) + 0.03 * thin


def plain_model() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()
    with torch.no_grad():
        for number, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
            module.weight.copy_(spiked(*module.weight.shape, seed=number))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with quiet():
        plain_model().save_pretrained(folder)
    return folder


def states(model: Any) -> Tensor:
    """The last hidden states."""
    found: Tensor = model.base_model(IDS).last_hidden_state
    return found


def quantised(folder: Path, double: bool = False) -> Any:
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier", "bert.pooler"],
    )  # fmt: skip
    with quiet():
        loaded: Any = BertForSequenceClassification.from_pretrained(folder, quantization_config=config)
    return loaded.eval()


def values(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found.float()


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Every base parameter and what belongs to its codes."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "inlays" not in name:
            found[name] = parameter.detach().clone()
            state = getattr(parameter, "quant_state", None)
            found |= {f"{name}.absmax": state.absmax.clone()} if state is not None else {}
    return found


# -- the mathematics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_no_change_of_this_rank_is_nearer(scale: float) -> None:
    matrix = spiked(24, 40)
    a, b = largest_part(matrix, 5, scale)
    left = matrix - scale * (b @ a)
    assert left.square().sum().item() == pytest.approx(torch.linalg.svdvals(matrix)[5:].square().sum().item(), rel=1e-4)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)  # shared between both


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("iterations", [1, 5])
def test_split_is_nearer_than_quantising_alone(how: str, iterations: int) -> None:
    weight = spiked(64, 128)
    plain = (weight - rounded(weight, "nf4")).norm()
    q, a, b = split(weight, 8, 2.0, how, iterations)
    assert torch.equal(rounded(q, "nf4"), q)  # what is stored is on the grid
    error = (weight - q - 2.0 * (b @ a)).norm()
    assert error < (0.9 if how == "loftq" else 0.75) * plain  # QPiSSA takes the spikes out before the codes are chosen
    if how == "loftq" and iterations == 1:
        assert torch.equal(q, rounded(weight, "nf4"))


def test_more_rank_is_nearer() -> None:
    weight = spiked(64, 64)
    errors = [
        [(weight - q - b @ a).norm() for q, a, b in (split(weight, r, 1.0, how, 3) for r in (1, 4, 16))] for how in HOW
    ]
    assert all(first > second > third for first, second, third in errors)


# -- codes that are there ----------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [False, True])
def test_loftq_leaves_the_codes_and_comes_nearer(double: bool, base: Path, tmp_path: Path) -> None:
    whole, model = plain_model(), quantised(base, double)
    before = codes(model)
    with torch.no_grad():
        wanted = states(whole)
        plain = states(quantised(base, double))  # another, because the first forward packs the codes
    inlay.attach(model, inlay.LoRA(r=8, alpha=4, targets=EVERY, init="loftq"))
    after = codes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for site, piece in adapters_of(model).get("default").pieces():
        if piece.replaces:
            continue
        weight = whole.get_submodule(site.path).weight
        q = values(site.weight)
        lost = weight - q
        left = lost - piece.scale * (piece.lora_B @ piece.lora_A)
        best = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
        assert left.norm().item() == pytest.approx(best.item(), rel=1e-3)
        assert left.norm() < 0.9 * lost.norm()
    with torch.no_grad():
        started = states(model)
    assert (started - wanted).norm() < (plain - wanted).norm()
    folder = inlay.save(model, tmp_path / "start")
    again = inlay.load(quantised(base, double), folder, trainable=True)
    with torch.no_grad():
        assert torch.equal(states(again), started)
    inlay.detach(model)
    with torch.no_grad():
        assert torch.equal(states(model), plain)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_loftq_is_that_of_peft(base: Path) -> None:
    """peft's one step on a base that bitsandbytes quantised; the step itself, since the whole of it needs a GPU."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    whole = plain_model()
    ours = inlay.attach(quantised(base), inlay.LoRA(r=4, alpha=4, targets="query", init="loftq"))
    for site, piece in adapters_of(ours).get("default").pieces():
        if not piece.replaces:
            lost = whole.get_submodule(site.path).weight - values(site.weight)
            theirs = _low_rank_decomposition(lost, reduced_rank=4)
            torch.testing.assert_close(piece.lora_B @ piece.lora_A, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_what_loftq_refuses(base: Path, tmp_path: Path) -> None:
    method = inlay.LoRA(r=2, init="loftq")
    with pytest.raises(UnsupportedError, match="this base is not quantised"):
        inlay.attach(plain_model(), method)
    with pytest.raises(ConfigError, match=r"LoRA\(r=65\)"):
        inlay.attach(quantised(base), inlay.LoRA(r=65, init="loftq"))
    model = quantised(base)
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(BaseModelError, match="no safetensors are there"):
        inlay.attach(model, method)
    assert not hasattr(model.bert.encoder.layer[0].attention.self.query, "inlays")
    saved = inlay.save(inlay.attach(quantised(base), method), tmp_path / "loftq")
    with pytest.raises(UnsupportedError, match="this base is not quantised"):  # twice what was lost, otherwise
        inlay.load(plain_model(), saved)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_places_that_are_not_quantised_start_as_ever(base: Path) -> None:
    model = inlay.attach(quantised(base), inlay.LoRA(r=2, targets="query,re:.*pooler.dense", init="loftq"))
    zero = {
        site.path: not piece.lora_B.any()
        for site, piece in adapters_of(model).get("default").pieces()
        if not piece.replaces
    }
    assert [path for path, empty in zero.items() if empty] == ["bert.pooler.dense"]


# -- codes that are chosen ---------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOW)
def test_a_split_base_is_quantised_without_further_loss(how: str, tmp_path: Path) -> None:
    whole, model = plain_model(), plain_model()
    with torch.no_grad():
        wanted = states(whole)
    inlay.split_base(model, inlay.LoRA(r=8, alpha=8, targets=EVERY), how, iterations=2)
    with torch.no_grad():
        started = states(model)
    inlay.save(model, tmp_path / "start")
    inlay.detach(model)
    with quiet():
        model.save_pretrained(tmp_path / "base")
        plain_model().save_pretrained(tmp_path / "plain")
    again = quantised(tmp_path / "base")
    for name in ("query", "value"):
        module = again.bert.encoder.layer[1].attention.self.get_submodule(name)
        assert torch.equal(values(module.weight), model.bert.encoder.layer[1].attention.self.get_submodule(name).weight)
    inlay.load(again, tmp_path / "start", trainable=True)
    qlora = quantised(tmp_path / "plain")
    error = [
        sum(
            (weight - w(site)).square().sum().item()
            for site, w in targets
            for weight in [whole.get_submodule(site).weight]
        )
        for targets in (_reads(again), _reads(qlora, [site for site, _ in _reads(again)]))
    ]
    assert error[0] < (0.9 if how == "loftq" else 0.6) * error[1]
    with torch.no_grad():
        assert (states(again) - wanted).norm() < 0.9 * (states(qlora) - wanted).norm()
        assert (states(again) - started).abs().max() < 0.02  # bitsandbytes' kernel for inference rounds on its own


def _reads(model: Any, paths: list[str] | None = None) -> list[tuple[str, Any]]:
    """Adapted places, and what each weight amounts to."""
    if paths is not None:
        return [(path, lambda path: values(model.get_submodule(path).weight)) for path in paths]
    pieces = {s.path: (s, p) for s, p in adapters_of(model).get("default").pieces() if not p.replaces}

    def read(path: str) -> Tensor:
        site, piece = pieces[path]
        found: Tensor = values(site.weight) + piece.scale * (piece.lora_B @ piece.lora_A)
        return found

    return [(path, read) for path in pieces]


def test_what_split_base_refuses() -> None:
    model = plain_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for error, words, method, options in (
        (ConfigError, "choose one of loftq, qpissa", inlay.LoRA(), {"how": "pisa"}),
        (ConfigError, "iterations=0", inlay.LoRA(), {"iterations": 0}),
        (UnsupportedError, "something else", inlay.IA3(), {}),
        (UnsupportedError, "something else", inlay.LoRA(init="pissa"), {}),
        (UnsupportedError, "something else", inlay.DoRA(), {}),
        (ConfigError, r"r=100", inlay.LoRA(r=100), {}),
    ):
        with pytest.raises(error, match=words):
            inlay.split_base(model, method, **options)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
