"""Conversations: rows of messages to text segments, each marked as learned (the assistant's) or not."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from inlay.errors import DataError, did_you_mean
from inlay.tasks.columns import values
from inlay.tasks.data import place

Message = dict[str, str]
Segment = tuple[str, bool]
"""A piece of text, and whether its tokens are learned."""

_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def conversations(rows: Dataset, column: str) -> list[list[Message]]:
    """The messages of every row as {"role", "content"}; ShareGPT's {"from", "value"} are brought to that form."""
    return [
        [_message(message, rows, index, column) for message in _list(cell, rows, index, column)]
        for index, cell in enumerate(values(rows, column, "messages"))
    ]


def before_reply(messages: list[Message]) -> list[Message]:
    """The conversation up to the reply that is to be generated: without its last turn where that is the assistant's."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def segments(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Segment] | None:
    """The conversation as text, assistant turns marked as learned; None where its template cannot be cut into turns.

    A template that rewrites earlier turns (some drop old reasoning) can only teach the last one.
    """
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for learned in (ends, ends[-1:]):
        found, done = [], ""
        for index in learned:
            prefix = render(tokenizer, messages[:index], reply=True)
            whole = render(tokenizer, messages[: index + 1], reply=False)
            if not prefix.startswith(done) or not whole.startswith(prefix):
                break
            found += [(prefix[len(done) :], False), (whole[len(prefix) :], True)]
            done = whole
        else:
            return found
    return None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, reply: bool) -> str:
    """Messages as one text by the tokenizer's chat template, or as "Role: content" lines where it has none.

    With `reply`, it ends where the assistant begins to speak.
    """
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
    eos = tokenizer.eos_token or ""
    lines = [
        f"{message['role'].capitalize()}: {message['content']}{eos if message['role'] == 'assistant' else ''}\n"
        for message in messages
    ]
    return "".join(lines) + ("Assistant:" if reply else "")


def _list(cell: Any, rows: Dataset, index: int, column: str) -> list[Any]:
    if not isinstance(cell, list) or not cell:
        raise DataError(
            f"{place(rows, index)}: the messages (column {column!r}) are empty; fill them or leave the row out"
        )
    return cell


def _message(message: Any, rows: Dataset, index: int, column: str) -> Message:
    role = message.get("role") or message.get("from") if isinstance(message, dict) else None
    content = message.get("content") or message.get("value") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        raise DataError(f"{place(rows, index)}: a message in column {column!r} lacks its role or content: {message!r}")
    if role.lower() not in _ROLES:
        raise DataError(
            f"{place(rows, index)}: a message has the role {role!r}{did_you_mean(role, _ROLES)}; "
            f"roles: {', '.join(_ROLES)}"
        )
    return {"role": _ROLES[role.lower()], "content": content}
