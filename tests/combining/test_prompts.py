"""Prompts carried from task to task: started from saved ones (SPoT), taught by them (PANDA), measured against them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.prompt_hosts import TEXT, N, host, without_dropout
from torch import Tensor

import inlay
from inlay import PrefixTuning, PromptTuning
from inlay.errors import BaseModelError, CheckpointError, ConfigError, InlayError, UnsupportedError
from inlay.pieces.prompts.distilling import Distillation
from inlay.pieces.prompts.saved import saved_prompt

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LABELS = torch.tensor([0, 1])
METHODS = (PromptTuning, PrefixTuning)


def saved(folder: Path, method: Any, name: str = "bert", head: str = "sequence", seed: int = 0) -> str:
    torch.manual_seed(seed)
    inlay.save(inlay.attach(host(name, head), method), folder)
    return str(folder)


def tagger() -> Any:
    """The same trunk under another head."""
    model = host("bert", "token")
    model.bert.load_state_dict(host("bert", "sequence").bert.state_dict(), strict=False)
    return model


def vectors(model: Any) -> Tensor:
    """The prompt, or all layers' prefixes side by side."""
    found = [p.detach() for name, p in model.named_parameters() if ".prompt_tuning" in name or ".prefix_tuning" in name]
    return torch.cat(found, dim=-1)


def student(folder: str | None, cls: Any = PromptTuning, **fields: Any) -> Any:
    torch.manual_seed(7)
    model = without_dropout(host("bert", "sequence"))
    return inlay.attach(model, cls(num_virtual_tokens=N, distil_from=folder, **fields)).train()


# -- where a prompt starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_a_prompt_starts_from_a_saved_one_whatever_the_head(cls: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "run" / "adapter", cls(num_virtual_tokens=N))
    expected = saved_prompt(tmp_path / "run").vectors
    for model, folder in ((host("bert", "sequence"), source), (tagger(), str(tmp_path / "run"))):  # an adapter, a run
        inlay.attach(model, cls(num_virtual_tokens=N, init_from=folder))
        assert torch.equal(vectors(model), expected)
        assert all(parameter.grad is None for parameter in model.parameters())
    inlay.save(model, tmp_path / "again")
    (tmp_path / "run").rename(tmp_path / "gone")  # what it started from is no longer needed
    assert torch.equal(vectors(inlay.load(tagger(), tmp_path / "again")), expected)


def test_a_prompt_of_peft_and_one_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = host("t5", "conditional")
    shape = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, **shape)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, init_from=str(tmp_path)))
    (weight,) = theirs.prompt_encoder.parameters()
    assert torch.equal(vectors(model), weight[:N])  # peft keeps a second half that it never uses


@pytest.mark.parametrize("cls", METHODS)
def test_several_sources_are_averaged(cls: Any, tmp_path: Path) -> None:
    folders = tuple(saved(tmp_path / str(seed), cls(num_virtual_tokens=N), seed=seed) for seed in range(3))
    sources = torch.stack([saved_prompt(folder).vectors for folder in folders])
    plain = inlay.attach(host("bert", "sequence"), cls(num_virtual_tokens=N, init_from=folders))
    torch.testing.assert_close(vectors(plain), sources.mean(0), rtol=1e-6, atol=1e-6)
    weighted = cls(num_virtual_tokens=N, init_from=folders, init_weights=(3, 1, 0))
    model = inlay.attach(host("bert", "sequence"), weighted)
    torch.testing.assert_close(vectors(model), (3 * sources[0] + sources[1]) / 4, rtol=1e-6, atol=1e-6)


def test_several_sources_run_side_by_side(tmp_path: Path) -> None:
    folders = tuple(saved(tmp_path / str(seed), PromptTuning(num_virtual_tokens=N), seed=seed) for seed in range(3))
    model = inlay.attach(tagger(), PromptTuning(num_virtual_tokens=N, ensemble=3, init_from=folders))
    each = [
        inlay.attach(tagger(), PromptTuning(num_virtual_tokens=N, init_from=folder))(TEXT).logits for folder in folders
    ]
    torch.testing.assert_close(model(TEXT).logits, torch.stack(each).mean(0), rtol=1e-5, atol=1e-5)


# -- how alike prompts are ---------------------------------------------------------------------------------------------


def test_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 6, generator=generator) for n in (4, 3))
    pairs = [torch.cosine_similarity(a, b, dim=0) for a in first for b in second]
    means = torch.cosine_similarity(first.mean(0), second.mean(0), dim=0)
    assert inlay.prompt_similarity(first, second, "tokens") == pytest.approx(sum(pairs).item() / 12, abs=1e-6)  # type: ignore[union-attr]
    assert inlay.prompt_similarity(first, second) == pytest.approx(means.item(), abs=1e-6)
    assert inlay.prompt_similarity(first, first) == pytest.approx(1)
    assert inlay.prompt_similarity(first, -first) == pytest.approx(-1)
    for measure in ("mean", "tokens"):
        mine = inlay.prompt_similarity(first, second, measure)
        assert inlay.prompt_similarity(second, first, measure) == pytest.approx(mine)
        assert inlay.prompt_similarity(first.flip(0) * 5, second, measure) == pytest.approx(mine)
    with pytest.raises(ConfigError, match="width 6 and 5"):
        inlay.prompt_similarity(first, torch.ones(2, 5))
    with pytest.raises(ConfigError, match="choose 'mean' or 'tokens'"):
        inlay.prompt_similarity(first, second, "means")


def test_the_nearest_come_first_and_weigh_the_start(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(seed), PromptTuning(num_virtual_tokens=N), seed=seed) for seed in range(3)]
    target = saved_prompt(folders[1]).vectors + 1e-3
    found = inlay.nearest_prompts(target, folders)
    assert next(iter(found)) == folders[1]
    assert list(found.values()) == sorted((inlay.prompt_similarity(target, one) for one in folders), reverse=True)
    weights = tuple(max(value, 0.0) for value in found.values())
    PromptTuning(num_virtual_tokens=N, init_from=tuple(found), init_weights=weights)
    with pytest.raises(ConfigError, match="no sources"):
        inlay.nearest_prompts(target, [])


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_the_loss_is_the_distance_to_the_teacher_in_eval_mode(cls: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, cls(num_virtual_tokens=N), seed=3)
    model = student(folder, cls, distil_weight=0.7)
    (controller,) = inlay.controllers(model)
    assert controller.extra_loss() is None  # nothing was asked yet
    logits = model(TEXT, labels=LABELS).logits
    term = controller.extra_loss()
    assert controller.extra_loss() is None  # once for each call
    expected = inlay.load(host("bert", "sequence"), folder).eval()(TEXT).logits
    torch.testing.assert_close(term, 0.7 * (logits - expected).square().mean(), rtol=1e-5, atol=1e-7)
    assert isinstance(controller, Distillation)
    assert controller.teacher is not None
    term.backward()  # type: ignore[union-attr]
    assert not any(m.training for m in controller.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in controller.teacher.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    table = model.get_input_embeddings().weight
    assert controller.teacher.get_input_embeddings().weight.data_ptr() == table.data_ptr()  # one base, not two
    model.eval()(TEXT, labels=LABELS)
    assert controller.extra_loss() is None  # evaluation has no teacher


@pytest.mark.parametrize(("name", "head"), [("llama", "causal"), ("t5", "conditional")])
def test_only_real_tokens_count(name: str, head: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, PromptTuning(num_virtual_tokens=N), name, head, seed=3)
    torch.manual_seed(7)
    method = PromptTuning(num_virtual_tokens=N, distil_from=folder)
    model = inlay.attach(without_dropout(host(name, head)), method).train()
    labels = TEXT.clone()
    labels[:, :2] = -100
    logits = model(TEXT, labels=labels).logits
    expected = inlay.load(host(name, head), folder)(TEXT, labels=labels).logits
    (controller,) = inlay.controllers(model)
    seen = slice(1, -1) if head == "causal" else slice(2, None)  # what predicts the tokens from the third on
    squares = (logits - expected).square()[:, seen]
    torch.testing.assert_close(controller.extra_loss(), squares.mean(), rtol=1e-5, atol=1e-7)


def test_nothing_is_added_where_student_and_teacher_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = without_dropout(host("bert", "sequence"))
    folder = inlay.save(inlay.attach(copy.deepcopy(base), PromptTuning(num_virtual_tokens=N)), tmp_path)
    same = PromptTuning(num_virtual_tokens=N, init_from=str(folder), distil_from=str(folder))  # and the head as it was
    model = inlay.attach(base, same).train()
    model(TEXT)
    (controller,) = inlay.controllers(model)
    assert controller.extra_loss().item() == 0  # type: ignore[union-attr]


def trained(model: Any) -> list[Tensor]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = model(TEXT, labels=LABELS).loss
        loss = loss + sum(term for c in inlay.controllers(model) if (term := c.extra_loss()) is not None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_weight_of_zero_is_plain_prompt_tuning(tmp_path: Path) -> None:
    folder = saved(tmp_path, PromptTuning(num_virtual_tokens=N), seed=3)
    plain, idle, taught = (trained(student(f, distil_weight=w)) for f, w in ((None, 1), (folder, 0), (folder, 1)))
    assert all(torch.equal(one, other) for one, other in zip(plain, idle, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(plain, taught, strict=True))


def test_the_authors_weight_depends_on_the_rows_of_a_batch(tmp_path: Path) -> None:
    folder = saved(tmp_path, PromptTuning(num_virtual_tokens=N), seed=3)
    terms = []
    for compat in ("paper", "authors"):
        model = student(folder, distil_compat=compat)
        model(TEXT)
        terms.append(inlay.controllers(model)[0].extra_loss())
    torch.testing.assert_close(terms[1], 0.01 * terms[0] / 2, rtol=1e-5, atol=1e-9)


def test_the_weight_of_two_prompts_is_their_similarity(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(seed), PromptTuning(num_virtual_tokens=N), seed=seed) for seed in range(2)]
    model = student(folders[0], distil_weight=tuple(folders))
    (controller,) = inlay.controllers(model)
    controller.prepare(3)
    assert isinstance(controller, Distillation)
    assert controller.weight == pytest.approx(max(0.0, inlay.prompt_similarity(*folders)))


def test_a_copy_and_a_pickle_have_a_teacher_of_their_own(tmp_path: Path) -> None:
    model = student(saved(tmp_path, PromptTuning(num_virtual_tokens=N), seed=3))
    model(TEXT)
    expected = inlay.controllers(model)[0].extra_loss()
    model(TEXT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (controller,) = inlay.controllers(other)
        assert controller.extra_loss() is None
        other(TEXT)
        torch.testing.assert_close(controller.extra_loss(), expected, rtol=1e-6, atol=1e-8)


def test_a_trained_student_needs_its_teacher_no_more(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", PromptTuning(num_virtual_tokens=N), seed=3)
    model = student(folder)
    expected = model.eval()(TEXT).logits
    inlay.save(model, tmp_path / "student")
    (tmp_path / "teacher").rename(tmp_path / "gone")
    loaded = inlay.load(host("bert", "sequence"), tmp_path / "student", trainable=True)
    assert torch.equal(loaded(TEXT).logits, expected)
    loaded.train()(TEXT)
    with pytest.raises(ConfigError, match=r"distil_from=.* cannot teach this model: there is no folder"):
        inlay.controllers(loaded)[0].extra_loss()
    theirs = peft.PeftModel.from_pretrained(host("bert", "sequence"), tmp_path / "student")
    torch.testing.assert_close(theirs.eval()(TEXT).logits, expected, rtol=1e-5, atol=1e-5)


# -- what cannot be carried --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"init_from": "prompt", "num_virtual_tokens": N + 1}, ConfigError, f"set num_virtual_tokens={N}"),
        ({"init_from": "prefix"}, ConfigError, "holds a prefix of 3 rows of 128, and a prompt"),
        ({"init_from": "other"}, BaseModelError, "another base model: the weights of"),
        ({"init_from": "narrow"}, BaseModelError, "another base model: hidden_size is 32 here, 16 there"),
        ({"init_from": "lora"}, CheckpointError, "holds no prompt"),
        ({"init_from": "nowhere"}, CheckpointError, "there is no folder"),
        ({"init_from": ("prompt", "prompt"), "init_weights": (1,)}, ConfigError, "one weight of 0 or more for each"),
        ({"init_weights": (1,)}, ConfigError, "needs init_from="),
        ({"init_from": ()}, ConfigError, "at least one folder"),
        ({"init_from": "prompt", "init": "zeros"}, ConfigError, "keep one of them"),
        ({"distil_from": "nowhere"}, ConfigError, "cannot teach this model: there is no folder"),
        ({"distil_from": "narrow"}, ConfigError, "cannot teach this model: .*hidden_size is 32 here, 16 there"),
        ({"distil_from": "threefold"}, ConfigError, r"cannot teach this model: .*classifier.*\(3, 32\).*\(2, 32\)"),
        ({"distil_from": "prompt", "distil_weight": -1}, ConfigError, "a number of 0 or more"),
        ({"distil_from": "prompt", "distil_weight": ("prompt",)}, ConfigError, "or two folders"),
        ({"distil_from": "prompt", "distil_weight": ("prompt", "narrow")}, ConfigError, "width 32 and 16"),
        ({"distil_from": "prompt", "distil_compat": "code"}, ConfigError, "choose 'paper' or 'authors'"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], error: type[InlayError], message: str, sources: Path
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, tuple) and value and isinstance(value[0], str):
            return tuple(placed(one) for one in value)
        names = ("prompt", "prefix", "other", "narrow", "lora", "threefold", "nowhere")
        return str(sources / value) if value in names else value

    model = host("bert", "sequence")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        inlay.attach(
            model, PromptTuning(**{"num_virtual_tokens": N, **{key: placed(value) for key, value in fields.items()}})
        )
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that fit, and adapters that do not."""
    folder = tmp_path_factory.mktemp("sources")
    saved(folder / "prompt", PromptTuning(num_virtual_tokens=N))
    saved(folder / "prefix", PrefixTuning(num_virtual_tokens=N))
    saved(folder / "lora", inlay.LoRA(r=1))
    narrow = host("bert", "sequence", hidden_size=16, num_attention_heads=2)
    inlay.save(inlay.attach(narrow, PromptTuning(num_virtual_tokens=N)), folder / "narrow")
    threefold = host("bert", "sequence", num_labels=3)
    inlay.save(inlay.attach(threefold, PromptTuning(num_virtual_tokens=N)), folder / "threefold")
    other = host("bert", "sequence")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)
    inlay.save(inlay.attach(other, PromptTuning(num_virtual_tokens=N)), folder / "other")
    return folder


def test_a_model_without_logits_cannot_be_taught(tmp_path: Path) -> None:
    folder = saved(tmp_path, PromptTuning(num_virtual_tokens=N), "bert", "trunk")
    model = inlay.attach(host("bert", "trunk"), PromptTuning(num_virtual_tokens=N, distil_from=folder)).train()
    model(TEXT)
    with pytest.raises(UnsupportedError, match="distil_from compares logits"):
        inlay.controllers(model)[0].extra_loss()
