"""Whatever lies around or between the calls of fused linears, they compute what each would by itself."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.plain_formulas import attached, close
from pieces import fusing_in_processes
from pieces.fusing_hosts import (
    IDS,
    GatedNetwork,
    X,
    alike,
    attention,
    count,
    decoder,
    family,
    logits,
    outcome,
    pair,
    siblings,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.kernels import dropout, low_rank
from inlay.pieces import fusing

HOOKED = ("gate_proj", "up_proj", "down_proj", "act_fn", "q_proj", "k_proj", "v_proj", "self_attn", "mlp")


def run(model: Any) -> Tensor:
    result: Tensor = model(X)
    return result


def both(plain: Any, fused: Any, times: int = 2, how: Callable[[Any], Tensor] = run) -> None:
    """They agree, call after call."""
    for _ in range(times):
        alike(outcome(fused, how), outcome(plain, how))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """The outputs of each time that siblings were computed together."""
    found: list[tuple[Tensor, ...]] = []
    adapted = fusing.siblings.adapted

    def watched(*args: Any) -> tuple[Tensor, ...]:
        found.append(outputs := adapted(*args))
        return outputs

    monkeypatch.setattr(fusing.siblings, "adapted", watched)
    yield found
    found.clear()


# -- who is called, and when -------------------------------------------------------------------------------------------


def test_three_that_are_called_with_one_x_are_computed_together() -> None:
    plain, fused = siblings(family())
    both(plain, fused)
    assert count(run(fused), "Siblings") == 1
    assert count(run(fused), "LowRankLinear") == 0


def q_and_maybe_k(module: Any, x: Tensor) -> Tensor:
    return module.q(x) + module.v(x) if getattr(module, "brief", False) else attention(module, x)


def test_a_sibling_that_is_never_called_is_neither_kept_nor_computed_again(shared: list[tuple[Tensor, ...]]) -> None:
    plain, fused = siblings(family(q_and_maybe_k))
    run(fused)
    assert [len(outputs) for outputs in shared] == [3]
    plain.brief = fused.brief = True
    x = X.clone()
    y = fused(x)
    assert len(shared) == 2
    watched = [weakref.ref(output) for output in shared[1]] + [weakref.ref(x)]
    shared.clear()
    del x
    gc.collect()
    assert [one() for one in watched[:3]] == [None] * 3
    del y
    gc.collect()
    assert watched[3]() is None
    both(plain, fused)
    assert not shared


def test_one_that_no_call_needs_gets_no_gradient() -> None:
    plain, fused = siblings(family(q_and_maybe_k))
    plain.brief = fused.brief = True
    found, truth = outcome(fused, run), outcome(plain, run)
    alike(found, truth)
    assert not any(name.startswith("k.") for name in found)


def failing(module: Any, x: Tensor) -> Tensor:
    q = module.q(x)
    if getattr(module, "fails", False):
        raise KeyError("between")
    return q * torch.tanh(module.k(x)) + module.v(x)


def test_an_exception_between_siblings(shared: list[tuple[Tensor, ...]]) -> None:
    plain, fused = siblings(family(failing))
    fused.fails = True
    x = X.clone()
    with pytest.raises(KeyError, match="between"):
        fused(x)
    fused.fails = False
    watched = [weakref.ref(output) for output in shared.pop()]
    gc.collect()
    assert [one() for one in watched] == [None] * 3
    with torch.no_grad():
        x.mul_(2)
    alike(outcome(fused, lambda model: model(x)), outcome(plain, lambda model: model(x)))
    assert len(shared) == 1  # it goes on sharing


def test_a_sibling_called_by_itself_outside_of_their_module(shared: list[tuple[Tensor, ...]]) -> None:
    plain, fused = siblings(family())
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(fused, name)(X), getattr(plain, name)(X))
    assert not shared


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "changed in place": lambda m, x: m.q(x) + m.k(x.mul_(2)) * m.v(x),
    "changed before the last": lambda m, x: m.q(x) * m.k(x) + m.v(x.add_(1)),
    "outputs changed in place": lambda m, x: m.q(x).mul_(2) * m.k(x).add_(1) + m.v(x),
    "another tensor": lambda m, x: m.q(x) * m.k(x.clone()) + m.v(x * 1),
    "one twice": lambda m, x: m.q(x) * m.k(x) + m.k(x) * m.v(x) + m.q(x),
    "one on another x, then on this": lambda m, x: m.q(x) * m.k(-x) + m.k(x) * m.v(x),
    "two pairs": lambda m, x: m.q(x) * m.k(x) + m.v(y := -x) * m.q(y),
    "in another order": lambda m, x: m.v(x) * m.k(x) + m.q(x),
    "within itself": lambda m, x: m.q(x) + (m(x[:1]) if len(x) > 1 else 0) * m.k(x) + m.v(x),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("grad", [True, False])
def test_other_ways_to_call_them(body: str, grad: bool) -> None:
    model = family(BODIES[body])
    for parameter in model.parameters():
        if "place" in body or "before" in body:
            parameter.requires_grad_(False)  # autograd refuses to use what was changed, fused or not
    plain, fused = pair(model, mlp=False, siblings=True)
    for _ in range(3):
        if grad and any(parameter.requires_grad for parameter in model.parameters()):
            alike(outcome(fused, run), outcome(plain, run))
        for around in (torch.no_grad, torch.inference_mode):
            with around():
                close(fused(X.clone()), plain(X.clone()), 64)


def test_what_is_changed_between_calls_that_had_been_shared() -> None:
    """Learned with x left alone, and then it is changed in place: inference tensors have no version that would tell."""

    def body(module: Any, x: Tensor) -> Tensor:
        q = module.q(x)
        return q + module.k(x.mul_(2) if getattr(module, "late", False) else x) * module.v(x)

    for around in (torch.no_grad, torch.inference_mode):
        plain, fused = siblings(family(body))
        plain.late = fused.late = True
        for _ in range(2):
            with around():
                close(fused(X.clone()), plain(X.clone()), 64)


def k_without_gradients(module: Any, x: Tensor) -> Tensor:
    q = module.q(x)
    with torch.no_grad():
        k = module.k(x)
    assert not k.requires_grad
    return q * k + module.v(x)


def q_without_gradients(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        q = module.q(x)
    k = module.k(x)
    assert k.requires_grad
    return q * k + module.v(x)


@pytest.mark.parametrize("body", [k_without_gradients, q_without_gradients])
@pytest.mark.parametrize("before", [True, False])
def test_no_grad_for_one_of_them(body: Callable[[Any, Tensor], Tensor], before: bool) -> None:
    plain, fused = siblings(family(attention if before else body))
    plain.body = fused.body = body
    both(plain, fused, 3)


def autocast_for_k(module: Any, x: Tensor) -> Tensor:
    q = module.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        k = module.k(x)
    assert k.dtype == (torch.bfloat16 if x.dtype == torch.float32 else x.dtype)
    return q * torch.tanh(k) + module.v(x)


@pytest.mark.parametrize("before", [True, False])
def test_autocast_entered_between(before: bool) -> None:
    plain, fused = siblings(family(attention if before else autocast_for_k).double())
    plain, fused = plain.float(), fused.float()
    plain.body = fused.body = autocast_for_k
    for _ in range(2):
        found, truth = (outcome(model, lambda model: model(X.float())) for model in (fused, plain))
        alike(found, truth, 16 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)


def switching(module: Any, x: Tensor) -> Tensor:
    q = module.q(x)
    with inlay.using(module, *module.names):
        k = module.k(x)
    return q * k + module.v(x)


@pytest.mark.parametrize("names", [(), ("second",), ("default", "second")])
def test_another_adapter_for_one_of_them(names: tuple[str, ...]) -> None:
    model = attached("lora", family(), targets="k,v", name="second")
    inlay.activate(model, "default")
    plain, fused = siblings(model)
    for one in (plain, fused):
        one.body, one.names = switching, names
    both(plain, fused)


# -- hooks -------------------------------------------------------------------------------------------------------------


def watch(model: Any, kind: str) -> list[tuple[str, Tensor]]:
    """Register hooks of one kind on what may be fused; what they see, in order."""
    seen: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if not name.endswith(HOOKED):
            continue

        def look(module: Any, given: Any, result: Any = None, name: str = name) -> Any:
            values = given if result is None or kind == "backward" else result
            first = (*values, None)[0] if isinstance(values, tuple) else values
            if isinstance(first, Tensor):
                seen.append((name, first.detach().clone()))
            if kind == "changing x":
                return tuple(2 * one for one in given)
            return 1.5 * result if kind == "changing y" and isinstance(result, Tensor) else None

        register = {"changing x": "forward_pre", "before": "forward_pre", "backward": "full_backward"}.get(
            kind, "forward"
        )
        if kind not in ("changing x", "before") or not name.endswith("self_attn"):
            getattr(module, f"register_{register}_hook")(look)
    return seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the first layer's x needs no gradient
@pytest.mark.parametrize("kind", ["forward", "before", "changing x", "changing y", "backward"])
@pytest.mark.parametrize("when", ["before fusing", "before learning", "after"])
def test_hooks_see_and_do_what_they_did(kind: str, when: str) -> None:
    plain = decoder()
    fused = copy.deepcopy(plain)
    if when != "before fusing":
        inlay.fuse(fused, siblings=True)
    if when == "after":
        logits(fused)
    truth, seen = watch(plain, kind), watch(fused, kind)
    if when == "before fusing":
        inlay.fuse(fused, siblings=True)
    for _ in range(2):
        alike(outcome(fused), outcome(plain))
    assert sorted(name for name, _ in seen) == sorted(name for name, _ in truth)
    if kind != "backward":  # whose order is the graph's
        assert [name for name, _ in seen] == [name for name, _ in truth]
    for name in {name for name, _ in truth}:
        found, expected = ([value for one, value in values if one == name] for values in (seen, truth))
        for one, other in zip(found, expected, strict=True):
            close(one, other, 4096)


@pytest.mark.parametrize("part", ["down_proj", "act_fn", "down_proj.inlays.default.lora"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_hook_on_what_is_computed_inside_sends_the_call_the_ordinary_way(part: str, backward: bool) -> None:
    model = inlay.fuse(attached("lora", nn.Sequential(GatedNetwork()), targets="down_proj"))
    assert count(model(X), "GatedLowRank") == 1
    seen: list[Any] = []
    module = model[0].get_submodule(part)
    register = module.register_full_backward_hook if backward else module.register_forward_hook
    handle = register(lambda *given: seen.append(given))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert len(seen) == 1
    handle.remove()
    assert count(model(X), "GatedLowRank") == 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks to be called")
@pytest.mark.parametrize("backward", [False, True])
def test_hooks_on_all_modules(backward: bool) -> None:
    plain, fused = pair(decoder(), siblings=True)
    logits(fused)
    seen: list[str] = []
    register: Any = register_module_full_backward_hook if backward else register_module_forward_hook
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        results, calls = [], []
        for model in (plain, fused):
            seen.clear()
            results.append(outcome(model))
            calls.append({name: seen.count(name) for name in ("Linear", "SiLUActivation", "SiLU", "LlamaMLP")})
    finally:
        handle.remove()
    alike(results[1], results[0])
    assert calls[0] == calls[1]
    assert calls[0]["Linear"] == 15


# -- checkpointing inside, threads, processes --------------------------------------------------------------------------


def inside(reentrant: bool, which: str) -> Callable[[Any, Tensor], Tensor]:
    def body(module: Any, x: Tensor) -> Tensor:
        if which == "all":
            result: Tensor = checkpoint(attention, module, x, use_reentrant=reentrant)
            return result
        q, k, v = (
            checkpoint(part, x, use_reentrant=reentrant) if name in which else part(x)
            for name, part in (("q", module.q), ("k", module.k), ("v", module.v))
        )
        return q * torch.tanh(k) + v

    return body


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("which", ["q", "k", "qk", "qkv", "all"])
@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_of_some_of_them(
    reentrant: bool, which: str, before: bool, shared: list[tuple[Tensor, ...]]
) -> None:
    """Recomputed outside the module's call, where nobody would fetch what was computed for the others."""
    plain, fused = pair(family(inside(reentrant, which)), mlp=False, siblings=True)
    if before:
        fused.body = attention
        run(fused)
        fused.body = plain.body

    def with_gradient(model: Any) -> Tensor:
        result: Tensor = model(X.clone().requires_grad_())
        return result

    both(plain, fused, 3, with_gradient)
    watched = [weakref.ref(output) for outputs in shared for output in outputs]
    shared.clear()
    gc.collect()
    assert all(one() is None for one in watched)


def test_checkpointed_calls_whose_backwards_come_later_and_in_any_order() -> None:
    plain, fused = pair(family(dropout=0.3), mlp=False, siblings=True, shared_dropout=True)
    for reentrant in (False, True):
        for order in ((0, 1, 2), (2, 0, 1)):
            totals = []
            for model in (plain, fused):
                torch.manual_seed(3)
                xs = [(X * n).requires_grad_() for n in (1, 2, 3)]
                losses = [checkpoint(model, x, use_reentrant=reentrant).square().sum() for x in xs]
                model.eval()
                with torch.no_grad():
                    model(X)
                model.train()
                for n in order:
                    losses[n].backward()
                totals.append([x.grad for x in xs] + [p.grad for p in model.parameters() if p.grad is not None])
                model.zero_grad()
            for one, other in zip(*totals, strict=True):
                close(one, other, 64)


def test_two_threads_in_one_model_at_once() -> None:
    """They meet between the siblings, so that each finds the module while the other is in it."""
    barrier = threading.Barrier(2)

    def body(module: Any, x: Tensor) -> Tensor:
        q = module.q(x)
        if threading.current_thread() is not threading.main_thread():
            barrier.wait(30)
        return q * torch.tanh(module.k(x)) + module.v(x)

    plain = family(body)
    fused = inlay.fuse(plain, mlp=False, siblings=True)
    fused(X)
    found: dict[int, Tensor] = {}

    def work(n: int) -> None:
        for _ in range(5):
            found[n] = fused(X * n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    inlay.fuse(fused, mlp=False, siblings=True)  # one call that has not learned: one by one
    for n in (1, 2):
        assert count(found[n], "Siblings") == 1
        close(found[n], inlay.fuse(fused, mlp=False, siblings=True)(X * n), 64)


@pytest.mark.slow
def test_two_processes_under_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fusing_in_processes.train, (str(tmp_path),), nprocs=2)
    plain = decoder()
    truth = fusing_in_processes.gradients(plain, IDS, plain)
    for rank in (0, 1):
        alike(torch.load(tmp_path / f"{rank}.pt"), truth)


# -- other adapters ----------------------------------------------------------------------------------------------------


def test_states_of_two_adapters() -> None:
    """Disabled, switched, composed, merged, a row each, switchable: as without, and shared again afterwards."""
    model = attached("lora", decoder(), targets="q_proj,up_proj,down_proj", name="second")
    inlay.activate(model, "default")
    plain, fused = pair(model, siblings=True)
    logits(fused)
    for names in ((), ("second",), ("default", "second"), ("default",)):
        for one in (plain, fused):
            inlay.activate(one, *names)
            inlay.trainable(one, *(names or ("default",)))
        if names:
            alike(outcome(fused), outcome(plain))
        else:
            assert torch.equal(logits(fused), logits(plain))
    results = []
    for one in (plain, fused):
        one.eval()
        found = [logits(inlay.merge(one)), logits(inlay.unmerge(one))]
        with inlay.per_row(one, ["default", "second"]):
            found.append(logits(one))
        inlay.switchable(one)
        inlay.activate(one, "second")
        found.append(logits(one))
        inlay.switchable(one, False)
        inlay.activate(one, "default")
        results.append([*found, logits(one)])
    for found, truth in zip(*results, strict=True):
        close(found, truth, 4096)
    assert count(results[1][-1], "Siblings") == 4
    assert count(results[1][-1], "GatedLowRank") == 2


@pytest.mark.parametrize("other", ["dora", "ia3", "exact", "pissa", "lora_bias"])
def test_other_methods_go_their_own_way(other: str) -> None:
    fields = {"exact": {"precision": "exact"}, "pissa": {"init": "pissa"}, "lora_bias": {"lora_bias": True}}
    if other == "ia3":
        model: Any = inlay.attach(decoder(), inlay.IA3(), name="second")
    elif other == "dora":
        model = attached("dora", copy.deepcopy(decoder(targets="q_proj")), targets="all-linear", name="second")
    else:
        model = decoder(**fields[other])
    plain, fused = pair(model, siblings=True)
    both(plain, fused, 2, logits)
    if other != "ia3":  # which leaves q, gate and up alone
        assert count(logits(fused), "GatedLowRank") + count(logits(fused), "Siblings") == 0


def test_an_adapter_attached_and_one_detached_afterwards() -> None:
    plain, fused = pair(decoder(), siblings=True)
    logits(fused)
    for model in (plain, fused):
        torch.manual_seed(1)
        attached("lora", model, targets="v_proj,o_proj", name="second")
    alike(outcome(fused), outcome(plain))
    for model in (plain, fused):
        inlay.detach(model, "default")
    alike(outcome(fused), outcome(plain))
    for model in (plain, fused):
        inlay.detach(model)
    assert torch.equal(logits(fused), logits(plain))


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_with_dropout_they_share_only_if_they_may() -> None:
    plain, fused = siblings(family(dropout=0.4))
    alike(outcome(fused, run), outcome(plain, run), 0)  # the same masks, to the bit
    assert count(run(fused), "Siblings") == 0
    alike(outcome(fused.eval(), run), outcome(plain.eval(), run))
    assert count(run(fused), "Siblings") == 1


def test_shared_dropout_is_one_mask_for_all() -> None:
    plain, fused = siblings(family(dropout=0.4), shared_dropout=True)
    torch.manual_seed(11)
    y = run(fused)
    assert count(y, "Siblings") == 1
    torch.manual_seed(11)
    mask = dropout.draw(X.shape, 0.4, X.device)
    parts = []
    for linear in (plain.q, plain.k, plain.v):
        piece = linear.inlays.default.lora
        change = low_rank.linear(dropout.apply(X, mask), piece.lora_A, piece.lora_B)
        parts.append(nn.functional.linear(X, linear.weight, linear.bias) + piece.scale / 0.6 * change)
    close(y, parts[0] * torch.tanh(parts[1]) + parts[2], 16)
    alike(outcome(fused, run), outcome(fused, run), 0)
    assert not torch.equal(run(fused), run(fused))
    alike(outcome(fused.eval(), run), outcome(plain.eval(), run))


@pytest.mark.parametrize("different", ["q", "k"])
def test_shared_dropout_needs_one_rate(different: str) -> None:
    plain, fused = siblings(family(dropout=0.4, overrides={different: {"dropout": 0.0}}), shared_dropout=True)
    alike(outcome(fused, run), outcome(plain, run), 0)
    assert count(run(fused), "Siblings") == 0


# -- torch.compile, 4-bit ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_compiled_as_one_graph(before: bool) -> None:
    plain, fused = pair(decoder(dtype=torch.float32), siblings=True)
    if before:
        logits(fused)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    truth = outcome(plain)
    torch.manual_seed(7)
    y = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(y, truth["output"], rtol=1e-4, atol=1e-5)
    alike(outcome(fused), truth, 4096)


def test_a_second_derivative_is_refused() -> None:
    network = attached("lora", nn.Sequential(GatedNetwork()), targets="down_proj")
    for model in (siblings(family())[1], inlay.fuse(network)):
        x = X.clone().requires_grad_()
        first = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_four_bit_base(grad: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes for a 4-bit base")
    base = nn.Sequential(GatedNetwork(torch.float32))
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(base[0], name)
        wide = nn.Linear(64, 64)
        quantised = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        quantised.weight = bitsandbytes.nn.Params4bit(wide.weight.detach(), requires_grad=False, quant_type="nf4")
        quantised.bias = linear.bias = nn.Parameter(torch.randn(64))
        setattr(base[0], name, quantised.to("cpu"))
    plain, fused = pair(attached("lora", base, targets="gate_proj,up_proj,down_proj"), siblings=True)
    x = torch.randn(3, 5, 64)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            if grad:
                alike(*(outcome(model, lambda model: model(x)) for model in (fused, plain)), 256)
            close(fused(x), plain(x), 256)
    if grad:  # together where each is one function by itself
        number = count(plain(x), "LowRankLinear") // 3
        assert (count(fused(x), "GatedLowRank"), count(fused(x), "Siblings")) == (number, number)
