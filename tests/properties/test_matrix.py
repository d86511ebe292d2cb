"""What always holds: nine properties, for every method in every host that it claims. A new method is a new row."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from properties.models import (
    GROUPED,
    HOSTS,
    Row,
    base_bits,
    base_output,
    checkpointed,
    close,
    fresh,
    gradients,
    linears,
    near,
    output,
    perturb,
    snapshot,
    total,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.registry import kinds, make_method
from inlay.errors import CheckpointError, ConfigError, InlayError, TargetError, UnsupportedError

TEXT = ("bert", "llama", "gpt2", "t5", "mixtral")
R, N = 2, 3  # rank; virtual tokens
MIXED = "line,plane,space"  # the convolutions of "conv": 4 to 8 in 2 groups, 8 to 6, 6 to 4
ALL = {host: lambda model: sum(p.numel() for p in model.parameters()) for host in HOSTS}  # bert's and vit's heads too
BLOCK = 4 * (32 * 32 + 32) + (32 * 48 + 48) + (48 * 32 + 32) + 2 * 64  # bert's, gpt2's and vit's
CONV_A, CONV_B, CONV_OUT = R * 2 * 3 + R * 8 * 3 * 2 + R * 6 * 3 * 3, 8 * R // 2 + 6 * R + 4 * R, 8 + 6 + 4
EXPERTS = 3 * ((32 + 96) + (48 + 32))  # mixtral: 3 experts, gate and up in one


def lora(i: int, o: int) -> int:
    return R * (i + o)


def dora(i: int, o: int) -> int:
    return R * (i + o) + o


def bottleneck(width: int) -> int:
    m = max(1, width // 16)
    return m * (width + width) + m + width


ROWS = [
    Row("lora", inlay.LoRA(r=R), linears(lora) | {
        "bert": 2 * 2 * R * (32 + 32),  # the default: query and value
        "mixtral": ("experts,attention", R * 2 * EXPERTS + 2 * total(GROUPED, lora)),
        "conv": (MIXED, CONV_A + CONV_B),
        "tied": ("embed,mix", R * (11 + 8) + R * (8 + 8)),
        "plain": ("lookup,mix,mixing", R * (11 + 8) + R * (4 * 3) + 12 * R // 2 + 3 * R * (12 + 12)),
    }, compiled=("llama", "mixtral", "conv", "tied", "torch", "plain"), refuses={"bert": "LayerNorm", "conv": None}),
    Row("lora-bias", inlay.LoRA(r=R, bias="lora_only", lora_bias=True, rank_stabilised=True),
        {"bert": 4 * R * (32 + 32) + 4 * 32 + 4 * 32, "conv": (MIXED, CONV_A + CONV_B + CONV_OUT + 8 + 4)},
        compiled=()),
    Row("lora-pissa", inlay.LoRA(r=R, init="pissa", targets="attention"), {"gpt2": 2 * R * (32 + 96 + 32 + 32)},
        compiled=()),
    Row("dora", inlay.DoRA(r=R), linears(dora) | {
        "torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], dora)),
        "plain": ("a,b,out", 3 * total([(12, 16), (16, 12)], dora) + dora(12, 5)),
        "conv": (MIXED, CONV_A + CONV_B + CONV_OUT),
        "tied": ("embed,mix", R * (11 + 8) + 8 + R * (8 + 8) + 8),
    }, compiled=("vit", "conv"), refuses={"torch": "all-linear", "mixtral": "experts"}),
    Row("ia3", inlay.IA3(), {
        "bert": 2 * (32 + 32 + 48), "llama": 2 * (16 + 16 + 48), "gpt2": 2 * (96 + 48), "t5": 6 * 64 + 4 * 48,
        "vit": 2 * (32 + 32 + 48), "mixtral": 2 * (16 + 16 + 3 * 48), "conv": (MIXED, CONV_OUT),
        "torch": ("linear1,linear2", 2 * (20 + 20)), "plain": ("a,b,mix", 3 * (16 + 12) + 12),
    }, refuses={"torch": None, "tied": None}),
    Row("ia3-additive", inlay.IA3(form="additive"), {"bert": 2 * (32 + 32 + 48)}, mergeable=False, peft=False,
        compiled=()),
    Row("bitfit", inlay.BitFit(), {
        "bert": 2 * (4 * 32 + 48 + 32 + 2 * 32) + 32 + 32, "gpt2": 2 * (96 + 32 + 48 + 32 + 2 * 32) + 32,
        "vit": 2 * (4 * 32 + 48 + 32 + 2 * 32) + 32 + 32, "conv": 8 + 6 + 4, "tied": 8,
        "torch": 2 * (36 + 12 + 20 + 3 * 12), "plain": 12 + 3 * (12 + 16 + 36 + 12) + 5,
    }, peft=False, refuses={"llama": None, "t5": None, "mixtral": None}),
    Row("bitfit-added", inlay.BitFit(add_missing=True), {
        "llama": 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), "t5": 6 * 4 * 32 + 4 * (48 + 32), "conv": 8 + 6 + 6 + 4,
    }, peft=False, compiled=("conv",)),
    Row("layer_norm", inlay.LayerNormTuning(), {
        "bert": 5 * 64, "llama": 5 * 32, "gpt2": 5 * 64, "t5": (5 + 7) * 32, "vit": 5 * 64, "mixtral": 5 * 32,
        "conv": 2 * 6, "torch": 2 * 2 * 24, "plain": 3 * 24,
    }, compiled=("conv", "torch"), refuses={"tied": None}),
    Row("freezing", inlay.PartialFineTuning(top_k=1), {
        "bert": BLOCK, "gpt2": BLOCK, "vit": BLOCK, "llama": 2 * 32 * 48 + 3 * 32 * 48 + 2 * 32,
        "t5": (4 + 8) * 32 * 32 + 4 * 32 * 48 + 5 * 32,
    }, peft=False, refuses={"conv": None, "tied": None}),
    Row("freezing-heads", inlay.PartialFineTuning(heads={0: [1]}), {
        "bert": 4 * 8 * 32 + 3 * 8, "llama": 4 * 8 * 32, "torch": 4 * 6 * 12 + 3 * 6,
    }, peft=False, compiled=("torch",), refuses={"gpt2": None, "conv": None}),
    Row("freezing-gradual", inlay.PartialFineTuning(top_k=2, unfreeze_every=1), {"bert": 2 * BLOCK}, peft=False,
        compiled=()),
    Row("full", inlay.FullFineTuning(), ALL, peft=False, compiled=("gpt2", "conv", "torch")),
    Row("head", inlay.FrozenFeatures(), {"bert": 0, "vit": 0}, peft=False, targets=False,
        compiled=(), refuses={"llama": None, "plain": None}),
    Row("head-lm", inlay.FrozenFeatures(head="lm_head"), {"llama": 64 * 32, "gpt2": 64 * 32}, peft=False,
        targets=False, compiled=()),
    Row("trainable_tokens", inlay.TrainableTokens(token_indices=(8, 3, 10)),
        {**dict.fromkeys(TEXT[1:], 3 * 32), "tied": 3 * 8, "plain": ("lookup", 3 * 8)}, refuses={"vit": None}),
    Row("adapter", inlay.Adapter(activation="gelu"), {
        "bert": 2 * bottleneck(32), "llama": 2 * bottleneck(32), "gpt2": 2 * bottleneck(32), "t5": 4 * bottleneck(32),
        "vit": 2 * bottleneck(32), "mixtral": 2 * bottleneck(32), "torch": 2 * bottleneck(12),
        "tied": ("mix", bottleneck(8)), "plain": ("b", 3 * bottleneck(12)),
    }, mergeable=False, peft=False, refuses={"conv": None, "plain": None}),
    Row("adapter-houlsby", inlay.Adapter(placement="houlsby", activation="gelu"), {
        "bert": 4 * bottleneck(32) + 5 * 64, "llama": 4 * bottleneck(32) + 5 * 32,
        "t5": (6 + 4) * bottleneck(32) + 12 * 32, "torch": 4 * bottleneck(12) + 4 * 24,
    }, mergeable=False, peft=False, compiled=("torch",)),
    Row("adapter-parallel", inlay.Adapter(placement="parallel", activation="gelu", scale=4.0), {
        "bert": 2 * bottleneck(32), "llama": 2 * bottleneck(32), "torch": 2 * bottleneck(12),
    }, mergeable=False, peft=False),
    # A prompt changes what a model computes from the start: that is what it is for.
    Row("prompt_tuning", inlay.PromptTuning(num_virtual_tokens=N), dict.fromkeys(TEXT, N * 32),
        identity=1.5, mergeable=False, targets=False, refuses={"vit": None, "conv": None}),
    Row("prompt_tuning-added", inlay.PromptTuning(num_virtual_tokens=N, position="added"),
        {"bert": N * 32, "llama": N * 32}, mergeable=False, peft=False, targets=False),
    Row("prompt_tuning-ensemble", inlay.PromptTuning(num_virtual_tokens=N, ensemble=2),
        {"llama": 2 * N * 32, "t5": 2 * N * 32}, identity=1.5, mergeable=False, peft=False, targets=False),
    Row("prefix_tuning", inlay.PrefixTuning(num_virtual_tokens=N), {
        "bert": N * 2 * 64, "llama": N * 2 * 32, "gpt2": N * 2 * 64, "t5": N * 2 * 64, "vit": N * 2 * 64,
        "mixtral": N * 2 * 32,
    }, identity=1.5, mergeable=False, refuses={"torch": None, "conv": None}),
    Row("p_tuning", inlay.PTuning(num_virtual_tokens=N, hidden_size=5),
        dict.fromkeys(TEXT, N * 32 + 5 * 33 + 5 * 6 + 32 * 6), identity=1.5, mergeable=False, targets=False),
    Row("p_tuning-lstm", inlay.PTuning(num_virtual_tokens=N, encoder="lstm", hidden_size=4, num_layers=1),
        {"gpt2": N * 32 + 8 * 4 * (32 + 4 + 2) + 2 * 4 * (2 * 4 + 1) + 32 * (2 * 4 + 1)}, identity=1.5, mergeable=False,
        targets=False, compiled=()),  # torch compiles no LSTM in one graph
    Row("p_tuning-deep", inlay.PTuning(num_virtual_tokens=N, deep=True), {"bert": N * 2 * 64, "llama": N * 2 * 32},
        identity=1.5, mergeable=False, peft="PREFIX_TUNING", compiled=()),
    Row("prefix_tuning-mlp", inlay.PrefixTuning(num_virtual_tokens=N, projection_size=5),
        {"llama": N * 32 + 5 * 33 + 6 * 2 * 32}, identity=1.5, mergeable=False),
]  # fmt: skip
for file in sorted(Path(__file__).parent.glob("rows_*.py")):  # the families of methods that have a file of their own
    ROWS += importlib.import_module(f"properties.{file.stem}").ROWS


def cases(hosts: Callable[[Row], Iterable[str]]) -> pytest.MarkDecorator:
    """One test for each row and each of some hosts."""
    found = [pytest.param(row, host, id=f"{row.name}-{host}") for row in ROWS for host in hosts(row)]
    return pytest.mark.parametrize(("row", "host"), found)


every = cases(lambda row: row.claims)


def test_every_method_has_a_row() -> None:
    assert {row.method.kind for row in ROWS} >= set(kinds()) - {"modules_to_save"}  # sits with all: the heads


@every
def test_1_starts_as_the_base(row: Row, host: str) -> None:
    model = row.attached(host, perturbed=False)
    inlay.trainable(model)  # as the base: torch chooses other kernels for weights that require gradients
    close(output(model, host, fused=False), base_output(host, fused=False), row.identity)
    assert (output(perturb(model), host) - base_output(host)).abs().max() > 1e-3


@every
def test_2_only_the_adapter_learns_and_all_of_it_does(row: Row, host: str) -> None:
    model = row.attached(host).train()
    own = {id(parameter) for parameter in adapters_of(model).get("default").parameters()}
    before = base_bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for controller in inlay.controllers(model):
        controller.prepare(total_steps=4)
    for _ in range(3):
        found = gradients(model, host)
        optimizer.step()
        for controller in inlay.controllers(model):
            controller.after_step(optimizer)
    assert set(found) == {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert base_bits(model) == before


@every
def test_3_detach_restores_everything_and_disabled_is_the_base(row: Row, host: str) -> None:
    model = fresh(host)
    next(model.children()).train()
    next(model.parameters()).requires_grad_(False)
    before, base = snapshot(model), output(model, host)
    inlay.attach(model, row.at(host))
    perturb(model)
    with inlay.disabled(model):
        frozen = fresh(host).requires_grad_(False)
        next(frozen.children()).train()
        assert torch.equal(output(model, host), output(frozen, host))
    inlay.detach(model)
    assert snapshot(model) == before
    assert torch.equal(output(model, host), base)


@every
def test_4_a_saved_adapter_loads_with_the_same_outputs_and_trains_on(row: Row, host: str, tmp_path: Path) -> None:
    model = row.attached(host)
    inlay.save(model, tmp_path)
    loaded = inlay.load(fresh(host), tmp_path, trainable=True)
    assert torch.equal(output(loaded, host), output(model, host))
    theirs, ours = gradients(loaded, host), gradients(model, host)
    assert {name: gradient.tolist() for name, gradient in theirs.items()} == {n: g.tolist() for n, g in ours.items()}
    frozen = inlay.load(fresh(host), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


READER = """
import json, sys, torch, inlay
from properties.models import fresh, output
for name, host in json.loads(sys.argv[2]).items():
    model = inlay.load(fresh(host), f"{sys.argv[1]}/{name}")
    if not torch.equal(output(model, host), torch.load(f"{sys.argv[1]}/{name}.pt")):
        print("differs:", name)
"""


def test_4_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    hosts = {row.name: row.first for row in ROWS}
    for row in ROWS:
        model = row.attached(hosts[row.name])
        inlay.save(model, tmp_path / row.name)
        torch.save(output(model, hosts[row.name]), tmp_path / f"{row.name}.pt")
    command = [sys.executable, "-c", READER, str(tmp_path), json.dumps(hosts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@every
def test_5_merged_equals_unmerged_and_unmerge_restores_the_bits(row: Row, host: str) -> None:
    model = row.attached(host)
    inlay.attach(model, row.at(host), name="law")
    perturb(model, "law")
    before = snapshot(model)
    for names in (("default",), ("default", "law"), ("law", "default")):
        inlay.activate(model, *names)
        expected = output(model, host)
        if not row.mergeable:
            with pytest.raises(UnsupportedError, match="not a change of the weights"):
                inlay.merge(model)
        else:
            inlay.merge(model)
            close(output(model, host), expected, 1e-5)
            assert base_bits(model) != before.state
            inlay.unmerge(model)
        assert snapshot(model) == before
        assert torch.equal(output(model, host), expected)


@every
def test_5_merged_for_good_is_a_plain_model_with_the_merged_bits(row: Row, host: str) -> None:
    model = row.attached(host)
    expected, before = output(model, host), snapshot(model)
    if not row.mergeable:
        with pytest.raises(UnsupportedError, match="not a change of the weights"):
            inlay.merge(model, keep_base=False)
        assert snapshot(model) == before
        return
    inlay.merge(model)
    merged = base_bits(model)
    inlay.merge(model, keep_base=False)
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh(host).modules()]
    assert base_bits(model) == merged
    assert model.state_dict().keys() == merged.keys()
    close(output(model, host), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@cases(lambda row: [row.first])
def test_6_hf_peft_reads_the_file_and_computes_the_same(row: Row, host: str, tmp_path: Path) -> None:
    model = row.attached(host)
    inlay.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == {True: row.method.peft_type, False: "INLAY"}.get(row.peft, row.peft)
    if row.peft:
        peft = pytest.importorskip("peft")
        theirs = output(peft.PeftModel.from_pretrained(fresh(host), tmp_path), host)
        expected = output(model, host)
        close(theirs[:, -expected.shape[1] :], expected, 1e-5)  # peft leaves a prompt's positions in the output


@every
def test_7_autocast(row: Row, host: str) -> None:
    model = row.attached(host, perturbed=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = output(fresh(host).requires_grad_(False), host, fused=False)
        close(output(model, host, fused=False), base, row.identity and row.identity + 0.05)
    expected = output(perturb(model), host)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near(output(model, host), expected, 0.05)  # bfloat16 keeps 8 bits: 0.4 % for each of some dozens of roundings
        found = gradients(model, host)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


@every
def test_7_a_bfloat16_base(row: Row, host: str, tmp_path: Path) -> None:
    model = row.attached(host, perturbed=False, dtype=torch.bfloat16)
    base = output(fresh(host).bfloat16().requires_grad_(False), host, fused=False)
    close(output(model, host, fused=False), base, row.identity and row.identity + 0.05)
    assert {parameter.dtype for parameter in adapters_of(model).get("default").parameters()} == {torch.float32}
    found = output(perturb(model), host)
    assert found.dtype == torch.bfloat16
    expected = output(row.attached(host), host)
    rounded = found
    if row.carried:
        inlay.save(row.attached(host), tmp_path)
        rounded = output(inlay.load(fresh(host).bfloat16(), tmp_path), host)
    near(rounded, expected, 0.1)  # here the weights are rounded too
    near(output(row.attached(host).bfloat16(), host), expected, 0.1)  # and here those of the pieces
    assert all(gradient.isfinite().all() for gradient in gradients(model, host).values())
    if row.mergeable:
        before = base_bits(model)
        inlay.merge(model)
        near(output(model, host), found, 0.1)
        inlay.unmerge(model)
        assert base_bits(model) == before


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@every
def test_7_gradient_checkpointing(row: Row, host: str, reentrant: bool) -> None:
    model = row.attached(host).train(row.drawn)
    torch.manual_seed(3)
    expected = gradients(model, host)
    torch.manual_seed(3)
    found = checkpointed(model, HOSTS[host], reentrant)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-4)


@cases(lambda row: [row.first] if row.compiled is None else row.compiled)
def test_7_compiles_without_a_graph_break(row: Row, host: str) -> None:
    model = row.attached(host)
    expected = output(model, host)
    torch._dynamo.reset()
    close(output(torch.compile(model, fullgraph=True, backend="eager"), host), expected, 1e-5)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@every
@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
def test_7_deepcopy_and_pickle(row: Row, host: str, twin: Callable[[nn.Module], nn.Module]) -> None:
    model = row.attached(host)
    other, expected = twin(model), output(model, host)
    assert torch.equal(output(other, host), expected)
    perturb(other, std=0.3)
    assert not torch.equal(output(other, host), expected)
    assert torch.equal(output(model, host), expected)
    inlay.detach(other)
    assert torch.equal(output(other, host), base_output(host))


@every
def test_8_the_parameter_count_is_the_formulas(row: Row, host: str) -> None:
    summary = inlay.summary(row.attached(host))
    assert summary.trainable_parameters == row.parameters(host)
    assert summary.base_parameters == sum(parameter.numel() for parameter in fresh(host).parameters())


@every
def test_9_a_target_that_matches_nothing(row: Row, host: str) -> None:
    model, method = fresh(host), row.at(host)
    before = snapshot(model)
    name = next((site.path or site.name for site in method.sites(inlay.SiteIndex(model))), "") or "classifier"
    word = name.rpartition(".")[2]
    wrong = f"{word[:2]}x{word[2:]}"
    for targets in (wrong, [name, wrong]):
        with pytest.raises(TargetError if row.targets else ConfigError, match=f"{wrong}.*did you mean|targets"):
            inlay.attach(model, method.replace(targets=targets))
        assert snapshot(model) == before


@cases(lambda row: row.refuses)
def test_9_a_place_where_the_method_cannot_sit(row: Row, host: str) -> None:
    model, method = fresh(host), row.method
    before = snapshot(model)
    with pytest.raises(InlayError, match=r"matches|cannot sit|no place|no new head|needs a|no feed-forward|heads"):
        inlay.attach(model, method if row.refuses[host] is None else method.replace(targets=row.refuses[host]))
    assert snapshot(model) == before


@every
def test_9_a_file_with_a_tensor_or_a_field_that_nobody_knows(row: Row, host: str, tmp_path: Path) -> None:
    inlay.save(row.attached(host), tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    key = list(tensors)[-1]
    model = fresh(host)
    before = snapshot(model)
    missing = {k: v for k, v in tensors.items() if not torch.equal(v, tensors[key])}  # of two tied ones, one will do
    for damaged in ({**tensors, f"{key}x": torch.ones(2)}, missing):
        save_file(damaged, path, metadata)
        with pytest.raises(CheckpointError, match=r"no tensor '[\w.]+'|nothing here takes, such as '[\w.]+x'; did you"):
            inlay.load(model, tmp_path)
        assert snapshot(model) == before
    save_file(tensors, path, metadata)
    content = json.loads(config.read_text())
    content["auto_mapping"]["inlay"]["methods"][0]["layerz"] = None
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"layerz.*did you mean 'layers'"):
        inlay.load(model, tmp_path)
    with pytest.raises(ConfigError, match=r"overidess.*did you mean 'overrides'"):
        make_method(row.method.kind, {"overidess": {}})
    assert snapshot(model) == before
