"""Poly's tasks: named by the call, by a block or by the method; known again in the backward; refused where unknown."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from engine.tiny import build
from properties.models import perturb
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, UnsupportedError

IDS = torch.arange(2, 22).reshape(2, 10)
METHOD = inlay.Poly(r=2, n_tasks=3, n_skills=2, sample="never")


def adapted(method: inlay.Poly = METHOD, name: str = "llama", head: str = "causal") -> nn.Module:
    torch.manual_seed(0)
    model = perturb(inlay.attach(build(name, head).eval(), method))
    for parameter in model.parameters():
        if parameter.shape[:1] == (3,) and parameter.requires_grad:
            nn.init.normal_(parameter)  # tasks that want unlike skills
    return model


def test_each_row_is_what_it_is_alone() -> None:
    model = adapted()
    with torch.no_grad():
        both = model(IDS, task_ids=torch.tensor([2, 0])).logits
        alone = [model(IDS[i : i + 1], task_ids=[t]).logits for i, t in ((0, 2), (1, 0))]
        other = model(IDS, task_ids=[0, 0]).logits
        with inlay.for_tasks(model, [2, 0]):
            block = model(IDS).logits
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(block, both)
    assert not torch.allclose(other[0], both[0], atol=1e-4)
    assert torch.equal(other[1], both[1])


def gradients(model: nn.Module, tasks: list[list[int]]) -> list[Tensor]:
    """Of the sum over calls, all made before one backward."""
    model.zero_grad()
    sum(model(IDS, task_ids=one).logits.square().mean() for one in tasks).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_computed_again_know_the_tasks_of_their_own_call(reentrant: bool) -> None:
    model, calls = adapted(), [[2, 0], [1, 1]]
    expected = gradients(model, calls)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for found, gradient in zip(gradients(model, calls), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("read", ["tuple", "hidden states"])
def test_so_do_they_whatever_of_the_output_is_read_and_after_an_evaluation_between(read: str) -> None:
    model = adapted()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        total = torch.zeros(())
        for tasks in ([2, 0], [1, 1]):
            given = {"return_dict": False} if read == "tuple" else {"output_hidden_states": True}
            output = model(IDS, task_ids=tasks, use_cache=False, **given)
            found = output[0] if read == "tuple" else output.hidden_states[1]
            total = total + found.square().mean()
        with torch.no_grad():
            model(IDS, task_ids=[0, 0])
        total.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_generate_and_beams() -> None:
    model = adapted()
    with inlay.for_tasks(model, [2, 0]):
        both = model.generate(IDS, max_new_tokens=3, num_beams=2, do_sample=False)
    with inlay.for_tasks(model, 2):
        first = model.generate(IDS[:1], max_new_tokens=3, num_beams=2, do_sample=False)
    assert torch.equal(both[:1], first)


def test_an_encoder_decoder_generates_for_tasks() -> None:
    model = adapted(METHOD.replace(targets="attention"), "t5", "conditional")
    model(input_ids=IDS, decoder_input_ids=IDS[:, :3], task_ids=[1, 1]).logits.sum().backward()
    with inlay.for_tasks(model, [2, 0]), torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=IDS[:, :1]).logits.argmax(-1)
        found = model.generate(IDS, max_new_tokens=1, do_sample=False, decoder_start_token_id=int(IDS[0, 0]))
        assert int(found[0, 1]) == int(expected[0, 0])


def test_two_adapters_hear_of_the_tasks() -> None:
    model = adapted()
    inlay.attach(model, METHOD, name="law")
    perturb(model, "law")
    with torch.no_grad():
        assert not torch.equal(model(IDS, task_ids=[0, 1]).logits, model(IDS, task_ids=[2, 2]).logits)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IDS, task_ids=[0, 1]).logits, model(IDS, task_ids=[0, 1]).logits)


def test_the_task_of_all_rows_is_kept_in_the_file(tmp_path: Path) -> None:
    model = adapted(METHOD.replace(task=2))
    inlay.save(model, tmp_path)
    back = inlay.load(build("llama", "causal").eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(back(IDS).logits, back(IDS, task_ids=[2, 2]).logits, rtol=1e-5, atol=1e-5)


def test_draws_are_reproducible_and_their_mean_is_near_the_sigmoid() -> None:
    model = adapted(METHOD.replace(sample="training")).train()
    given = {"input_ids": IDS, "task_ids": [1, 1]}
    with torch.no_grad():
        torch.manual_seed(5)
        first = model(**given).logits
        second = model(**given).logits
        torch.manual_seed(5)
        assert torch.equal(model(**given).logits, first)
    assert not torch.equal(first, second)


def test_what_is_refused() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="this adapter is of 3 tasks, and the call does not say"):
        model(IDS)
    with pytest.raises(ConfigError, match="this adapter is of tasks 0 to 2"):
        model(IDS, task_ids=[0, 3])
    with pytest.raises(ConfigError, match="task_ids of shape"):
        model(IDS, task_ids=[0, 1, 2])
    with pytest.raises(ConfigError, match="the tasks are 0 to 2"):
        METHOD.replace(task=3)
    for method, error in (
        (METHOD.replace(n_splits=5), UnsupportedError),
        (METHOD.replace(overrides={"query": {"n_tasks": 2}}), ConfigError),
    ):
        bare = build("llama", "causal")
        with pytest.raises(error, match="Poly"):
            inlay.attach(bare, method)
        assert inlay.engine.adapters.find_adapters(bare) is None


def test_rows_of_several_tasks_compiled_and_in_half_precision() -> None:
    model, tasks = adapted(), torch.tensor([2, 0])
    with torch.no_grad():
        expected = model(IDS, task_ids=tasks).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(IDS, task_ids=tasks).logits, expected, rtol=1e-5, atol=1e-5)
    bound = 0.05 * expected.abs().max()  # bfloat16 keeps 8 bits: 0.4 % for each of some dozens of roundings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(IDS, task_ids=tasks).logits
        found.float().square().mean().backward()
    assert (found.float() - expected).abs().max() < bound
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
