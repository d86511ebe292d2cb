"""The variants of LoRA that HF peft keeps in LoRA's own file, against it: outputs, gradients, and files both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import Case, gradients, gradients_of_peft, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft
from peft.tuners.lora.config import BdLoraConfig
from transformers import DynamicCache

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, UnsupportedError

pytestmark = [  # what peft says of itself, or wrongly
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
]

BERT = ["query", "key", "value", "attention.output.dense"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj"]


def texts() -> dict[str, Any]:
    """Invoked by (7, 8) twice, once and never; peft counts from the last time."""
    rows = [[3, 7, 8, 9, 10, 7, 8, 11, 12], [5, 4, 3, 7, 8, 20, 21, 22, 23], [7, 9, 8, 7, 5, 4, 3, 2, 7]]
    return {"input_ids": torch.tensor(rows)}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], inlay.Method, peft.PeftConfig, bool]] = {
    "alora": (
        model("llama", "causal"), texts,
        inlay.ALoRA(r=3, alpha=5, targets="attention", invocation_tokens=(7, 8)),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=LLAMA, alora_invocation_tokens=[7, 8],
                        task_type="CAUSAL_LM"), False,
    ),
    "alora, bias": (
        model("gpt2", "causal"), texts,
        inlay.ALoRA(r=2, lora_bias=True, rank_stabilised=True, targets="query,up", invocation_tokens=(7, 8)),
        peft.LoraConfig(r=2, lora_bias=True, use_rslora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
                        alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM"), False,
    ),
    "bdlora": (
        model("llama"), ids, inlay.BDLoRA(r=4, alpha=5, targets="attention,ffn"),
        peft.LoraConfig(r=4, lora_alpha=5, target_modules=[*LLAMA, "up_proj", "gate_proj", "down_proj"],
                        use_bdlora=BdLoraConfig(["o_proj", "down"], ["q_proj", "k_", "v_proj", "up", "gate"], 2)), True,
    ),
    "bdlora, mixed": (
        model("bert"), ids,
        inlay.BDLoRA(r=4, rank_stabilised=True, nblocks=4, targets="query,key,value", blocks_in_a="key",
                     blocks_in_b="query", match_strict=False, overrides={"key": {"r": 8}}),
        peft.LoraConfig(r=4, use_rslora=True, target_modules=["query", "key", "value"], rank_pattern={"key": 8},
                        use_bdlora=BdLoraConfig(["key"], ["query"], 4, False)), True,
    ),
    "kasa": (
        model("bert"), ids, inlay.KaSA(r=3, alpha=5, beta=0.1, targets="attention"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=BERT, kasa_config=peft.KasaConfig(beta=0.1)), True,
    ),
    "kasa, patterns": (
        model("llama"), ids,
        inlay.KaSA(r=2, alpha=8, targets="query,down", overrides={"down": {"r": 4, "alpha": 3}}),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 4},
                        alpha_pattern={"down_proj": 3}, kasa_config=peft.KasaConfig()), True,
    ),
    "mica": (
        model("bert"), ids, inlay.MiCA(r=3, alpha=5, rank_stabilised=True, targets="attention"),
        peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=BERT, init_lora_weights="mica"), True,
    ),
    "mica, embedding": (
        model("llama"), ids, inlay.MiCA(r=2, targets="embed,value"),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"], init_lora_weights="mica"), True,
    ),
    "velora": (
        model("bert"), ids, inlay.VeLoRA(r=3, alpha=5, num_groups=5, rho=0.5, targets="attention"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=BERT, velora_config=peft.VeloraConfig(5, 0.5)), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    build, inputs, method, config, merges = CASES[name]
    both_ways(Case(build, inputs, {}, method), config, tmp_path, merges)


def test_two_variants_at_once_are_refused(tmp_path: Path) -> None:
    base = model("llama", "causal")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = theirs.peft_config["default"]
    config.use_dora, config.alora_invocation_tokens = True, [1]
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="use_dora"):
        inlay.load(base(), tmp_path)


# -- aLoRA -------------------------------------------------------------------------------------------------------------


def invoked(**fields: Any) -> Any:
    torch.manual_seed(0)
    found = inlay.attach(
        model("llama", "causal")(), inlay.ALoRA(init="random", targets="attention", invocation_tokens=(7, 8), **fields)
    )
    return found.eval()


def test_alora_leaves_what_comes_before_it_to_the_base_bit_for_bit() -> None:
    ours, call = invoked(r=4), texts()
    with torch.no_grad():
        found, base = ours(**call).logits, model("llama", "causal")()(**call).logits
    for row, start in enumerate((5, 3, 9)):
        assert torch.equal(found[row, :start], base[row, :start])
        assert (found[row, start:] != base[row, start:]).any(1).all()


@pytest.mark.parametrize("cut", [1, 4, 6, 7])
def test_alora_stays_invoked_with_the_cache(cut: int) -> None:
    """Rows that end before the cut, in the middle of the tokens or after them: the base's cache does for the first."""
    ours, ids = invoked(r=4), texts()["input_ids"][1:2]
    with torch.no_grad():
        whole = ours(input_ids=ids).logits
        cache = DynamicCache(config=ours.config)
        first = ours(input_ids=ids[:, :cut], past_key_values=cache).logits
        rest = ours(input_ids=ids[:, cut:], past_key_values=cache).logits
        if cut == 4:  # the tokens were cut in two, and so not seen
            assert not torch.allclose(torch.cat((first, rest), 1), whole, atol=1e-4)
            return
        torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-5, atol=1e-5)


def test_alora_reads_the_cache_of_the_base_and_generates_as_peft_does(tmp_path: Path) -> None:
    build, ids = model("llama", "causal"), texts()["input_ids"][1:2]
    ours = invoked(r=4)
    inlay.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    settings["pad_token_id"] = 0
    expected = theirs.generate(input_ids=ids, **settings)
    assert torch.equal(ours.generate(input_ids=ids, **settings), expected)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad(), inlay.disabled(ours):
        ours(input_ids=ids[:, :3], past_key_values=cache)
    with torch.no_grad():
        rest = ours(input_ids=ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(rest, ours(input_ids=ids).logits[:, 3:], rtol=1e-5, atol=1e-5)


def test_alora_searches_with_beams() -> None:
    """Which peft refuses. A text that is invoked from its first token on has LoRA's change throughout."""
    ours, ids = invoked(r=4), texts()["input_ids"][1:2, 3:]
    torch.manual_seed(0)
    lora = inlay.attach(model("llama", "causal")(), inlay.LoRA(r=4, init="random", targets="attention")).eval()
    settings: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "pad_token_id": 0, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(ours.generate(input_ids=ids, **settings), lora.generate(input_ids=ids, **settings))


def test_alora_computes_again_what_it_computed() -> None:
    """Gradient checkpointing with a call without gradients in between; and two calls at once, which it cannot tell."""
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        ours = invoked(r=4).train()
        if checkpointing:
            ours.gradient_checkpointing_enable()
        loss = ours(**texts()).logits.square().sum()
        with torch.no_grad():
            ours(input_ids=texts()["input_ids"].flip(0))
        loss.backward()
        found.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)
    for both in (False, True):
        first, second = (ours(input_ids=texts()["input_ids"].roll(n, 0)).logits.sum() for n in (0, 1))
        with pytest.raises(UnsupportedError, match="backward after each forward"):
            (first + second if both else first).backward()


def test_alora_takes_outputs_of_any_form() -> None:
    ours, call = invoked(r=4), texts()
    (logits, *_), expected = ours(**call, return_dict=False), ours(**call).logits
    assert torch.equal(logits, expected)


def test_alora_says_what_it_needs() -> None:
    base = model("llama", "causal")()
    for tokens in ((), (-1,), ("a",)):
        with pytest.raises(ConfigError, match=r"ALoRA.invocation_tokens=.*give the ids"):
            inlay.attach(base, inlay.ALoRA(invocation_tokens=tokens))
    with pytest.raises(UnsupportedError, match="pass ids"):
        invoked()(inputs_embeds=torch.randn(1, 4, 32))


# -- VeLoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("groups", [8, 5])
def test_velora_trains_as_peft_does(kind: str, groups: int, tmp_path: Path) -> None:
    """Two batches in training mode: the gradients, and the direction that is remembered after each."""
    build = model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = peft.LoraConfig(r=3, target_modules=BERT, velora_config=peft.VeloraConfig(groups, 0.7, kind))
    theirs = perturbed_peft(build(), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(build(), tmp_path, trainable=True)
    ours.train(), theirs.train()
    for call in (ids(), {"input_ids": ids()["input_ids"].flip(0, 1) + 3}):
        torch.testing.assert_close(run(ours, call), run(theirs, call), rtol=1e-5, atol=1e-5)
        found, expected = gradients(ours), gradients_of_peft(theirs)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6)
        there = peft.get_peft_model_state_dict(theirs)
        pieces = adapters_of(ours).get("default").pieces()
        for site, piece in pieces:
            held = there[f"base_model.model.{site.path}.lora_velora_embed"]
            torch.testing.assert_close(piece.lora_velora_embed, held, rtol=1e-5, atol=1e-6)


def test_velora_keeps_a_number_for_each_group_and_no_x() -> None:
    kept: dict[str, int] = {}
    for method in (inlay.LoRA(r=2, targets="0"), inlay.VeLoRA(r=2, num_groups=4, targets="0")):
        linear = inlay.attach(torch.nn.Sequential(torch.nn.Linear(64, 8)), method).train()
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel() if tensor.shape[0] == 100 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            linear(torch.randn(100, 64))
        kept[method.kind] = sum(sizes)
    assert kept == {"lora": 100 * (64 + 2), "velora": 100 * (4 + 2)}


# -- BD-LoRA -----------------------------------------------------------------------------------------------------------


def test_bdlora_does_on_two_devices_what_it_does_on_one() -> None:
    """Each holds its part of W and its block: the parts of the outputs, or of the sums, are all that is exchanged."""
    torch.manual_seed(0)
    for blocks, dim in (("a", 1), ("b", 0)):
        linear = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
        fields = {f"blocks_in_{blocks}": "0", f"blocks_in_{'ab'.replace(blocks, '')}": ()}
        inlay.attach(linear, inlay.BDLoRA(r=4, alpha=4, init="random", targets="0", **fields))
        piece, x, parts = linear[0].inlays.default.bdlora, torch.randn(3, 8), []
        for n, w in enumerate(linear[0].weight.chunk(2, dim)):
            a, b = piece.lora_A, piece.lora_B
            mine = x if blocks == "b" else x.chunk(2, 1)[n]
            if blocks == "a":
                parts.append(mine @ w.T + mine @ a.chunk(2)[n].T @ b.chunk(2, 1)[n].T)
            else:
                parts.append(mine @ w.T + (mine @ a.T).chunk(2, 1)[n] @ b.chunk(2)[n].T)
        whole = sum(parts) if blocks == "a" else torch.cat(parts, 1)
        torch.testing.assert_close(linear(x), whole, rtol=1e-5, atol=1e-6)


# -- KaSA and MiCA -----------------------------------------------------------------------------------------------------


def test_kasa_has_pefts_extra_loss(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=BERT, kasa_config=peft.KasaConfig(beta=0.2, gamma=0.3))
    theirs = perturbed_peft(model("bert")(), config)
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(model("bert")(), tmp_path, trainable=True)
    (controller,) = inlay.controllers(ours)
    found = controller.extra_loss()
    assert found is not None
    expected = theirs.base_model._get_kasa_loss()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward(), expected.backward()
    for key, gradient in gradients_of_peft(theirs).items():
        torch.testing.assert_close(gradients(ours)[key], gradient, rtol=1e-4, atol=1e-5)


def test_kasa_takes_away_the_smallest_part_and_leaves_the_base_its_bits() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 5))
    weight = linear[0].weight.detach().clone()
    inlay.attach(linear, inlay.KaSA(r=2, targets="0"))
    kept = torch.linalg.svdvals(linear[0].inlays.default.kasa.weight(weight).detach())
    torch.testing.assert_close(kept[:3], torch.linalg.svdvals(weight)[:3], rtol=1e-5, atol=1e-6)
    assert kept[3:].max() < 1e-6
    assert torch.equal(linear[0].weight, weight)


def test_mica_starts_from_the_directions_that_the_weight_uses_least() -> None:
    theirs = peft.get_peft_model(model("bert")(), peft.LoraConfig(r=3, target_modules=BERT, init_lora_weights="mica"))
    ours = inlay.attach(model("bert")(), inlay.MiCA(r=3, targets="attention"))
    expected = {name: tensor for name, tensor in theirs.named_parameters() if "lora_B" in name}
    found = [piece.lora_B for _, piece in adapters_of(ours).get("default").pieces()]
    for b, (_, there) in zip(found, expected.items(), strict=True):
        torch.testing.assert_close(b @ b.T, there @ there.T, rtol=1e-4, atol=1e-5)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(9, 4))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: inlay.VeLoRA(num_groups=0), "VeLoRA.num_groups=0.*at least 1"),
        (lambda: inlay.VeLoRA(rho=0), "VeLoRA.rho=0.*above 0"),
        (lambda: inlay.VeLoRA(projection="mean"), "VeLoRA.projection='mean'.*batch_average, batch"),
        (lambda: inlay.VeLoRA(init="olora"), "VeLoRA.init='olora'.*use LoRA"),
        (lambda: inlay.BDLoRA(r=8, nblocks=3), r"BDLoRA.r=8, nblocks=3.*divisor of the rank"),
        (lambda: inlay.BDLoRA(lora_bias=True), "BDLoRA.lora_bias=True.*use LoRA"),
        (lambda: inlay.attach(small(), inlay.BDLoRA(r=2, targets="0")), "BDLoRA cannot sit at 0.*neither"),
        (lambda: inlay.attach(small(), inlay.BDLoRA(r=2, targets="0", blocks_in_a="0", blocks_in_b="0")), "in both"),
        (
            lambda: inlay.attach(small(), inlay.BDLoRA(r=2, targets="0", blocks_in_a="0")),
            "does not divide the 9 features",
        ),
        (lambda: inlay.KaSA(init="pissa"), "KaSA.init='pissa'.*split already"),
        (lambda: inlay.KaSA(beta=-1), "KaSA.beta=-1.*at least 0"),
        (lambda: inlay.MiCA(init="gaussian"), "MiCA.init='gaussian'.*starts at zero"),
        (lambda: inlay.MiCA(freeze_a=True), "MiCA.freeze_a=True.*starts at zero"),
        (lambda: inlay.attach(small(), inlay.KaSA(r=4, targets="0")), "3 at most"),
    ],
)
def test_what_they_cannot_do(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()
