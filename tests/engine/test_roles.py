"""The roles of every place in the architectures that Inlay names, stated in full: nothing more and nothing less."""

from __future__ import annotations

import pytest
import torch
import transformers
from engine import tiny
from torch import nn

from inlay.engine.roles import ROLES, known_role, new_heads
from inlay.engine.sites import Site, SiteIndex

# "architecture stack" -> the places of each block, relative to it, by role. Umbrellas ("attention", "ffn", "norm",
# "block") follow from the others and are checked as such. A line "role@1" holds for layer 1 only.
BERT = """
    self_attention attention.self
    query attention.self.query
    key attention.self.key
    value attention.self.value
    output attention.output.dense
    up intermediate.dense
    down output.dense
    attention_norm attention.output.LayerNorm
    ffn_norm output.LayerNorm
    post_norm attention.output.LayerNorm output.LayerNorm
"""
LLAMA = """
    self_attention self_attn
    query self_attn.q_proj
    key self_attn.k_proj
    value self_attn.v_proj
    output self_attn.o_proj
    mlp mlp
    gate mlp.gate_proj
    up mlp.up_proj
    down mlp.down_proj
    attention_norm input_layernorm
    ffn_norm post_attention_layernorm
"""
QK_NORM = """
    qk_norm self_attn.q_norm self_attn.k_norm
"""
SANDWICH = """
    attention_norm input_layernorm post_attention_layernorm
    ffn_norm pre_feedforward_layernorm post_feedforward_layernorm
"""
FAIRSEQ = """
    self_attention self_attn
    query self_attn.q_proj
    key self_attn.k_proj
    value self_attn.v_proj
    output self_attn.out_proj
    up fc1
    down fc2
    attention_norm self_attn_layer_norm
    ffn_norm final_layer_norm
"""
FAIRSEQ_DECODER = """
    self_attention self_attn
    cross_attention encoder_attn
    cross encoder_attn encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj
    cross encoder_attn_layer_norm
    query self_attn.q_proj encoder_attn.q_proj
    key self_attn.k_proj encoder_attn.k_proj
    value self_attn.v_proj encoder_attn.v_proj
    output self_attn.out_proj encoder_attn.out_proj
    up fc1
    down fc2
    attention_norm self_attn_layer_norm encoder_attn_layer_norm
    ffn_norm final_layer_norm
"""
MIXTURE = """
    self_attention self_attn
    query self_attn.q_proj
    key self_attn.k_proj
    value self_attn.v_proj
    output self_attn.o_proj
    mlp mlp
    router mlp.gate mlp.gate.weight
    experts mlp.experts mlp.experts.gate_up_proj mlp.experts.down_proj
    gate mlp.experts.gate_up_proj
    up mlp.experts.gate_up_proj
    gate_up mlp.experts.gate_up_proj
    down mlp.experts.down_proj
    attention_norm input_layernorm
    ffn_norm post_attention_layernorm
"""
T5_ENCODER = """
    self_attention layer.0.SelfAttention
    query layer.0.SelfAttention.q
    key layer.0.SelfAttention.k
    value layer.0.SelfAttention.v
    output layer.0.SelfAttention.o
    position@0 layer.0.SelfAttention.relative_attention_bias
    mlp layer.1.DenseReluDense
    down layer.1.DenseReluDense.wo
    attention_norm layer.0.layer_norm
    ffn_norm layer.1.layer_norm
"""
CROSS = "layer.1.EncDecAttention"
T5_DECODER = f"""
    self_attention layer.0.SelfAttention
    cross_attention {CROSS}
    cross layer.1 {CROSS} {CROSS}.q {CROSS}.k {CROSS}.v {CROSS}.o layer.1.layer_norm
    query layer.0.SelfAttention.q {CROSS}.q
    key layer.0.SelfAttention.k {CROSS}.k
    value layer.0.SelfAttention.v {CROSS}.v
    output layer.0.SelfAttention.o {CROSS}.o
    position@0 layer.0.SelfAttention.relative_attention_bias
    mlp layer.2.DenseReluDense
    down layer.2.DenseReluDense.wo
    attention_norm layer.0.layer_norm layer.1.layer_norm
    ffn_norm layer.2.layer_norm
"""
POST = "post_norm self_attn_layer_norm final_layer_norm"

BLOCKS = {
    "bert encoder.layer": BERT,
    "roberta encoder.layer": BERT,
    "xlm-roberta encoder.layer": BERT,
    "electra encoder.layer": BERT,
    "deberta-v2 encoder.layer": BERT.replace("self.query", "self.query_proj")
    .replace("self.key", "self.key_proj")
    .replace("self.value", "self.value_proj"),
    "distilbert transformer.layer": """
        self_attention attention
        query attention.q_lin
        key attention.k_lin
        value attention.v_lin
        output attention.out_lin
        mlp ffn
        up ffn.lin1
        down ffn.lin2
        attention_norm sa_layer_norm
        ffn_norm output_layer_norm
        post_norm sa_layer_norm output_layer_norm
    """,
    "albert encoder.albert_layer_groups.0.albert_layers": """
        self_attention attention
        query attention.query
        key attention.key
        value attention.value
        output attention.dense
        up ffn
        down ffn_output
        attention_norm attention.LayerNorm
        ffn_norm full_layer_layer_norm
        post_norm attention.LayerNorm full_layer_layer_norm
    """,
    # The first block's attn_norm is an Identity: the embedding has been normalised already.
    "modernbert layers": """
        self_attention attn
        query attn.Wqkv
        key attn.Wqkv
        value attn.Wqkv
        qkv attn.Wqkv
        output attn.Wo
        mlp mlp
        gate mlp.Wi
        up mlp.Wi
        gate_up mlp.Wi
        down mlp.Wo
        attention_norm@1 attn_norm
        ffn_norm mlp_norm
    """,
    "gpt2 h": """
        self_attention attn
        query attn.c_attn
        key attn.c_attn
        value attn.c_attn
        qkv attn.c_attn
        output attn.c_proj
        mlp mlp
        up mlp.c_fc
        down mlp.c_proj
        attention_norm ln_1
        ffn_norm ln_2
    """,
    "gpt-neox layers": """
        self_attention attention
        query attention.query_key_value
        key attention.query_key_value
        value attention.query_key_value
        qkv attention.query_key_value
        output attention.dense
        mlp mlp
        up mlp.dense_h_to_4h
        down mlp.dense_4h_to_h
        attention_norm input_layernorm
        ffn_norm post_attention_layernorm
    """,
    "opt decoder.layers": FAIRSEQ,
    "llama layers": LLAMA,
    "mistral layers": LLAMA,
    "qwen2 layers": LLAMA,
    "qwen3 layers": LLAMA + QK_NORM,
    "gemma layers": LLAMA,
    "gemma2 layers": LLAMA.split("    attention_norm")[0] + SANDWICH,
    "gemma3 layers": LLAMA.split("    attention_norm")[0] + SANDWICH + QK_NORM,
    # Attention and feed-forward run side by side behind one norm.
    "phi layers": """
        self_attention self_attn
        query self_attn.q_proj
        key self_attn.k_proj
        value self_attn.v_proj
        output self_attn.dense
        mlp mlp
        up mlp.fc1
        down mlp.fc2
        attention_norm input_layernorm
        ffn_norm input_layernorm
    """,
    "phi3 layers": """
        self_attention self_attn
        query self_attn.qkv_proj
        key self_attn.qkv_proj
        value self_attn.qkv_proj
        qkv self_attn.qkv_proj
        output self_attn.o_proj
        mlp mlp
        gate mlp.gate_up_proj
        up mlp.gate_up_proj
        gate_up mlp.gate_up_proj
        down mlp.down_proj
        attention_norm input_layernorm
        ffn_norm post_attention_layernorm
    """,
    "deepseek-v3 layers": """
        self_attention self_attn
        q_a self_attn.q_a_proj
        q_b self_attn.q_b_proj
        query self_attn.q_b_proj
        kv_a self_attn.kv_a_proj_with_mqa
        kv_b self_attn.kv_b_proj
        kv self_attn.kv_b_proj
        key self_attn.kv_b_proj
        value self_attn.kv_b_proj
        output self_attn.o_proj
        mlp mlp
        gate@0 mlp.gate_proj
        up@0 mlp.up_proj
        down@0 mlp.down_proj
        router@1 mlp.gate mlp.gate.weight
        experts@1 mlp.experts mlp.experts.gate_up_proj mlp.experts.down_proj
        shared_expert@1 mlp.shared_experts mlp.shared_experts.gate_proj mlp.shared_experts.up_proj
        shared_expert@1 mlp.shared_experts.down_proj
        gate_up@1 mlp.experts.gate_up_proj
        gate@1 mlp.experts.gate_up_proj mlp.shared_experts.gate_proj
        up@1 mlp.experts.gate_up_proj mlp.shared_experts.up_proj
        down@1 mlp.experts.down_proj mlp.shared_experts.down_proj
        attention_norm input_layernorm
        ffn_norm post_attention_layernorm
        norm self_attn.q_a_layernorm self_attn.kv_a_layernorm
    """,
    "mixtral layers": MIXTURE,
    "qwen2-moe layers": MIXTURE
    + """
        router mlp.shared_expert_gate
        shared_expert mlp.shared_expert mlp.shared_expert.gate_proj mlp.shared_expert.up_proj
        shared_expert mlp.shared_expert.down_proj
        gate mlp.shared_expert.gate_proj
        up mlp.shared_expert.up_proj
        down mlp.shared_expert.down_proj
    """,
    "qwen3-moe layers": MIXTURE + QK_NORM,
    "t5 encoder.block": T5_ENCODER + "up layer.1.DenseReluDense.wi",
    "t5 decoder.block": T5_DECODER + "up layer.2.DenseReluDense.wi",
    "t5-gated encoder.block": T5_ENCODER
    + """
        gate layer.1.DenseReluDense.wi_0
        up layer.1.DenseReluDense.wi_1
    """,
    "bart encoder.layers": FAIRSEQ + POST,
    "bart decoder.layers": FAIRSEQ_DECODER + POST + " encoder_attn_layer_norm",
    "whisper encoder.layers": FAIRSEQ,
    "whisper decoder.layers": FAIRSEQ_DECODER,
    "wav2vec2 encoder.layers": """
        self_attention attention
        query attention.q_proj
        key attention.k_proj
        value attention.v_proj
        output attention.out_proj
        mlp feed_forward
        up feed_forward.intermediate_dense
        down feed_forward.output_dense
        attention_norm layer_norm
        ffn_norm final_layer_norm
        post_norm layer_norm final_layer_norm
    """,
    "vit layers": """
        self_attention attention
        query attention.q_proj
        key attention.k_proj
        value attention.v_proj
        output attention.o_proj
        mlp mlp
        up mlp.fc1
        down mlp.fc2
        attention_norm layernorm_before
        ffn_norm layernorm_after
    """,
    "clip text_model.encoder.layers": FAIRSEQ.split("    up")[0]
    + """
        mlp mlp
        up mlp.fc1
        down mlp.fc2
        attention_norm layer_norm1
        ffn_norm layer_norm2
    """,
    "torch layers": """
        self_attention self_attn
        qkv self_attn.in_proj_weight
        query self_attn.in_proj_weight
        key self_attn.in_proj_weight
        value self_attn.in_proj_weight
        output self_attn.out_proj.weight
        up linear1
        down linear2
        attention_norm norm1
        ffn_norm norm2
        post_norm norm1 norm2
    """,
}
ATTENTION = {"query", "key", "value", "output", "qkv", "kv", "q_a", "q_b", "kv_a", "kv_b"}
FEED_FORWARD = {"gate", "up", "down", "gate_up"}
NORMALISATION = {"attention_norm", "ffn_norm", "qk_norm", "post_norm"}


def build(name: str) -> nn.Module:
    if name == "torch":
        return tiny.build_transformer_encoder()
    return tiny.build_clip() if name == "clip" else tiny.build(name)


def expected(text: str, layer: int) -> dict[str, set[str]]:
    """The places of one layer by role, from a table above, with its umbrellas."""
    found: dict[str, set[str]] = {}
    for line in text.split("\n"):
        role, *names = line.split() or [""]
        role, _, only = role.partition("@")
        if role and only in ("", str(layer)):
            found.setdefault(role, set()).update(names)
    for umbrella, parts in (("attention", ATTENTION), ("ffn", FEED_FORWARD), ("norm", NORMALISATION)):
        found.setdefault(umbrella, set()).update(*(found.get(part, set()) for part in parts))
    found["block"] = {""}
    return found


def actual(sites: list[Site], block: str) -> dict[str, set[str]]:
    """The places inside one block by role."""
    found: dict[str, set[str]] = {}
    for site in sites:
        if f"{site.name}.".startswith(f"{block}."):
            for role in site.roles:
                found.setdefault(role, set()).add(site.name[len(block) + 1 :])
    return found


@pytest.mark.parametrize("stack", BLOCKS)
def test_roles_of_every_place_in_a_block(stack: str) -> None:
    name, path = stack.split()
    sites = SiteIndex(build(name)).sites
    blocks = [site for site in sites if "block" in site.roles and site.path.rpartition(".")[0] == path]
    assert [site.layer for site in blocks] == list(range(1 if name == "albert" else tiny.LAYERS))
    for block in blocks:
        assert block.layer is not None
        assert actual(sites, block.path) == expected(BLOCKS[stack], block.layer)


def test_every_architecture_is_stated() -> None:
    assert {stack.split()[0] for stack in BLOCKS} == {*tiny.names(), "clip", "torch"}


# "architecture head" -> places outside the blocks by role, and last the modules that the task class added.
OUTSIDE = {
    "bert sequence": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm; pooler pooler pooler.dense; head classifier; "
    "new classifier",
    "roberta sequence": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm; "
    "head classifier classifier.dense classifier.out_proj; new classifier",
    "xlm-roberta token": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm; head classifier; new classifier",
    "distilbert sequence": "embed embeddings.word_embeddings; position embeddings.position_embeddings; "
    "norm embeddings.LayerNorm; head pre_classifier classifier; new pre_classifier classifier",
    "albert question": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm; head qa_outputs; new qa_outputs",
    # DeBERTa's pooler comes with the task class and is not in the pretrained weights.
    "deberta-v2 sequence": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "encoder.rel_embeddings; norm embeddings.LayerNorm encoder.LayerNorm; pooler pooler pooler.dense; "
    "head pooler pooler.dense classifier; new pooler classifier",
    # ModernBERT's prediction head is in the pretrained weights.
    "modernbert sequence": "embed embeddings.tok_embeddings; norm embeddings.norm final_norm head.norm; "
    "head head head.dense head.norm classifier; new classifier",
    "electra choice": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm; "
    "head sequence_summary sequence_summary.summary classifier; new sequence_summary classifier",
    "gpt2 sequence": "embed wte; position wpe; norm ln_f; head score; new score",
    "gpt2 causal": "embed wte; position wpe; norm ln_f; head lm_head; lm_head lm_head; new",
    "opt causal": "embed decoder.embed_tokens; position decoder.embed_positions; norm decoder.final_layer_norm; "
    "head lm_head; lm_head lm_head; new",
    "gpt-neox causal": "embed embed_in; norm final_layer_norm; head lm_head; lm_head lm_head; new",
    "llama causal": "embed embed_tokens; norm norm; head lm_head; lm_head lm_head; new",
    "llama sequence": "embed embed_tokens; norm norm; head score; new score",
    "gemma3 sequence": "embed embed_tokens; norm norm; head score; new score",
    "qwen2 token": "embed embed_tokens; norm norm; head score; new score",
    "mistral question": "embed embed_tokens; norm norm; head qa_outputs; new qa_outputs",
    "bert masked": "embed embeddings.word_embeddings; position embeddings.position_embeddings "
    "embeddings.token_type_embeddings; norm embeddings.LayerNorm cls.predictions.transform.LayerNorm; "
    "head cls cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions.decoder; "
    "lm_head cls cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions.decoder; new",
    "t5 conditional": "embed shared encoder.embed_tokens decoder.embed_tokens; "
    "norm encoder.final_layer_norm decoder.final_layer_norm; head lm_head; lm_head lm_head; new",
    "bart sequence": "embed shared encoder.embed_tokens decoder.embed_tokens; "
    "position encoder.embed_positions decoder.embed_positions; "
    "norm encoder.layernorm_embedding decoder.layernorm_embedding; "
    "head classification_head classification_head.dense classification_head.out_proj; new classification_head",
    "whisper conditional": "embed decoder.embed_tokens; position encoder.embed_positions decoder.embed_positions; "
    "patch encoder.conv1 encoder.conv2; norm encoder.layer_norm decoder.layer_norm; head proj_out; "
    "lm_head proj_out; new",
    "whisper audio": "position encoder.embed_positions; patch encoder.conv1 encoder.conv2; norm encoder.layer_norm; "
    "head projector classifier; new projector classifier",
    "wav2vec2 sequence": "position encoder.pos_conv_embed.conv; patch feature_extractor.conv_layers.0.conv "
    "feature_extractor.conv_layers.1.conv; norm feature_extractor.conv_layers.0.layer_norm "
    "feature_projection.layer_norm encoder.layer_norm; head projector classifier; new projector classifier",
    "wav2vec2 ctc": "position encoder.pos_conv_embed.conv; patch feature_extractor.conv_layers.0.conv "
    "feature_extractor.conv_layers.1.conv; norm feature_extractor.conv_layers.0.layer_norm "
    "feature_projection.layer_norm encoder.layer_norm; head lm_head; lm_head lm_head; new lm_head",
    "vit image": "position embeddings.position_embeddings; patch embeddings.patch_embeddings.projection; "
    "norm layernorm; head classifier; new classifier",
}


@pytest.mark.parametrize("which", OUTSIDE)
def test_roles_outside_the_blocks(which: str) -> None:
    model = tiny.build(*which.split())
    stated = {line.split()[0]: set(line.split()[1:]) for line in OUTSIDE[which].split(";")}
    assert set(new_heads(model)) == stated.pop("new")
    trunk = model.base_model_prefix + "."
    found: dict[str, set[str]] = {}
    for site in SiteIndex(model).sites:
        for role in site.roles if site.layer is None else ():
            found.setdefault(role, set()).add(site.name.removeprefix(trunk))
    assert found == stated


def test_clip_has_two_towers() -> None:
    roles = SiteIndex(tiny.build_clip()).roles()
    assert [site.path for site in roles["embed"]] == ["text_model.embeddings.token_embedding"]
    assert [site.path for site in roles["patch"]] == ["vision_model.embeddings.patch_embedding"]
    assert len(roles["block"]) == 2 * tiny.LAYERS
    assert {site.out_features for site in roles["query"]} == {32, 24}


def test_trunks_have_no_new_heads() -> None:
    for name in tiny.names():
        assert new_heads(tiny.build(name)) == []


def test_heads_of_a_users_own_module_are_new() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny.build("bert")
            self.dropout = nn.Dropout(0.1)
            self.verdict = nn.Linear(32, 2)

    model = Mine()
    assert new_heads(model) == ["verdict"]
    chosen = SiteIndex(model).select("all-linear", hosts=frozenset({"linear"}))
    assert "verdict" not in {site.name for site in chosen}
    assert new_heads(tiny.Plain()) == []


@pytest.mark.parametrize(
    ("name", "changes", "post"),
    [
        ("opt", {"do_layer_norm_before": False}, True),
        ("wav2vec2", {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, False),
    ],
)
def test_the_config_says_whether_norms_come_last(name: str, changes: dict[str, object], post: bool) -> None:
    roles = SiteIndex(tiny.build(name, **changes)).roles()
    assert (set(roles.get("post_norm", ())) == {*roles["attention_norm"], *roles["ffn_norm"]}) is post
    assert ("post_norm" in roles) is post


def test_torch_layers_say_whether_norms_come_first() -> None:
    assert "post_norm" not in SiteIndex(tiny.build_transformer_encoder(norm_first=True)).roles()


def test_post_norms_are_where_the_hidden_states_leave_the_sub_layer_normalised() -> None:
    """The role is checked against what the models compute: a post-norm's output is its sub-layer's output."""
    tokens = torch.arange(12).reshape(2, 6)
    for name in ("bert", "distilbert", "llama", "gpt2", "deberta-v2", "opt", "modernbert", "albert"):
        model = tiny.build(name)
        index = SiteIndex(model)
        outputs: dict[str, torch.Tensor] = {}

        def keep(path: str, outputs: dict[str, torch.Tensor] = outputs) -> object:
            def hook(module: nn.Module, args: object, output: object) -> None:
                outputs[path] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

            return hook

        blocks, norms = index.roles()["block"], index.roles()["ffn_norm"]
        handles = [s.module.register_forward_hook(keep(s.path)) for s in [*blocks, *norms]]  # type: ignore[arg-type]
        with torch.no_grad():
            model(tokens)
        for handle in handles:
            handle.remove()
        for block in blocks:
            norm = next(site for site in norms if site.path.startswith(block.path + "."))
            ends_normalised = torch.equal(outputs[block.path], outputs[norm.path])
            assert ends_normalised == ("post_norm" in norm.roles), (name, norm.path)


def test_cross_attention_in_gpt2_and_bert() -> None:
    gpt2 = SiteIndex(tiny.build("gpt2", add_cross_attention=True)).by_name()
    assert gpt2["h.0.crossattention.c_attn"].roles == {"attention", "cross", "kv", "key", "value"}
    assert gpt2["h.0.crossattention.q_attn"].roles == {"attention", "cross", "query"}
    assert gpt2["h.0.ln_cross_attn"].roles == {"norm", "attention_norm", "cross"}
    assert gpt2["h.0.crossattention"].roles == {"cross", "cross_attention"}
    bert = SiteIndex(tiny.build("bert", is_decoder=True, add_cross_attention=True)).by_name()
    assert bert["encoder.layer.1.crossattention.self"].roles == {"cross", "cross_attention"}
    assert bert["encoder.layer.1.crossattention.output.dense"].roles == {"attention", "cross", "output"}
    assert bert["encoder.layer.1.crossattention.output.LayerNorm"].roles >= {"cross", "attention_norm", "post_norm"}
    assert bert["encoder.layer.1.attention.self.query"].roles == {"attention", "query"}


def test_cross_attention_in_torchs_decoder() -> None:
    layer = nn.TransformerDecoderLayer(12, 2, dim_feedforward=20, batch_first=True)
    sites = SiteIndex(nn.TransformerDecoder(layer, 2)).by_name()
    assert sites["layers.1.multihead_attn"].roles == {"cross", "cross_attention"}
    assert sites["layers.1.multihead_attn.out_proj.weight"].roles == {"attention", "cross", "output"}
    assert sites["layers.1.norm2"].roles == {"norm", "attention_norm", "cross", "post_norm"}
    assert sites["layers.1.norm3"].roles == {"norm", "ffn_norm", "post_norm"}


def test_one_block_alone_has_its_roles() -> None:
    roles = SiteIndex(tiny.build("llama").layers[0]).roles()
    assert {role: [site.name for site in sites] for role, sites in roles.items() if role in ("query", "down")} == {
        "query": ["self_attn.q_proj"],
        "down": ["mlp.down_proj"],
    }
    assert [site.name for site in roles["attention_norm"]] == ["input_layernorm"]


def test_a_network_without_attention_has_blocks_and_layers() -> None:
    stack = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(mlps(3)))
    index = SiteIndex(stack)
    assert [(site.path, site.layer) for site in index.roles()["block"]] == [("1.0", 0), ("1.1", 1), ("1.2", 2)]


def test_layers_of_nested_stacks_count_on() -> None:
    model = tiny.build("albert", num_hidden_groups=2, inner_group_num=2, num_hidden_layers=4)
    blocks = SiteIndex(model).roles()["block"]
    assert [(site.layer, site.depth) for site in blocks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert blocks[2].path == "encoder.albert_layer_groups.1.albert_layers.0"


def test_a_block_that_has_a_piece_in_it_is_still_one_of_its_stack() -> None:
    for model in (tiny.build("albert", num_hidden_groups=2, num_hidden_layers=2), nn.Sequential(*mlps(3))):
        before = [(site.path, site.layer) for site in SiteIndex(model).roles()["block"]]
        block = model.get_submodule(before[1][0])
        block.__class__ = type(type(block).__name__, (type(block),), {})
        assert [(site.path, site.layer) for site in SiteIndex(model).roles()["block"]] == before


def mlps(count: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(count)]


def test_aliases_and_unknown_roles() -> None:
    assert known_role("ffn.up") == "up"
    assert known_role("query") == "query"
    assert known_role("q_proj") is None
    assert all(description for description in ROLES.values())


def test_transformers_is_what_the_tables_were_written_for() -> None:
    # A new major version may lay modules out anew: the tables above then need a look.
    assert transformers.__version__.split(".")[0] == "5"
