"""Give a tiny Llama that has only a `vocab.json` of pieces and scores a tokenizer that transformers can load.

    python examples/tiny_llama_tokenizer.py FOLDER OUT

FOLDER holds config.json, model.safetensors and vocab.json (a list of {"piece", "score"}, ids in its order) of a small
model such as those of llama2.c and BabyLlama. OUT becomes a folder with the model and its tokenizer, ready for

    inlay train --model OUT --task causal-lm …

The pieces are those of a SentencePiece BPE: U+2581 stands for a space, text begins with one and with <s>, and two
neighbours are joined to the piece of the highest score. Where the vocabulary has a piece for every byte (<0x00> …),
unknown characters are spelled in bytes; otherwise they become <unk>.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def build_tokenizer(pieces: list[dict[str, object]], length: int) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE (or, without joined pieces, a tokenizer of characters) from pieces and their scores."""
    vocabulary = {str(entry["piece"]): index for index, entry in enumerate(pieces)}
    scores = {str(entry["piece"]): float(str(entry["score"])) for entry in pieces}
    bytes_too = "<0x00>" in vocabulary
    model = BPE(vocabulary, merges(vocabulary, scores), unk_token=UNKNOWN, fuse_unk=False, byte_fallback=bytes_too)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    begin = [(BEGIN, vocabulary[BEGIN])]
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A $B", begin)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (UNKNOWN, BEGIN, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first."""
    found = []
    for piece, score in scores.items():
        if len(piece) > 1 and not (piece.startswith("<") and piece.endswith(">")):
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            found += [(-score, left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    return [(left, right) for _, left, right in sorted(found)]


def convert(folder: Path, out: Path) -> None:
    """Write the model in `folder` with a tokenizer to `out`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, out / name)
    build_tokenizer(pieces, config["max_position_embeddings"]).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}")
