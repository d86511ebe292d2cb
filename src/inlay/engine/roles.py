"""What each place of a model is for, read from its name and its neighbours by tables of regular expressions.

No architecture is known here by name. A place is first given an *address*, its path with the structure written in:

    encoder.layer.0.attention.self.query   ->   #.~.@.query       # block   ~ sub-layer around an attention   @ attention
    model.layers.3.self_attn.q_proj        ->   #.@.q_proj
    model.layers.3.mlp.down_proj           ->   #.mlp.down_proj

and then the first row of the table for its kind that fits (`PROJECTIONS`, `NORMS`, `MODULES`) names its roles. An
attention is a module that holds query, key and value projections, whatever they are called; a block is the smallest
numbered entry of a container that holds an attention and other weights beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
    """One row: an address that ends in `pattern` has `roles`, if a neighbour's name is `beside` (where one is given)."""

    pattern: re.Pattern[str]
    roles: frozenset[str]
    beside: re.Pattern[str] | None


def rule(pattern: str, roles: str, beside: str = "") -> Rule:
    """A row of a table."""
    return Rule(
        re.compile(f"(?:{pattern})$"), frozenset(roles.split()), re.compile(f"(?:{beside})$") if beside else None
    )


QUERY = r"q|q_proj|q_lin|query|query_proj|wq|q_attn|to_q|project_q|linear_q|q_linear|Wq"
KEY = r"k|k_proj|k_lin|key|key_proj|wk|to_k|project_k|linear_k|k_linear|Wk"
VALUE = r"v|v_proj|v_lin|value|value_proj|wv|to_v|project_v|linear_v|v_linear|Wv"
FUSED = r"qkv|qkv_proj|query_key_value|c_attn|Wqkv|to_qkv|qkv_linear|in_proj_weight|in_proj_bias"
KEY_VALUE = r"kv|kv_proj|to_kv|key_value|Wkv"
LATENT = r"kv_a_proj(?:_with_mqa)?|wkv_a"
OUTPUT = r"o|o_proj|out_proj|out_lin|dense|c_proj|proj|Wo|wo|to_out|to_out\.0|output_proj|linear_out|post_proj|out"

# Projections: linear, convolution and parameter places.
PROJECTIONS = (
    rule(r"@\.(q_a_proj|wq_a)", "attention q_a"),
    rule(r"@\.(q_b_proj|wq_b)", "attention q_b query"),
    rule(rf"@\.({LATENT})", "attention kv_a"),
    rule(r"@\.(kv_b_proj|wkv_b)", "attention kv_b kv key value"),
    rule(r"@\.c_attn", "attention kv key value", beside=r"q_attn"),
    rule(rf"@\.({FUSED})", "attention qkv query key value"),
    rule(rf"@\.({KEY_VALUE})", "attention kv key value"),
    rule(rf"@\.({QUERY}|q_proj_weight)", "attention query"),
    rule(rf"@\.({KEY}|k_proj_weight)", "attention key"),
    rule(rf"@\.({VALUE}|v_proj_weight)", "attention value"),
    rule(rf"@\.({OUTPUT}|out_proj\.(weight|bias))", "attention output"),
    rule(r"~\.(output\.)?(dense|proj|linear|c_proj|out_proj|o_proj)", "attention output"),
    rule(r"@\..*", "attention"),
    rule(r"\.(gate|router|wg)(\.\w+)?", "router", beside=r"experts?"),
    rule(r"\.router(\.\w+)*|\.shared_experts?_gate", "router"),
    rule(r"\.(gate_up_proj|up_gate_proj|gate_and_up_proj|w12|Wi|input_linear(\.weight)?)", "ffn gate_up gate up"),
    rule(r"\.(gate_proj|wi_0|w_gate)", "ffn gate"),
    rule(r"\.w1", "ffn gate", beside=r"w3|v1"),
    rule(
        r"\.(up_proj|wi_1|wi|w3|v1|w1|w_up|c_fc|fc1|fc_in|lin1|linear1|linear_fc1|dense_h_to_4h|intermediate_dense)"
        r"|\.intermediate\.dense|#\.ffn",
        "ffn up",
    ),
    rule(
        r"\.(down_proj|wo|Wo|w2|w_down|c_proj|fc2|fc_out|lin2|linear2|linear_fc2|dense_4h_to_h|output_dense)"
        r"|\.output_linear(\.weight)?|#\.output\.dense|#\.ffn_output",
        "ffn down",
    ),
)
EXPERTS = re.compile(r"\.experts\.|moe\.(in|out)put_linear\.")
SHARED_EXPERT = re.compile(r"\.(shared_experts?|shared_mlp)\.")

# Normalisation inside a block. "after" and "before": certainly after, or before, the residual addition; otherwise
# `Structure.normalises_first` decides.
NORMS = (
    rule(r"@\.(q|k|query|key)_?(norm|layer_?norm|ln)", "qk_norm before"),
    rule(r"#\.~\.output\.(LayerNorm|layer_?norm)", "attention_norm after"),
    rule(r"#\.output\.(LayerNorm|layer_?norm)", "ffn_norm after"),
    rule(r"#\.[~@]\.(LayerNorm|layer_?norm|ln)", "attention_norm"),
    rule(r"#\.(encoder_attn|cross_attn|cross_attention)_layer_norm|#\.ln_cross_attn", "attention_norm cross"),
    rule(r"#\.norm2", "attention_norm cross", beside=r"norm3"),
    rule(r"#\.post_attention_layernorm", "attention_norm before", beside=r"(pre|post)_feedforward_layernorm"),
    rule(r"#\.(post_attention_layernorm|layernorm_after|layer_norm2|mlp_norm|ffn_norm|ln_mlp)", "ffn_norm before"),
    rule(r"#\.(pre|post)_(feedforward|mlp|ffn|moe)_?(layer)?_?norm", "ffn_norm before"),
    rule(r"#\.(input_layernorm|layernorm_before|layer_norm1|attn_norm|attention_norm|ln_attn)", "attention_norm before"),
    rule(r"#\.pre_(attention|attn|self_attn)_?(layer)?_?norm", "attention_norm before"),
    rule(r"#\.(self_attn|self_attention|sa|attention|attn)_(layer_?norm|ln)|#\.(ln_?1|norm_?1)", "attention_norm"),
    rule(r"#\.layer_norm", "attention_norm", beside=r"final_layer_norm"),
    rule(r"#\.(final|output|ffn|feed_forward|full_layer)_(layer_)?(layer_?norm|ln)|#\.(ln_?2|norm_?[23])", "ffn_norm"),
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


class Place(NamedTuple):
    """A place before its roles are known."""

    path: str
    module: nn.Module
    kind: str
    parameter: str | None

    @property
    def name(self) -> str:
        """The path, with the parameter's name where there is one."""
        return join(self.path, self.parameter) if self.parameter else self.path


class Reading(NamedTuple):
    """What is known of a place: its roles, the index of its block, and how many blocks that stack has."""

    roles: frozenset[str]
    layer: int | None
    depth: int | None


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


def join(path: str, name: str) -> str:
    """`path.name`, or `name` at the root."""
    return f"{path}.{name}" if path else name


def parent(path: str) -> str:
    """The path one step up; the root is its own parent."""
    return path.rpartition(".")[0]


def ancestors(path: str) -> Iterator[str]:
    """The path itself and every path above it, the root last."""
    while path:
        yield path
        path = parent(path)
    yield ""


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


def _heads(model: nn.Module) -> dict[str, frozenset[str]]:
    """Paths of every head, new or pretrained, with its roles."""
    plain, language = frozenset({"head"}), frozenset({"head", "lm_head"})
    lm = bool(LM_CLASS.fullmatch(type(model).__name__))
    heads = {name: language if lm or LM_HEAD.fullmatch(name) else plain for name in _on_top(model)}
    if "cls" in heads:
        heads["cls.seq_relationship"] = plain
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    if isinstance(output, nn.Module):
        for path, module in model.named_modules():
            if module is output and not any(above in heads for above in ancestors(path)):
                heads[path] = language
    return heads


class Structure:
    """Where a model's blocks, attentions and heads are; gives each place its address and reads the tables."""

    def __init__(self, model: nn.Module, places: Sequence[Place]) -> None:
        self.model = model
        self.kinds = {place.path: place.kind for place in places if place.parameter is None}
        self.modules = {place.path: place.module for place in places}
        self.children: dict[str, list[str]] = {}
        self.weights: dict[str, list[str]] = {}
        for place in places:
            if place.path and place.parameter is None:
                self.children.setdefault(parent(place.path), []).append(place.path.rpartition(".")[2])
            if place.kind in ("linear", "conv", "parameter"):
                above, _, tail = place.name.rpartition(".")
                self.weights.setdefault(above, []).append(tail)
        self.heads = _heads(model)
        self.attentions = {path for path in self.modules if self.is_attention(path)}
        self.blocks: dict[str, tuple[int, int]] = {}  # path -> (layer, depth)
        self.find_blocks()
        self.shells = {self.shell(path): path for path in sorted(self.attentions)}
        self.crosses = {path for path in self.attentions if self.is_cross(path)}
        self.attentive = {self.block(path) or "" for path in self.attentions}
        self.norm_first: dict[str, bool] = {}

    # -- attentions, blocks ------------------------------------------------------------------------------------------

    def is_attention(self, path: str) -> bool:
        """Whether the module at `path` directly holds query, key and value projections."""
        if self.kinds.get(path) == "attention":
            return True
        query, key, value, fused, key_value, latent = (
            any(re.fullmatch(names, name) for name in self.weights.get(path, []))
            for names in (QUERY, KEY, VALUE, FUSED, KEY_VALUE, LATENT)
        )
        return latent or fused or (query and (key_value or (key and value)))

    def entries(self, path: str) -> Iterator[str]:
        """Numbered entries of containers at or above `path`, innermost first."""
        for above in ancestors(path):
            if above.rpartition(".")[2].isdigit() and self.is_container(parent(above)):
                yield above

    def is_container(self, path: str) -> bool:
        return isinstance(self.modules.get(path), (nn.ModuleList, nn.Sequential, nn.ModuleDict))

    def is_uniform(self, path: str) -> bool:
        """Whether all entries of a container are of one class and have children of their own."""
        entries = [join(path, name) for name in self.children.get(path, [])]
        classes = {type(self.modules[entry]) for entry in entries}
        return len(classes) == 1 and all(self.children.get(entry) for entry in entries)

    def find_blocks(self) -> None:
        """Fill `blocks`: every entry of every stack, numbered within the outermost container of the stack."""
        inside = {path for path in self.weights if any(above in self.attentions for above in ancestors(path))}
        others = {above for path in self.weights if path not in inside for above in ancestors(path)}
        stacks: dict[str, None] = {}
        for attention in sorted(self.attentions):
            candidates = [entry for entry in self.entries(attention) if entry != attention]
            block = next((entry for entry in candidates if entry in others), candidates[-1] if candidates else None)
            if block is not None:
                stacks[parent(block)] = None
        if not self.attentions:
            uniform = [path for path in self.modules if self.is_container(path) and self.is_uniform(path)]
            stacks = {p: None for p in uniform if not any(above in uniform for above in ancestors(parent(p)) if p)}
        groups: dict[str, list[str]] = {}
        for path in self.modules:
            if parent(path) in stacks and path.rpartition(".")[2].isdigit():
                outer = [parent(entry) for entry in self.entries(path) if self.is_uniform(parent(entry))]
                groups.setdefault(outer[-1] if outer else parent(path), []).append(path)
        for blocks in groups.values():
            for layer, path in enumerate(blocks):
                self.blocks[path] = (layer, len(blocks))

    def shell(self, path: str) -> str:
        """The sub-layer around an attention: the outermost module below the block that holds it (or itself)."""
        while (above := parent(path)) and above not in self.blocks and not self.is_container(above):
            path = above
        return path

    def is_cross(self, path: str) -> bool:
        block = self.block(path)
        local = path[len(block) :] if block else path
        beside = self.children.get(parent(path), [])
        return bool(CROSS.search(local)) or (local.endswith("multihead_attn") and "self_attn" in beside)

    def block(self, path: str) -> str | None:
        return next((above for above in ancestors(path) if above in self.blocks), None)

    # -- addresses ---------------------------------------------------------------------------------------------------

    def address(self, name: str) -> tuple[str, str | None]:
        """(the name with its structure written in, the attention whose sub-layer it is in)."""
        block = self.block(name)
        shell = next((above for above in ancestors(name) if above in self.shells), None)
        attention = self.shells[shell] if shell is not None else None
        prefix = "" if self.blocks and block is None else "#"
        if attention is not None and (name == attention or name.startswith(attention + ".") or not attention):
            inner = "~.@" if shell != attention else "@"
            rest = name[len(attention) :].lstrip(".")
        elif shell is not None:
            inner, rest = "~", name[len(shell) :].lstrip(".")
        else:
            inner, rest = "", name[len(block or "") :].lstrip(".")
        return ".".join(part for part in (prefix, inner, rest) if part), attention

    def match(self, table: Sequence[Rule], address: str, path: str) -> frozenset[str]:
        """The roles of the first row that fits."""
        beside = self.children.get(parent(path), []) + self.weights.get(parent(path), [])
        for row in table:
            if row.pattern.search(address) and (row.beside is None or any(map(row.beside.match, beside))):
                return row.roles
        return frozenset()

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, place: Place) -> Reading:
        """Everything the tables say of one place."""
        block = self.block(place.path)
        layer, depth = self.blocks[block] if block is not None else (None, None)
        address, attention = self.address(place.name)
        head = next((above for above in ancestors(place.path) if above in self.heads), None)
        container = place.kind == "module"
        roles: set[str] = set()
        if attention in self.crosses and (not container or place.path in (attention, self.shell(attention))):
            roles.add("cross")
        if "pooler" in (place.path.split(".")[-1:] if container else place.path.split(".")):
            roles.add("pooler")
        if head is not None and (place.path == head or not container):
            roles |= self.heads[head]
        if place.kind == "norm":
            roles |= {"norm"} | self.norm_roles(place, address)
        elif place.kind == "embedding":
            roles.add("position" if POSITION.fullmatch(place.name) else "embed")
        elif container or place.kind == "attention":
            roles |= self.module_roles(place, address) if head is None else set()
        elif head is None:
            roles |= self.weight_roles(place, address, block)
        return Reading(frozenset(roles), layer, depth)

    def weight_roles(self, place: Place, address: str, block: str | None) -> set[str]:
        if POSITION.search(place.name) and "@" not in address:
            return {"position"}
        roles = set(self.match(PROJECTIONS, address, place.path) if address[:1] in "#~@" else ())
        if "ffn" in roles:
            roles |= {"experts"} if EXPERTS.search(address) else set()
            roles |= {"shared_expert"} if SHARED_EXPERT.search(address) else set()
        patchy = place.kind == "conv" or (place.kind == "linear" and "patch" in place.path)
        if patchy and block is None and not roles and PATCH.search(place.path):
            roles.add("patch")
        return roles

    def module_roles(self, place: Place, address: str) -> set[str]:
        block = {"block"} if place.path in self.blocks else set()
        if place.path in self.attentions:
            return block | {"cross_attention" if place.path in self.crosses else "self_attention"}
        roles = block | set(self.match(MODULES, address, place.path) if address.startswith("#") else ())
        outer = any(MLP.match(self.address(above)[0]) for above in ancestors(parent(place.path)) if above)
        if MLP.match(address) and not outer and self.children.get(place.path):
            roles.add("mlp")
        return roles

    def norm_roles(self, place: Place, address: str) -> set[str]:
        block = self.block(place.path) or ""
        if block not in self.attentive:  # such names mean something else where there is no attention
            return set()
        roles = set(self.match(NORMS, address, place.path))
        beside = [self.kinds[join(parent(place.path), name)] for name in self.children.get(parent(place.path), [])]
        if NORM_ALONE.match(address) and beside.count("norm") == 1:
            roles.add("ffn_norm")
        if "after" in roles or (roles and "before" not in roles and not self.normalises_first(place.path)):
            roles.add("post_norm")
        return roles - {"after", "before"}

    def normalises_first(self, path: str) -> bool:
        """Whether the stack around `path` normalises before each sub-layer (pre-norm), not after the addition.

        A flag on the block or in its config decides; otherwise a pre-norm stack is known by the norm that ends it,
        which a post-norm stack has no need of.
        """
        block = self.block(path) or ""
        stack = parent(block)
        if stack not in self.norm_first:
            self.norm_first[stack] = self._normalises_first(block, stack)
        return self.norm_first[stack]

    def _normalises_first(self, block: str, stack: str) -> bool:
        config = next((self.modules[p].config for p in ancestors(stack) if hasattr(self.modules[p], "config")), None)
        for holder in (self.modules[block], config):
            for field in NORM_FIRST_FIELDS:
                if isinstance(flag := getattr(holder, field, None), bool):
                    return flag
        for above in ancestors(stack):
            for name in self.children.get(above, []):
                path = join(above, name)
                if self.kinds[path] == "norm" and path not in self.blocks and not NOT_FINAL_NORM.search(name):
                    return bool(block)
        return False
