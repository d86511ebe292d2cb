"""Causal language modelling: what is learned, what is packed, and real tiny decoders that go on with a story."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from inlay.errors import ConfigError, DataError
from inlay.tasks.batches import IGNORE
from inlay.tasks.causal_lm import cut_at, encode
from inlay.tasks.data import read_splits
from inlay.tasks.packing import bins, pack
from inlay.tasks.task import Task, make_task

Write = Callable[..., Path]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = "{% for m in messages[-2:] %}[{{ m.content }}]{% endfor %}"


def resolve(rows: Dataset | list[dict[str, Any]], **fields: Any) -> Task:
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return make_task("causal-lm", **fields).resolve({"train": rows})


def learned(task: Task, rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[str, list[str]]]:
    """(the whole example, the stretches of it that are learned), decoded."""
    found = []
    for row in task.features(Dataset.from_list(rows), tokenizer, train=True):
        stretches, open_stretch = [], []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (IGNORE, token)
            if label != IGNORE:
                open_stretch.append(token)
            elif open_stretch:
                stretches.append(tokenizer.decode(open_stretch))
                open_stretch = []
        stretches += [tokenizer.decode(open_stretch)] if open_stretch else []
        found.append((tokenizer.decode(row["input_ids"]), stretches))
    return found


# -- columns and what is learned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "whole", "completion"),
    [
        ({"text": "Once upon"}, {"text": "text"}, "Once upon</s>", "Once upon</s>"),
        ({"prompt": "2+2=", "completion": "4"}, {"source": "prompt", "target": "completion"}, "2+2=4</s>", "4</s>"),
        ({"source": "in", "target": "out"}, {"source": "source", "target": "target"}, "in\nout</s>", "out</s>"),
        ({"source": "i", "targets": ["out", "x"]}, {"source": "source", "target": "targets"}, "i\nout</s>", "out</s>"),
        ({"question": "q", "answer": "a"}, {"source": "question", "target": "answer"}, "q\na</s>", "a</s>"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"},
         {"instruction": "instruction", "input": "input", "target": "output"}, "Add.\n1 2\n3</s>", "3</s>"),
        ({"instruction": "Sing.", "input": "", "target": "La."},
         {"instruction": "instruction", "input": "input", "target": "target"}, "Sing.\nLa.</s>", "La.</s>"),
    ],
)  # fmt: skip
def test_each_form_of_rows_is_recognised_and_learns_its_completion(
    gpt2: Path, row: dict[str, Any], columns: dict[str, str], whole: str, completion: str
) -> None:
    task = resolve([row])
    assert dict(task.columns) == columns
    tokenizer = task.load_tokenizer(gpt2)
    assert learned(task, [row], tokenizer) == [(whole, [completion])]
    everything = resolve([row], completion_only=False, add_eos=False)
    assert learned(everything, [row], tokenizer) == [(whole.removesuffix("</s>"), [whole.removesuffix("</s>")])]


def test_a_begin_token_is_put_once_and_never_learned(llama: Path) -> None:
    row = {"prompt": "ab", "completion": "c"}
    task = resolve([row])
    tokenizer = task.load_tokenizer(llama)
    assert tokenizer.bos_token == "<s>"
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        "<s> $A", "<s> $A $B", [("<s>", 2)]
    )
    assert learned(task, [row], tokenizer) == [("<s>abc</s>", ["c</s>"])]
    assert encode(tokenizer, [("<s>ab", False)], learn_all=False)[0] == tokenizer("ab").input_ids


def test_a_template_of_ones_own_takes_roles_and_columns(gpt2: Path) -> None:
    row = {"question": "Why?", "hint": "", "answer": "So.", "topic": "life"}
    fields = {"columns": {"source": "question"}, "prompt_template": "[{topic}]\nHint: {hint}\nQ: {source}\nA: "}
    task = resolve([row], **fields)
    assert learned(task, [row], task.load_tokenizer(gpt2)) == [("[life]\nQ: Why?\nA: So.</s>", ["So.</s>"])]
    with pytest.raises(ConfigError, match="has the field 'sorce'; did you mean 'source'"):
        resolve([row], prompt_template="{sorce}")
    with pytest.raises(ConfigError, match=r"cannot be read .*for braces"):
        resolve([row], prompt_template="{source")


def test_aliases_of_roles_are_understood() -> None:
    row = {"a": "x", "b": "y"}
    task = resolve([row], columns={"prompt": "a", "completion": "b"})
    assert (dict(task.columns), task.prompt_template) == ({"source": "a", "target": "b"}, "{source}")
    assert Task.from_dict(task.to_dict()) == task


# -- conversations -----------------------------------------------------------------------------------------------------


def test_assistant_turns_are_learned_without_a_template(gpt2: Path) -> None:
    task = resolve([{"messages": CHAT}])
    whole = "System: Be brief.\nUser: Hi\nAssistant: Hello.</s>\nUser: More?\nAssistant: No.</s>\n"
    tokenizer = task.load_tokenizer(gpt2)
    assert learned(task, [{"messages": CHAT}], tokenizer) == [(whole, [" Hello.</s>\n", " No.</s>\n"])]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    task = resolve([{"conversations": share}])
    assert learned(task, [{"conversations": share}], tokenizer) == [
        ("User: Hi\nAssistant: Hello.</s>\n", [" Hello.</s>\n"])
    ]


def test_assistant_turns_are_learned_with_the_tokenizers_template(gpt2: Path) -> None:
    task = resolve([{"messages": CHAT}])
    tokenizer = task.load_tokenizer(gpt2)
    tokenizer.chat_template = TEMPLATE
    [(whole, stretches)] = learned(task, [{"messages": CHAT}], tokenizer)
    assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert stretches == ["Hello.<end>\n", "No.<end>\n"]


def test_a_template_that_forgets_earlier_turns_teaches_the_last_or_is_refused(gpt2: Path) -> None:
    task = resolve([{"messages": CHAT}])
    tokenizer = task.load_tokenizer(gpt2)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match="row 0: the conversation does not fit the tokenizer's chat template"):
        task.features(Dataset.from_list([{"messages": CHAT}]), tokenizer, train=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "row 0: the messages .* are empty"),
        ([{"role": "user", "content": None}], "lacks its role or content"),
        ([{"role": "asistant", "content": "x"}], "has the role 'asistant'; did you mean 'assistant'"),
    ],
)
def test_conversations_that_cannot_be_used(messages: list[dict[str, Any]], message: str) -> None:
    good = [{"role": "user", "content": "x"}]
    with pytest.raises(DataError, match=message):
        resolve([{"messages": messages}, {"messages": good}])


def test_a_conversation_without_an_answer_teaches_nothing(gpt2: Path) -> None:
    rows = [{"messages": CHAT[:2]}]
    task = resolve(rows)
    with pytest.raises(DataError, match="row 0: the conversation has no assistant turn"):
        task.features(Dataset.from_list(rows), task.load_tokenizer(gpt2), train=True)
    [found] = task.predict(task.load_model(gpt2), task.load_tokenizer(gpt2), Dataset.from_list(rows))
    assert found["prompt"] == "System: Be brief.\nUser: Hi\nAssistant:"


# -- length ------------------------------------------------------------------------------------------------------------


def test_long_text_is_cut_into_examples_and_long_prompts_lose_their_beginning(gpt2: Path) -> None:
    task = resolve([{"text": "x"}], max_length=8, add_eos=False)
    tokenizer = task.load_tokenizer(gpt2)
    text = "abcdefghijklmnopqrst"
    assert [whole for whole, _ in learned(task, [{"text": text}], tokenizer)] == ["abcdefgh", "ijklmnop", "qrst"]
    task = resolve([{"prompt": "x", "completion": "y"}], max_length=8)
    assert learned(task, [{"prompt": "0123456789", "completion": "ab"}], tokenizer) == [("56789ab</s>", ["ab</s>"])]
    assert learned(task, [{"prompt": "0123456789", "completion": "abcdefghi"}], tokenizer) == [("89abcdef", ["abcdef"])]
    assert learned(task, [{"prompt": "0", "completion": "abcdefghi"}], tokenizer) == [("0abcdefg", ["abcdefg"])]


def test_cut_at_always_leaves_something_to_learn() -> None:
    for prompt in range(12):
        for completion in range(1, 12):
            labels = [IGNORE] * prompt + [1] * completion
            for limit in (4, 5, 8, 30):
                window = labels[cut_at(labels, limit) :][:limit]
                assert len(window) == min(limit, len(labels))
                assert sum(label != IGNORE for label in window[1:]) > 0 or (prompt, completion) == (0, 1)


def test_rows_that_hold_nothing_to_learn_are_refused(gpt2: Path) -> None:
    task = resolve([{"text": "x"}], add_eos=False)
    with pytest.raises(DataError, match="no row has two tokens or more"):
        task.features(Dataset.from_list([{"text": "x"}]), task.load_tokenizer(gpt2), train=True)


# -- packing -----------------------------------------------------------------------------------------------------------


def test_bins_are_full_and_hold_everything_once() -> None:
    lengths = [int(n) for n in torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))]
    groups = bins(lengths, 40)
    assert sorted(item for group in groups for item in group) == list(range(200))
    assert all(sum(lengths[item] for item in group) <= 40 for group in groups)
    assert len(groups) <= math.ceil(sum(lengths) / 40) * 1.1  # best fit decreasing needs at most 11/9 of the optimum


def test_packed_rows_start_anew_with_every_example() -> None:
    examples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORE, 9]}]
    assert pack(examples, 8) == [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1], "labels": [IGNORE, 6, 7, IGNORE, 9]}
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "stories"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_the_losses_of_the_examples_alone(
    name: str, attention: str, request: pytest.FixtureRequest, shared_data: Path
) -> None:
    folder = request.getfixturevalue(name)
    rows = read_splits(shared_data / "generation" / "e2e")["train"].select(range(0, 300, 40))
    fields = {"max_length": 250, "packing": True}
    task = resolve(rows, **fields)
    tokenizer, model = task.load_tokenizer(folder), task.load_model(folder, attn_implementation=attention).eval()
    packed = task.features(rows, tokenizer, train=True)
    alone = task.features(rows, tokenizer, train=False)
    assert len(packed) < len(alone) == len(rows)
    collate = task.collator(tokenizer, model)

    def summed(features: Dataset, size: int) -> tuple[float, int]:
        total, count = 0.0, 0
        for start in range(0, len(features), size):
            batch = collate(features.to_list()[start : start + size])
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**batch).logits[:, :-1].float()
            total += functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            ).item()
            count += int((labels != IGNORE).sum())
        return total, count

    loss, count = summed(packed, 3)
    expected, expected_count = summed(alone, 1)
    assert count == expected_count
    # the same sums in another order: float32 over some hundred tokens
    assert loss == pytest.approx(expected, rel=1e-5)


def test_packing_is_refused_where_examples_would_see_each_other(gpt2: Path) -> None:
    task = resolve([{"text": "abc"}], packing=True)
    tokenizer, model = task.load_tokenizer(gpt2), task.load_model(gpt2)

    def ignoring_positions(position_ids: Any = None, **inputs: Any) -> Any:
        return type(model).forward(model, **inputs)

    task = resolve([{"text": "abc"}], packing=True, max_length=64)
    task.collator(tokenizer, model)
    model.forward = ignoring_positions  # like the models that build their own mask
    with pytest.raises(ConfigError, match=r"does not keep packed examples apart: set task.packing=false"):
        task.collator(tokenizer, model)


# -- results -----------------------------------------------------------------------------------------------------------


def test_the_real_story_teller_scores_and_goes_on(stories: Path, shared_data: Path) -> None:
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    told = [" ".join(story.split()) for story in text.split("<|endoftext|>")[:3]]
    rows = Dataset.from_list([{"text": story} for story in told])
    task = resolve(rows, add_eos=False, max_new_tokens=9)
    tokenizer, model = task.load_tokenizer(stories), task.load_model(stories)
    scores = task.evaluate(model, tokenizer, rows)
    assert 1.2 < scores["loss"] < 1.8  # the data's notes say 1.50 nats a token on 12 stories
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    starts = Dataset.from_list(
        [{"text": "Once upon a time"}, {"text": "Lily and her mom went to the park. They saw a big"}]
    )
    both = task.predict(model, tokenizer, starts)
    assert both[0]["generation"].startswith(", there was a little girl")
    # left padding must not change what is generated
    assert both[1] == task.predict(model, tokenizer, starts.select([1]))[0]


def test_text_metrics_by_generation(gpt2: Path, shared_data: Path) -> None:
    pytest.importorskip("rouge_score")
    rows = read_splits(shared_data / "generation" / "gsm8k")["test"].select(range(3))
    task = resolve(rows, metrics=["exact_match", "rouge"], max_new_tokens=4, max_length=128)
    tokenizer, model = task.load_tokenizer(gpt2), task.load_model(gpt2)
    scores = task.evaluate(model, tokenizer, rows)
    assert set(scores) == {"loss", "perplexity", "exact_match", "rouge1", "rouge2", "rougeL"}
    with pytest.raises(ConfigError, match="the rows are plain text"):
        resolve([{"text": "a b"}], metrics=["exact_match"])


def test_instructions_from_published_rows(gpt2: Path, shared_data: Path) -> None:
    splits = read_splits(shared_data / "generation" / "self_instruct")
    task = make_task("causal-lm", max_length=200, max_new_tokens=4).resolve(splits)
    assert dict(task.columns) == {"instruction": "instruction", "input": "input", "target": "target"}
    tokenizer, model = task.load_tokenizer(gpt2), task.load_model(gpt2)
    rows = splits["test"].select(range(5))
    batch = task.collator(tokenizer, model)(task.features(rows, tokenizer, train=True).to_list())
    assert model(**batch).loss.isfinite()
    found = task.predict(model, tokenizer, rows.remove_columns("target"))
    assert found[0]["prompt"] == f"{rows[0]['instruction']}\n{rows[0]['input']}\n"


def test_prompts_leave_room_for_what_is_generated(gpt2: Path) -> None:
    rows = Dataset.from_list([{"text": "x" * 300}])
    task = resolve(rows, max_length=256, max_new_tokens=6)
    tokenizer, model = task.load_tokenizer(gpt2), task.load_model(gpt2)
    assert len(task.predict(model, tokenizer, rows)) == 1
    full = resolve(rows, max_length=256, max_new_tokens=256)
    with pytest.raises(ConfigError, match="max_new_tokens=256 leaves no room for a prompt in the 256 positions"):
        full.predict(model, tokenizer, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"source": "a", "target": "b"}, {"source": None, "target": "b"}],
            r"line 2: the source \(column 'source'\) is null",
        ),
        ([{"source": "a", "target": "b"}, {"source": "a", "target": ""}], "line 2: the target .* is empty"),
        ([{"source": "a", "targets": ["b"]}, {"source": "a", "targets": []}], "line 2: the targets .* are empty"),
        ([{"instruction": "", "target": "b"}], "line 1: the instruction .* is empty"),
    ],
)
def test_rows_that_cannot_be_used(write: Write, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_task("causal-lm").resolve(read_splits(write("train.jsonl", rows)))
