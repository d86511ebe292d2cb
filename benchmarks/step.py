"""A training step and what it keeps: Inlay and HF peft over the floor, every method that both have.

    python benchmarks/step.py                         # all parts, 9 rounds: minutes each, benchmarks/results/step.json
    python benchmarks/step.py --only lora,dora-bf16   # parts by the beginning of their names
    python benchmarks/step.py --quick                 # 3 rounds, to results/short/

"peft" is HF peft as it comes, "peft(n)" the same with `autocast_adapter_dtype=False`: adapters in the dtype of the
base. The protocol is in `_protocol.py`. What was measured already, with these settings, versions and source, is not
measured again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import shutil
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import _protocol as protocol
import peft
import torch
from report import Bound, judged, line
from torch import nn

import inlay

RANK, ALPHA, DROPOUT = 16, 4.8, 0.1
BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {FP32: 1e-5, BF16: 5e-2}
"""Of the gradient that is furthest off, relative to its norm. In bf16 the base's own rounding sets it, and both
libraries' errors are printed; there Inlay's gradients as one vector may also be no more than 1.25 × peft(n)'s."""

# One line a variant: what is done to a model that has its adapter, before it is measured as "inlay, <name>". The bound
# on the fused MLP looks for the name "fused MLP".
OPTIONS: dict[str, protocol.Adapt] = {
    "fused MLP": inlay.fuse,
    "fused MLP and siblings": lambda model: inlay.fuse(model, siblings=True, shared_dropout=True),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model gets its adapter, and what is done once the adapter has its values."""

    adapt: protocol.Adapt
    finish: protocol.Adapt = lambda model: model
    compared: bool = True
    """False for another method than the part's, taken along for its time and bytes, and for the floor."""


FLOOR = Variant(protocol.floor, compared=False)


def ours(method: Callable[..., inlay.Method], **fields: Any) -> Variant:
    """A method of Inlay; the fields of LoRA are those of every part unless said."""
    if method is not inlay.IA3:
        fields = {"r": RANK, "alpha": ALPHA, "targets": "all-linear"} | fields
    return Variant(lambda model: inlay.attach(model, method(**fields)))


def theirs(cast: bool = True, **fields: Any) -> Variant:
    """LoRA of HF peft."""
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"} | fields
    return Variant(lambda model: peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=cast))


def their_ia3(cast: bool = True) -> Variant:
    """(IA)³ of HF peft, where Inlay puts it by itself."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return Variant(lambda model: peft.get_peft_model(model, config, autocast_adapter_dtype=cast))


def both(method: Callable[..., inlay.Method], mine: dict[str, Any], others: dict[str, Any]) -> dict[str, Variant]:
    """The floor, peft both ways and Inlay, with fields that mean the same."""
    return {
        "floor": FLOOR,
        "peft": theirs(**others),
        "peft(n)": theirs(cast=False, **others),
        "inlay": ours(method, **mine),
    }


def with_options(variants: dict[str, Variant]) -> dict[str, Variant]:
    """The variants, and "inlay" once more with each of the OPTIONS."""
    base = variants["inlay"].adapt
    return variants | {f"inlay, {name}": Variant(base, finish) for name, finish in OPTIONS.items()}


# -- ways to change a model --------------------------------------------------------------------------------------------


def freeze_a(model: nn.Module) -> nn.Module:
    """LoRA with A frozen: by its own field where the library has one, else by hand."""
    own = any(field.name == "freeze_a" for field in dataclasses.fields(inlay.LoRA))
    model = ours(inlay.LoRA, **({"freeze_a": True} if own else {})).adapt(model)
    return freeze_a_by_hand(model)


def freeze_a_by_hand(model: nn.Module) -> nn.Module:
    """No gradient for any A."""
    for name, tensor in protocol.adapter_tensors(model).items():
        if name.endswith("lora_A"):
            tensor.requires_grad_(False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """Every block recomputed in the backward."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile with its defaults, for one shape of batch; a graph break or giving up on it is an error."""
    torch._dynamo.config.recompile_limit = 64  # variants share the code of the model, and modes and hooks count too
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model, dynamic=False, fullgraph=True)  # type: ignore[return-value]


def quantised(shape: protocol.Shape, dtype: torch.dtype, values: torch.dtype | None = None) -> nn.Module:
    """The Llama with its blocks' linears in NF4, computing in bf16; in any other dtype, what those decode to."""
    import bitsandbytes as bnb

    model = protocol.llama(shape, dtype, BF16)
    for path, module in [*model.model.named_modules()]:
        if not isinstance(module, nn.Linear):
            continue
        packed = bnb.nn.Params4bit(module.weight.detach().to(BF16), requires_grad=False, quant_type="nf4").to("cpu")
        if dtype == BF16:
            linear = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=BF16, quant_type="nf4")
            linear.in_features, linear.out_features = module.in_features, module.out_features
            linear.weight, linear.quant_state, packed.module = packed, packed.quant_state, linear
            model.model.set_submodule(path, linear)
        else:
            module.weight.data = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    model.is_loaded_in_4bit = dtype == BF16  # by which peft knows
    return model


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """Variants that are measured against one another on one model."""

    shape: protocol.Shape
    dtype: torch.dtype
    variants: dict[str, Variant]
    bounds: list[Bound]
    reference: Variant
    """The same adapter where outputs are compared, with a base of higher precision."""
    base: Callable[..., nn.Module] = protocol.llama
    compare_in_training: bool = True
    """False with dropout, whose masks differ from library to library: the loss and gradients of evaluation mode."""
    count: Callable[[nn.Module, torch.Tensor], int] = protocol.saved_bytes
    missing: str = ""
    """Why the part cannot be measured here."""


PLAIN = theirs()
TIME, SAVED = "seconds", "saved_bytes"


def lora_parts() -> dict[str, Part]:
    """LoRA on every linear."""
    variants = with_options(both(inlay.LoRA, {}, {}))
    exact = {"inlay exact": ours(inlay.LoRA, precision="exact")}
    bf16 = [
        Bound("LoRA r16 all, bf16", TIME, "inlay", "floor", 1.18, 1.08),
        Bound("LoRA r16 all, bf16", TIME, "inlay", "peft", 0.73),
        Bound("LoRA r16 all, bf16", TIME, "inlay", "peft(n)", 0.93),
        Bound("LoRA r16 all, bf16", SAVED, "inlay", "peft", 0.67, "floor"),
        Bound("LoRA r16 all, bf16", SAVED, "inlay, fused MLP", "peft", 0.54, "floor"),
        Bound("LoRA r16 all, bf16", SAVED, "inlay", "peft(n)", None),
        Bound("LoRA r16 all, bf16", TIME, "inlay exact", "peft", None),
        *(Bound("LoRA r16 all, bf16", TIME, f"inlay, {name}", "floor", None) for name in OPTIONS),
    ]
    fp32 = [
        Bound("LoRA r16 all, fp32", TIME, "inlay", "floor", 1.10, 1.05),
        Bound("LoRA r16 all, fp32", TIME, "inlay", "peft", 0.95),
        Bound("LoRA r16 all, fp32", SAVED, "inlay", "peft", None),
    ]
    return {
        "lora-bf16": Part(protocol.LLAMA4, BF16, variants | exact, bf16, PLAIN),
        "lora-fp32": Part(protocol.LLAMA4, FP32, variants, fp32, PLAIN),
    }


def dropout_parts() -> dict[str, Part]:
    """LoRA with dropout; its own price is taken over Inlay without."""
    variants = both(inlay.LoRA, {"dropout": DROPOUT}, {"lora_dropout": DROPOUT})
    variants = with_options(variants) | {"inlay without": ours(inlay.LoRA)}
    parts = {}
    for dtype, name, bound in ((BF16, "bf16", 0.66), (FP32, "fp32", 0.86)):
        title = f"LoRA r16 all, dropout 0.1, {name}"
        bounds = [
            Bound(title, TIME, "inlay", "peft", bound),
            Bound(title, TIME, "inlay", "peft(n)", None),
            Bound(title, TIME, "inlay", "inlay without", None, 1.04),
            *(Bound(title, TIME, f"inlay, {option}", "peft", None) for option in OPTIONS),
            Bound(title, SAVED, "inlay", "peft", 0.49 if dtype == BF16 else None),
            Bound(title, SAVED, "inlay", "inlay without", 1.04 if dtype == BF16 else None),
        ]
        parts[f"dropout-{name}"] = Part(protocol.LLAMA4, dtype, variants, bounds, PLAIN, compare_in_training=False)
    return parts


def dora_parts() -> dict[str, Part]:
    """DoRA on every linear."""
    variants = both(inlay.DoRA, {}, {"use_dora": True})
    variants["inlay LoRA"] = dataclasses.replace(ours(inlay.LoRA), compared=False)
    parts = {}
    for dtype, name, bound, saved in ((BF16, "bf16", 0.53, 0.45), (FP32, "fp32", 0.74, 0.61)):
        title = f"DoRA r16 all, {name}"
        bounds = [
            Bound(title, TIME, "inlay", "peft", bound),
            Bound(title, TIME, "inlay", "peft(n)", None),
            Bound(title, TIME, "inlay", "inlay LoRA", None, 1.10),
            Bound(title, SAVED, "inlay", "peft", saved),
        ]
        parts[f"dora-{name}"] = Part(protocol.LLAMA4, dtype, variants, bounds, theirs(use_dora=True))
    return parts


def other_parts() -> dict[str, Part]:
    """(IA)³, LoRA with A frozen, LoRA under gradient checkpointing (no bound: to be known)."""
    ia3 = {"floor": FLOOR, "peft": their_ia3(), "peft(n)": their_ia3(cast=False),
           "inlay": ours(inlay.IA3)}  # fmt: skip
    ia3_bounds = [
        Bound("(IA)³, bf16", TIME, "inlay", "peft", 0.95),
        Bound("(IA)³, bf16", TIME, "inlay", "peft(n)", None),
        Bound("(IA)³, bf16", TIME, "inlay", "floor", None, 1.10),
        Bound("(IA)³, bf16", SAVED, "inlay", "peft", None),
    ]
    frozen_reference = Variant(lambda model: freeze_a_by_hand(PLAIN.adapt(model)))
    frozen = {"floor": FLOOR, "peft": frozen_reference, "inlay": Variant(freeze_a)}
    frozen_bounds = [
        Bound("LoRA r16 all, A frozen, bf16", SAVED, "inlay", "floor", 1.02),
        Bound("LoRA r16 all, A frozen, bf16", TIME, "inlay", "floor", None),
    ]
    recomputed = {name: dataclasses.replace(variant, finish=checkpointed)
                  for name, variant in both(inlay.LoRA, {}, {}).items() if name != "floor"}  # fmt: skip
    recomputed_bounds = [Bound("LoRA r16 all, checkpointed, bf16", measure, "inlay", over, None)
                         for measure in (TIME, SAVED) for over in ("peft", "peft(n)", "floor")]  # fmt: skip
    recomputed = {"floor": FLOOR} | recomputed
    return other_methods() | {
        "ia3-bf16": Part(protocol.LLAMA4, BF16, ia3, ia3_bounds, their_ia3()),
        "frozen-a-bf16": Part(protocol.LLAMA4, BF16, frozen, frozen_bounds, frozen_reference),
        "checkpointed-bf16": Part(
            protocol.LLAMA4, BF16, recomputed, recomputed_bounds, PLAIN, count=protocol.allocated_bytes
        ),
    }


def other_methods() -> dict[str, Part]:
    """VeRA, AdaLoRA and OFT on all linears."""
    every = {"target_modules": "all-linear"}
    pairs = {
        "VeRA r256": (0.95, inlay.VeRA(r=256, targets="all-linear"), peft.VeraConfig(r=256, **every)),
        "AdaLoRA r16": (
            0.75, inlay.AdaLoRA(init_r=RANK, alpha=ALPHA, targets="all-linear"),
            peft.AdaLoraConfig(init_r=RANK, lora_alpha=ALPHA, total_step=9, orth_reg_weight=0.0, **every),
        ),
        "OFT b32": (0.95, inlay.OFT(targets="all-linear"), peft.OFTConfig(oft_block_size=32, **every)),
    }  # fmt: skip
    parts = {}
    for title, (bound, method, config) in pairs.items():
        name = f"{title} all, bf16"
        their = {cast: Variant(lambda model, config=config, cast=cast: peft.get_peft_model(
            model, copy.deepcopy(config), autocast_adapter_dtype=cast)) for cast in (True, False)}  # fmt: skip
        variants = {"floor": FLOOR, "peft": their[True], "peft(n)": their[False],
                    "inlay": Variant(lambda model, method=method: inlay.attach(model, method))}  # fmt: skip
        bounds = [Bound(name, TIME, "inlay", "peft", bound), Bound(name, TIME, "inlay", "peft(n)", None),
                  Bound(name, TIME, "inlay", "floor", None, 1.10),
                  Bound(name, SAVED, "inlay", "peft", None)]  # fmt: skip
        parts[f"{title.split()[0].lower()}-bf16"] = Part(protocol.LLAMA4, BF16, variants, bounds, their[True])
    return parts


def quantised_and_compiled_parts() -> dict[str, Part]:
    """QLoRA over a 4-bit base, and torch.compile."""
    no_bitsandbytes = "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"
    no_compiler = "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "torch.compile needs a C++ compiler"
    qlora_bounds = [
        Bound("QLoRA r16 all, NF4 and bf16", TIME, "inlay", "peft", 0.80),
        Bound("QLoRA r16 all, NF4 and bf16", TIME, "inlay", "peft(n)", None),
        Bound("QLoRA r16 all, NF4 and bf16", TIME, "inlay", "floor", 1.13, 1.08),
        Bound("QLoRA r16 all, NF4 and bf16", SAVED, "inlay", "peft", 0.70),
    ]
    compiled_bounds = [
        Bound("LoRA r16 all, bf16, compiled", TIME, "inlay", "peft", 0.89),
        Bound("LoRA r16 all, bf16, compiled", TIME, "inlay", "peft(n)", None),
        Bound("LoRA r16 all, bf16, compiled", TIME, "inlay", "floor", 1.2, 1.10),
        Bound("LoRA r16 all, bf16, compiled", TIME, "inlay", "floor, eager", None),
        Bound("LoRA r16 all, bf16, compiled", SAVED, "inlay", "peft", None),
    ]
    traced = {name: dataclasses.replace(variant, finish=compiled)
              for name, variant in both(inlay.LoRA, {}, {}).items()}  # fmt: skip
    traced |= {"floor": Variant(protocol.traceable_floor, compiled, compared=False), "floor, eager": FLOOR}
    return {
        "qlora-bf16": Part(
            protocol.QUANTISED, BF16, both(inlay.LoRA, {}, {}), qlora_bounds, PLAIN, base=quantised,
            missing=no_bitsandbytes,
        ),
        "compiled-bf16": Part(protocol.LLAMA2, BF16, traced, compiled_bounds, PLAIN, missing=no_compiler),
    }  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


def reference_of(part: Part) -> tuple[protocol.Values, protocol.Outcome]:
    """The adapter's values, and the step that they give with the same base in higher precision."""
    higher = FP32 if part.dtype == BF16 else torch.float64
    model = part.reference.adapt(part.base(part.shape, higher, part.dtype))
    tensors = protocol.adapter_tensors(model)
    values = protocol.draw(tensors)
    protocol.fill(tensors, values, "the reference")
    model.train(part.compare_in_training)
    return values, protocol.outcome(model, tensors, protocol.batch(part.shape))


def measure(part: Part, rounds: int) -> dict[str, Any]:
    """Errors, saved bytes and seconds of every variant of a part, and its bounds."""
    ids = protocol.batch(part.shape)
    values, reference = reference_of(part)
    known: dict[str, dict[str, Any]] = {}
    steps = {}
    for name, variant in part.variants.items():
        model = variant.adapt(part.base(part.shape, part.dtype))
        tensors = protocol.adapter_tensors(model)
        protocol.fill(tensors, values if variant.compared else protocol.draw(tensors), name)
        model = variant.finish(model)
        known[name] = {}
        if variant.compared:
            model.train(part.compare_in_training)
            known[name]["errors"] = protocol.outcome(model, tensors, ids).error(reference)
            model.train()
        known[name]["saved_bytes"] = part.count(model, ids)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[name] = protocol.training_step(model, ids, trained)
    check(part, known)
    for name, seconds in protocol.interleaved(steps, rounds).items():
        known[name]["seconds"] = [round(second, 5) for second in seconds]
    return {"variants": known, "bounds": [judged(bound, known) for bound in part.bounds]}


def check(part: Part, known: Mapping[str, Mapping[str, Any]]) -> None:
    """End here, before any time is taken, if Inlay's gradients are not those of the reference."""
    for name, about in known.items():
        if "errors" in about:
            text = "  errors of {:<24} loss {loss:.1e}, gradients {gradients:.1e}, worst tensor {worst_tensor:.1e}"
            print(text.format(name, **about["errors"]))
    theirs_off = known.get("peft(n)", known["peft"])["errors"]["gradients"]
    for name, about in known.items():
        errors = about.get("errors")
        if errors is None or not name.startswith("inlay"):
            continue
        if max(errors["worst_tensor"], errors["loss"]) > TOLERANCE[part.dtype]:
            raise SystemExit(f"{name} is off by more than {TOLERANCE[part.dtype]}")
        if part.dtype == BF16 and errors["gradients"] > 1.25 * theirs_off:
            raise SystemExit(f"{name} is further off than peft(n) by more than a quarter")


def table(record: Mapping[str, Any]) -> str:
    """Every variant of a part in a line, then the bounds."""
    variants = record["variants"]
    floor = variants["floor"]
    lines = [f"  {'':<24}{'CPU ms':>9}{'× floor':>9}{'MiB saved':>11}{'× floor':>9}"]
    for name, about in variants.items():
        times = statistics.median(a / b for a, b in zip(about["seconds"], floor["seconds"], strict=True))
        lines.append(
            f"  {name:<24}{1e3 * statistics.median(about['seconds']):9.0f}{times:9.3f}"
            f"{about['saved_bytes'] / 2**20:11.1f}{about['saved_bytes'] / floor['saved_bytes']:9.3f}"
        )
    return "\n".join([*lines, *map(line, record["bounds"])])


def main() -> None:
    """Measure the parts asked for, print and store each as it ends."""
    options = protocol.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft|transformers")
    results = protocol.Results("step", options)
    parts = functools.reduce(
        dict.__or__, (lora_parts(), dropout_parts(), dora_parts(), other_parts(), quantised_and_compiled_parts())
    )
    for name in protocol.chosen(list(parts), options.only):
        part = parts[name]
        settings = {"rounds": results.rounds, "rank": RANK, "alpha": ALPHA, "shape": dataclasses.asdict(part.shape),
                    "tolerance": TOLERANCE[part.dtype], "variants": list(part.variants)}  # fmt: skip
        if part.missing:
            print(f"{name}: left out, {part.missing}")
            continue
        record = results.part(name, settings, functools.partial(measure, part, results.rounds))
        print(f"{name}\n{table(record)}\n", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
