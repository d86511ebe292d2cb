"""Tiny, randomly initialised models of many architectures, built from their transformers classes without a download.

    model = build("llama")                    # two layers, width 32
    model = build("bert", "sequence")         # with a head: see HEADS for what each architecture offers

Widths are chosen so that query, key/value, feed-forward and model widths all differ where the architecture lets them,
so that a test which mixes two of them up fails on a shape.
"""

# ruff: noqa: C408 (configs read best as keywords)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

WIDTH, LAYERS, VOCABULARY = 32, 2, 64

_ENCODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, pad_token_id=1,
)  # fmt: skip
_DECODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_VISION: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)
_MOE: dict[str, Any] = dict(_DECODER, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)
_GEMMA: dict[str, Any] = dict(_DECODER, head_dim=8)

# name -> (prefix of the classes, fields of the config)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER),
    "xlm-roberta": ("XLMRoberta", _ENCODER),
    "distilbert": (
        "DistilBert",
        dict(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40),
    ),
    "albert": ("Albert", dict(_ENCODER, embedding_size=16)),
    "electra": ("Electra", dict(_ENCODER, embedding_size=16)),
    "deberta-v2": (
        "DebertaV2",
        dict(_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
             norm_rel_ebd="layer_norm", share_att_key=True, pooler_hidden_size=32),
    ),
    "modernbert": ("ModernBert", dict(_ENCODER, global_attn_every_n_layers=2, local_attention=8)),
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=40,
                          bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "gpt-neox": ("GPTNeoX", dict(_DECODER, num_key_value_heads=4)),
    "opt": ("OPT", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                        max_position_embeddings=40, word_embed_proj_dim=32, pad_token_id=1)),
    "llama": ("Llama", _DECODER),
    "mistral": ("Mistral", _DECODER),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", dict(_DECODER, head_dim=8)),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", dict(_GEMMA, sliding_window=8)),
    "gemma3": ("Gemma3", dict(_GEMMA, sliding_window=8)),
    "phi": ("Phi", dict(_DECODER, num_key_value_heads=4)),
    "phi3": ("Phi3", _DECODER),
    "deepseek-v3": (
        "DeepseekV3",
        dict(_DECODER, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6,
             v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
             moe_intermediate_size=24, first_k_dense_replace=1),
    ),
    "mixtral": ("Mixtral", dict(_DECODER, num_local_experts=3, num_experts_per_tok=2)),
    "qwen2-moe": ("Qwen2Moe", dict(_MOE, shared_expert_intermediate_size=40)),
    "qwen3-moe": ("Qwen3Moe", dict(_MOE, head_dim=8)),
    "t5": ("T5", dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)),
    "t5-gated": ("T5", dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                            feed_forward_proj="gated-gelu", decoder_start_token_id=0)),
    "bart": ("Bart", dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
                          decoder_ffn_dim=40, encoder_attention_heads=4, decoder_attention_heads=4,
                          max_position_embeddings=40)),
    "whisper": ("Whisper", dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
                                encoder_ffn_dim=48, decoder_ffn_dim=40, encoder_attention_heads=4,
                                decoder_attention_heads=4, num_mel_bins=8, max_source_positions=16,
                                max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)),
    "wav2vec2": ("Wav2Vec2", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=48, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4),
                                  num_feat_extract_layers=2, num_conv_pos_embeddings=16,
                                  num_conv_pos_embedding_groups=2, classifier_proj_size=24)),
    "vit": ("ViT", _VISION),
}  # fmt: skip

HEADS = {
    "trunk": "Model",
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "question": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
    "conditional": "ForConditionalGeneration",
    "image": "ForImageClassification",
    "audio": "ForAudioClassification",
    "ctc": "ForCTC",
    "pretraining": "ForPreTraining",
}

# Classes that do not follow "prefix + suffix".
_SPELLINGS = {
    ("gpt2", "causal"): "GPT2LMHeadModel",
    ("gemma3", "trunk"): "Gemma3TextModel",
    ("gemma3", "config"): "Gemma3TextConfig",
    ("gemma3", "sequence"): "Gemma3TextForSequenceClassification",
}


def config(name: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model; `changes` replace fields of it."""
    prefix, fields = ARCHITECTURES[name]
    cls = getattr(transformers, _SPELLINGS.get((name, "config"), f"{prefix}Config"))
    result: transformers.PreTrainedConfig = cls(**{**fields, **changes})
    return result


def build(name: str, head: str = "trunk", **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model in eval mode, its weights random but the same each time."""
    prefix, _ = ARCHITECTURES[name]
    cls = getattr(transformers, _SPELLINGS.get((name, head), f"{prefix}{HEADS[head]}"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = cls(config(name, **changes))
    return model.eval()


def build_clip(**changes: Any) -> transformers.PreTrainedModel:
    """A tiny CLIP: two towers, each with its own width."""
    text = dict(_ENCODER, max_position_embeddings=16, projection_dim=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = dict(_VISION, hidden_size=24, intermediate_size=40, projection_dim=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20, **changes)
        )
    return model.eval()


class Plain(nn.Module):
    """A network that no table knows: embedding, convolution, a stack of blocks with a bare parameter, a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.lookup = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 12, kernel_size=3, padding=1, groups=2)
        self.stages = nn.ModuleList(PlainStage() for _ in range(depth))
        self.temperature = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.lookup(tokens).transpose(1, 2)).transpose(1, 2)
        for stage in self.stages:
            x = stage(x)
        result: torch.Tensor = self.out(x.mean(1)) / self.temperature
        return result


class PlainStage(nn.Module):
    """One block of `Plain`: y = x + b(relu(a(n(x)))) @ mixing, with torch's own attention beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(12)
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(16, 12, bias=False)
        self.look = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mixing = nn.Parameter(torch.eye(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.n(x)
        h = h + self.look(h, h, h, need_weights=False)[0]
        return x + self.b(torch.relu(self.a(h))) @ self.mixing


def build_transformer_encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    """torch's own encoder, two layers."""
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=20, batch_first=True, norm_first=norm_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def names() -> list[str]:
    """Every architecture that `build` knows."""
    return list(ARCHITECTURES)


Builder = Callable[[], nn.Module]
