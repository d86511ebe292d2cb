"""What the benchmarks of the hot path share: models, the floor, saved bytes, equality, interleaved timing, results.

The protocol. All variants of a part live in one process with one torch thread. Every variant gets the same base and
the same adapter values (A and B random, none zero, a scale that is no power of two, all of them numbers that bf16
holds), and its loss and adapter gradients are compared with a reference of higher precision before anything is timed. A
step is forward, loss and backward; the optimiser, which is the same for all, is left out. A round runs each variant
once, in an order drawn anew; time is the CPU time of the process; a ratio is the median over rounds of the ratio within
one round.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"
FULL = 9
"""Rounds below which a run is a trial: its results go to results/short/ and no table is made of them."""
Adapt = Callable[[nn.Module], nn.Module]
Values = dict[str, Tensor]


# -- models ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A random Llama and its batch."""

    layers: int
    hidden: int = 768
    mlp: int = 2048
    heads: int = 12
    vocabulary: int = 8192
    batch: int = 4
    length: int = 256


LLAMA4, LLAMA2 = Shape(layers=4), Shape(layers=2)
LLAMA6 = Shape(layers=6, batch=8)
QUANTISED = Shape(layers=3, hidden=1024, mlp=2816, heads=16)


def llama(shape: Shape, dtype: torch.dtype, values: torch.dtype | None = None) -> nn.Module:
    """A Llama with the same random weights at each call, rounded to `values` (default: dtype) and held in `dtype`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # buffers stay in fp32: the rotary frequencies are no weights
        parameter.data = parameter.data.to(values or dtype).to(dtype)
    return model.train()


def batch(shape: Shape) -> Tensor:
    """Token ids, which are their own labels."""
    return torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of one forward."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def floor(model: nn.Module) -> nn.Module:
    """All weights frozen, gradients down to what the first layer's q, k and v give: a method that costs nothing."""
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model


class Tapped(nn.Module):
    """A frozen projection whose output a trainable number is added to: the floor where hooks cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.tap = nn.Parameter(torch.zeros(1, dtype=next(inner.parameters()).dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.tap


def traceable_floor(model: nn.Module) -> nn.Module:
    """The floor for torch.compile: one-element taps on the first layer's q, k and v."""
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, Tapped(getattr(attention, name)))
    return model


# -- the same adapter in both libraries --------------------------------------------------------------------------------

OURS = re.compile(r"(?P<host>.+)\.inlays\.[^.]+\.[^.]+\.(?P<tensor>\w+?)(?:\.weight)?")
THEIRS = re.compile(r"base_model\.model\.(?P<host>.+)\.(?P<tensor>\w+)\.default(?:\.weight)?")
NAMES = {name: name for name in ("lora_A", "lora_B", "lora_E", "magnitude", "ia3_l", "oft_R")}
NAMES |= {"lora_magnitude_vector": "magnitude", "vera_lambda_b": "vera_b", "vera_lambda_d": "vera_d"}
START_AT_ZERO = {"lora_B": 0.05, "lora_E": 1.0, "vera_b": 0.05, "oft_R": 0.02}
"""What would do nothing at its start, and how large it is drawn instead."""


def adapter_tensors(model: nn.Module) -> Values:
    """An adapter's parameters and buffers as "host.tensor", spelled alike whichever library made them."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # a frozen A may be a buffer
        match = OURS.fullmatch(name) or THEIRS.fullmatch(name)
        if match and match["tensor"] in NAMES:
            found[f"{match['host']}.{NAMES[match['tensor']]}"] = tensor
    return found


def draw(tensors: Values, dtype: torch.dtype = torch.bfloat16) -> Values:
    """Random values for an adapter that has only begun: none zero, each a number of this dtype."""
    generator = torch.Generator().manual_seed(2)
    values = {}
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("lora_A"):
            value = noise / math.sqrt(tensor.shape[1])
        elif name.rpartition(".")[2] in START_AT_ZERO:
            value = noise * START_AT_ZERO[name.rpartition(".")[2]]
        else:  # magnitudes and scales start at what leaves the base alone
            value = tensor.detach().float() * (1 + 0.1 * noise)
        values[name] = value.to(dtype).float()
    return values


@torch.no_grad()
def fill(tensors: Values, values: Values, variant: str) -> None:
    """Copy the values in by name; the names have to be the same ones."""
    if tensors.keys() != values.keys():
        differ = sorted(tensors.keys() ^ values.keys())
        raise SystemExit(f"{variant}: {len(differ)} adapter tensors have no partner, such as {differ[:2]}")
    for name, tensor in tensors.items():
        tensor.copy_(values[name].view(tensor.shape))


# -- equality ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """The loss of one step and the gradients of the adapter, in fp64."""

    loss: float
    gradients: Values

    def error(self, reference: Outcome) -> dict[str, float]:
        """Relative errors: of the loss, of all gradients as one vector, and of the tensor that is furthest off."""
        if self.gradients.keys() != reference.gradients.keys():
            raise SystemExit(f"gradients differ in name: {sorted(self.gradients.keys() ^ reference.gradients)[:2]}")
        differences = {name: float((g - reference.gradients[name]).norm()) for name, g in self.gradients.items()}
        sizes = {name: float(reference.gradients[name].norm()) for name in differences}
        return {
            "loss": abs(self.loss - reference.loss) / abs(reference.loss),
            "gradients": math.hypot(*differences.values()) / math.hypot(*sizes.values()),
            "worst_tensor": max(differences[name] / sizes[name] for name in differences),
        }


def outcome(model: nn.Module, tensors: Values, ids: Tensor) -> Outcome:
    """One step, and what came of it."""
    clear(model)
    loss = loss_of(model, ids)
    loss.backward()
    gradients = {name: tensor.grad.double().flatten() for name, tensor in tensors.items() if tensor.grad is not None}
    clear(model)
    return Outcome(loss.item(), gradients)


def clear(model: nn.Module) -> None:
    """Drop all gradients."""
    for parameter in model.parameters():
        parameter.grad = None


# -- saved bytes -------------------------------------------------------------------------------------------------------


class Packed:
    """What the graph holds in place of a saved tensor; gone when the graph drops it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the distinct storages that the graph holds when the forward has ended, without parameters and buffers.

    Counted are tensors handed to saved-tensor hooks and still held, and, so that nothing hides there, tensors and
    arrays that an autograd function put on its context directly.
    """
    held: list[weakref.ref[Packed]] = []

    def pack(tensor: Tensor) -> Packed:
        packed = Packed(tensor.detach())  # with its graph, an output that is saved would keep itself alive
        held.append(weakref.ref(packed))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = loss_of(model, ids)
    gc.collect()
    alive = [packed.tensor for reference in held if (packed := reference()) is not None]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    sizes |= {place: size for node in _nodes(loss.grad_fn) for place, size in _storages(vars(node))}
    for place, _ in _storages(list(_frozen(model))):
        sizes.pop(place, None)
    return sum(sizes.values())


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of a graph that Python code made (others have no attributes)."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "__dict__"):
            yield node


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the tensors and arrays in a value."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif hasattr(value, "__array_interface__"):
        yield value.__array_interface__["data"][0], value.nbytes
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _storages(part)


def _frozen(model: nn.Module) -> Iterator[Any]:
    """Parameters, buffers, and the tables of quantised weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield list(vars(part).values()) if part is not None else None


def allocated_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that torch allocated during the forward and has not given back at its end.

    For checkpointing, whose own hooks hide what it holds. This counts a little more: whatever else lives on as well.
    """
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as recorded:
        loss = loss_of(model, ids)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in recorded.function_events)


# -- time --------------------------------------------------------------------------------------------------------------


def cpu_seconds(step: Callable[[], Any]) -> float:
    """CPU time of the process for one call, with the collector held off."""
    gc.collect()
    gc.disable()
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    gc.enable()
    return seconds


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each round, the order drawn anew for every round."""
    order = random.Random(3)
    names = list(steps)
    for _ in range(warm):
        for name in names:
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            seconds[name].append(cpu_seconds(steps[name]))
    return seconds


def training_step(model: nn.Module, ids: Tensor, trained: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Forward, loss and backward, with gradients made anew."""

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        loss_of(model, ids).backward()

    return step


# -- results -----------------------------------------------------------------------------------------------------------


def arguments(description: str | None, rounds: int = FULL) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--quick", action="store_true", help="3 rounds, to see that it runs")
    parser.add_argument("--only", default="", help="parts by the beginning of their names: lora,dropout-bf16")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results already")
    parser.add_argument("--out", type=Path, help="the results; default benchmarks/results/, short/ for few rounds")
    return parser


def chosen(names: Sequence[str], only: str) -> list[str]:
    """The parts whose names begin with one of those asked for."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    for word in wanted:
        if not any(name.startswith(word) for name in names):
            raise SystemExit(f"--only {word}: no such part; there are {', '.join(names)}")
    return [name for name in names if not wanted or any(name.startswith(word) for word in wanted)]


class Results:
    """A JSON file of parts, written after each one, so that a stopped run goes on where it was."""

    def __init__(self, name: str, options: argparse.Namespace, least: int = FULL) -> None:
        self.rounds = 3 if options.quick else options.rounds
        folder = RESULTS if self.rounds >= least else RESULTS / "short"
        self.path: Path = options.out or folder / f"{name}.json"
        self.again = options.again
        self.stored: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {"parts": {}}

    def part(self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a part: what is there, or what `measure` finds now, which is written down at once."""
        if not self._have(name, settings):
            print(f"{name}: measuring, {self.rounds} rounds", flush=True)
            load = os.getloadavg()[0]
            self._add(name, {"settings": dict(settings), **measure()}, load)
        record: dict[str, Any] = self.stored["parts"][name]
        return record

    def _have(self, part: str, settings: Mapping[str, Any]) -> bool:
        """Whether this part was measured under these settings, by these versions and by this very source."""
        stored = self.stored["parts"].get(part)
        if stored is None or self.again or stored["settings"] != json.loads(json.dumps(settings)):
            return False
        return all(stored["environment"].get(key) == value for key, value in versions().items())

    def _add(self, part: str, record: Mapping[str, Any], load_before: float) -> None:
        """Merge one part in and write the file."""
        self.stored["parts"][part] = {**record, "environment": environment(load_before)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.stored, indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, Any]:
    """What decides whether two runs compare: versions, and a digest of the source that was measured."""
    import inlay

    digest = hashlib.sha256()
    for path in sorted(Path(inlay.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    found: dict[str, Any] = {"python": platform.python_version(), "inlay_source": digest.hexdigest()[:12]}
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(load_before: float) -> dict[str, Any]:
    """Versions, processor, date, load."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    facts = dict(re.findall(r"(model name|flags)\s*: (.*)", about))
    flags = facts.get("flags", "").split()
    return versions() | {
        "cpu": facts.get("model name", platform.processor()),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
