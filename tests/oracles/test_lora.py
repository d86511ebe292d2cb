"""LoRA against HF peft: outputs, gradients, and files both ways, on every kind of host."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from engine import tiny
from oracles.against_peft import (
    Case,
    both_ways,
    gradients,
    gradients_of_peft,
    randomise,
    randomised_peft,
    read_by_peft,
    run,
    same_tensors,
    shift,
)
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.errors import BaseModelError, CheckpointError, UnsupportedError

pytestmark = [  # what peft says of itself, or wrongly
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
]

LoRA = inlay.LoRA


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder that gives the same eval model each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make().eval()

    return build


def model(name: str, head: str = "trunk", **changes: Any) -> Callable[[], nn.Module]:
    return functools.partial(tiny.build, name, head, **changes)


def ids() -> dict[str, Any]:
    return {"input_ids": torch.arange(2, 22).reshape(2, 10)}


def floats(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.linspace(-2, 2, torch.Size(shape).numel()).sin().reshape(shape)}


class Around(nn.Module):
    """One module between two linears that nothing adapts (peft cannot adapt the root itself)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result * 0.5


class Lookup(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6, **fields)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.table(input_ids)
        return result


class Attend(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.after = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.after(self.attention(x, x, x, need_weights=False)[0])
        return result


def undouble(theirs: peft.PeftModel) -> str:
    """peft 0.21.2 adds the change of nn.MultiheadAttention's out_proj twice (huggingface/peft#3774)."""
    attention = theirs.base_model.model.attention
    out = attention.base_layer.out_proj
    before = out.base_layer.weight.detach().clone()
    attention.merge(adapter_names=["default"])
    times = (out.base_layer.weight - before).norm() / out.get_delta_weight("default").norm()
    attention.unmerge()
    out.scaling["default"] /= round(times.item())
    return "out_proj"


class Experts(nn.Module):
    """Three parameters of one module, in an order that is not the alphabet's, and a 2-D one beside them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        shapes = {"up": (6, 4), "gate": (6, 4), "down": (4, 6)}
        self.is_transposed = is_transposed
        for name, shape in shapes.items():
            stored = torch.randn(3, *(reversed(shape) if is_transposed else shape)) * 0.4
            self.register_parameter(name, nn.Parameter(stored))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate, down = (p if self.is_transposed else p.transpose(1, 2) for p in (self.up, self.gate, self.down))
        result: torch.Tensor = ((x @ up) * torch.tanh(x @ gate)) @ down
        return result


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ self.weight.T, -1)


class Mixing(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)
        self.gate = Router()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (self.gate(x).T[:, :, None] * self.experts(x)).sum(0)
        return result


def conv(make: Callable[[], nn.Module], *shape: int, r: int = 4, same_file: bool = True) -> Case:
    return Case(seeded(lambda: Around(make())), floats(*shape), {"r": r, "target_modules": ["inner"]},
                LoRA(r=r, alpha=8, targets="inner"), same_file=same_file)  # fmt: skip


def parameters(*names: str, transposed: bool = False) -> Case:
    return Case(seeded(lambda: Mixing(transposed)), floats(5, 4),
                {"r": 2, "target_modules": [], "target_parameters": list(names)},
                LoRA(r=2, alpha=8, targets=list(names)))  # fmt: skip


MOE = ["experts.down_proj", "experts.gate_up_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, Case] = {
    # hosts
    "linear": Case(model("llama", "causal"), ids,
                   {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
                   LoRA(r=4, alpha=12, targets="q_proj,down_proj")),
    "conv1d of gpt-2, fused qkv": Case(
        model("gpt2", "causal"), ids, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        LoRA(r=4, alpha=8, targets="c_attn,c_fc")),
    "embedding": Case(seeded(Lookup), ids, {"r": 3, "target_modules": ["table"]}, LoRA(r=3, alpha=8, targets="table")),
    "embedding with padding": Case(seeded(lambda: Lookup(padding_idx=3)), ids, {"r": 3, "target_modules": ["table"]},
                                   LoRA(r=3, alpha=8, targets="table")),
    "scaled embedding": Case(model("gemma"), ids, {"r": 3, "target_modules": ["embed_tokens"]},
                             LoRA(r=3, alpha=8, targets="embed_tokens")),
    "conv1d": conv(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 2, 4, 9),
    "conv1d, padding same": conv(lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False), 2, 4, 9),
    "conv2d": conv(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), 2, 4, 7, 6),
    "conv2d 1x1": conv(lambda: nn.Conv2d(4, 6, 1), 2, 4, 3, 3),
    "conv3d": conv(lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 2, 3, 4, 3, r=3),
    "multi-head attention": Case(
        seeded(lambda: Attend(False)), floats(5, 2, 8), {"r": 3, "target_modules": ["attention"]},
        LoRA(r=3, alpha=8, targets="attention"), mend=undouble),
    "multi-head attention, batch first": Case(
        seeded(lambda: Attend(True)), floats(2, 5, 8), {"r": 3, "target_modules": ["attention"], "lora_dropout": 0.1},
        LoRA(r=3, alpha=8, targets="attention"), mend=undouble),
    # parameters
    "2-D parameter": parameters("gate.weight"),
    "3-D parameter": parameters("experts.down"),
    "two parameters of one module": parameters("experts.up", "experts.down"),
    "two parameters, listed the other way": parameters("experts.down", "experts.up"),
    "three parameters and a router": parameters("experts.down", "experts.gate", "experts.up", "gate.weight"),
    "transposed parameters": parameters("experts.up", "experts.down", transposed=True),
    "mixtral": Case(model("mixtral", "causal"), ids, {"r": 2, "target_modules": ["q_proj"], "target_parameters": MOE},
                    LoRA(r=2, alpha=8, targets=["q_proj", *MOE])),
    "qwen2-moe": Case(model("qwen2-moe", "causal"), ids,
                      {"r": 2, "target_modules": [], "target_parameters": [*MOE, "gate.weight"]},
                      LoRA(r=2, alpha=8, targets=[*MOE, "gate.weight"])),
    "qwen3-moe": Case(model("qwen3-moe", "causal"), ids, {"r": 2, "target_modules": [], "target_parameters": MOE},
                      LoRA(r=2, alpha=8, targets=MOE)),
    "gpt-oss, stored (in, out)": Case(
        seeded(lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(
            vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2))), ids,
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": MOE}, LoRA(r=2, alpha=8, targets=["q_proj", *MOE])),
    # ranks and scales
    "rank and alpha patterns": Case(
        model("llama"), ids,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
         "rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 6, "nowhere": 9},
         "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "down_proj": 3}},
        LoRA(r=4, alpha=8, targets="q_proj,v_proj,down_proj",
             overrides={"layers.0.self_attn.q_proj": {"r": 6}, "layers.0.self_attn.v_proj": {"alpha": 5},
                        "v_proj": {"r": 2}, "ffn.down": {"alpha": 3}})),
    "rank-stabilised, with patterns": Case(
        model("llama"), ids,
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {r".*\.1\..*v_proj": 2},
         "alpha_pattern": {"q_proj": 3}},
        LoRA(r=4, alpha=8, rank_stabilised=True, targets="q_proj,v_proj",
             overrides={"re:.*1.*v_proj": {"r": 2}, "q_proj": {"alpha": 3}})),
    "patterns on parameters": Case(
        model("mixtral"), ids,
        {"r": 2, "target_modules": [], "target_parameters": MOE, "rank_pattern": {"down_proj": 3},
         "alpha_pattern": {"experts.gate_up_proj": 5}},
        LoRA(r=2, alpha=8, targets=MOE, overrides={"down_proj": {"r": 3}, "gate_up_proj": {"alpha": 5}})),
    "patterns on attention": Case(
        seeded(lambda: Attend(True)), floats(2, 5, 8),
        {"r": 2, "target_modules": ["attention", "after"], "rank_pattern": {"attention": 3}},
        LoRA(r=2, alpha=8, targets="name:attention,after", overrides={"name:attention": {"r": 3}}), mend=undouble),
    # biases and whole modules
    "every bias": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "bias": "all"},
                       LoRA(r=2, alpha=8, targets="query", bias="all")),
    "biases of adapted modules": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "bias": "lora_only"},
                                      LoRA(r=2, alpha=8, targets="query", bias="lora_only")),
    "bias on B": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "lora_bias": True},
                      LoRA(r=2, alpha=8, targets="query", lora_bias=True)),
    "nested head of roberta": Case(
        model("roberta", "sequence"), ids, {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
        LoRA(r=2, alpha=8, targets="query,dense", exclude="classifier")),
    "heads of distilbert": Case(
        model("distilbert", "sequence"), ids,
        {"r": 2, "target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
        LoRA(r=2, alpha=8, targets="q_lin")),
    "a module beside": Case(model("llama", "causal"), ids,
                            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                            LoRA(r=2, alpha=8, targets="q_proj"), modules_to_save=["lm_head"]),
    "every bias and a head": Case(model("bert", "sequence"), ids,
                                  {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
                                  LoRA(r=2, alpha=8, targets="query", bias="all"), same_file=False),
    # targets
    "all-linear": Case(model("llama", "causal"), ids, {"r": 2, "target_modules": "all-linear"},
                       LoRA(r=2, alpha=8, targets="all-linear")),
    "regular expression": Case(model("llama"), ids, {"r": 2, "target_modules": r"layers\.[01]\..*(q|v)_proj"},
                               LoRA(r=2, alpha=8, targets="q_proj,v_proj")),
    "exclusions": Case(model("llama"), ids, {"r": 2, "target_modules": EVERY, "exclude_modules": ["o_proj", "nowhere"]},
                       LoRA(r=2, alpha=8, targets="all-linear", exclude="o_proj")),
    "excluding by expression": Case(
        model("llama"), ids, {"r": 2, "target_modules": EVERY, "exclude_modules": ".*mlp.*"},
        LoRA(r=2, alpha=8, targets="attention")),
    "some layers": Case(model("llama", "causal"), ids,
                        {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
                        LoRA(r=2, alpha=8, targets="q_proj,up_proj", layers=1)),
    "layers of a named stack": Case(
        model("t5", "conditional"), lambda: ids() | {"decoder_input_ids": torch.arange(8).reshape(2, 4)},
        {"r": 2, "target_modules": ["q", "wo"], "layers_to_transform": 1, "layers_pattern": "block"},
        LoRA(r=2, alpha=8, targets="q,wo", layers=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    both_ways(CASES[name], tmp_path)


# -- convolutions that peft cannot follow ------------------------------------------------------------------------------


def grouped() -> nn.Module:
    return seeded(lambda: Around(nn.Conv2d(4, 6, 3, padding=1, groups=2)))()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_grouped_convolution_born_here_is_the_same_in_peft(tmp_path: Path) -> None:
    """Our A reads its own group only, so that it can merge; in peft's ungrouped A the other groups are zeros."""
    x = floats(2, 4, 5, 5)()
    ours = inlay.attach(grouped(), LoRA(r=4, targets="inner"))
    randomise(ours)
    inlay.save(ours, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.inner.lora_A.weight"].shape == (4, 4, 3, 3)
    expected = run(ours, x)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(grouped(), tmp_path), x, backward=False), expected)
    back = inlay.load(grouped(), tmp_path)
    assert torch.equal(run(back, x, backward=False), expected)
    inlay.merge(back)
    torch.testing.assert_close(run(back, x, backward=False), expected)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_grouped_convolution_trained_by_peft_runs_and_says_why_it_cannot_merge(tmp_path: Path) -> None:
    x = floats(2, 4, 5, 5)()
    theirs = randomised_peft(grouped(), {"r": 4, "target_modules": ["inner"]})
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(grouped(), tmp_path, trainable=True)
    torch.testing.assert_close(run(ours, x), run(theirs, x))
    for key, gradient in gradients_of_peft(theirs).items():
        torch.testing.assert_close(gradients(ours)[key], gradient)
    with pytest.raises(UnsupportedError, match="cannot merge"):
        inlay.merge(ours)
    inlay.save(ours, tmp_path / "ours")
    same_tensors(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("fields", [{"dilation": 2}, {"padding_mode": "reflect"}, {"padding_mode": "circular"}])
def test_convolutions_that_peft_gets_wrong_are_not_written_as_its_own(fields: dict[str, Any], tmp_path: Path) -> None:
    """peft's A ignores both: with a dilation its forward fails, with a padding mode its merged output is another."""
    build, x = seeded(lambda: Around(nn.Conv2d(4, 6, 3, padding=1, **fields))), floats(2, 4, 7, 7)()
    ours = inlay.attach(build(), LoRA(r=2, targets="inner"))
    randomise(ours)
    inlay.save(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INLAY"
    expected = run(ours, x, backward=False)
    assert torch.equal(run(inlay.load(build(), tmp_path), x, backward=False), expected)
    inlay.merge(ours)
    torch.testing.assert_close(run(ours, x, backward=False), expected)
    if "padding_mode" in fields:
        theirs = randomised_peft(build(), {"r": 2, "target_modules": ["inner"]})
        theirs.save_pretrained(tmp_path / "theirs")
        theirs.merge_adapter()
        ours = inlay.load(build(), tmp_path / "theirs")
        torch.testing.assert_close(run(ours, x, backward=False), run(theirs, x, backward=False))


# -- what peft writes beside the adapter -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_embeddings_that_peft_adds_are_dropped_when_the_base_has_them(tmp_path: Path) -> None:
    build = model("llama", "causal", tie_word_embeddings=False)
    theirs = randomised_peft(build(), {"r": 2, "target_modules": ["embed_tokens", "q_proj"]})
    theirs.save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = inlay.load(build(), tmp_path)
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False))
    assert inlay.summary(ours).added_parameters == sum(p.numel() for n, p in theirs.named_parameters() if "lora" in n)


@pytest.mark.parametrize(("head", "targets"), [("causal", ["q_proj"]), ("trunk", ["embed_tokens", "q_proj"])])
def test_resized_embeddings_come_along_as_trained_copies(head: str, targets: list[str], tmp_path: Path) -> None:
    build = model("llama", head, tie_word_embeddings=False)
    tokens = {"input_ids": torch.tensor([[1, 64, 65, 3]])}

    def resized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build()
        net.resize_token_embeddings(66, mean_resizing=False)
        return net

    theirs = randomised_peft(resized(0), {"r": 2, "target_modules": targets})
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    expected = run(theirs, tokens, backward=False)
    ours = inlay.load(resized(1), tmp_path)  # its new rows are others
    torch.testing.assert_close(run(ours, tokens, backward=False), expected)
    inlay.save(ours, tmp_path / "ours")
    torch.testing.assert_close(run(inlay.load(resized(2), tmp_path / "ours"), tokens, backward=False), expected)
    fresh = build()
    with pytest.raises(BaseModelError, match=r"resize_token_embeddings\(66\)"):
        inlay.load(fresh, tmp_path)
    assert not any("inlays" in name for name, _ in fresh.named_modules())


def test_a_module_whose_name_only_ends_in_one_of_modules_to_save_comes_along(tmp_path: Path) -> None:
    """peft saves DistilBERT's pre_classifier when told to save `classifier`."""
    build = model("distilbert", "sequence")
    theirs = randomised_peft(build(), {"r": 2, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"})
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.pre_classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    ours = inlay.load(build(), tmp_path)
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False))


def test_keys_without_the_wrappers_prefix_are_read(tmp_path: Path) -> None:
    """What models that adapt themselves write (`model.add_adapter` of transformers and diffusers)."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    theirs = tiny.build("llama")
    peft.inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    tensors = peft.get_peft_model_state_dict(theirs)
    assert not any(key.startswith("base_model") for key in tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    ours = inlay.load(tiny.build("llama"), tmp_path)
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False))


def test_peft_may_load_and_save_our_file_and_we_read_it_again(tmp_path: Path) -> None:
    build = model("llama", "causal")
    method = LoRA(r=2, targets="q_proj,v_proj", overrides={"v_proj": {"r": 3}})
    inlay.save(inlay.attach(build(), method), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "ours", is_trainable=True)
    shift(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.load(build(), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False))


def test_named_adapters_of_one_peft_model_load_side_by_side(tmp_path: Path) -> None:
    theirs = randomised_peft(tiny.build("llama"), {"r": 2, "target_modules": ["q_proj"]})
    theirs.add_adapter("law", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(tiny.build("llama"), tmp_path)
    inlay.load(ours, tmp_path / "law", name="law")
    for name in ("default", "law"):
        theirs.set_adapter(name)
        with inlay.using(ours, name):
            torch.testing.assert_close(run(ours, ids(), backward=False), run(theirs, ids(), backward=False))


# -- inits, dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{"init": "olora"}, {"init": "pissa"}, {"init": "pissa", "rank_stabilised": True}])
def test_factors_of_w_are_written_as_a_plain_lora_of_twice_the_rank(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    build = model(name, "causal")
    ours = inlay.attach(build(), LoRA(r=4, targets="attention", overrides={"role:value": {"r": 2}}, **fields))
    if name == "llama":
        randomise(ours)
    inlay.save(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    expected = run(ours, ids(), backward=False)
    back = peft.PeftModel.from_pretrained(build(), tmp_path)
    # W's own singular vectors make the two halves large, and they cancel: one digit fewer than elsewhere.
    torch.testing.assert_close(run(back, ids(), backward=False), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(inlay.load(build(), tmp_path), ids(), backward=False), expected)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_inits_of_peft_that_change_the_base_are_refused_until_converted(init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(tiny.build("llama"), config)
    start = tmp_path / "start"
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(start)
    theirs.peft_config["default"].init_lora_weights = init
    shift(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(UnsupportedError, match="path_initial_model_for_weight_conversion"):
        inlay.load(tiny.build("llama"), tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(start))
    ours = inlay.load(tiny.build("llama"), tmp_path / "converted")
    expected = run(theirs, ids(), backward=False)  # W − B₀A₀ + BA there, W + (BA − B₀A₀) here
    torch.testing.assert_close(run(ours, ids(), backward=False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_bfloat16_base_keeps_float32_adapters_in_both(name: str, tmp_path: Path) -> None:
    build = lambda: tiny.build(name, "causal").to(torch.bfloat16)  # noqa: E731
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"] if name != "gpt2" else ["c_attn"]}
    config |= {"fan_in_fan_out": True} if name == "gpt2" else {}
    config |= {"target_parameters": MOE} if name == "mixtral" else {}
    theirs = randomised_peft(build(), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(build(), tmp_path)
    assert {p.dtype for n, p in ours.named_parameters() if "inlays" in n} == {torch.float32}
    expected = run(theirs, ids(), backward=False).float()
    # peft runs A and B in float32, Inlay in the dtype of x as the base's own products are: outputs of order 0.5 may
    # differ by a few roundings to 8 bits.
    torch.testing.assert_close(run(ours, ids(), backward=False).float(), expected, rtol=2**-6, atol=2**-7)
    inlay.save(ours, tmp_path / "ours")
    same_tensors(tmp_path, tmp_path / "ours")
    exactly = Case(build, ids, config, LoRA(), close={"rtol": 0.0, "atol": 0.0})
    read_by_peft(exactly, tmp_path / "ours", expected.bfloat16())


# -- published adapters in other formats -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "shape"),
    [
        ("lora_roberta_base_mnli.safetensors", "roberta.encoder.layer.0.attention.self.query.lora_A", (8, 768)),
        ("ia3_t0_3b.safetensors", "decoder.block.0.layer.0.SelfAttention.k.multi_lora_b", (2048, 1)),
    ],
)
def test_published_files_of_before_peft_are_not_taken_for_its_format(
    shared_data: Path, file: str, key: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Microsoft's LoRA and T-Few's (IA)³ have no config, and keys of their own, which lack even peft's suffixes."""
    published = shared_data / "weights" / "adapters" / file
    assert load_file(published)[key].shape == shape
    (tmp_path / "adapter_model.safetensors").write_bytes(published.read_bytes())
    net = tiny.build("roberta", "sequence")
    before = run(net, ids()).clone()
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json \(it holds: adapter_model.safetensors\)"):
        inlay.load(net, tmp_path)
    peft.LoraConfig(r=8, target_modules=["query", "value"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor|made for another base"):
        inlay.load(net, tmp_path)
    assert torch.equal(run(net, ids()), before)
    assert not any("inlays" in name for name, _ in net.named_modules())
