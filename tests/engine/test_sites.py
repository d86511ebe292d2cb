"""Sites: which places there are, what they say of themselves, and the grammar that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import tiny
from torch import nn

import inlay
from inlay.engine.sites import Site, SiteIndex, Targets, kind_of
from inlay.engine.targets import layer_indices, split_items
from inlay.errors import TargetError, UnsupportedError

LINEAR = frozenset({"linear"})
LORA = frozenset({"linear", "conv", "embedding", "parameter"})
EVERY_KIND = frozenset({"linear", "conv", "embedding", "attention", "norm", "parameter", "module"})


@pytest.fixture(scope="module")
def bert() -> SiteIndex:
    return SiteIndex(tiny.build("bert", "sequence"))


@pytest.fixture(scope="module")
def plain() -> SiteIndex:
    return SiteIndex(tiny.Plain())


@pytest.fixture(scope="module")
def mixtral() -> SiteIndex:
    return SiteIndex(tiny.build("mixtral", "causal"))


@pytest.fixture(scope="module")
def bart() -> SiteIndex:
    return SiteIndex(tiny.build("bart", encoder_layers=3, decoder_layers=2))


def names(index: SiteIndex, targets: Targets, hosts: frozenset[str] = LORA, **limits: Any) -> list[str]:
    return [site.name for site in index.select(targets, hosts=hosts, **limits)]


def refusal(index: SiteIndex, targets: Targets, hosts: frozenset[str] = LORA, **limits: Any) -> str:
    with pytest.raises(TargetError) as caught:
        index.select(targets, hosts=hosts, what="LoRA", **limits)
    return str(caught.value)


# -- the places ------------------------------------------------------------------------------------------------------


def test_places_of_a_plain_network(plain: SiteIndex) -> None:
    assert [(site.name, site.kind, site.layer) for site in plain.sites][:15] == [
        ("", "module", None),
        ("lookup", "embedding", None),
        ("mix", "conv", None),
        ("stages", "module", None),
        ("stages.0", "module", 0),
        ("stages.0.mixing", "parameter", 0),
        ("stages.0.n", "norm", 0),
        ("stages.0.a", "linear", 0),
        ("stages.0.b", "linear", 0),
        ("stages.0.look", "attention", 0),
        ("stages.0.look.in_proj_weight", "parameter", 0),
        ("stages.0.look.out_proj.weight", "parameter", 0),
        ("stages.1", "module", 1),
        ("stages.1.mixing", "parameter", 1),
        ("stages.1.n", "norm", 1),
    ]


@pytest.mark.parametrize("name", tiny.names())
def test_sites_are_unique_and_tell_the_truth(name: str) -> None:
    model = tiny.build(name)
    index = SiteIndex(model)
    assert len(index.by_name()) == len(index.sites)
    for site in index.sites:
        assert site.module is model.get_submodule(site.path)
        if site.kind == "parameter":
            assert site.weight is model.get_parameter(site.name)
        elif site.kind == "linear":
            shape = (site.out_features, site.in_features)
            assert tuple(site.weight.shape) == (shape[::-1] if site.transposed else shape)
            assert site.weight is site.module.weight
            assert site.bias is site.module.bias


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral", "wav2vec2", "vit"])
def test_parameters_is_every_parameter_of_every_module(name: str) -> None:
    model = tiny.build(name)
    sites = SiteIndex(model).parameters()
    assert {site.name: site.weight for site in sites} == dict(model.named_parameters(remove_duplicate=False))
    assert all(site.kind == "parameter" for site in sites)


def test_parameters_play_the_role_of_their_layer(bert: SiteIndex, plain: SiteIndex) -> None:
    biases = {site.name: site for site in bert.parameters() if site.parameter == "bias"}
    assert biases["bert.encoder.layer.1.attention.self.query.bias"].roles == {"attention", "query"}
    assert biases["bert.encoder.layer.1.attention.self.query.bias"].layer == 1
    assert "post_norm" in biases["bert.encoder.layer.0.output.LayerNorm.bias"].roles
    assert biases["classifier.bias"].roles == {"head"}
    mine = {site.name: site for site in plain.parameters()}
    assert mine["stages.0.look.in_proj_bias"].roles == {"attention", "qkv", "query", "key", "value"}
    assert mine["stages.0.look.out_proj.bias"].roles == {"attention", "output"}
    assert mine["stages.0.look.out_proj.bias"].owner == "stages.0.look"
    assert mine["temperature"].owner is None


def test_parameters_that_are_tied_appear_at_each_place() -> None:
    model = tiny.build("gpt2", "causal")
    weights = {site.name: site.weight for site in SiteIndex(model).parameters()}
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]


def test_pieces_already_in_the_model_are_not_looked_into() -> None:
    model = tiny.build("llama")
    before = [(site.name, site.kind, site.roles, site.layer) for site in SiteIndex(model).sites]
    parameters = [site.name for site in SiteIndex(model).parameters()]
    weight = model.layers[0].self_attn.q_proj.weight
    inlay.attach(model, inlay.LoRA(r=2))
    index = SiteIndex(model)
    assert [(site.name, site.kind, site.roles, site.layer) for site in index.sites] == before
    assert [site.name for site in index.parameters()] == parameters
    assert index.by_name()["layers.0.self_attn.q_proj"].weight is weight


def test_the_raw_weight_of_a_parameter_with_a_piece_on_it() -> None:
    model = tiny.Plain()
    weight = model.stages[0].look.in_proj_weight
    inlay.attach(model, inlay.LoRA(r=2, targets="look"))
    assert SiteIndex(model).by_name()["stages.0.look.in_proj_weight"].weight is weight


def test_features_and_bias_of_every_kind(plain: SiteIndex, mixtral: SiteIndex) -> None:
    sites = plain.by_name()
    sizes = {name: (site.in_features, site.out_features) for name, site in sites.items() if site.kind != "module"}
    assert sizes["lookup"] == (11, 8)
    assert sizes["mix"] == (8, 12)
    assert sizes["stages.0.a"] == (12, 16)
    assert sizes["stages.0.n"] == (12, 12)
    assert sizes["stages.0.mixing"] == (12, 12)
    assert sizes["stages.0.look"] == (12, 12)
    assert sizes["stages.0.look.in_proj_weight"] == (12, 36)
    assert sites["stages.0.look.in_proj_weight"].bias is sites["stages.0.look"].module.in_proj_bias
    assert sites["stages.0.look.out_proj.weight"].bias is sites["stages.0.look"].module.out_proj.bias
    assert sites["stages.0.mixing"].bias is None
    assert sites["stages.0.b"].bias is None
    experts = mixtral.by_name()["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.in_features, experts.out_features, experts.transposed) == (32, 96, False)
    with pytest.raises(UnsupportedError, match=r"stages.0 \(PlainStage, kind module\)"):
        _ = sites["stages.0"].in_features
    with pytest.raises(UnsupportedError, match="has no parameter 'weight'"):
        _ = sites["stages.0"].weight


def test_expert_weights_stored_in_out() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = True
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 10))
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 10))

    sites = SiteIndex(nn.ModuleDict({"experts": Experts()})).by_name()
    assert "experts.gate_up_proj_bias" not in sites
    site = sites["experts.gate_up_proj"]
    assert (site.in_features, site.out_features, site.transposed) == (4, 10, True)


def test_dtype_and_device(plain: SiteIndex) -> None:
    model = tiny.Plain().to(torch.bfloat16)
    sites = SiteIndex(model).by_name()
    for name in ("", "stages.0.a", "stages.0.look", "stages.0.look.in_proj_weight"):
        assert sites[name].dtype == torch.bfloat16
        assert sites[name].device == torch.device("cpu")


def test_attention_with_separate_projections() -> None:
    model = nn.ModuleDict({"x": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    sites = SiteIndex(model).by_name()
    assert [(name, sites[name].in_features) for name in sites if name.startswith("x.")] == [
        ("x.q_proj_weight", 8),
        ("x.k_proj_weight", 6),
        ("x.v_proj_weight", 4),
        ("x.out_proj.weight", 8),
    ]
    assert sites["x.k_proj_weight"].roles == {"attention", "key"}
    assert len({site.file_path for site in sites.values() if site.kind == "parameter"}) == 4


def test_an_attention_alone_is_a_model_too() -> None:
    index = SiteIndex(nn.MultiheadAttention(8, 2))
    assert names(index, "all-linear") == ["in_proj_weight", "out_proj.weight"]
    assert names(index, "output") == ["out_proj.weight"]


def test_weights_that_an_attribute_does_not_reach_are_no_sites() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    index = SiteIndex(nn.ModuleDict({"memory": nn.LSTM(4, 4), "conv": conv}))
    assert [(site.name, site.kind) for site in index.sites[1:]] == [("memory", "module"), ("conv", "conv")]
    assert torch.equal(index.by_name()["conv"].weight, conv.weight)


def test_kinds() -> None:
    class Quantised(nn.Linear):
        pass

    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    class NormalEstimator(LlamaRMSNorm):
        pass

    assert kind_of(Quantised(2, 2)) == "linear"
    assert kind_of(LlamaRMSNorm()) == "norm"
    assert kind_of(NormalEstimator()) == "module"
    assert kind_of(nn.BatchNorm2d(2)) == "norm"
    assert kind_of(nn.LayerNorm(2, elementwise_affine=False)) == "module"
    assert kind_of(nn.Conv3d(2, 2, 1)) == "conv"


@pytest.mark.filterwarnings("ignore")  # HF peft uses what transformers and torch have deprecated
def test_file_paths_are_hf_pefts(plain: SiteIndex) -> None:
    peft = pytest.importorskip("peft")
    for targets in (
        {"target_modules": ["look", "a", "mix", "lookup"]},
        {"target_modules": [], "target_parameters": ["stages.2.mixing"]},
    ):
        model = peft.get_peft_model(tiny.Plain(), peft.LoraConfig(r=2, **targets))
        keys = peft.get_peft_model_state_dict(model)
        theirs = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
        items = [item for value in targets.values() for item in value]
        assert {site.file_path for site in plain.select(items, hosts=LORA)} == theirs


# -- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query,value", ["query", "value"]),
        ("value, query", ["query", "value"]),
        (["value", "query"], ["query", "value"]),
        ("query,query,attention.self.query", ["query"]),
        ("self.key", ["key"]),
        ("name:key", ["key"]),
        ("role:key", ["key"]),
        (r"re:.*\.self\.(key|value)", ["key", "value"]),
        (r"re:.*\.self\.[a-z]{3,3},query", ["query", "key"]),
        (lambda site: site.tail == "value", ["value"]),
    ],
)
def test_targets(bert: SiteIndex, targets: Targets, expected: list[str]) -> None:
    paths = [f"bert.encoder.layer.{layer}.attention.self.{tail}" for layer in (0, 1) for tail in expected]
    assert names(bert, targets) == paths


def test_whole_names_and_suffixes_after_a_dot(bert: SiteIndex) -> None:
    assert names(bert, "bert.encoder.layer.1.output.dense") == ["bert.encoder.layer.1.output.dense"]
    assert names(bert, "1.output.dense") == ["bert.encoder.layer.1.output.dense"]
    assert "nothing" in refusal(bert, "utput.dense")
    assert "nothing" in refusal(bert, "encoder.layer.1.output.dens")


def test_a_role_is_read_before_a_name() -> None:
    # Mixtral's router is called "gate"; the role of that name is that of the gated feed-forward's gate.
    qwen = SiteIndex(tiny.build("qwen2-moe"))
    gates = {site.tail for site in qwen.select("gate", hosts=LORA)}
    assert gates == {"gate_up_proj", "gate_proj"}
    assert {site.tail for site in qwen.select("name:gate", hosts=EVERY_KIND)} == {"gate"}
    plain = SiteIndex(nn.ModuleDict({"gate": nn.Linear(2, 2), "other": nn.Linear(2, 2)}))
    assert names(plain, "gate") == ["gate"]
    assert "role:gate" in refusal(plain, "role:gate")


def test_aliases_of_roles() -> None:
    llama = SiteIndex(tiny.build("llama"))
    assert names(llama, "ffn.up") == names(llama, "up") == names(llama, "up_proj")
    assert names(llama, "role:ffn.down") == names(llama, "down_proj")


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny.build("bert"),
        lambda: tiny.build("gpt2", "causal"),
        lambda: tiny.build("llama", "causal"),
        lambda: tiny.build("t5", "conditional"),
        lambda: tiny.build("qwen2-moe", "causal"),
        lambda: tiny.build("whisper", "conditional"),
        lambda: tiny.build("vit"),
        tiny.build_clip,
    ],
)
def test_all_linear_is_hf_pefts(build: Callable[[], nn.Module]) -> None:
    peft = pytest.importorskip("peft")
    ours = names(SiteIndex(build()), "all-linear")
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules="all-linear")).base_model
    assert set(ours) == set(theirs.targeted_module_names)


def test_all_linear_leaves_out_heads_and_bare_parameters(bert: SiteIndex, plain: SiteIndex) -> None:
    tails = {name.rpartition(".")[2] for name in names(bert, "all-linear")}
    assert tails == {"query", "key", "value", "dense"}
    expected = ["a", "b", "look.in_proj_weight", "look.out_proj.weight"]
    assert names(plain, "all-linear", layers=0) == [f"stages.0.{name}" for name in expected]
    assert names(plain, "all-linear", LINEAR, layers=0) == ["stages.0.a", "stages.0.b"]
    bart = SiteIndex(tiny.build("bart", "sequence"))
    assert not any(name.startswith("classification_head") for name in names(bart, "all-linear"))
    masked = SiteIndex(tiny.build("roberta", "masked"))
    assert not any(name.startswith("lm_head") for name in names(masked, "all-linear"))


def test_an_attention_stands_for_its_projections(plain: SiteIndex) -> None:
    both = ["stages.1.look.in_proj_weight", "stages.1.look.out_proj.weight"]
    assert names(plain, "look", layers=1) == both
    assert names(plain, "stages.1.look") == both
    assert names(plain, "out_proj", layers=1) == both[1:]
    assert names(plain, "look", frozenset({"attention"}), layers=1) == ["stages.1.look"]


def test_bare_parameters_are_named_by_themselves(plain: SiteIndex, mixtral: SiteIndex) -> None:
    assert names(plain, "mixing", layers=2) == ["stages.2.mixing"]
    assert names(plain, "re:stages.2.mix.*") == ["stages.2.mixing"]
    assert "stages.2" in refusal(plain, "stages.2")
    assert names(mixtral, "gate_up_proj", layers=0) == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert names(mixtral, "experts.down_proj", layers=0) == ["model.layers.0.mlp.experts.down_proj"]
    assert names(mixtral, "experts") == names(mixtral, "ffn")
    assert names(mixtral, "router", layers=1) == ["model.layers.1.mlp.gate.weight"]


def test_no_target_is_every_place_of_an_accepted_kind(plain: SiteIndex) -> None:
    assert names(plain, None, LINEAR) == [site.name for site in plain.sites if site.kind == "linear"]


def test_splitting() -> None:
    assert split_items("a, b,,c") == ["a", "b", "c"]
    assert split_items(["a,b", "c"]) == ["a", "b", "c"]
    assert split_items(r"re:x{1,2},re:(a,b),re:[a,b],re:\(,c") == ["re:x{1,2}", "re:(a,b)", "re:[a,b]", r"re:\(", "c"]
    assert split_items("") == []


def test_one_site_matches_one_item(bert: SiteIndex) -> None:
    site = bert.by_name()["bert.encoder.layer.0.attention.self.query"]
    for pattern in ("query", "attention", "self.query", "all-linear", "re:.*query", "role:query", "name:query"):
        assert site.matches(pattern)
    for pattern in ("key", "uery", "re:query", "role:self.query", "name:attention"):
        assert not site.matches(pattern)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_misspelt_item_beside_good_ones(bert: SiteIndex) -> None:
    message = refusal(bert, "query,valeu")
    assert message.startswith("LoRA: target 'valeu' matches nothing in BertForSequenceClassification")
    assert "did you mean 'value' or 'self.value'? `inlay show MODEL`" in message
    assert "searched 17 places of kind conv, embedding, linear, parameter" in message


def test_a_role_that_this_model_does_not_have(bert: SiteIndex) -> None:
    assert "target 'gate' matches nothing" in refusal(bert, "gate")


def test_a_place_of_another_kind(bert: SiteIndex) -> None:
    message = refusal(bert, "LayerNorm", LINEAR)
    assert "matches 5 places of kind norm" in message
    assert "only linear can be used here" in message
    assert r"'re:.*encoder\..*'" in refusal(bert, "encoder")


def test_not_a_regular_expression(bert: SiteIndex) -> None:
    assert "target 're:(query' is not a regular expression" in refusal(bert, "re:(query")


def test_a_callable_that_is_never_true(bert: SiteIndex) -> None:
    assert "the target callable is true for none of" in refusal(bert, lambda site: False)


def test_no_item_at_all(bert: SiteIndex) -> None:
    assert "names no place" in refusal(bert, " , ")
    assert "names no place" in refusal(bert, [])


# -- exclude and layers ----------------------------------------------------------------------------------------------


def test_exclude(bert: SiteIndex) -> None:
    kept = names(bert, "attention", exclude="query,name:1.attention.self.key")
    assert len(kept) == 8 - 2 - 1
    assert not any(name.endswith("query") for name in kept)
    pooled = names(bert, "all-linear")
    assert set(pooled) - set(names(bert, "all-linear", exclude="pooler")) == {"bert.pooler.dense"}
    assert names(bert, "query", exclude="layer.0") == ["bert.encoder.layer.1.attention.self.query"]
    assert names(bert, "query", exclude=lambda site: site.layer == 0) == ["bert.encoder.layer.1.attention.self.query"]


def test_exclude_that_matches_nothing_or_everything(bert: SiteIndex) -> None:
    assert "exclude 'qurey' matches nothing" in refusal(bert, "attention", exclude="qurey")
    message = refusal(bert, "query", exclude="query")
    assert "nothing is left of targets 'query'" in message
    assert "exclude='query'" in message


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [1]), (-1, [2]), ([0, 2], [0, 2]), (range(2), [0, 1]), ("0-1", [0, 1]), ("0,2", [0, 2]), ("-2--1", [1, 2])],
)
def test_layers(plain: SiteIndex, layers: Any, expected: list[int]) -> None:
    assert names(plain, "a", layers=layers) == [f"stages.{layer}.a" for layer in expected]
    assert names(plain, "all-linear", LINEAR, layers=layers) == [f"stages.{n}.{x}" for n in expected for x in "ab"]


def test_layers_of_two_stacks(bart: SiteIndex) -> None:
    queries = [f"encoder.layers.{n}.self_attn.q_proj" for n in range(3)]
    queries += [
        f"decoder.layers.{n}.{attention}.q_proj" for n in range(2) for attention in ("self_attn", "encoder_attn")
    ]
    assert names(bart, "query") == queries
    assert names(bart, "query", layers=0) == [name for name in queries if ".0." in name]
    assert names(bart, "query", layers=2) == ["encoder.layers.2.self_attn.q_proj"]
    last = [name for name in queries if name.startswith(("encoder.layers.2", "decoder.layers.1"))]
    assert names(bart, "query", layers=-1) == last


def test_shared_layers_are_one() -> None:
    albert = SiteIndex(tiny.build("albert", num_hidden_layers=6))
    assert [site.layer for site in albert.select("query", hosts=LORA)] == [0]
    assert "its layers are 0 to 0" in refusal(albert, "query", layers=1)


@pytest.mark.parametrize("layers", [3, -4, [0, 3], "1-3", "7"])
def test_layers_out_of_range(plain: SiteIndex, layers: Any) -> None:
    assert "its layers are 0 to 2 (or -1 to -3 from the end)" in refusal(plain, "a", layers=layers)


@pytest.mark.parametrize("layers", ["a", "2-1", "0:2", "", True, 1.5, [0.5], []])
def test_layers_that_cannot_be_read(plain: SiteIndex, layers: Any) -> None:
    assert "0-3,8" in refusal(plain, "a", layers=layers)


def test_layers_where_there_are_none() -> None:
    index = SiteIndex(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    assert "has no repeated stack" in refusal(index, "all-linear", layers=0)


def test_layers_that_leave_nothing(bert: SiteIndex) -> None:
    assert "layers=0" in refusal(bert, "embed", layers=0)


def test_reading_layers() -> None:
    assert layer_indices("0-3, 8,-1") == [0, 1, 2, 3, 8, -1]


def test_sites_compare_by_identity(bert: SiteIndex) -> None:
    first: Site = bert.sites[0]
    assert first == first
    assert first != SiteIndex(bert.model).sites[0]
