"""Multitask prompt tuning against HF peft: a task for each row; outputs, gradients, texts, files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.prompt_hosts import TEXT, N, host
from torch import Tensor

import inlay
from inlay import MultitaskPromptTuning, PromptTuning
from inlay.errors import BaseModelError, CheckpointError, ConfigError

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TASKS = {"causal": "CAUSAL_LM", "conditional": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS"}
ROWS = torch.tensor([2, 1])
CASES = [("llama", "causal"), ("t5", "conditional"), ("bert", "sequence")]


def in_peft(model: Any, head: str, **fields: Any) -> peft.PeftModel:
    """peft's model with prompts of three tasks, as large as trained ones."""
    shape: dict[str, Any] = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    config = peft.MultitaskPromptTuningConfig(
        task_type=TASKS[head], num_virtual_tokens=N, num_tasks=3, num_ranks=2, **{**shape, **fields}
    )
    theirs = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return theirs


def call(head: str, **more: Any) -> dict[str, Tensor]:
    labels = torch.tensor([0, 1]) if head == "sequence" else TEXT
    return {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": labels, **more}


def learnt(model: Any) -> list[Tensor]:
    names = ("prefix_task_cols", "prefix_task_rows", "prompt.prompt", "embedding.weight")
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith(names)}
    return sorted(found.values(), key=lambda p: (p.ndim, p.shape))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_both_ways(name: str, head: str, tmp_path: Path) -> None:
    model = host(name, head)
    one_half = {"num_transformer_submodules": 1} if head == "conditional" else {}
    theirs = in_peft(copy.deepcopy(model), head, **one_half)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    found, expected = mine(**call(head, task_ids=ROWS)), theirs(**call(head, task_ids=ROWS))
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(found.logits, expected.logits[:, -found.logits.shape[1] :], **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    pairs = list(zip(learnt(mine), learnt(theirs), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)
        assert one.grad is not None
        assert one.grad.abs().max() > 1e-4
    inlay.save(mine, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**call(head, task_ids=ROWS)).logits, expected.logits, **CLOSE)
    again = inlay.load(copy.deepcopy(model), tmp_path / "ours")
    assert torch.equal(again(**call(head, task_ids=ROWS)).logits, found.logits)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(
    ("name", "head", "beams"), [("llama", "causal", 1), ("llama", "causal", 2), ("t5", "conditional", 2)]
)
def test_generated_texts(name: str, head: str, beams: int, tmp_path: Path) -> None:
    model = host(name, head)
    theirs = in_peft(copy.deepcopy(model), head)
    theirs.save_pretrained(tmp_path)
    if head == "conditional":
        with pytest.warns(UserWarning, match="a second prompt before the target"):
            mine = inlay.load(model, tmp_path)
    else:
        mine = inlay.load(model, tmp_path)
    way = {"max_new_tokens": 5, "num_beams": beams}
    expected = theirs.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), task_ids=ROWS, **way)
    with inlay.for_tasks(mine, ROWS):
        assert torch.equal(mine.generate(TEXT, **way), expected)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_each_row_has_the_prompt_of_its_task(name: str, head: str) -> None:
    torch.manual_seed(0)
    method = MultitaskPromptTuning(num_virtual_tokens=N, num_tasks=3, num_ranks=2)
    model = inlay.attach(host(name, head), method)
    prompts = next(m for m in model.modules() if hasattr(m, "prefix_task_cols"))
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    found = model(**call(head, task_ids=ROWS)).logits
    for row, task in enumerate(ROWS.tolist()):
        with torch.no_grad():
            vectors = prompts.prompt * (prompts.prefix_task_cols[task] @ prompts.prefix_task_rows[task])
        single = inlay.attach(host(name, head), PromptTuning(num_virtual_tokens=N, init="zeros"), modules_to_save=[])
        if head == "sequence":
            single.classifier.load_state_dict(host(name, head).classifier.state_dict())
        with torch.no_grad():
            (parameter,) = (p for p in single.parameters() if p.requires_grad)
            parameter.copy_(vectors)
        torch.testing.assert_close(found[row], single(**call(head)).logits[row], **CLOSE)
        with inlay.for_tasks(model, task):  # one task for all
            torch.testing.assert_close(model(**call(head)).logits[row], found[row], **CLOSE)


def test_beside_another_prompt() -> None:
    model = inlay.attach(host("llama", "causal"), MultitaskPromptTuning(num_virtual_tokens=N, num_tasks=3))
    inlay.attach(model, PromptTuning(num_virtual_tokens=2), name="second")
    alone = {}
    for name, more in (("default", {"task_ids": ROWS}), ("second", {})):
        inlay.activate(model, name)
        alone[name] = model(TEXT, **more).logits
    inlay.activate(model, "default", "second")
    assert not torch.equal(model(TEXT, task_ids=ROWS).logits, alone["second"])
    inlay.activate(model, "default")
    assert torch.equal(model(TEXT, task_ids=ROWS).logits, alone["default"])


# -- transfer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init_task", "theirs"),
    [("average", "AVERAGE_SOURCE_TASKS"), (1, "EXACT_SOURCE_TASK"), ("shared", "ONLY_SOURCE_SHARED")],
)
def test_a_target_starts_from_its_sources_as_in_peft(init_task: Any, theirs: str, tmp_path: Path) -> None:
    source = in_peft(host("llama", "causal"), "causal")
    source.save_pretrained(tmp_path)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, num_ranks=2, prompt_tuning_init=theirs, prompt_tuning_init_task=1,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
    )  # fmt: skip
    torch.manual_seed(5)
    expected = peft.get_peft_model(host("llama", "causal"), config)
    method = MultitaskPromptTuning(num_virtual_tokens=N, num_ranks=2, init_from=str(tmp_path), init_task=init_task)
    model = inlay.attach(host("llama", "causal"), method)
    for one, other in zip(learnt(model), learnt(expected), strict=True):
        if init_task != "shared" or one.ndim == 2:
            assert torch.equal(one, other)
        else:
            assert one.detach().std() == pytest.approx(0.02, rel=0.5)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_tasks_that_are_not_there() -> None:
    model = inlay.attach(host("llama", "causal"), MultitaskPromptTuning(num_virtual_tokens=N, num_tasks=3))
    with pytest.raises(ConfigError, match="the call does not say which: pass task_ids="):
        model(TEXT)
    with pytest.raises(ConfigError, match=r"task_ids=\[0, 3\]: the prompts are of tasks 0 to 2"):
        model(TEXT, task_ids=torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match=r"shape \(3,\) for 2 rows"):
        model(TEXT, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match="has no prompts of tasks"), inlay.for_tasks(host("llama", "causal"), 0):
        pass


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_tasks": 0}, ConfigError, "it must be 1 or more"),
        ({"num_tasks": 2, "task": 2}, ConfigError, "the tasks are 0 to 1"),
        ({"init": "zero"}, ConfigError, "choose random"),
        ({"init_task": "best"}, ConfigError, "choose average"),
        ({"targets": "query"}, ConfigError, "has no targets"),
        ({"init_from": "source", "num_ranks": 1}, ConfigError, "set num_virtual_tokens and num_ranks"),
        ({"init_from": "source", "num_ranks": 2, "init_task": 3}, ConfigError, "has the tasks 0 to 2"),
        ({"init_from": "prompt"}, CheckpointError, "use init_task='shared'"),
        ({"init_from": "other", "init_task": "shared"}, BaseModelError, "another base model"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    if fields.get("init_from") == "source":
        in_peft(host("llama", "causal"), "causal").save_pretrained(tmp_path / "source")
    elif "init_from" in fields:
        model = host("llama" if fields["init_from"] == "prompt" else "gpt2", "causal")
        inlay.save(inlay.attach(model, PromptTuning(num_virtual_tokens=N)), tmp_path / fields["init_from"])
    fields = {name: str(tmp_path / value) if name == "init_from" else value for name, value in fields.items()}
    model = host("llama", "causal")
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        inlay.attach(model, MultitaskPromptTuning(**{"num_virtual_tokens": N, **fields}))
    assert list(model.state_dict()) == before
