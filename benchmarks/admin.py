"""What administering an adapter costs on 1,000 linears, against HF peft: inject, load, switch, disable, save, merge.

    python benchmarks/admin.py                            # every size, 9 rounds, benchmarks/results/admin.json
    python benchmarks/admin.py --sizes 64 --rounds 3      # a trial, benchmarks/results/short/admin.json

For each size both libraries get the same base (a stack of 100 blocks of 10 linears d x d, fp32) and the same LoRA
(r=8 on all of them). First it is shown that they do the same: equal files, equal outputs, equal merged weights. Then
each operation is timed: same process, libraries in random order within a round, process CPU time on one thread, median.
A ratio is the median of Inlay over the median of peft; the bounds are those that the project set itself beforehand.

Merging is compared with a bare form too: one addmm for each linear and nothing else, into new memory. So much takes
whoever keeps the base's own weights to put them back bit for bit, which peft, adding in place and subtracting, does
not. New memory comes from the operating system page by page; where that is slow it outweighs the arithmetic. Merging
for good, with no way back, is `inlay.merge(model, keep_base=False)` and peft's merge_and_unload. With
MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment, glibc keeps freed memory instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of

RESULTS = Path(__file__).parent / "results"
FULL = 9
"""Rounds below which a run is a trial, whose results are kept apart."""
BLOCKS, RANK, ALPHA = 100, 8, 16
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "down_proj")
TARGETS = [*ATTENTION, *FEED_FORWARD]
BOUNDS = {"inject": (0.15, 0.08), "load": (0.10, 0.04), "switch": (0.05, 0.01), "disable + enable": (0.05, 0.01),
          "save": (0.85, 0.7), "merge": (0.60, 0.5), "unmerge": (None, None),
          "merge and unload": (None, None)}  # fmt: skip
"""By operation, the bound and the aim for the ratio Inlay / peft."""


class Part(nn.Module):
    """Linears called one after the other, each added to its input."""

    def __init__(self, names: tuple[str, ...], wide: int) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(wide, wide, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.children():
            x = x + 0.1 * linear(x)
        return x


class Block(nn.Module):
    """A decoder's block in names and sizes: two attentions and a feed-forward network, ten linears in all."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.self_attn = Part(ATTENTION, wide)
        self.cross_attn = Part(ATTENTION, wide)
        self.mlp = Part(FEED_FORWARD, wide)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.cross_attn(self.self_attn(x)))
        return out


class Stack(nn.Module):
    """100 blocks of 10 linears."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(wide) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


@dataclasses.dataclass
class Operation:
    """What is timed, and what brings the model to the state before it and after it (not timed)."""

    run: Callable[[], Any]
    undo: Callable[[], Any] = lambda: None


def config() -> peft.LoraConfig:
    """peft's description of the adapter."""
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)


def method() -> inlay.LoRA:
    """Ours."""
    return inlay.LoRA(r=RANK, alpha=ALPHA, targets=TARGETS)


class Peft:
    """The operations in HF peft. `bare` has no adapter; `full` has "default" and "second"."""

    def __init__(self, base: nn.Module, folder: Path) -> None:
        self.bare, self.folder = base, folder
        self.full: Any = None
        self.own = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}

    def begin_again(self) -> None:
        """The base's own weights, and the two adapters."""
        with torch.no_grad():
            for name, parameter in self.bare.named_parameters():
                parameter.copy_(self.own[name])
        self.prepare(*self.adapters)

    def prepare(self, first: Path, second: Path) -> None:
        """Load two adapters."""
        self.adapters = first, second
        self.full = peft.PeftModel.from_pretrained(self.bare, first, is_trainable=True)
        self.full.load_adapter(second, "second")

    def close(self) -> None:
        """Back to the bare base."""
        self.bare, self.full = self.full.unload(), None

    def inject(self) -> Operation:
        """get_peft_model on the base."""

        def run() -> None:
            self.full = peft.get_peft_model(self.bare, config())

        return Operation(run, self.close)

    def operations(self, second: Path) -> dict[str, Operation]:
        """What is timed on a model with two adapters."""

        def disable() -> None:
            with self.full.disable_adapter():
                pass

        return {
            "load": Operation(
                lambda: self.full.load_adapter(second, "third"), lambda: self.full.delete_adapter("third")
            ),
            "switch": Operation(lambda: self.full.set_adapter("second"), lambda: self.full.set_adapter("default")),
            "disable + enable": Operation(disable),
            "save": Operation(lambda: self.full.save_pretrained(self.folder, selected_adapters=["default"]),
                              lambda: shutil.rmtree(self.folder)),
            "merge": Operation(lambda: self.full.merge_adapter(["default"]), self.full.unmerge_adapter),
            "unmerge": Operation(self.full.unmerge_adapter, lambda: self.full.merge_adapter(["default"])),
            "merge and unload": Operation(self.full.merge_and_unload, self.begin_again),
        }  # fmt: skip

    def weights(self) -> dict[str, Tensor]:
        """The base's weights as they are now, by their names in it."""
        named = self.full.base_model.model.named_parameters()
        return {name.replace(".base_layer", ""): p for name, p in named if "lora_" not in name}


class Inlay:
    """The same operations here."""

    def __init__(self, base: nn.Module, folder: Path) -> None:
        self.full, self.folder = base, folder
        self.own = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}

    def prepare(self, first: Path, second: Path) -> None:
        """Load two adapters."""
        self.adapters = first, second
        inlay.load(self.full, first, trainable=True)
        inlay.load(self.full, second, name="second")

    def close(self) -> None:
        """Back to the bare base."""
        inlay.detach(self.full)

    def inject(self) -> Operation:
        """attach on the base."""
        return Operation(lambda: inlay.attach(self.full, method()), self.close)

    def operations(self, second: Path) -> dict[str, Operation]:
        """What is timed on a model with two adapters."""

        def disable() -> None:
            with inlay.disabled(self.full):
                pass

        return {
            "load": Operation(
                lambda: inlay.load(self.full, second, name="third"), lambda: inlay.detach(self.full, "third")
            ),
            "switch": Operation(
                lambda: inlay.activate(self.full, "second"), lambda: inlay.activate(self.full, "default")
            ),
            "disable + enable": Operation(disable),
            "save": Operation(lambda: inlay.save(self.full, self.folder), lambda: shutil.rmtree(self.folder)),
            "merge": Operation(lambda: inlay.merge(self.full), lambda: inlay.unmerge(self.full)),
            "unmerge": Operation(lambda: inlay.unmerge(self.full), lambda: inlay.merge(self.full)),
            "merge and unload": Operation(lambda: inlay.merge(self.full, keep_base=False), self.begin_again),
        }

    def begin_again(self) -> None:
        """The base's own weights, and the two adapters."""
        with torch.no_grad():
            for name, parameter in self.full.named_parameters():
                parameter.copy_(self.own[name])
        self.prepare(*self.adapters)

    def bare_merge(self) -> Operation:
        """The arithmetic of merging alone, into new tensors."""
        placed = [(site.weight, piece.lora_A, piece.lora_B) for site, piece in adapters_of(self.full).active_pieces()]
        merged: list[Tensor] = []

        def run() -> None:
            with torch.no_grad():
                merged.extend(torch.addmm(weight, b, a, alpha=ALPHA / RANK) for weight, a, b in placed)

        return Operation(run, merged.clear)

    def weights(self) -> dict[str, Tensor]:
        """The base's weights as they are now, by their names in it."""
        return {name: p for name, p in self.full.named_parameters() if "inlays" not in name.split(".")}


# -- correctness -------------------------------------------------------------------------------------------------------


def adapter_files(base: nn.Module, folder: Path) -> tuple[Path, Path]:
    """Two adapters with no zero in them, written by peft."""
    model = peft.get_peft_model(base, config())
    for name in ("first", "second"):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / name)
    model.unload()
    return folder / "first", folder / "second"


def show_equal(ours: Inlay, theirs: Peft, x: Tensor) -> dict[str, float]:
    """Raise unless both do the same; returns the largest differences of outputs, relative to the largest value."""

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    differences: dict[str, float] = {}
    with torch.no_grad():
        for name in ("default", "second"):
            inlay.activate(ours.full, name)
            theirs.full.set_adapter(name)
            differences[f"outputs, {name}"] = apart(ours.full(x), theirs.full(x))
        with inlay.disabled(ours.full), theirs.full.disable_adapter():
            differences["outputs, disabled"] = apart(ours.full(x), theirs.full(x))
        inlay.activate(ours.full, "default")
        theirs.full.set_adapter("default")
        unmerged = ours.full(x)
        before = {name: weight.clone() for name, weight in ours.weights().items()}
        inlay.merge(ours.full)
        theirs.full.merge_adapter(["default"])
        merged, reference = ours.weights(), theirs.weights()
        assert merged.keys() == reference.keys()
        assert len(merged) == 10 * BLOCKS
        differences["merged weights"] = max(apart(weight, reference[name]) for name, weight in merged.items())
        differences["outputs, merged"] = apart(ours.full(x), unmerged)
        inlay.unmerge(ours.full)
        theirs.full.unmerge_adapter()
        assert all(torch.equal(weight, before[name]) for name, weight in ours.weights().items()), "unmerge"
    assert all(difference < 1e-5 for difference in differences.values()), differences
    written = []
    for library in (ours, theirs):
        library.operations(Path())["save"].run()
        written.append(safetensors.torch.load_file(library.folder / "adapter_model.safetensors"))
        shutil.rmtree(library.folder)
    assert written[0].keys() == written[1].keys()
    assert len(written[0]) == 20 * BLOCKS
    assert all(torch.equal(tensor, written[1][key]) for key, tensor in written[0].items()), "files"
    assert sum(p.numel() for p in adapters_of(ours.full).get("default").parameters()) == sum(
        tensor.numel() for tensor in written[1].values()
    )
    return differences


# -- time --------------------------------------------------------------------------------------------------------------


def timed(operation: Operation) -> tuple[float, float]:
    """(CPU ms, wall ms) of one run."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    operation.run()
    spent = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
    operation.undo()
    return spent


def race(rivals: dict[str, Operation], rounds: int, order: random.Random) -> dict[str, Any]:
    """Median times of the rivals, who take turns in random order; the first round only warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name in order.sample(list(rivals), len(rivals)):
            spent = timed(rivals[name])
            if number:
                times[name].append(spent)
    figures: dict[str, Any] = {f"{name}_ms": statistics.median(cpu for cpu, _ in times[name]) for name in rivals}
    figures |= {f"{name}_wall_ms": statistics.median(wall for _, wall in times[name]) for name in rivals}
    return figures | {"ratio": figures["inlay_ms"] / figures["peft_ms"], "rounds": times}


def measure(wide: int, rounds: int) -> dict[str, Any]:
    """Every operation at one size."""
    torch.manual_seed(0)
    order = random.Random(0)
    base = Stack(wide)
    x = torch.randn(4, wide)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, second = adapter_files(base, folder)
        ours, theirs = Inlay(copy.deepcopy(base), folder / "inlay"), Peft(base, folder / "peft")
        results = {"inject": race({"inlay": ours.inject(), "peft": theirs.inject()}, rounds, order)}
        for library in (ours, theirs):
            library.prepare(first, second)
        differences = show_equal(ours, theirs, x)
        mine, others = ours.operations(second), theirs.operations(second)
        for name in mine:
            if name == "unmerge":
                mine["merge"].run(), others["merge"].run()
            bare = {"bare": ours.bare_merge()} if name == "merge" else {}
            results[name] = race({"inlay": mine[name], "peft": others[name], **bare}, rounds, order)
    return {"d": wide, "largest_differences": differences, "operations": results}


def table(size: dict[str, Any]) -> str:
    """The results of one size, to be read."""
    lines = [f"{10 * BLOCKS:,} linears, d={size['d']}, LoRA r={RANK}, fp32; CPU ms",
             f"{'':18}{'Inlay':>10}{'peft':>10}{'ratio':>9}{'bound':>8}{'aim':>7}"]  # fmt: skip
    for name, figures in size["operations"].items():
        bound, aim = BOUNDS[name]
        verdict = "" if bound is None else "met" if figures["ratio"] <= bound else "NOT met"
        lines.append(
            f"{name:22}{figures['inlay_ms']:10.2f}{figures['peft_ms']:10.1f}{figures['ratio']:9.4f}"
            f"{bound if bound is not None else '':>8}{aim if aim is not None else '':>7}  {verdict}"
        )
    bare = size["operations"]["merge"]["bare_ms"]
    lines.append(f"one addmm for each linear into new memory, and nothing else: {bare:.1f} ms")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], help="widths d of the linears")
    parser.add_argument("--rounds", type=int, default=FULL, help=f"at least {FULL} for a figure to be quoted")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(1)
    sizes = []
    for wide in arguments.sizes:
        sizes.append(measure(wide, arguments.rounds))
        print(table(sizes[-1]), end="\n\n", flush=True)
    versions = {name: version(name) for name in ("torch", "peft", "safetensors")}
    out = arguments.out or (RESULTS if arguments.rounds >= FULL else RESULTS / "short") / "admin.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"versions": versions, "blocks": BLOCKS, "r": RANK, "bounds": BOUNDS, "sizes": sizes}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
