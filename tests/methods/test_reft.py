"""ReFT: the edits by hand, R orthonormal after training, padding, generation, and the authors' variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.tiny import build
from torch import Tensor, nn

import inlay
from inlay import ReFT
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.pieces.edits import Edit, orthonormal

IDS = torch.arange(3, 15).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def attached(model: nn.Module, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    inlay.attach(model, ReFT(**{"r": 2, "first": 2, "last": 1, **fields}))
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def edits(model: nn.Module) -> list[Edit]:
    return [module for module in model.modules() if isinstance(module, Edit)]


def by_hand(edit: Edit, h: Tensor, variant: str) -> Tensor:
    p = orthonormal(edit.projection) if edit.orthogonal else edit.projection
    source = edit.weight @ h + edit.bias
    return h + p.T @ (source if variant == "direft" else source - p @ h)


@pytest.mark.parametrize(
    ("variant", "compat"), [("loreft", None), ("noreft", None), ("direft", None), ("direft", "authors")]
)
def test_the_formula_at_the_first_and_last_real_tokens(variant: str, compat: str | None) -> None:
    model, seen = attached(build("bert"), variant=variant, compat=compat, layers=0), {}
    model.encoder.layer[0].output.register_forward_hook(lambda _, x, y: seen.update(h=y))
    model.encoder.layer[1].register_forward_pre_hook(lambda _, x: seen.update(edited=x[0]))
    model(IDS, MASK)
    expected, (first, last) = seen["h"].clone(), edits(model)
    assert first.orthogonal == (variant == "loreft" or compat == "authors")
    for row, (head, tail) in enumerate([((0, 1), 5), ((0, 1), 3)]):
        for place in head:
            expected[row, place] = by_hand(first, seen["h"][row, place], variant)
        expected[row, tail] = by_hand(last, seen["h"][row, tail], variant)
    torch.testing.assert_close(seen["edited"], expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def test_r_is_orthonormal_whatever_the_optimiser_did() -> None:
    model = inlay.attach(build("bert"), ReFT(r=4, first=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    before = edits(model)[0].basis().detach()
    for _ in range(3):
        model(IDS)[0].square().sum().backward()
        optimizer.step()
    for edit in edits(model):
        basis = edit.basis()
        torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=1e-5)
    assert (edits(model)[0].basis() - before).abs().max() > 0.01
    q = orthonormal(torch.randn(4, 32))
    torch.testing.assert_close(orthonormal(q), q)
    assert torch.autograd.gradcheck(orthonormal, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    model = attached(build("llama"))
    real = slice(2, 6) if side == "left" else slice(0, 4)
    mask = torch.zeros_like(IDS)
    mask[0] = 1
    mask[1, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, attention_mask=mask, position_ids=positions)[0][1, real]
    torch.testing.assert_close(padded, model(IDS[1:, real])[0][0], rtol=1e-4, atol=1e-5)


def test_generated_tokens_are_not_edited() -> None:
    model = attached(build("llama", "causal"), last=2)
    cached = model(IDS[:1], use_cache=True)
    step = model(torch.tensor([[7]]), past_key_values=cached.past_key_values).logits
    with torch.no_grad():  # the same without a cache: a text of seven, edited where the first six of it were
        text = torch.cat((IDS[:1], torch.tensor([[7]])), 1)
        plain = build("llama", "causal")
        for number, layer in enumerate(plain.model.layers):
            head, tail = edits(model)[2 * number : 2 * number + 2]

            def hook(_: nn.Module, x: object, h: Tensor, head: Edit = head, tail: Edit = tail) -> Tensor:
                h = h.clone()
                for place, edit in ((0, head), (1, head), (4, tail), (5, tail)):
                    h[0, place] = by_hand(edit, h[0, place], "loreft")
                return h

            layer.register_forward_hook(hook)
        torch.testing.assert_close(step[0, -1], plain(text).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_tied_edits_encoders_and_files(tmp_path: Path) -> None:
    model = attached(build("t5"), tied=True)
    assert len(edits(model)) == 2  # the encoder's blocks, one edit each
    assert inlay.summary(model).trainable_parameters == 2 * (2 * 2 * 32 + 2)
    expected = model(IDS, MASK, decoder_input_ids=IDS)[0]
    loaded = inlay.load(build("t5"), inlay.save(model, tmp_path))
    assert torch.equal(loaded(IDS, MASK, decoder_input_ids=IDS)[0], expected)


def test_dropout_leaves_the_base_alone() -> None:
    model = attached(build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), dropout=0.999, layers=-1)
    with inlay.disabled(model):
        base = model.train()(IDS)[0]
    assert (model(IDS)[0] == base).float().mean() > 0.9  # an edit is left out nearly everywhere, and h nowhere


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    for fields, words in (
        ({"variant": "loraft"}, "choose one of loreft"),
        ({"first": 0, "last": 0}, "edits no token"),
        ({"r": 0}, r"ReFT\(r=0\)"),
        ({"first": -1}, r"first=-1"),
        ({"compat": "paper"}, "choose one of None, authors"),
    ):
        with pytest.raises(ConfigError, match=words):
            ReFT(**fields)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(12, 2, 20), 2, enable_nested_tensor=False)
    for model, method, error, words in (
        (build("bert"), ReFT(targets="mlp"), TargetError, "ReFT: target 'mlp'"),
        (build("bert"), ReFT(targets="self_attention"), UnsupportedError, "it is no block"),
        (build("bert"), ReFT(r=33), ConfigError, "32 dimensions only"),
        (encoder, ReFT(), UnsupportedError, "batch_first=True"),
    ):
        with pytest.raises(error, match=words):
            inlay.attach(model, method)
        assert not hasattr(model, "_inlay")
