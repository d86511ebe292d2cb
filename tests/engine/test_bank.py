"""per_row: every row of a batch as if it were alone under its adapter, whatever that is and however it runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engine import tiny
from engine.small import randomise
from torch import Tensor, nn

import inlay
from inlay.engine import bank
from inlay.engine.adapters import adapters_of
from inlay.engine.host import inlays_of
from inlay.errors import AdapterError, UnsupportedError
from inlay.kernels import dropout
from inlay.pieces.lora import banked

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Products of other shapes add up in another order; in fp32 that is a few units of 1e-7 in numbers around one."""
ROWS = ["law", "poems", None, "law", "news"]


class Net(nn.Module):
    """Linears of several widths, a norm and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.gate = nn.Linear(6, 10, bias=False)
        self.last = nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        result: Tensor = self.last(torch.tanh(self.norm(self.first(x))) * self.gate(x))
        return result


def with_adapters(base: nn.Module, methods: dict[str, Any], **fields: Any) -> nn.Module:
    """A model with adapters of these names, all of whose tensors matter."""
    for name, method in methods.items():
        inlay.attach(base, method, name, **fields)
        randomise(base, name)
    return base


def loras(**fields: Any) -> dict[str, inlay.Method]:
    """Three LoRAs of one rank and different scales."""
    fields = {"r": 2, "targets": "re:first|gate|last"} | fields
    return {name: inlay.LoRA(alpha=alpha, **fields) for name, alpha in [("law", 3), ("poems", 1), ("news", 5)]}


def ids(rows: int, tokens: int = 3) -> Tensor:
    return torch.randint(11, (rows, tokens), generator=torch.Generator().manual_seed(4))


def one_by_one(model: nn.Module, rows: Sequence[str | None], call: Callable[[int], Tensor]) -> Tensor:
    """Each row alone, under its adapter."""
    outputs = []
    for number, name in enumerate(rows):
        with inlay.using(model, *([name] if name else [])):
            outputs.append(call(number))
    return torch.cat(outputs)


def same_as_one_by_one(model: nn.Module, rows: Sequence[str | None], x: Tensor, **close: Any) -> None:
    """Three calls: matrices that rows take are kept from the second on."""
    expected = one_by_one(model, rows, lambda number: model(x[number : number + 1]))
    with inlay.per_row(model, rows):
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, **(CLOSE | close))
    with inlay.disabled(model):
        assert not torch.equal(model(x), expected)


@pytest.fixture(params=["wide", "gathered", "as it chooses"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way that LoRAs can be computed together."""
    if request.param != "as it chooses":
        monkeypatch.setattr(banked, "WIDE", 10**9 if request.param == "wide" else -1)
    return str(request.param)


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [ROWS, ["law"] * 5, [None] * 5, ["news", "law", "poems", "news"], [None, "law"]])
def test_rows_of_loras(way: str, rows: list[str | None], grad: bool) -> None:
    model = with_adapters(Net(), loras())
    with torch.set_grad_enabled(grad):
        expected = one_by_one(model, rows, lambda number: model(ids(5)[number : number + 1]))
        with inlay.per_row(model, rows):
            for _ in range(3):
                torch.testing.assert_close(model(ids(5)[: len(rows)]), expected, **CLOSE)


@torch.no_grad()
def test_loras_of_different_ranks_scales_and_places(way: str) -> None:
    methods = {
        "law": inlay.LoRA(r=2, alpha=3, targets="re:first|gate"),
        "poems": inlay.LoRA(r=3, alpha=1, rank_stabilised=True, targets="re:gate|last"),
        "news": inlay.LoRA(r=4, alpha=2, targets="last", freeze_a=True),
    }
    same_as_one_by_one(with_adapters(Net(), methods), ROWS, ids(5))


@torch.no_grad()
def test_adapters_that_are_absent_at_some_places(way: str) -> None:
    methods = loras() | {"news": inlay.LoRA(r=2, targets="gate")}
    same_as_one_by_one(with_adapters(Net(), methods), ROWS, ids(5))


def test_it_is_one_piece_a_host_and_calls_the_base_once() -> None:
    model = with_adapters(Net(), loras())
    calls: list[str] = []
    for name in ("first", "gate", "last"):
        model.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: calls.append(name))
    with inlay.per_row(model, ROWS):
        model(ids(5))
        inlays = inlays_of(model.first)  # type: ignore[arg-type]
        assert inlays is not None
        assert isinstance(inlays.call().piece, banked.BankedLoRA)
    assert calls == ["first", "gate", "last"]


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6), (5, 0, 6)])
def test_inputs_of_any_number_of_dimensions(way: str, shape: tuple[int, ...]) -> None:
    model = with_adapters(nn.Sequential(nn.Linear(6, 4)), loras(targets="0"))
    x = torch.randn(shape)
    with torch.no_grad(), inlay.per_row(model, ROWS):
        found = [model(x), model(x)]
    for y in found:
        torch.testing.assert_close(y, one_by_one(model, ROWS, lambda number: model(x[number : number + 1])), **CLOSE)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_bf16(way: str, tokens: int) -> None:
    """As good as one by one: a few roundings (2⁻⁸ each) of the same numbers away."""
    model = with_adapters(Net().bfloat16(), loras())
    with torch.no_grad():
        same_as_one_by_one(model, ROWS, ids(5, tokens), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("tokens", [1, 40])
def test_autocast(way: str, tokens: int) -> None:
    model = with_adapters(Net(), loras())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same_as_one_by_one(model, ROWS, ids(5, tokens), rtol=0.03, atol=0.03)


def test_a_base_that_does_more_than_its_weight_says(way: str) -> None:
    """The base is called where it is not a plain linear, and its output is not written into."""

    class Doubled(nn.Linear):
        last: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.last = 2 * super().forward(x)
            return self.last

    base = Doubled(6, 4)
    model = with_adapters(nn.Sequential(base), loras(targets="0"))
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        with inlay.per_row(model, ROWS):
            found = [model(x), model(x)]
        with inlay.disabled(model):
            torch.testing.assert_close(base.last, model(x))
        for y in found:
            expected = one_by_one(model, ROWS, lambda number: model(x[number : number + 1]))
            torch.testing.assert_close(y, expected, **CLOSE)


# -- what is kept ------------------------------------------------------------------------------------------------------


def changes(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Ways in which an adapter's values change."""
    adapter = adapters_of(model).get("law")
    parameters = adapter.parameters()
    values = {name: tensor * (2 if ".law." in name else 1) for name, tensor in model.state_dict().items()}

    def stepped() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(parameters, lr=0.3).step()

    def replaced() -> None:
        for _, piece in adapter.pieces():
            piece.lora_B = nn.Parameter(piece.lora_B.detach() * 2)  # type: ignore[operator]

    def moved() -> None:
        for parameter in parameters:
            parameter.data = parameter.data * 2

    return {
        "copy_": lambda: [p.copy_(p * 2) for p in parameters],
        "optimiser": stepped,
        "load_state_dict": lambda: model.load_state_dict(values),
        "assigned": lambda: model.load_state_dict(values, assign=True),
        "replaced": replaced,
        "moved": moved,
    }


@pytest.mark.parametrize("change", ["copy_", "optimiser", "load_state_dict", "assigned", "replaced", "moved"])
@torch.no_grad()
def test_a_change_is_noticed_within_the_block(way: str, change: str) -> None:
    model = with_adapters(Net(), loras())
    with inlay.per_row(model, ROWS):
        before = [model(ids(5)) for _ in range(3)][-1]
        changes(model)[change]()
        after = [model(ids(5)) for _ in range(2)]
    expected = one_by_one(model, ROWS, lambda number: model(ids(5)[number : number + 1]))
    for y in after:
        torch.testing.assert_close(y, expected, **CLOSE)
    assert not torch.allclose(before, expected, atol=1e-2)


@torch.no_grad()
def test_a_change_in_inference_mode_is_noticed(way: str) -> None:
    with torch.inference_mode():
        model = with_adapters(Net(), loras())
        for _ in range(2):
            same_as_one_by_one(model, ROWS, ids(5))
            randomise(model, "law")


@torch.no_grad()
def test_other_rows_are_noticed_and_the_same_rows_form_nothing_anew(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(Net(), loras())
    for rows in (ROWS, ROWS[::-1], ["poems"] * 5, ROWS):
        same_as_one_by_one(model, rows, ids(5))
    with inlay.per_row(model, ROWS):
        model(ids(5))
    monkeypatch.setattr(torch, "cat", None)  # whatever is formed, is joined
    monkeypatch.setattr(banked.BankedLoRA, "_gathered", None)
    with inlay.per_row(model, ROWS):
        model(ids(5))


def test_only_a_few_sets_of_adapters_keep_what_they_formed() -> None:
    model = with_adapters(Net(), {f"a{n}": inlay.LoRA(r=1, targets="first") for n in range(bank.KEPT + 3)})
    for n in range(bank.KEPT + 3):
        with inlay.per_row(model, [f"a{n}", None]):
            model(ids(2))
    assert list(adapters_of(model).banks) == [(f"a{n}",) for n in range(3, bank.KEPT + 3)]


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("tokens", [1, 3])
def test_each_adapter_gets_the_gradients_of_its_rows(way: str, tokens: int) -> None:
    model = with_adapters(Net(), loras())
    x, weights = ids(5, tokens), torch.randn(5, tokens, 4)

    def alone() -> Tensor:
        return (one_by_one(model, ROWS, lambda n: model(x[n : n + 1])) * weights).sum()

    def together() -> Tensor:
        with inlay.per_row(model, ROWS):
            return (model(x) * weights).sum()

    expected = gradients(model, alone)
    torch.testing.assert_close(gradients(model, together), expected, **CLOSE)
    assert {name.split(".inlays.")[1].split(".")[0] for name in expected} == {"law", "poems", "news"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(way: str, reentrant: bool) -> None:
    model = with_adapters(tiny.build("llama", "causal"), loras(targets="all-linear"))
    x = torch.randint(3, 60, (5, 7))

    def loss() -> Tensor:
        with inlay.per_row(model, ROWS):
            value: Tensor = model(input_ids=x, labels=x).loss
            value.backward()
        return torch.zeros((), requires_grad=True)

    plain = gradients(model, loss)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, loss), plain, **CLOSE)
    assert plain


def test_dropout_with_equal_rates_drops_the_same_entries(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(Net(), loras(dropout=0.4)).train()
    masks: dict[int, Tensor] = {}

    def draw(shape: torch.Size, p: float, device: torch.device) -> Tensor:
        full = masks.setdefault(shape[-1], torch.rand(5, *shape[1:]) > p)
        return full if shape[0] == 5 else full[row : row + 1]

    monkeypatch.setattr(dropout, "draw", draw)
    with inlay.per_row(model, ROWS):
        found = model(ids(5))
    expected = []
    for row, name in enumerate(ROWS):
        with inlay.using(model, *([name] if name else [])):
            expected.append(model(ids(5)[row : row + 1]))
    torch.testing.assert_close(found, torch.cat(expected), **CLOSE)
    model.eval()
    assert not torch.allclose(one_by_one(model, ROWS, lambda n: model(ids(5)[n : n + 1])), found, atol=1e-2)


def test_dropout_with_unequal_rates_is_refused_in_training_only() -> None:
    model = with_adapters(Net(), loras() | {"news": inlay.LoRA(r=2, targets="first", dropout=0.1)})
    with torch.no_grad():
        same_as_one_by_one(model.eval(), ROWS, ids(5))
    with pytest.raises(UnsupportedError, match=r"dropout \[0.0, 0.1\]"), inlay.per_row(model.train(), ROWS):
        model(ids(5))


# -- other methods -----------------------------------------------------------------------------------------------------

PLACES = {"targets": "re:first|gate|last"}
KINDS: dict[str, Callable[[], inlay.Method]] = {
    "dora": lambda: inlay.DoRA(r=2, **PLACES),
    "ia3": lambda: inlay.IA3(targets="re:first|gate|last", feedforward="last"),
    "adapter": lambda: inlay.Adapter(bottleneck=3, **PLACES),
    "adapter on a norm": lambda: inlay.Adapter(bottleneck=3, targets="norm"),
    "lora on a table": lambda: inlay.LoRA(r=2, targets="re:table|first"),
    "pissa": lambda: inlay.LoRA(r=2, init="pissa", **PLACES),
    "exact": lambda: inlay.LoRA(r=2, precision="exact", **PLACES),
    "bitfit": inlay.BitFit,
    "norms": inlay.LayerNormTuning,
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_method_on_single_modules(kind: str) -> None:
    model = with_adapters(Net(), {name: KINDS[kind]() for name in ("law", "poems", "news")})
    same_as_one_by_one(model, ROWS, ids(5))


@torch.no_grad()
def test_mixed_methods_in_one_batch() -> None:
    methods = {
        "law": inlay.LoRA(r=2, targets="re:first|gate"),
        "poems": inlay.DoRA(r=3, targets="first"),
        "news": [inlay.IA3(targets="gate", feedforward=()), inlay.LoRA(r=1, targets="gate")],
    }
    same_as_one_by_one(with_adapters(Net(), methods), ROWS, ids(5))


def test_gradients_of_other_methods() -> None:
    methods = {"law": KINDS["dora"](), "poems": KINDS["ia3"](), "news": KINDS["adapter"]()}
    model = with_adapters(Net(), methods)
    x = ids(5)
    alone = gradients(model, lambda: one_by_one(model, ROWS, lambda n: model(x[n : n + 1])).square().sum())

    def together() -> Tensor:
        with inlay.per_row(model, ROWS):
            return model(x).square().sum()  # type: ignore[no-any-return]

    torch.testing.assert_close(gradients(model, together), alone, **CLOSE)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_a_head_for_each_adapter(architecture: str) -> None:
    """Trained copies of the classifier (2-D inputs in BERT's), beside LoRA in the trunk."""
    model = tiny.build(architecture, "sequence", **({"pad_token_id": 0} if architecture == "bert" else {}))
    with_adapters(model, loras(targets="all-linear" if architecture != "bert" else "query,value"))
    x = torch.randint(3, 60, (5, 7))
    assert any("modules_to_save" in name for name, _ in model.named_parameters())
    same_as_one_by_one(_logits(model), ROWS, x)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self.model(*args, **kwargs).logits
        return logits


def _logits(model: nn.Module) -> nn.Module:
    return _Logits(model)


def refused() -> Iterator[tuple[str, nn.Module, Any]]:
    yield "prompt", tiny.build("llama", "causal"), inlay.PromptTuning(num_virtual_tokens=2)
    yield "prefix", tiny.build("llama", "causal"), inlay.PrefixTuning(num_virtual_tokens=2)
    yield "experts", tiny.build("mixtral", "causal"), inlay.LoRA(r=2, targets="re:.*experts.*")
    yield "torch's attention", nn.MultiheadAttention(8, 2), inlay.LoRA(r=2, targets="out_proj.weight")
    yield "composed", tiny.build("bert"), inlay.Adapter(placement="parallel", bottleneck=2)


@pytest.mark.parametrize(("model", "method"), [pytest.param(m, k, id=name) for name, m, k in refused()])
def test_what_works_on_the_whole_batch_is_refused(model: nn.Module, method: Any) -> None:
    model = inlay.attach(copy.deepcopy(model), method, "law")
    message = r"'law' cannot be chosen row by row.*inlay.using"
    with pytest.raises(UnsupportedError, match=message), inlay.per_row(model, ["law"]):
        pass
    assert adapters_of(model).state.bank is None


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generating(way: str, beams: int) -> None:
    model = with_adapters(tiny.build("llama", "causal"), loras(targets="all-linear"))
    x = torch.randint(3, 60, (5, 6))
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    mask = torch.ones_like(x)
    expected = one_by_one(
        model, ROWS, lambda n: model.generate(x[n : n + 1], attention_mask=mask[:1], **options)  # type: ignore[operator]
    )
    with inlay.per_row(model, ROWS):
        assert torch.equal(model.generate(x, attention_mask=mask, **options), expected)  # type: ignore[operator]
    with inlay.disabled(model):
        assert not torch.equal(model.generate(x, attention_mask=mask, **options), expected)  # type: ignore[operator]


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_encoder_and_decoder(way: str, beams: int) -> None:
    model = with_adapters(tiny.build("t5", "conditional"), loras(targets="all-linear"))
    x = torch.randint(3, 60, (5, 6))
    y = x[:, :4].contiguous()
    expected = one_by_one(model, ROWS, lambda n: model(input_ids=x[n : n + 1], labels=y[n : n + 1]).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    mask = torch.ones_like(x)
    texts = one_by_one(
        model, ROWS, lambda n: model.generate(x[n : n + 1], attention_mask=mask[:1], **options)  # type: ignore[operator]
    )
    with inlay.per_row(model, ROWS):
        torch.testing.assert_close(model(input_ids=x, labels=y).logits, expected, **CLOSE)
        assert torch.equal(model.generate(x, attention_mask=mask, **options), texts)  # type: ignore[operator]


# -- errors and life ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["law", [], [3], ()])
def test_what_is_no_list_of_names(rows: Any) -> None:
    model = with_adapters(Net(), loras())
    with pytest.raises(AdapterError, match="one adapter name, or None, for each row"), inlay.per_row(model, rows):
        pass


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    model = with_adapters(Net(), loras())
    with pytest.raises(AdapterError, match="did you mean 'poems'"), inlay.per_row(model, ["law", "poem"]):
        pass


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("rows", [2, 4, 6, 10])
def test_a_wrong_number_of_rows(kind: str, rows: int) -> None:
    model = with_adapters(Net(), loras() if kind == "lora" else {name: KINDS["ia3"]() for name in ("law", "poems")})
    names = (["law", "poems", None, "law", "poems"] * 2)[:rows]
    with pytest.raises(UnsupportedError, match=f"given {rows} rows, and .* with shape \\(5, 3, 6\\)"):  # noqa: SIM117
        with inlay.per_row(model, names):
            model(ids(5))
    assert adapters_of(model).state.bank is None
    model(ids(5))


def test_a_tensor_without_rows_is_refused() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(5, 4)), loras(targets="0"))
    with pytest.raises(UnsupportedError, match=r"with shape \(5,\)"), inlay.per_row(model, ROWS):
        model(torch.randn(5))


def test_blocks_do_not_nest_nor_stand_on_merged_or_switchable_models() -> None:
    model = with_adapters(Net(), loras())
    with inlay.per_row(model, ROWS):
        with pytest.raises(AdapterError, match="end the other one first"), inlay.per_row(model, ROWS):
            pass
        with pytest.raises(AdapterError, match="leave the block first"):
            inlay.activate(model, "law")
        with pytest.raises(AdapterError, match="leave the block first"):
            inlay.weigh(model, {"law": 1.0})
        with pytest.raises(AdapterError, match="leave the block first"):
            inlay.switchable(model)
        with pytest.raises(AdapterError, match="leave per_row"):
            inlay.merge(model)
        assert torch.equal(model(ids(5)), model(ids(5)))
    inlay.switchable(model)
    with pytest.raises(AdapterError, match="end the other one first"), inlay.per_row(model, ROWS):
        pass
    with pytest.raises(AdapterError, match="switchable"):
        inlay.merge(model)
    inlay.switchable(model, False)
    inlay.merge(model)
    with pytest.raises(AdapterError, match="unmerge"), inlay.per_row(model, ROWS):
        pass
    with pytest.raises(AdapterError, match="unmerge"):
        inlay.switchable(model)


def test_after_an_exception_the_model_is_as_it_was() -> None:
    model = with_adapters(Net(), loras())
    inlay.activate(model, "poems")
    before = model(ids(5))
    for kind in (KeyError, KeyboardInterrupt):
        with pytest.raises(kind), inlay.per_row(model, ROWS):
            model(ids(5))
            raise kind
        assert inlay.active(model) == ("poems",)
        assert torch.equal(model(ids(5)), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_go_their_own_way(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = with_adapters(Net(), loras())
    with inlay.per_row(model, ROWS):
        expected = [model(ids(5)) for _ in range(3)][-1]
    twin = copied(model)
    randomise(model, "law")
    with inlay.per_row(twin, ROWS):
        torch.testing.assert_close(twin(ids(5)), expected, **CLOSE)
    same_as_one_by_one(model, ROWS, ids(5))
    inlay.switchable(model)
    inlay.activate(model, "law")
    twin = copied(model)
    before = model(ids(5))
    inlay.activate(twin, "poems")
    assert torch.equal(model(ids(5)), before)
    inlay.activate(model, "poems")
    torch.testing.assert_close(twin(ids(5)), model(ids(5)), **CLOSE)
    assert not torch.equal(before, model(ids(5)))


@torch.no_grad()
def test_attaching_and_detaching_afterwards() -> None:
    model = with_adapters(Net(), loras())
    same_as_one_by_one(model, ROWS, ids(5))
    with_adapters(model, {"more": inlay.LoRA(r=2, targets="re:first|last")})
    same_as_one_by_one(model, ["more", "law", None], ids(3))
    inlay.detach(model, "law")
    inlay.attach(model, inlay.LoRA(r=3, targets="re:gate|last"), "law")
    randomise(model, "law")
    same_as_one_by_one(model, ROWS, ids(5))
    inlay.detach(model)
    assert type(model.first) is nn.Linear


# -- switchable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_a_switchable_model_computes_what_others_do(grad: bool) -> None:
    model = with_adapters(Net(), loras() | {"news": inlay.LoRA(r=4, targets="last")})
    switched = inlay.switchable(copy.deepcopy(model))
    x = ids(5)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(switched(x), model(x), **CLOSE)
        for names in [("law",), (), ("poems", "news"), ("law", "poems", "news")]:
            inlay.activate(model, *names)
            inlay.activate(switched, *names)
            torch.testing.assert_close(switched(x), model(x), **CLOSE)
        with inlay.using(model, "law"), inlay.using(switched, "law"):
            torch.testing.assert_close(switched(x), model(x), **CLOSE)
        torch.testing.assert_close(switched(x), model(x), **CLOSE)
        with inlay.disabled(model), inlay.disabled(switched):
            assert torch.equal(switched(x), model(x))
    assert inlay.active(switched) == inlay.active(model)


def test_weights_scale_the_change() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(6, 4)), loras(targets="0"))
    x = torch.randn(5, 6)
    changes = {}
    for name in ("law", "poems", "news"):
        with inlay.using(model, name):
            changes[name] = model(x)
    with inlay.disabled(model):
        base = model(x)
    with pytest.raises(AdapterError, match="switchable"):
        inlay.weigh(model, {"law": 1.0})
    inlay.switchable(model)
    inlay.weigh(model, {"law": 0.3, "news": -1.5})
    expected = base + 0.3 * (changes["law"] - base) - 1.5 * (changes["news"] - base)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    assert inlay.active(model) == ("law", "news")
    with pytest.raises(AdapterError, match="did you mean 'poems'"):
        inlay.weigh(model, {"poem": 1.0})
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize("end", ["attach", "detach", "off"])
def test_what_ends_it(end: str) -> None:
    model = inlay.switchable(with_adapters(Net(), loras()))
    inlay.activate(model, "law")
    before = model(ids(5))
    {
        "attach": lambda: inlay.attach(model, inlay.LoRA(r=2, targets="gate"), "more"),
        "detach": lambda: inlay.detach(model, "news"),
        "off": lambda: inlay.switchable(model, False),
    }[end]()
    assert adapters_of(model).state.bank is None
    inlay.activate(model, "law")
    torch.testing.assert_close(model(ids(5)), before, **CLOSE)
    with pytest.raises(AdapterError, match="switchable"):
        inlay.weigh(model, {"law": 1.0})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lora on a table",)])
def test_switching_by_numbers_is_for_lora(kind: str) -> None:
    model = with_adapters(Net(), loras() | {"other": KINDS[kind]()})
    with pytest.raises(UnsupportedError, match="low-rank changes of linears"):
        inlay.switchable(model)
    assert adapters_of(model).state.bank is None
    inlay.activate(model, "other")
    model(ids(5))


def test_a_training_step_of_a_switchable_model() -> None:
    model = with_adapters(Net(), loras())
    switched = inlay.switchable(copy.deepcopy(model))
    for names in [("law",), ("poems", "news")]:
        inlay.activate(model, *names)
        inlay.activate(switched, *names)
        expected = gradients(model, lambda: model(ids(5)).square().sum())
        torch.testing.assert_close(gradients(switched, lambda: switched(ids(5)).square().sum()), expected, **CLOSE)
        assert {name.split(".inlays.")[1].split(".")[0] for name in expected} == set(names)
