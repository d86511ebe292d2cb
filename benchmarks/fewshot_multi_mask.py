"""Words of several tokens at {mask*}: the batched decoding against the same one row and one label at a time.

The peer is the algorithm of multi-mask PET as it is published (Schick & Schütze 2021, arXiv:2009.07118), written down
plainly: for each row and each label a text with just that label's masks, a pass for each token, probabilities of the
whole vocabulary at every token of the text. 100 rows of the demonstration's intents, whose names ("credit limit
change") are the labels' words; the embedded MiniLM, and a BERT of the shape of multilingual MiniLM (250,002 tokens)
with random weights, which costs what a trained one does. Each round both ways score the same rows and have to find the
same scores. Time is CPU time of one thread; the ratio is the median of the rounds' ratios. Beside it stand the
operations of both ways: a thread that is busy either way gains by batching little more than what the batched way leaves
out. In the parts called -bfloat16 the batched way computes in bfloat16, as `--dtype bfloat16` does, and the peer in
float32 as ever: how many of the answers are the same is part of the result. In the part called -by_length the peer
still takes one row at a time, and its labels of equal length together, with one first pass for all of them: the same
authors' later form, for many labels.

    python benchmarks/fewshot_multi_mask.py [--rounds N] [--only minilm-max_first]
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _protocol import Results, arguments, chosen, interleaved
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedModel

from inlay.fewshot.embedded import embedded_model
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.multi_mask import DECODES, MultiMaskScorer

DATA = Path(__file__).parents[1] / "examples" / "data" / "test.jsonl"
ROWS, BATCH, LEAST = 100, 32, 3
COUNTS = {"minilm": 18, "multilingual": 6}
"""How many of the labels are asked about."""
HALF, BY_LENGTH = "-bfloat16", "-by_length"
Peer = Callable[[PreTrainedModel, MultiMaskScorer, list[Row]], Tensor]


def load(shape: str, decode: Any) -> tuple[PreTrainedModel, list[Row], MultiMaskScorer]:
    """The model, the rows and the way of asking."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})[: COUNTS[shape]]
    folder = embedded_model()
    if shape == "minilm":
        model = AutoModelForMaskedLM.from_pretrained(folder)
    else:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=250002, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536,
            initializer_range=0.1,
        )  # fmt: skip
        model = BertForMaskedLM(config)
    scorer = MultiMaskScorer(
        tokenizer=AutoTokenizer.from_pretrained(folder), template=Template("{text} This is about {mask*}."),
        verbalizer=Verbalizer({label: label.replace("_", " ") for label in labels}), decode=decode,
    )  # fmt: skip
    return model.eval(), rows[:ROWS], scorer


@torch.no_grad()
def one_by_one(model: PreTrainedModel, scorer: MultiMaskScorer, rows: list[Row]) -> Tensor:
    """Scores (rows, labels): one row, one label and one token after another."""
    words = [listed[0] for listed in scorer.verbalizer.tokens(scorer.tokenizer, scorer.template).values()]
    found = torch.zeros(len(rows), len(words))
    for index, row in enumerate(rows):
        for label, word in enumerate(words):
            encoded = scorer.encoder([scorer.template.render(row, masks=len(word))])[0]
            ids, left = torch.tensor([encoded.ids]), dict(zip(encoded.masks, word, strict=True))
            while left:
                likely = model(input_ids=ids).logits.softmax(-1)[0]
                asked = {place: likely[place, token].log().item() for place, token in left.items()}
                order = {"max_first": max(asked, key=lambda place: asked[place]), "ltr": min(asked)}
                for place in list(asked) if scorer.decode == "parallel" else [order[scorer.decode]]:
                    found[index, label] += asked[place]
                    ids[0, place] = left.pop(place)
    return found


@torch.no_grad()
def by_length(model: PreTrainedModel, scorer: MultiMaskScorer, rows: list[Row]) -> Tensor:
    """Scores (rows, labels), max-first: one row after another, its labels of one length together."""
    words = [listed[0] for listed in scorer.verbalizer.tokens(scorer.tokenizer, scorer.template).values()]
    found = torch.zeros(len(rows), len(words))
    for index, row in enumerate(rows):
        for width in sorted({len(word) for word in words}):
            labels = [label for label, word in enumerate(words) if len(word) == width]
            encoded = scorer.encoder([scorer.template.render(row, masks=width)])[0]
            ids = torch.tensor([encoded.ids])
            likely = model(input_ids=ids).logits.softmax(-1).expand(len(labels), -1, -1)
            ids, left = ids.repeat(len(labels), 1), [dict(zip(encoded.masks, words[at], strict=True)) for at in labels]
            for step in range(width):
                likely = model(input_ids=ids).logits.softmax(-1) if step else likely
                for number, label in enumerate(labels):
                    asked = {place: likely[number, place, token].log().item() for place, token in left[number].items()}
                    place = max(asked, key=lambda place: asked[place])
                    found[index, label] += asked[place]
                    ids[number, place] = left[number].pop(place)
    return found


def measure(shape: str, decode: str, rounds: int, half: bool = False, peer: Peer = one_by_one) -> dict[str, Any]:
    """Time both ways, and see that they find the same."""
    model, rows, scorer = load(shape, decode)
    batched = copy.deepcopy(model).to(torch.bfloat16) if half else model
    found: dict[str, Tensor] = {}
    ways: dict[str, Callable[[], Tensor]] = {
        "batched": lambda: scorer.scores(batched, rows, batch_size=BATCH),
        "one by one": lambda: peer(model, scorer, rows),
    }
    seconds = interleaved({name: partial(_kept, found, name, way) for name, way in ways.items()}, rounds, warm=0)
    difference = (found["batched"] - found["one by one"]).abs()
    # Where two places are alike to the last bits the orders may differ; what comes then is another, as good a score.
    same = float((difference < 1e-3).float().mean())
    answers = float((found["batched"].argmax(-1) == found["one by one"].argmax(-1)).float().mean())
    if not half and (same < 0.999 or answers < 1):
        raise SystemExit(f"{shape}: {1 - same:.2%} of the scores and {1 - answers:.0%} of the answers differ")
    flops = {name: flops_of(way) for name, way in ways.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["one by one"], seconds["batched"], strict=True)]
    words = scorer.verbalizer.tokens(scorer.tokenizer, scorer.template)
    return {
        "tokens_of_labels": {label: len(listed[0]) for label, listed in words.items()},
        "rows": len(rows),
        "tokens_of_rows": statistics.mean(len(row) for row in scorer.encode(rows)),
        "same_scores": same,
        "same_answers": answers,
        "largest_difference": float(difference.max()),
        "flops": flops,
        "flops_ratio": flops["one by one"] / flops["batched"],
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def flops_of(way: Callable[[], Tensor]) -> int:
    """Floating point operations of the products that a way takes: what no batching can save."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def _kept(found: dict[str, Tensor], name: str, way: Callable[[], Tensor]) -> None:
    found[name] = way()


def main() -> None:
    """Measure and write down."""
    options = arguments(__doc__, rounds=LEAST).parse_args()
    torch.set_num_threads(1)
    results = Results("fewshot_multi_mask", options, least=LEAST)
    parts = {f"{shape}-{decode}": partial(measure, shape, decode) for shape in COUNTS for decode in DECODES}
    parts |= {f"minilm-{decode}{HALF}": partial(measure, "minilm", decode, half=True) for decode in DECODES}
    parts[f"minilm-max_first{BY_LENGTH}"] = partial(measure, "minilm", "max_first", peer=by_length)
    for name in chosen(list(parts), options.only):
        settings = {"rows": ROWS, "batch": BATCH, "rounds": results.rounds}
        record = results.part(name, settings, partial(parts[name], rounds=results.rounds))
        rounds = ", ".join(f"{ratio:.1f}" for ratio in record["ratios"])
        saved = f"{record['flops_ratio']:.1f} times fewer operations"
        same = f"{record['same_answers']:.0%} of the answers the same"
        print(f"{name}: {record['ratio']:.1f} times as fast ({rounds}), {saved}, {same}", flush=True)


if __name__ == "__main__":
    main()
