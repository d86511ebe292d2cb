"""Adapters whose matrices are codes: the error is bounded and told, what is read is what was decoded, peft refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.small import IDS, Net, randomise
from safetensors import safe_open
from torch import Tensor, nn

import inlay
from inlay.cli import app
from inlay.engine import codes, files
from inlay.errors import CheckpointError, ConfigError, UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", codes.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (3, 5), (2, 3, 7), (1, 129), (65, 1)])
def test_what_was_decoded_has_the_same_codes(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = matrix(*shape, dtype=dtype)
    first = codes.rounded(tensor, kind)
    assert (first.shape, first.dtype) == (tensor.shape, dtype)
    for one, again in zip(codes.encode(tensor, kind), codes.encode(first, kind), strict=True):
        assert torch.equal(one, again)
    assert torch.equal(codes.rounded(first, kind), first)


def test_the_error_is_at_most_half_a_step() -> None:
    tensor = matrix(16, 64)
    absmax = tensor.abs().amax(1, keepdim=True)
    for kind, step in (("int8", 1 / 254), ("nf4", (1 - 0.6961928) / 2)):  # of the largest gap between two values
        assert ((codes.rounded(tensor, kind) - tensor).abs() <= absmax * (step + 1e-6)).all()
    nearest = (tensor / absmax)[..., None].sub(torch.tensor(codes.NF4)).abs().amin(-1) * absmax
    assert torch.allclose((codes.rounded(tensor, "nf4") - tensor).abs(), nearest, atol=1e-6)


def test_zeros_and_the_largest_entries_are_exact() -> None:
    tensor = matrix(4, 64)
    tensor[1] = 0
    for kind in codes.KINDS:
        found = codes.rounded(tensor, kind)
        assert torch.equal(found[1], tensor[1])
        largest = tensor.abs().argmax(1, keepdim=True)
        rows = [0, 2, 3]
        if kind == "int8":
            assert torch.equal(found.gather(1, largest), tensor.gather(1, largest))
        assert torch.equal(found.abs().amax(1)[rows], tensor.abs().amax(1)[rows])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensor = matrix(32, 128)
    packed, state = quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    mine, absmax = codes.encode(tensor, "nf4")
    assert torch.equal(mine, packed.flatten())
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(codes.rounded(tensor, "nf4"), dequantize_4bit(packed, state))


# -- files -------------------------------------------------------------------------------------------------------------


def adapted(*methods: Any) -> nn.Module:
    net = inlay.attach(Net(), list(methods) or [inlay.LoRA(r=4, targets="all-linear")])
    randomise(net)
    return net


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters() if "inlays" in name}


@pytest.mark.parametrize("kind", codes.KINDS)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "both"])
def test_what_is_read_is_what_was_decoded(kind: str, method: str, tmp_path: Path) -> None:
    methods = {
        "lora": [inlay.LoRA(r=4, targets="all-linear")],
        "dora": [inlay.DoRA(r=4, targets="all-linear")],
        "loha": [inlay.LoHa(r=4, targets="all-linear")],
        "both": [inlay.LoRA(r=4, targets="all-linear"), inlay.BitFit()],
    }[method]
    net = adapted(*methods)
    mine = values(net)
    inlay.save(net, tmp_path / "codes", quantise=kind)
    assert all(torch.equal(value, mine[name]) for name, value in values(net).items())  # saving rounds nothing here
    read = inlay.load(Net(), tmp_path / "codes", trainable=True)
    for name, value in values(read).items():
        wanted = codes.rounded(mine[name], kind) if mine[name].dim() > 1 else mine[name]
        assert torch.equal(value, wanted), name
    inlay.save(read, tmp_path / "again", quantise=kind)
    assert (tmp_path / "again" / files.WEIGHTS).read_bytes() == (tmp_path / "codes" / files.WEIGHTS).read_bytes()
    again = inlay.load(Net(), tmp_path / "again")
    assert torch.equal(again(IDS), read(IDS))
    swapped = inlay.hot_swap(adapted(*methods), tmp_path / "codes")
    assert torch.equal(swapped(IDS), read(IDS))


def test_size_and_error_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4.5 and 8.5 bits an entry instead of 32, and errors near those of normal numbers."""
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    inlay.attach(net, inlay.LoRA(r=16, targets="all-linear"))
    randomise(net)
    for kind, bits, low, high in (("int8", 8.5, 0.003, 0.012), ("nf4", 4.5, 0.05, 0.12)):
        inlay.save(net, tmp_path / kind, quantise=kind)
        config = files.read_config(tmp_path / kind)
        told = config["auto_mapping"]["inlay"]["quantised"]
        entries = 2 * 2 * 16 * 256
        assert (told["tensors"], told["bytes"], told["plain_bytes"]) == (4, entries * bits / 8, entries * 4)
        read = inlay.load(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), tmp_path / kind, strict=False)
        pairs = [(mine, theirs) for mine, theirs in zip(values(net).values(), values(read).values(), strict=True)]
        error = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
        assert told["relative_error"] == pytest.approx(error.sqrt().item(), rel=1e-4)
        assert low < told["relative_error"] <= told["largest_error"] < high
        assert app.run(["show", str(tmp_path / kind)], debug=True) == 0
        shown = capsys.readouterr().out
        assert f"quantised   {kind}: 4 matrices in {entries * bits / 8e3:.3g} kB, plain 65.5 kB" in shown
        assert f"relative error {told['relative_error']:.2%}, at most {told['largest_error']:.2%}" in shown
        assert "read by     Inlay\n" in shown


def test_peft_and_older_versions_refuse_it(tmp_path: Path) -> None:
    folder = inlay.save(adapted(), tmp_path / "codes", quantise="nf4")
    config = files.read_config(folder)
    assert config["peft_type"] == "INLAY"
    assert config["auto_mapping"]["inlay"]["format"] == 2  # above what they read
    assert files.read_config(inlay.save(adapted(), tmp_path / "plain"))["auto_mapping"]["inlay"]["format"] == 1
    with safe_open(folder / files.WEIGHTS, framework="pt") as file:
        assert not any(key.startswith("base_model.") for key in file.keys())  # noqa: SIM118  (not a dict)
    peft = pytest.importorskip("peft")
    with pytest.raises((KeyError, ValueError), match="INLAY"):
        peft.PeftModel.from_pretrained(Net(), str(folder))


def test_heads_stay_whole(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    build = lambda: BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).eval()  # noqa: E731
    torch.manual_seed(0)
    model, other = build(), build()
    other.load_state_dict(model.state_dict())
    inlay.attach(model, inlay.LoRA(r=2))
    randomise(model)
    inlay.load(other, inlay.save(model, tmp_path / "a", quantise="nf4"))
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    change = (other(torch.arange(8)[None]).logits - model(torch.arange(8)[None]).logits).abs().max()
    assert 0 < change < 1


def test_convert_there_and_back(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from inlay.tasks.loading import quiet
    from inlay.train import convert

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with quiet():
        model = BertForMaskedLM(BertConfig(vocab_size=20, **sizes))
        model.save_pretrained(tmp_path / "base")
    inlay.attach(model, inlay.LoRA(r=2))
    randomise(model)
    inlay.save(model, tmp_path / "plain")
    base = str(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"quantise='nf4' needs the base model"):
        convert(tmp_path / "plain", tmp_path / "codes", quantise="nf4")
    assert convert(tmp_path / "plain", tmp_path / "codes", model=base, quantise="nf4").peft_type == "INLAY"
    convert(tmp_path / "codes", tmp_path / "copy")  # without the base it stays as it is
    assert files.read_stored(tmp_path / "copy")[0].keys() == files.read_stored(tmp_path / "codes")[0].keys()
    back = convert(tmp_path / "copy", tmp_path / "back", model=base)
    assert back.peft_type == "LORA"
    plain, read = files.read_tensors(tmp_path / "plain")[0], files.read_tensors(tmp_path / "back")[0]
    assert plain.keys() == read.keys()
    assert all(torch.equal(codes.rounded(plain[key], "nf4"), read[key]) for key in plain)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantise='nf5': choose one of int8, nf4; did you mean 'nf4'"):
        inlay.save(adapted(), tmp_path / "a", quantise="nf5")
    with pytest.raises(UnsupportedError, match="subtracts the factors that it started from"):
        inlay.save(adapted(inlay.LoRA(r=2, init="pissa", targets="all-linear")), tmp_path / "a", quantise="int8")
    with pytest.raises(UnsupportedError, match="has no matrices to quantise"):
        inlay.save(adapted(inlay.BitFit()), tmp_path / "a", quantise="int8")
    broken = adapted()
    next(p for name, p in broken.named_parameters() if "lora_B" in name).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="values that are not finite"):
        inlay.save(broken, tmp_path / "a", quantise="int8")
    assert not (tmp_path / "a").exists()


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    good = inlay.save(adapted(), tmp_path / "good", quantise="nf4")
    tensors, metadata = files.read_stored(good)
    config = files.read_config(good)
    name = next(key for key in tensors if key.endswith(codes.SCALES))
    short = {**tensors, name: tensors[name][:-1].clone()}
    missing = {key: value for key, value in tensors.items() if key != name}
    entries = json.loads(metadata[codes.ENTRY])
    entries[name.removesuffix(codes.SCALES)]["codes"] = "nf9"
    without = {key: value for key, value in metadata.items() if key != codes.ENTRY}
    wrong = [
        (short, metadata),
        (missing, metadata),
        (tensors, {**metadata, codes.ENTRY: json.dumps(entries)}),
        (tensors, {**metadata, codes.ENTRY: "[3]"}),
        (tensors, without),
    ]
    for number, (held, said) in enumerate(wrong):
        files.write(tmp_path / str(number), config, {files.WEIGHTS: (held, said)})
        with pytest.raises(CheckpointError):
            inlay.load(Net(), tmp_path / str(number))
