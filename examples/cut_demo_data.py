"""Cut the demonstration data of `inlay quickstart` out of CLINC150 (examples/data/ holds the result).

    python examples/cut_demo_data.py data_small.json OUT

data_small.json is the published "small" file of https://github.com/clinc/oos-eval (commit 828f8093932c, CC BY 3.0). Of
its 150 intents 18 are kept that are easily taken for one another: the same things are asked for, changed or named
("shopping_list" and "shopping_list_update"). The published splits stay as they are, except that a training row is left
out when its text, case and punctuation aside, occurs in an earlier training row, in validation or in test. Rows are put
in the order of the SHA-256 of their texts, so that labels are mixed and the files are the same wherever they are cut.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

INTENTS = [
    "change_ai_name", "change_user_name", "what_is_your_name", "user_name",
    "shopping_list", "shopping_list_update", "todo_list", "todo_list_update",
    "reminder", "reminder_update", "calendar", "calendar_update",
    "recipe", "ingredients_list", "spending_history", "transactions", "rewards_balance", "redeem_rewards",
]  # fmt: skip
SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Our name of a split, and the published one."""


def cut(published: dict[str, list[list[str]]]) -> dict[str, list[dict[str, str]]]:
    """The rows of the three splits."""
    splits = {
        name: sorted(([text, label] for text, label in published[theirs] if label in INTENTS), key=digest)
        for name, theirs in SPLITS.items()
    }
    seen = {plain(text) for name in ("validation", "test") for text, _ in splits[name]}
    kept = []
    for text, label in splits["train"]:
        if plain(text) not in seen:
            seen.add(plain(text))
            kept.append([text, label])
    splits["train"] = kept
    return {name: [{"text": text, "label": label} for text, label in rows] for name, rows in splits.items()}


def digest(row: list[str]) -> str:
    """What the rows are ordered by."""
    return hashlib.sha256(row[0].encode()).hexdigest()


def plain(text: str) -> str:
    """A text without case and punctuation."""
    return "".join(character for character in text.lower() if character.isalnum() or character == " ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in cut(json.loads(arguments.published.read_text(encoding="utf-8"))).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(rows)} rows, {len({row['label'] for row in rows})} intents")
