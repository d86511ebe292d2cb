"""Methods that turn the input or the output of a linear, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import butterfly_blocks
from oracles.against_peft import Case, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft
from torch import nn

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

butterfly_blocks.install()

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "oft": (
        inlay.OFT(block_size=8, targets="attention"), peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION)
    ),
    "oft, blocks": (
        inlay.OFT(block_size=0, r=4, block_share=True, targets="attention"),
        peft.OFTConfig(oft_block_size=0, r=4, block_share=True, target_modules=ATTENTION),
    ),
    "oft, exact": (
        inlay.OFT(block_size=4, use_cayley_neumann=False, targets="query"),
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["query"]),
    ),
    "oft, constrained": (
        inlay.OFT(block_size=4, coft=True, eps=0.3, targets="attention"),
        peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, target_modules=ATTENTION),
    ),
    "oft, embedding": (
        inlay.OFT(block_size=8, coft=True, eps=0.9, targets="query,word_embeddings,position_embeddings"),
        peft.OFTConfig(oft_block_size=8, coft=True, eps=0.9,
                       target_modules=["query", "word_embeddings", "position_embeddings"]),
    ),
    **{
        f"oft, {terms} terms": (
            inlay.OFT(block_size=8, num_cayley_neumann_terms=terms, targets="query"),
            peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=terms, target_modules=["query"]),
        )
        for terms in (2, 3, 4, 7)
    },
    **{
        f"road, {variant}": (
            inlay.RoAD(variant=variant, group_size=8, targets="attention"),
            peft.RoadConfig(variant=variant, group_size=8, target_modules=ATTENTION),
        )
        for variant in ("road_1", "road_2", "road_4")
    },
    "boft": (inlay.BOFT(targets="attention"), peft.BOFTConfig(target_modules=ATTENTION)),
    **{
        f"boft, {m} factors, {fields}": (
            inlay.BOFT(n_butterfly_factor=m, block_size=size, block_num=number, targets="attention"),
            peft.BOFTConfig(
                boft_n_butterfly_factor=m, boft_block_size=size, boft_block_num=number, target_modules=ATTENTION
            ),
        )
        for m, size, number in ((2, 0, 8), (3, 4, 0), (4, 2, 0), (3, 8, 0))
        for fields in (f"{size or number} {'entries' if size else 'blocks'}",)
    },
    **{
        f"psoft, {fields}": (
            inlay.PSOFT(r=4, targets="attention", **{ours.get(key, key): value for key, value in fields.items()}),
            peft.PsoftConfig(r=4, target_modules=ATTENTION, **fields),
        )
        for ours in ({"psoft_svd": "svd", "psoft_orth": "orth", "psoft_mag_a": "mag_a", "psoft_mag_b": "mag_b",
                      "psoft_alpha": "alpha"},)
        for fields in (
            {}, {"ab_svd_init": "pissa_init", "psoft_alpha": 7}, {"psoft_svd": "lowrank", "random_seed": 3},
            {"psoft_orth": False, "psoft_mag_a": False}, {"psoft_mag_b": False}, {"use_cayley_neumann": True},
            {"use_cayley_neumann": True, "cayley_neumann_eps": 0.2, "num_cayley_neumann_terms": 4},
        )
    },
    **{
        f"hra, {r}, {apply_gs}": (
            inlay.HRA(r=r, apply_gs=apply_gs, targets="attention"),
            peft.HRAConfig(r=r, apply_GS=apply_gs, target_modules=ATTENTION),
        )
        for r, apply_gs in ((1, False), (4, False), (5, False), (6, False), (3, True))
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The symmetric initialization:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CASES[name]
    both_ways(Case(model("bert"), ids, {}, method), config, tmp_path)


@pytest.mark.filterwarnings("ignore:Invalid `:UserWarning")
@pytest.mark.parametrize("fields", [{"block_size": 20, "r": 0}, {"block_size": 0, "r": 9}], ids=["size", "number"])
def test_a_size_that_does_not_divide_becomes_the_nearest_that_does(fields: dict[str, int], tmp_path: Path) -> None:
    theirs = {"oft_block_size": fields["block_size"], "r": fields["r"], "target_modules": [*ATTENTION, "output.dense"]}
    case = Case(model("bert"), ids, {}, inlay.OFT(**fields, targets="attention,down"))
    with pytest.warns(UserWarning, match=rf"OFT: {max(fields.values())} does not divide"):
        both_ways(case, peft.OFTConfig(**theirs), tmp_path)


PAIRS: dict[str, peft.PeftConfig] = {
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "boft": peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=ATTENTION),
    "hra": peft.HRAConfig(r=4, target_modules=ATTENTION),
    "road": peft.RoadConfig(variant="road_2", group_size=8, target_modules=ATTENTION),
}


def test_the_sum_of_two_principal_changes(tmp_path: Path) -> None:
    """PSOFT's changes are added to W, so their order is none."""
    config = peft.PsoftConfig(r=4, target_modules=ATTENTION)
    theirs = perturbed_peft(model("bert")(), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = inlay.load(model("bert")(), tmp_path)
    inlay.load(ours, tmp_path, name="second")
    for names in (["default", "second"], ["second", "default"]):
        inlay.activate(ours, *names)
        expected = run(ours, ids(), backward=False)
        theirs.merge_adapter()
        for layer in theirs.modules():
            if hasattr(layer, "get_delta_weight"):
                layer.base_layer.weight.data += layer.get_delta_weight("default")
        torch.testing.assert_close(expected, run(theirs, ids(), backward=False), rtol=1e-5, atol=1e-5)
        for layer in theirs.modules():
            if hasattr(layer, "get_delta_weight"):
                layer.base_layer.weight.data -= layer.get_delta_weight("default")
        theirs.unmerge_adapter()
        inlay.merge(ours)
        torch.testing.assert_close(run(ours, ids(), backward=False), expected, rtol=1e-5, atol=1e-5)
        inlay.unmerge(ours)


@pytest.mark.parametrize("name", PAIRS)
def test_two_adapters_compose_in_the_order_of_activation(name: str, tmp_path: Path) -> None:
    """As peft's merged weights do: its unmerged OFT turns x by the first adapter first, which is another product."""
    theirs = perturbed_peft(model("bert")(), PAIRS[name])
    theirs.add_adapter("second", PAIRS[name])
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".second" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = inlay.load(model("bert")(), tmp_path)
    inlay.load(ours, tmp_path / "second", name="second")
    outputs = []
    for names in (["default", "second"], ["second", "default"]):
        inlay.activate(ours, *names)
        outputs.append(run(ours, ids(), backward=False))
        theirs.merge_adapter(names)
        expected = run(theirs, ids(), backward=False)
        theirs.unmerge_adapter()
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)  # peft's unmerging leaves roundings
        inlay.merge(ours)
        torch.testing.assert_close(run(ours, ids(), backward=False), expected, rtol=1e-4, atol=1e-5)
        inlay.unmerge(ours)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


REFUSED: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_dropout": 0.1}, "HRA": {"bias": "hra_only"}, "OFT": {"module_dropout": 0.1}
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    entry = next(iter(REFUSED[name]))
    base = model("bert")()
    config = getattr(peft, f"{name}Config")(target_modules=["query"], **REFUSED[name])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)


# -- convolutions ------------------------------------------------------------------------------------------------------


def plane(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, **fields)).eval()


def image() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"input": torch.randn(2, 4, 7, 7)}


def test_a_convolutions_oft_is_what_pefts_is_merged(tmp_path: Path) -> None:
    """Unmerged, peft turns each window and adds up the overlaps: even at the start it is not the base."""
    build: Callable[[], nn.Module] = functools.partial(plane, kernel_size=3, stride=2, padding=1)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"])
    start = run(peft.get_peft_model(build(), config), image(), backward=False)
    assert (start - run(build(), image(), backward=False)).abs().max() > 1
    theirs = perturbed_peft(build(), config)
    theirs.save_pretrained(tmp_path)
    theirs.merge_adapter()
    expected = run(theirs, image(), backward=False)
    ours = inlay.load(build(), tmp_path)
    torch.testing.assert_close(run(ours, image(), backward=False), expected, rtol=1e-5, atol=1e-5)
    inlay.merge(ours)
    torch.testing.assert_close(run(ours, image(), backward=False), expected, rtol=1e-5, atol=1e-5)


CONVOLUTIONS: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "boft": (inlay.BOFT(targets="0"), peft.BOFTConfig(target_modules=["0"])),
    "boft, factors": (
        inlay.BOFT(block_size=2, n_butterfly_factor=2, targets="0"),
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["0"]),
    ),
    "hra": (inlay.HRA(r=4, targets="0"), peft.HRAConfig(r=4, target_modules=["0"])),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_both_ways(name: str, tmp_path: Path) -> None:
    build = functools.partial(plane, kernel_size=3, stride=2, padding=1)
    both_ways(Case(build, image, {}, CONVOLUTIONS[name][0]), CONVOLUTIONS[name][1], tmp_path)


@pytest.mark.parametrize("fields", [{"kernel_size": (3, 2)}, {"kernel_size": 3, "groups": 2}, {"kernel_size": 1}])
@pytest.mark.parametrize("method", [inlay.HRA(r=2), inlay.BOFT(block_size=2)])
def test_the_file_of_a_convolution_that_peft_cannot_have(
    method: inlay.Method, fields: dict[str, Any], tmp_path: Path
) -> None:
    build = functools.partial(plane, **fields)
    ours = inlay.attach(build(), method.replace(targets="0"))
    inlay.save(ours, tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind == (method.peft_type if fields == {"kernel_size": 1} else "INLAY")
    expected = run(ours, image(), backward=False)
    assert torch.equal(run(inlay.load(build(), tmp_path), image(), backward=False), expected)
