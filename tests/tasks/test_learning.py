"""Every task on real rows: what its collator makes can be learned, and learning shows in its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.tasks.data import read_splits
from inlay.tasks.task import make_task

CASES = {
    "text-classification": ("bert", "nli/cb", {"max_length": 64}),
    "token-classification": ("bert", "keyphrase/semeval2017", {"max_length": 64}),
    "masked-lm": ("bert", "nli/cb", {"columns": {"text": "hypothesis"}, "max_length": 64}),
    "causal-lm": ("llama", "generation/gsm8k", {"max_length": 96, "packing": True, "max_new_tokens": 3}),
    "seq2seq": ("t5", "generation/wiki_split", {"max_length": 64, "max_target_length": 8, "metrics": ["exact_match"]}),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_few_steps_lower_the_evaluated_loss(kind: str, shared_data: Path, request: pytest.FixtureRequest) -> None:
    model_name, folder, fields = CASES[kind]
    base: Path = request.getfixturevalue(model_name)
    rows = read_splits(shared_data / folder)["train"].select(range(24))
    options: dict[str, Any] = fields
    task = make_task(kind, **options).resolve({"train": rows})
    tokenizer, model = task.load_tokenizer(base), task.load_model(base)
    rows = rows.select(range(6))
    before = task.evaluate(model, tokenizer, rows)
    features = task.features(rows, tokenizer, train=True).to_list()
    batch = task.collator(tokenizer, model)(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(6):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.evaluate(model, tokenizer, rows)
    assert after["loss"] < before["loss"]
    assert set(before) == set(after)
    assert task.primary_metric[0] in after
    assert model.training
    assert len(task.predict(model, tokenizer, rows if kind != "masked-lm" else masked(rows, tokenizer))) == len(rows)


def masked(rows: Any, tokenizer: Any) -> Any:
    return rows.map(lambda row: {"hypothesis": f"[MASK] {row['hypothesis']}"}, load_from_cache_file=False)
