"""Compositions as data: each against running its adapters by themselves, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from combining.composed import CASES, TEXT, close, model, run, shared
from engine.small import IDS, Net, randomise
from torch import Tensor, nn

import inlay
from inlay import Average, BatchSplit, Fuse, Parallel, Split, Stack
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, UnsupportedError
from inlay.pieces.lora.banked import BankedLoRA

every = pytest.mark.parametrize("case", CASES)


@every
def test_parallel_is_each_part_by_itself_one_after_the_other(case: str) -> None:
    base = shared(case)
    close(run(base, Parallel("a", "b", None)), torch.cat([run(base, "a"), run(base, "b"), run(base)]))
    if case != "trained-copies":  # of which the last is read
        both = torch.cat([run(base, "a", "b"), run(base, "a", "c")])
        close(run(base, Stack("a", Parallel("b", "c"))), both)
        close(run(base, "a", Parallel("b", "c")), both)
        close(run(base, Parallel(Stack("a", "b"), Stack("a", "c"))), both)


@every
def test_batch_split_gives_each_row_its_own_part(case: str) -> None:
    base = shared(case)
    own = [run(base, "a", ids=TEXT[:1]), run(base, "b", ids=TEXT[1:3]), run(base, ids=TEXT[3:])]
    close(run(base, BatchSplit("a", "b", None, sizes=[1, 2, 1])), torch.cat(own))
    inside = Parallel(BatchSplit("a", "b", sizes=[1, 3]), "c")
    first = torch.cat([run(base, "a", ids=TEXT[:1]), run(base, "b", ids=TEXT[1:])])
    close(run(base, inside), torch.cat([first, run(base, "c")]))


def test_batch_split_of_loras_runs_them_together_as_per_row_does() -> None:
    base = shared("lora-with-heads")
    with inlay.per_row(base, ["a", "b", "b", None]):
        expected = base(TEXT)[0]
    assert torch.equal(run(base, BatchSplit("a", "b", None, sizes=[1, 2, 1])), expected)
    inlay.activate(base, BatchSplit("a", "b", sizes=[1, 3]))
    host = base.bert.encoder.layer[0].attention.self.query
    assert isinstance(host.inlays.call().piece, BankedLoRA)
    inlay.activate(base, Average("a", "b"))
    assert isinstance(host.inlays.call().piece, BankedLoRA)


HOSTS: dict[str, Callable[[Any], nn.Module]] = {
    "lora-with-heads": lambda base: base.bert.encoder.layer[0].attention.self.query,
    "norms": lambda base: base.encoder.layer[0].output.LayerNorm,
    "after-networks": lambda base: base.model.layers[0].mlp,
    "rotated-inputs": lambda base: base.model.layers[0].self_attn.q_proj,
    "trained-copies": lambda base: base.transformer.h[0].attn.c_attn,
}


@pytest.mark.parametrize("case", HOSTS)
def test_average_and_split_at_one_place_with_gradients(case: str) -> None:
    base = shared(case)
    host, x = HOSTS[case](base), torch.randn(2, 5, 32)
    trained = [p for name in "abc" for p in adapters_of(base).get(name).parameters()]
    direction = torch.randn_like(host(x))

    def at(*parts: Any) -> Tensor:
        with inlay.using(base, *parts):
            found: Tensor = host(x)
            return found

    h, a, b, c = at(), at("a"), at("b"), at("c")
    nested = at("a", "b")
    pairs = [
        (at(Average("a", "b", "c")), (a + b + c) / 3),
        (at(Average("a", "b", weights=[0.5, 0.7])), h + 0.5 * (a - h) + 0.7 * (b - h)),
        (at(Average("a", None, weights=[1, 1])), a),
        (at(Average(Stack("a", "b"), "c", weights=[0.25, 0.75])), 0.25 * nested + 0.75 * c),
        (at(Split("a", None, "b", sizes=[1, 2, 2])), torch.cat([a[:, :1], h[:, 1:3], b[:, 3:]], 1)),
        (at(Split(Average("a", "b"), "c", sizes=[3, 2])), torch.cat([((a + b) / 2)[:, :3], c[:, 3:]], 1)),
    ]
    for found, expected in pairs:
        close(found, expected)
        grads = [torch.autograd.grad((y * direction).sum(), trained, allow_unused=True, retain_graph=True)
                 for y in (found, expected)]  # fmt: skip
        for mine, other in zip(*grads, strict=True):
            zero = torch.zeros(())
            close(zero if mine is None else mine.norm(), zero if other is None else other.norm(), 1e-4)
            if mine is not None and other is not None:
                close(mine, other, 1e-4)  # sums over 10 tokens


def test_split_over_a_whole_network_of_tokens() -> None:
    net: Any = Net()
    for name in "ab":
        inlay.attach(net, inlay.LoRA(r=2, targets="table,first,second"), name)
        randomise(net, name)
    outputs = []
    for parts in (("a",), ("b",), (Split("a", "b", sizes=[2, 3]),)):
        inlay.activate(net, *parts)
        outputs.append(net(IDS))
    close(outputs[2], torch.cat([outputs[0][:, :2], outputs[1][:, 2:]], 1))


@every
def test_each_part_of_parallel_learns_from_its_own_rows(case: str) -> None:
    base = shared(case)
    bits = {name: value.clone() for name, value in base.state_dict().items()}
    inlay.trainable(base, "a", "b")
    output = run(base, Parallel("a", "b"))
    torch.manual_seed(0)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    found = {name: p.grad for name, p in base.named_parameters() if p.grad is not None}
    base.zero_grad(set_to_none=True)
    for part, own in zip("ab", direction.chunk(2), strict=True):
        (run(base, part) * own).sum().backward()
    expected = {name: p.grad for name, p in base.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():  # fp32 sums over other batches; some gradients are 0 but for rounding
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * largest)
    assert all(torch.equal(value, bits[name]) for name, value in base.state_dict().items())


def test_parallel_repeats_masks_and_labels_and_refuses_a_cache() -> None:
    base: Any = shared("lora-with-heads")
    mask, labels = torch.ones_like(TEXT), torch.tensor([0, 1, 1, 0])
    mask[0, 4:] = 0
    losses = []
    for part in ("a", "b", Parallel("a", "b")):
        with inlay.using(base, part):
            output = base(input_ids=TEXT, attention_mask=mask, labels=labels)
        losses.append(output.loss)
    close(losses[2], (losses[0] + losses[1]) / 2)
    assert output.logits.shape == (8, 2)
    translator: Any = shared("several-methods")
    inlay.activate(translator, Parallel("a", "b"))
    whole = translator(input_ids=TEXT, decoder_input_ids=TEXT[:, :2])[0]
    inlay.activate(translator)
    encoded = translator.encoder(TEXT)
    inlay.activate(translator, Parallel("a", "b"))
    again = translator(encoder_outputs=encoded, decoder_input_ids=TEXT[:, :2])[0]
    assert again.shape == whole.shape
    decoder: Any = shared("after-networks")
    inlay.activate(decoder, Parallel("a", "b"))
    with pytest.raises(UnsupportedError, match="BatchSplit"):
        decoder.generate(TEXT, max_new_tokens=2)
    texts = []
    for parts, ids in ((("a",), TEXT), (("b",), TEXT), ((BatchSplit("a", "b", sizes=[4, 4]),), TEXT.repeat(2, 1))):
        inlay.activate(decoder, *parts)
        texts.append(decoder.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2))
    width = max(text.shape[1] for text in texts)
    texts = [torch.nn.functional.pad(text, (0, width - text.shape[1])) for text in texts]
    assert torch.equal(texts[2], torch.cat(texts[:2]))


def test_a_prompt_outside_and_a_fusion_inside() -> None:
    base = model("bert")
    inlay.attach(base, inlay.PromptTuning(num_virtual_tokens=2), "prompt")
    each = torch.cat([run(base, "prompt", "a"), run(base, "prompt", "b")])
    close(run(base, "prompt", Parallel("a", "b")), each)
    close(run(base, Parallel("a", "b"), "prompt"), each)
    inlay.activate(base)
    inlay.attach(base, inlay.AdapterFusion(adapters=("a", "b")), "both")
    fused = run(base, "both")
    assert torch.equal(run(base, Fuse("a", "b")), fused)
    close(run(base, Parallel(Fuse("b", "a"), "c")), torch.cat([fused, run(base, "c")]))
    inlay.activate(base)
    inlay.attach(base, inlay.AdapterFusion(adapters=("b", "a")), "again")
    with pytest.raises(AdapterError, match="both, again"):
        inlay.activate(base, Fuse("a", "b"))
    with pytest.raises(AdapterError, match=r"AdapterFusion\(adapters=\('a', 'c'\)\)"):
        inlay.activate(base, Fuse("a", "c"))


def test_beside_linears_that_were_fused() -> None:
    base = model("llama", "causal", inlay.LoRA(r=2, targets="all-linear"))
    expected = torch.cat([run(base, "a"), run(base, "b")])
    inlay.fuse(base)
    close(run(base, Parallel("a", "b")), expected)
