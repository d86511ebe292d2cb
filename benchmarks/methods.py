"""What a method's step costs beside HF peft's of the same adapter: forward and backward of one adapted linear.

    python benchmarks/methods.py                  # all methods that both have, 9 rounds, to results/methods.json
    python benchmarks/methods.py --only oft,hra   # some
    python benchmarks/methods.py --quick          # 3 rounds, to results/short/

A linear of 1,024 by 1,024 in fp32, 256 rows, gradients of the adapter and of x. peft makes the adapter and writes its
file; Inlay reads that, and the gradients of x are compared before anything is timed (of C3A the outputs, because its
gradient of x is wrong in peft). Prompts, mixtures and whatever else needs a model get a small one: `_whole_models.py`.
The protocol is in `_protocol.py`.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import _protocol as protocol
import _whole_models as whole
import peft
import torch
from peft.tuners.lora import gptq
from peft.tuners.lora.config import BdLoraConfig
from report import Bound, judged, line
from torch import Tensor, nn
from torch.nn import functional

import inlay

SIZE, ROWS = 1024, 256
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=16, target_modules=["0"]),
    "dora": lambda: peft.LoraConfig(r=16, use_dora=True, target_modules=["0"]),
    "mica": lambda: peft.LoraConfig(r=16, init_lora_weights="mica", target_modules=["0"]),
    "kasa": lambda: peft.LoraConfig(r=16, kasa_config=peft.KasaConfig(), target_modules=["0"]),
    "velora": lambda: peft.LoraConfig(r=16, velora_config=peft.VeloraConfig(), target_modules=["0"]),
    "qalora": lambda: peft.LoraConfig(r=16, use_qalora=True, qalora_group_size=32, target_modules=["0"]),
    "monteclora": lambda: peft.LoraConfig(
        r=16, monteclora_config=peft.MontecloraConfig(buffer_size=1), target_modules=["0"]
    ),
    "bdlora": lambda: peft.LoraConfig(r=16, use_bdlora=BdLoraConfig(None, ["0"], 4), target_modules=["0"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=16, target_r=8, total_step=9, target_modules=["0"]),
    "loha": lambda: peft.LoHaConfig(r=8, target_modules=["0"]),
    "lokr": lambda: peft.LoKrConfig(r=16, target_modules=["0"]),
    "hira": lambda: peft.HiraConfig(r=16, target_modules=["0"]),
    "gralora": lambda: peft.GraloraConfig(r=16, target_modules=["0"]),
    "delora": lambda: peft.DeloraConfig(r=16, target_modules=["0"]),
    "miss": lambda: peft.MissConfig(r=64, target_modules=["0"]),
    "beft": lambda: peft.BeftConfig(target_modules=["0"]),
    "ia3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(r=256, target_modules=["0"]),
    "pvera": lambda: peft.PveraConfig(r=256, target_modules=["0"]),
    "randlora": lambda: peft.RandLoraConfig(r=32, target_modules=["0"]),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=64, vector_length=256, target_modules=["0"]),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=["0"]),
    "unilora": lambda: peft.UniLoraConfig(target_modules=["0"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=["0"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["0"]),
    "hra": lambda: peft.HRAConfig(r=8, target_modules=["0"]),
    "road": lambda: peft.RoadConfig(target_modules=["0"]),
    "psoft": lambda: peft.PsoftConfig(r=32, target_modules=["0"]),
    "shira": lambda: peft.ShiraConfig(r=16, random_seed=1, target_modules=["0"]),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=["0"]),
    "c3a": lambda: peft.C3AConfig(block_size=256, target_modules=["0"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=["0"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=2592, target_modules=["0"]),
    "glora": lambda: peft.GloraConfig(r=8, target_modules=["0"]),
    "peanut": lambda: peft.PeanutConfig(r=32, target_modules=["0"]),
    "deft": lambda: peft.DeftConfig(target_modules=["0"]),
    "frod": lambda: peft.FrodConfig(target_modules=["0"], progressbar=False),
    "adamss": lambda: peft.AdamssConfig(target_modules=["0"]),
    "lily": lambda: peft.LilyConfig(r=32, target_modules=["0"]),
    "poly": lambda: peft.PolyConfig(r=8, n_tasks=3, target_modules=["0"]),
    "osf": lambda: peft.OSFConfig(target_modules=["0"]),
}
DRAWS = {"monteclora"}
"""Compared in eval mode and timed in training mode, where every step draws anew (in peft too: buffer_size=1)."""
WRONG_GRADIENT = {"c3a"}
"""Whose gradient of x is wrong in peft 0.21.2, as tests/oracles shows against the explicit matrix."""
NO_SLOWER = 1.0
CLOSE = 1e-4
"""Of the gradient of x, relative to its norm: fp32 sums in other orders, through inverses in some methods."""


def base() -> nn.Module:
    """The linear, always with the same weight."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE))


class QuantLinear(nn.Module):
    """What peft takes for a GPTQ linear, all that it has QA-LoRA for; here with the plain weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.get_buffer("qweight"), self.bias)


def in_peft(kind: str) -> peft.PeftModel:
    """peft's model."""
    model = base()
    if kind == "qalora":
        model[0] = QuantLinear(model[0])
        peft.tuners.lora.model.dispatch_gptq = lambda target, name, config, **more: (
            gptq.GPTQLoraLinear(target, name, config=config, **more) if isinstance(target, QuantLinear) else None
        )
    return peft.get_peft_model(model, CONFIGS[kind]())


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for x."""
    found: Tensor = model(x)
    return found


def of_tasks(model: nn.Module, x: Tensor) -> Tensor:
    """The same for a batch of four, each row of a task."""
    tasks, rows = torch.tensor([0, 2, 1, 1]), x.view(4, -1, SIZE)
    if isinstance(model, peft.PeftModel):  # whose own call passes no tasks on
        return plainly(functools.partial(model.base_model, task_ids=tasks), rows).view(x.shape)  # type: ignore[arg-type]
    with inlay.for_tasks(model, tasks):
        return plainly(model, rows).view(x.shape)


CALLS = {"poly": of_tasks}
"""How a model is called that needs more than x."""


def step_of(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = plainly) -> Callable[[], Tensor]:
    """Forward and backward, with gradients made anew; gives the gradient of x."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        call(model, x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    return step


def linears(kind: str) -> whole.Pair:
    """One linear with the adapter in both libraries."""
    x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = in_peft(kind)
    ours = whole.through_file(base, theirs)
    return whole.Pair(theirs, ours, base().requires_grad_(False), x, CALLS.get(kind, plainly))


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """Equality, seconds of both and of the bare base, and the ratio."""
    bare = "linear" if kind in CONFIGS else "model"
    made = linears(kind) if kind in CONFIGS else whole.pair(kind)
    models = {bare: made.bare, "inlay": made.ours.eval(), "peft": made.theirs.eval()}
    steps = {name: step_of(model, made.x, made.call) for name, model in models.items()}
    if kind in WRONG_GRADIENT:
        found, expected, what = made.ours(made.x), made.theirs(made.x), "output"
    else:
        found, expected, what = steps["inlay"]().clone(), steps["peft"]().clone(), "gradient of x"
    error = float((found - expected).norm() / expected.norm())
    if error > CLOSE:
        raise SystemExit(f"{kind}: the {what} differs by {error:.1e} of its norm; times mean nothing")
    for model in models.values():
        model.train(kind in DRAWS)
    known = {name: {"seconds": every} for name, every in protocol.interleaved(steps, rounds).items()}
    bounds = [Bound(kind, "seconds", "inlay", "peft", NO_SLOWER), Bound(kind, "seconds", "inlay", bare, None)]
    return {"error": error, "variants": known, "bounds": [judged(bound, known) for bound in bounds]}


def main() -> None:
    """Measure the methods asked for, print and store each as it ends."""
    options = protocol.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = protocol.Results("methods", options)
    for kind in protocol.chosen([*CONFIGS, *whole.CONFIGS], options.only):
        settings: dict[str, Any] = {"rounds": results.rounds}
        if kind in CONFIGS:
            settings |= {"size": SIZE, "rows": ROWS, "config": str(CONFIGS[kind]())}
        else:
            settings |= {"model": str(whole.SHAPE), "config": str(whole.CONFIGS[kind]())}
        record = results.part(kind, settings, functools.partial(measure, kind, results.rounds))
        known = record["variants"]
        bare = statistics.median(known["linear" if kind in CONFIGS else "model"]["seconds"])
        print("\n".join([*map(line, record["bounds"])]), f"   bare {1e3 * bare:.1f} ms", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
