"""How architectures spell what each of their places is for: tables of regular expressions over addresses.

No architecture is known here by its class. `inlay.engine.structure` gives every place an *address*, its path with the
structure written in, and the first row that fits the end of the address names its roles:

    encoder.layer.0.attention.self.query   ->   #.~.@.query      # block  ~ sub-layer of an attention  @ attention
    model.layers.3.self_attn.q_proj        ->   #.@.q_proj
    model.layers.3.mlp.down_proj           ->   #.mlp.down_proj
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

ROLES: dict[str, str] = {
    "attention": "every projection inside an attention",
    "query": "query projection (a fused one too)",
    "key": "key projection (a fused one too)",
    "value": "value projection (a fused one too)",
    "output": "output projection of an attention",
    "qkv": "query, key and value in one projection",
    "kv": "key and value in one projection",
    "q_a": "multi-head latent attention: query down-projection",
    "q_b": "multi-head latent attention: query up-projection",
    "kv_a": "multi-head latent attention: key-value down-projection",
    "kv_b": "multi-head latent attention: key-value up-projection",
    "ffn": "every projection of a feed-forward network",
    "gate": "gate of a gated feed-forward network (a fused one too)",
    "up": "first feed-forward projection (a fused one too)",
    "down": "second feed-forward projection",
    "gate_up": "gate and up in one projection",
    "experts": "feed-forward weights of routed experts",
    "router": "what chooses the experts",
    "shared_expert": "the expert that every token passes through",
    "cross": "everything in a cross-attention",
    "norm": "every normalisation layer",
    "attention_norm": "the normalisation that belongs to an attention sub-layer",
    "ffn_norm": "the normalisation that belongs to a feed-forward sub-layer",
    "qk_norm": "normalisation of queries or keys inside an attention",
    "post_norm": "a normalisation applied after the residual addition",
    "embed": "token embedding",
    "position": "position and type embeddings",
    "patch": "patch or convolutional embedding of images and sound",
    "head": "everything on top of the trunk: classification and language-model heads",
    "lm_head": "a language-model head",
    "pooler": "the pooling layer",
    "block": "one module of the repeated stack",
    "self_attention": "the module that computes a self-attention",
    "cross_attention": "the module that computes a cross-attention",
    "mlp": "the module that holds a feed-forward network",
}
ALIASES = {"ffn.up": "up", "ffn.down": "down", "ffn.gate": "gate", "ffn.gate_up": "gate_up"}


class Rule(NamedTuple):
    """One row: an address that ends in `pattern` has `roles`, if a neighbour fits `beside` (where one is given)."""

    pattern: re.Pattern[str]
    roles: frozenset[str]
    beside: re.Pattern[str] | None


def rule(pattern: str, roles: str, beside: str = "") -> Rule:
    """A row of a table."""
    return Rule(
        re.compile(f"(?:{pattern})$"), frozenset(roles.split()), re.compile(f"(?:{beside})$") if beside else None
    )


QUERY = r"q|q_proj|q_lin|query|query_proj|wq|q_attn|to_q|project_q|linear_q|q_linear|q_head|Wq"
KEY = r"k|k_proj|k_lin|key|key_proj|wk|to_k|project_k|linear_k|k_linear|k_head|Wk"
VALUE = r"v|v_proj|v_lin|value|value_proj|wv|to_v|project_v|linear_v|v_linear|v_head|Wv"
FUSED = r"qkv|qkv_proj|query_key_value|c_attn|Wqkv|to_qkv|qkv_linear|in_proj_weight|in_proj_bias"
FUSED_IN_ATTENTION = r"in_proj|att_proj"  # other modules use these names too: only where the class says attention
KEY_VALUE = r"kv|kv_proj|to_kv|key_value|Wkv"
LATENT = r"kv_a_proj(?:_with_mqa)?|wkv_a"
LATENT_QUERY = r"q_b_proj|wq_b"
OUTPUT = (
    r"o|o_proj|o_b_proj|out_proj|out_lin|out|output|dense|c_proj|proj|projection_layer|Wo|wo|to_out(\.0)?|output_proj"
    r"|linear_out|post_proj"
)

# Projections: linear, convolution and parameter places.
PROJECTIONS = (
    rule(r"@\.(q_a_proj|wq_a)", "attention q_a"),
    rule(rf"@\.({LATENT_QUERY})", "attention q_b query"),
    rule(rf"@\.({LATENT})", "attention kv_a"),
    rule(r"@\.(kv_b_proj|wkv_b)", "attention kv_b kv key value"),
    rule(r"@\.c_attn", "attention kv key value", beside=r"q_attn"),
    rule(rf"@\.({FUSED}|{FUSED_IN_ATTENTION})", "attention qkv query key value"),
    rule(rf"@\.({KEY_VALUE})", "attention kv key value"),
    rule(rf"@\.({QUERY}|q_proj_weight)", "attention query"),
    rule(rf"@\.({KEY}|k_proj_weight)", "attention key"),
    rule(rf"@\.({VALUE}|v_proj_weight)", "attention value"),
    rule(rf"@\.({OUTPUT}|out_proj\.(weight|bias))", "attention output"),
    rule(r"~\.(output\.)?(dense|proj|linear|c_proj|out_proj|o_proj)|~\.output", "attention output"),
    rule(r"@\..*", "attention"),
    rule(r"\.linear_attn\.in_proj_qkvz?", "attention qkv query key value"),
    rule(r"\.linear_attn\.out_proj", "attention output"),
    rule(r"\.linear_attn\.in_proj_\w+", "attention"),
    rule(r"\.(gate|router|wg)(\.\w+)?", "router", beside=r"experts?"),
    rule(r"\.router(\.\w+)*|\.shared_experts?_gate", "router"),
    rule(r"\.(gate_up_proj|up_gate_proj|gate_and_up_proj|w12|Wi|input_linear(\.weight)?)", "ffn gate_up gate up"),
    rule(r"\.(gate_proj|wi_0|w_gate)", "ffn gate"),
    rule(r"\.w1", "ffn gate", beside=r"w3|v1"),
    rule(
        r"\.(up_proj|wi_1|wi|w3|v1|w1|w_up|c_fc|fc1|fc_in|lin1|linear_?1|linear_fc1|layer_1|dense1|dense_h_to_4h)"
        r"|\.(intermediate_dense|intermediate\w*\.dense|feed_forward\.intermediate)|#\.ffn|\.(mlp|ffn?|net)\.0",
        "ffn up",
    ),
    rule(
        r"\.(down_proj|wo|Wo|w2|w_down|c_proj|fc2|fc_out|lin2|linear_?2|linear_fc2|layer_2|dense2|dense_4h_to_h)"
        r"|\.(output_dense|feed_forward\.output|output_linear(\.weight)?|ffn\.\d+\.output\.dense)"
        r"|#\.(output\w*\.dense|ffn_output)|\.(mlp|ffn?|net)\.[23]",
        "ffn down",
    ),
)
EXPERTS = re.compile(r"\.experts\.|moe\.(in|out)put_linear\.")
SHARED_EXPERT = re.compile(r"\.(shared_experts?|shared_mlp)\.")

# Normalisation inside a block. After the residual addition ("after"), before it ("before"), as a flag of the block or
# of its config says ("flagged"), or, where none of these is given, as `Structure.normalises_first` finds.
NORMS = (
    rule(r"@\.(q|k|query|key)_?(norm|layer_?norm|ln)", "qk_norm before"),
    rule(r"#\.~\.output\.(LayerNorm|layer_?norm)", "attention_norm after"),
    rule(r"#\.output\w*\.(LayerNorm|layer_?norm)", "ffn_norm after"),
    rule(r"#\.[~@]\.(LayerNorm|layer_?norm|ln)", "attention_norm"),
    rule(r"#\.(encoder_attn|cross_attn|cross_attention)_layer_norm|#\.ln_cross_attn", "attention_norm cross"),
    rule(r"#\.norm2", "attention_norm cross flagged", beside=r"norm3"),
    rule(r"#\.norm_?1", "attention_norm flagged"),
    rule(r"#\.norm_?[23]", "ffn_norm flagged"),
    rule(r"#\.post_attention_layernorm", "attention_norm before", beside=r"(pre|post)_feedforward_layernorm"),
    rule(r"#\.(post_attention_layernorm|layernorm_after|layer_?norm_?2|mlp_norm|ffn_norm|ln_mlp)", "ffn_norm before"),
    rule(r"#\.(pre|post)_(feedforward|mlp|ffn|moe|ff)_?(layer)?_?norm", "ffn_norm before"),
    rule(r"#\.(input_layernorm|layernorm_before|layer_?norm_?1|attn_norm|attention_norm)", "attention_norm before"),
    rule(r"#\.pre_(attention|attn|self_attn)_?(layer)?_?norm|#\.ln_attn", "attention_norm before"),
    rule(r"#\.self_attn_layer_norm", "attention_norm before", beside=r"conv_module|ffn1_layer_norm"),
    rule(r"#\.(self_attn|self_attention|sa|attention|attn)_(layer_?norm|ln)|#\.ln_?1", "attention_norm"),
    rule(r"#\.layer_norm", "attention_norm", beside=r"final_layer_norm"),
    rule(r"#\.(final|output|ffn|feed_forward|full_layer)_(layer_)?(layer_?norm|ln)|#\.ln_?2", "ffn_norm"),
    rule(r"#\.(layer\.\d+|ffn|ff|feed_forward|mlp)\.(layer_?norm|LayerNorm)", "ffn_norm"),
)
NORM_ALONE = re.compile(r"#\.(input_layernorm|ln_1|norm1)$")  # in a parallel block, one norm serves both sub-layers

MODULES = (
    rule(r"\.(gate|router)", "router", beside=r"experts?"),
    rule(r"\.experts", "experts"),
    rule(r"\.(shared_experts?|shared_mlp)", "shared_expert"),
)
MLP = re.compile(
    r"#\.(?!.*@)(.*\.)?(mlp|ffn\d?|ff|feed_?forward\d?|DenseReluDense|block_sparse_moe|moe|moe_block)$", re.IGNORECASE
)
CROSS = re.compile(r"cross|encoder_attn|EncDec|enc_dec", re.IGNORECASE)
POSITION = re.compile(
    r"(^|[._])(pos|positions?|positional)([._]|$)|(wpe|token_type_\w+|segment_\w+|relative_\w+|rel_embeddings)$"
)
PATCH = re.compile(r"patch|feature_extractor|conv_layers|stem|embed|(^|\.)conv\d+$")

TASK_CLASS = re.compile(r".*For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector|Segmentation|Detection)")
LM_CLASS = re.compile(r".*(For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)|LMHeadModel|WithLMHead\w*)")
HEAD = re.compile(
    r"classifier|pre_classifier|score|qa_outputs|classification_head|heads?|logits_proj|sequence_summary"
    r"|multiple_choice_head|seq_relationship"
)
LM_HEAD = re.compile(r"lm_head|cls|predictions|generator_predictions|generator_lm_head|proj_out|embed_out|vocab_\w+")
NOT_FINAL_NORM = re.compile(r"emb|pre_|rel")  # norms of embeddings, and norms before a stack
NORM_FIRST_FIELDS = ("norm_first", "do_layer_norm_before", "do_stable_layer_norm", "normalize_before")


def known_role(text: str) -> str | None:
    """The role that `text` spells, or None."""
    text = ALIASES.get(text, text)
    return text if text in ROLES else None


def new_heads(model: nn.Module) -> list[str]:
    """Paths of the modules that were added, untrained, on top of a pretrained trunk.

    They are what a transformers task class (…ForSequenceClassification, …ForCTC) holds beside its trunk, or what a
    module of the user's own holds beside a transformers model. Empty for bare trunks and for language models. A head
    that comes with the pretrained weights (ModernBERT's prediction head) is not new.
    """
    if not (TASK_CLASS.fullmatch(type(model).__name__) or _wraps_pretrained(model)):
        return []
    return [name for name in _on_top(model) if "PredictionHead" not in type(model.get_submodule(name)).__name__]


def _is_pretrained(module: nn.Module) -> bool:
    """Whether a module is one of transformers' models, told without importing transformers."""
    return hasattr(module, "base_model_prefix") and hasattr(module, "config")


def _wraps_pretrained(model: nn.Module) -> bool:
    return not _is_pretrained(model) and any(_is_pretrained(child) for child in model.children())


def _on_top(model: nn.Module) -> list[str]:
    """Children of the model that lie outside its trunk and have weights."""
    children = {name: child for name, child in model.named_children() if name != "inlays"}
    weighted = {name: child for name, child in children.items() if any(True for _ in child.parameters())}
    if _wraps_pretrained(model):
        return [name for name, child in weighted.items() if not _is_pretrained(child)]
    trunk = getattr(model, "base_model_prefix", "")
    if trunk in children:
        return [name for name in weighted if name != trunk]
    named = [name for name in weighted if HEAD.fullmatch(name) or LM_HEAD.fullmatch(name)]
    return ["projector", *named] if "projector" in weighted and "classifier" in named else named


def heads(model: nn.Module) -> dict[str, frozenset[str]]:
    """Paths of every head, new or pretrained, with its roles."""
    plain, language = frozenset({"head"}), frozenset({"head", "lm_head"})
    lm = bool(LM_CLASS.fullmatch(type(model).__name__))
    found = {name: language if lm or LM_HEAD.fullmatch(name) else plain for name in _on_top(model)}
    if "cls" in found:
        found["cls.seq_relationship"] = plain
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    if isinstance(output, nn.Module):
        for path, module in model.named_modules():
            if module is output and not any(f"{path}.".startswith(f"{head}.") for head in found):
                found[path] = language
    return found
