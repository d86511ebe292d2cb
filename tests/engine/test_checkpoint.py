"""Adapters on disk: what is written is read back, whoever reads it; what is damaged is refused and changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import tiny
from engine.small import IDS, Net, adapted, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.engine import files
from inlay.engine.adapters import find_adapters
from inlay.errors import AdapterError, BaseModelError, CheckpointError, ConfigError, InlayError, UnsupportedError

LoRA = inlay.LoRA
CONFIG, WEIGHTS = files.CONFIG, files.WEIGHTS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter's folder."""
    return inlay.save(adapted(), tmp_path / "good")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config by hand."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and keep the file's metadata."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def snapshot(model: nn.Module) -> Any:
    """All that a failing load must leave alone, but for the values (see `same`)."""
    found = find_adapters(model)
    return (
        {path: (type(module), module.training, sorted(vars(module))) for path, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        (list(found.loaded), found.state.active, found.state.merged) if found else None,
    )


# -- there and back ----------------------------------------------------------------------------------------------------

ELSEWHERE = """
    import sys, torch, inlay
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from engine.small import IDS, Net
    net = inlay.load(Net(), {folder!r}, trainable=True)
    torch.save(net(IDS).detach(), {folder!r} + "/out.pt")
    inlay.save(net, {folder!r} + "/again")
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    net(IDS).square().sum().backward()
    optimizer.step()
    torch.save(net(IDS).detach(), {folder!r} + "/trained.pt")
"""


def test_a_fresh_process_computes_the_same_trains_on_and_writes_the_same_bytes(saved: Path) -> None:
    net = adapted()
    tests = str(Path(__file__).resolve().parents[1])
    script = textwrap.dedent(ELSEWHERE.format(tests=tests, folder=str(saved)))
    paths = os.pathsep.join([str(Path(inlay.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": paths})
    assert torch.equal(torch.load(saved / "out.pt"), net(IDS))
    for name in (CONFIG, WEIGHTS):
        assert (saved / "again" / name).read_bytes() == (saved / name).read_bytes()
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    net(IDS).square().sum().backward()
    optimizer.step()
    assert torch.equal(torch.load(saved / "trained.pt"), net(IDS))


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2, targets="first,second,table", overrides={"second": {"r": 3, "alpha": 4}}),
        LoRA(r=2, targets="first", init="pissa", bias="all"),
        inlay.DoRA(r=2, targets="first,second"),
        [LoRA(r=2, targets="first"), inlay.DoRA(r=2, targets="second")],
    ],
    ids=str,
)
def test_every_form_comes_back_bit_for_bit(method: Any, tmp_path: Path) -> None:
    net = adapted(method=method)
    inlay.save(net, tmp_path / "a")
    inlay.save(net, tmp_path / "b")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in (CONFIG, WEIGHTS))
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    back = inlay.load(Net(), tmp_path / "a")
    assert torch.equal(torch.rand(1), expected_next)  # loading draws no random numbers
    assert torch.equal(back(IDS), net(IDS))
    inlay.save(back, tmp_path / "c")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "c" / n).read_bytes() for n in (CONFIG, WEIGHTS))


def test_what_is_loaded_is_frozen_unless_asked_and_active_only_when_alone(saved: Path, tmp_path: Path) -> None:
    net = inlay.load(Net(), saved)
    assert not any(p.requires_grad for p in net.parameters())
    alone = net(IDS)
    inlay.save(adapted(1, LoRA(r=3, targets="first")), tmp_path / "law")
    inlay.load(net, tmp_path / "law", name="law", trainable=True)
    assert inlay.active(net) == ("default",)
    assert torch.equal(net(IDS), alone)
    assert {n.split(".")[2] for n, p in net.named_parameters() if p.requires_grad} == {"law"}
    with inlay.using(net, "law"):
        assert torch.equal(net(IDS), inlay.load(Net(), tmp_path / "law")(IDS))
    inlay.save(net, tmp_path / "law-again", name="law")
    assert (tmp_path / "law-again" / WEIGHTS).read_bytes() == (tmp_path / "law" / WEIGHTS).read_bytes()


def test_saving_over_an_adapter_replaces_it_and_leaves_other_files(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    other = adapted(1, LoRA(r=3, targets="second"))
    inlay.save(other, saved)
    assert torch.equal(inlay.load(Net(), saved)(IDS), other(IDS))
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert (saved / "README.md").read_text() == "mine"


def test_saving_while_merged_or_inactive_describes_the_base_not_the_mixture(tmp_path: Path) -> None:
    net = adapted(method=LoRA(r=2, targets="first,second,table", lora_bias=False))
    inlay.save(net, tmp_path / "a")
    inlay.merge(net)
    inlay.save(net, tmp_path / "b")
    inlay.unmerge(net)
    inlay.activate(net)
    inlay.save(net, tmp_path / "c")
    for other in "bc":
        assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / other / n).read_bytes() for n in (CONFIG, WEIGHTS))


def test_names_that_are_a_suffix_of_others_are_told_apart(tmp_path: Path) -> None:
    """`q` also ends `block.q`, so neither library can name it by its end."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["k"](self.block["q"](self.q(x)))

    torch.manual_seed(0)
    net = Nested()
    state = net.state_dict()
    inlay.attach(net, LoRA(r=2, targets="re:q|block.k", overrides={"re:q": {"r": 3}}))
    randomise(net)
    inlay.save(net, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"block\.k|q"
    fresh = Nested()
    fresh.load_state_dict({k: v for k, v in state.items() if "inlays" not in k})
    x = torch.randn(2, 4)
    assert torch.equal(inlay.load(fresh, tmp_path)(x), net(x))
    peft = pytest.importorskip("peft")
    plain = Nested()
    plain.load_state_dict({k: v for k, v in state.items() if "inlays" not in k})
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path)(x), net(x))


# -- half-written ------------------------------------------------------------------------------------------------------

KILLED = """
    import os, shutil, signal, sys, torch, inlay
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from engine.small import adapted
    from inlay import LoRA
    from inlay.engine import files
    net = adapted(1, LoRA(r=3, targets="second"))
    places = [(files, "write_tensors"), (files, "_flush"), (os, "replace"), (Path, "write_text"), (Path, "rmdir")]

    def child(folder, step):
        count = 0
        def killing(function):
            def call(*args, **kwargs):
                nonlocal count
                result = function(*args, **kwargs)
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call
        for owner, name in places:
            setattr(owner, name, killing(getattr(owner, name)))
        inlay.save(net, folder)
        os._exit(0)

    for step in range(1, 40):
        folder = Path({root!r}) / f"step-{{step}}"
        shutil.copytree({old!r}, folder)
        process = os.fork()
        if process == 0:
            child(folder, step)
        if os.waitpid(process, 0)[1] == 0:
            break
    else:
        raise SystemExit("the save never ended")
"""


def test_killed_at_any_moment_of_a_save_the_folder_holds_the_old_adapter_or_the_new(
    saved: Path, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    root.mkdir()
    tests = str(Path(__file__).resolve().parents[1])
    script = textwrap.dedent(KILLED.format(tests=tests, old=str(saved), root=str(root)))
    paths = os.pathsep.join([str(Path(inlay.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": paths})
    new = adapted(1, LoRA(r=3, targets="second"))
    old, outputs = inlay.load(Net(), saved)(IDS), []
    folders = sorted(root.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    assert len(folders) > 8
    for folder in folders:
        output = inlay.load(Net(), folder)(IDS)
        assert torch.equal(output, old) or torch.equal(output, new(IDS))
        outputs.append(torch.equal(output, new(IDS)))
        inlay.save(new, folder)  # the next save finishes or sweeps up
        assert torch.equal(inlay.load(Net(), folder)(IDS), new(IDS))
        assert not (folder / files.SAVED).exists()
    assert outputs == sorted(outputs)  # old until one moment, new from then on
    assert outputs[0] is False
    assert outputs[-1] is True


def test_leftovers_of_killed_saves_are_swept_up_when_old(saved: Path) -> None:
    for name, age in (("old", 7200), ("young", 0)):
        (saved / f"{files.SAVING}{name}").mkdir()
        stamp = (saved / CONFIG).stat().st_mtime - age
        os.utime(saved / f"{files.SAVING}{name}", (stamp, stamp))
    inlay.save(adapted(), saved)
    assert sorted(p.name for p in saved.iterdir()) == [f"{files.SAVING}young", CONFIG, WEIGHTS]


def test_an_extra_file_must_be_there_whole_and_of_the_same_save(saved: Path) -> None:
    edit(saved, lambda config: own(config).update(extra=True))
    with pytest.raises(CheckpointError, match=r"has no adapter_extra.safetensors: the adapter is incomplete"):
        inlay.load(Net(), saved)
    save_file({"0.encoder": torch.ones(2)}, saved / files.EXTRA, metadata={"inlay": "another"})
    with pytest.raises(CheckpointError, match="come from two saves"):
        inlay.load(Net(), saved)


def test_an_extra_file_of_an_older_adapter_is_not_read_and_goes_away(saved: Path) -> None:
    save_file({"0.encoder": torch.ones(2)}, saved / files.EXTRA)
    inlay.load(Net(), saved)
    inlay.save(adapted(), saved)
    assert not (saved / files.EXTRA).exists()


@pytest.mark.parametrize("where", ["write_tensors", "write_text", "_flush", "mkdtemp"])
@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "new folder"])
def test_a_full_disk_is_one_clear_error_and_keeps_the_old_adapter(
    saved: Path, tmp_path: Path, where: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"write_tensors": files, "write_text": Path, "_flush": files, "mkdtemp": files.tempfile}[where]
    folder = saved if there else tmp_path / "new"
    net = adapted(1, LoRA(r=3, targets="second"))
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="the disk is full: free some space"):
        patched.setattr(owner, where, full)
        inlay.save(net, folder)
    assert sorted(p.name for p in folder.iterdir()) == ([CONFIG, WEIGHTS] if there else [])
    if there:
        assert torch.equal(inlay.load(Net(), folder)(IDS), adapted()(IDS))
    inlay.save(net, folder)


def test_a_folder_that_cannot_be_is_one_clear_error(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="could not write"):
        inlay.save(adapted(), saved / CONFIG)
    with pytest.raises(CheckpointError, match="is a file; an adapter is a folder"):
        inlay.load(Net(), saved / WEIGHTS)


def test_saving_over_links_does_not_write_through_them(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.move(saved / name, outside / name)
        (saved / name).symlink_to(outside / name)
    before = {p.name: p.read_bytes() for p in outside.iterdir()}
    expected = inlay.load(Net(), saved)(IDS)  # reading follows links, as a hub's cache needs
    assert torch.equal(expected, adapted()(IDS))
    (saved / files.SAVED).symlink_to(outside, target_is_directory=True)
    with pytest.raises(CheckpointError, match="could not write"):
        inlay.save(adapted(1), saved)
    (saved / files.SAVED).unlink()
    inlay.save(adapted(1), saved)
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == before
    assert not (saved / WEIGHTS).is_symlink()


# -- refused -----------------------------------------------------------------------------------------------------------


def own(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["auto_mapping"]["inlay"]
    return found


def peft_only(**fields: Any) -> Callable[[Path], None]:
    """The config as if peft had written it, with these fields."""

    def damage(folder: Path) -> None:
        edit(folder, lambda config: (config.pop("auto_mapping"), config.update(fields)))

    return damage


def editing(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, change)


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


A = "base_model.model.first.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    # the config
    "no config": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json .it holds: adapter_model"),
    "not JSON": (bytes_of(CONFIG, lambda b: b[: len(b) // 2]), "is not valid JSON"),
    "not text": (bytes_of(CONFIG, lambda b: b"\xff\xfe\x00" + b), "is not valid JSON"),
    "nested too deep": (bytes_of(CONFIG, lambda b: b"[" * 100_000), "is not valid JSON"),
    "JSON of another kind": (bytes_of(CONFIG, lambda b: b"[1, 2]"), "holds a JSON list, not an object"),
    "huge": (bytes_of(CONFIG, lambda b: b'{"a": "' + b"x" * 17_000_000 + b'"}'), "which no adapter config needs"),
    "empty object": (bytes_of(CONFIG, lambda b: b"{}"), "peft_type=None, which is unknown here"),
    "unknown peft_type": (peft_only(peft_type="LORRA"), "'LORRA', which is unknown here; did you mean 'LORA'"),
    "peft_type of another kind": (peft_only(peft_type=["LORA"]), "value that cannot be used"),
    "no targets": (peft_only(target_modules=None), "names no target_modules"),
    "targets of another kind": (peft_only(target_modules=5), "value that cannot be used"),
    "targets not there": (peft_only(target_modules=["q_proj"]), r"\['q_proj'\] of a base it does not name"),
    "a broken pattern": (peft_only(target_modules="first("), "not a regular expression"),
    "a rank in words": (peft_only(r="eight"), "rank must be a whole number"),
    "rank zero": (peft_only(r=0), "rank must be a whole number"),
    "a large rank": (peft_only(r=10**5), "has shape .2, 8. in the adapter file"),
    "a rank beyond memory": (peft_only(r=10**12), "value that cannot be used"),
    "a rank beyond counting": (peft_only(r=10**30), "value that cannot be used"),
    "alpha null": (peft_only(lora_alpha=None), "alpha=None"),
    "ranks in a list": (peft_only(rank_pattern=[1]), "value that cannot be used"),
    "a feature we lack": (peft_only(megatron_config={"fp16": True}), "uses megatron_config, which Inlay does not have"),
    "own entry emptied": (editing(lambda c: own(c).pop("methods")), "value that cannot be used"),
    "own entry of another kind": (editing(lambda c: own(c).update(methods=3)), "value that cannot be used"),
    "own method unknown": (editing(lambda c: own(c)["methods"][0].update(kind="lorra")), "'lorra'; did you mean"),
    "own field unknown": (editing(lambda c: own(c)["methods"][0].update(rank=2)), "no field 'rank'"),
    "own base emptied": (editing(lambda c: own(c).update(base={"class": "Net"})), "value that cannot be used"),
    "a newer format": (editing(lambda c: own(c).update(format=99)), "upgrade inlay"),
    "a newer format in words": (editing(lambda c: own(c).update(format="two")), "value that cannot be used"),
    "rank edited for peft only": (editing(lambda c: c.update(r=4)), "says r=4, but its 'inlay' entry .* means 2"),
    "alpha edited for peft only": (editing(lambda c: c.update(lora_alpha=99)), "says lora_alpha=99.* edited by hand"),
    "rank edited for us only": (editing(lambda c: own(c)["methods"][0].update(r=4)), "has shape .2, 8. in the adapter"),
    "another rank in both": (
        editing(lambda c: (c.update(r=4), own(c)["methods"][0].update(r=4))), "this model needs .4, 8."),
    # the tensors
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors: the adapter is incomplete"),
    "only a pickle": (pickled, "a pickle file, which can run code .* refused"),
    "empty file": (bytes_of(WEIGHTS, lambda b: b""), "cannot be read .* damaged"),
    "cut in the header": (bytes_of(WEIGHTS, lambda b: b[:40]), "cannot be read"),
    "cut in the tensors": (bytes_of(WEIGHTS, lambda b: b[:-4]), "cannot be read"),
    "more behind": (bytes_of(WEIGHTS, lambda b: b + b"\0" * 64), "cannot be read"),
    "a header length that lies": (bytes_of(WEIGHTS, lambda b: struct.pack("<Q", 2**62) + b[8:]), "cannot be read"),
    "a header length too short": (
        bytes_of(WEIGHTS, lambda b: struct.pack("<Q", struct.unpack("<Q", b[:8])[0] - 9) + b[8:]), "cannot be read"),
    "a header that is no JSON": (bytes_of(WEIGHTS, lambda b: b[:8] + b"#" + b[9:]), "cannot be read"),
    "a pickle in its clothes": (
        lambda f: (torch.save({"a": torch.ones(1)}, f / "x"), (f / "x").replace(f / WEIGHTS)), "cannot be read"),
    "a tensor missing": (tensors(lambda t: t.pop(A)), "has no tensor '" + A),
    "a tensor renamed": (tensors(lambda t: t.update({A + "s": t.pop(A)})), f"no tensor '{A}'; did you mean '{A}s'"),
    "a tensor left over": (
        tensors(lambda t: t.update({A.replace("first", "third"): torch.ones(1)})),
        "1 tensors that nothing here takes, such as 'base_model.model.third.*did you mean"),
    "another shape": (tensors(lambda t: t.update({A: torch.ones(2, 9)})), r"\(2, 9\) in the adapter.*needs \(2, 8\)"),
    "fewer dimensions": (tensors(lambda t: t.update({A: torch.ones(())})), r"shape \(\) in the adapter file"),
    "whole numbers": (tensors(lambda t: t.update({A: torch.ones(2, 8).long()})), "holds torch.int64, where"),
    "of another save": (
        lambda f: (inlay.save(adapted(1, LoRA(targets="first")), f / "x") / WEIGHTS).replace(f / WEIGHTS),
        "come from two saves"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_a_damaged_adapter_is_refused_and_changes_nothing(saved: Path, tmp_path: Path, name: str, beside: bool) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    net = Net()
    net.second.weight.requires_grad_(False)
    net.table.eval()
    if beside:
        inlay.attach(net, LoRA(r=2, targets="first"), name="other")
        inlay.attach(net, LoRA(r=2, targets="first,table"), name="idle")
        inlay.activate(net, "other")
        inlay.trainable(net, "idle")
    before, values = snapshot(net), {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InlayError, match=message):
        inlay.load(net, saved)
    assert snapshot(net) == before
    assert list(net.state_dict()) == list(values)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in values.items())


@pytest.mark.parametrize("name", ["a.b", "a/b", "../up", "", "state", "a b"])
def test_names_that_cannot_be_folders_are_refused(saved: Path, name: str) -> None:
    net = Net()
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        inlay.load(net, saved, name=name)
    assert type(net.first) is nn.Linear


def test_wrong_use_is_named_and_changes_nothing(saved: Path, tmp_path: Path) -> None:
    net = inlay.load(Net(), saved)
    before = net(IDS)
    with pytest.raises(AdapterError, match="loaded already"):
        inlay.load(net, saved)
    with pytest.raises(AdapterError, match="no adapter 'law' is loaded"):
        inlay.save(net, tmp_path / "law", name="law")
    assert not (tmp_path / "law").exists()
    inlay.merge(net)
    with pytest.raises(AdapterError, match="unmerge"):
        inlay.load(net, saved, name="law")
    inlay.unmerge(net)
    assert torch.equal(net(IDS), before)
    with pytest.raises(CheckpointError, match=r"there is no folder .*goood; near it: good"):
        inlay.load(Net(), tmp_path / "goood")
    with pytest.raises(CheckpointError, match=r"its subfolder .*good looks like the one"):
        inlay.load(Net(), tmp_path)
    callable_targets = inlay.attach(Net(), LoRA(r=2, targets=lambda site: site.name == "first"))
    assert torch.equal(inlay.load(Net(), inlay.save(callable_targets, tmp_path / "c"))(IDS), Net()(IDS))


def test_a_pickle_beside_the_tensors_is_not_even_looked_at(saved: Path) -> None:
    (saved / "adapter_model.bin").write_bytes(b"not a pickle")
    assert torch.equal(inlay.load(Net(), saved)(IDS), adapted()(IDS))


# -- another base ------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_what_differs_and_strict_false_insists(saved: Path) -> None:
    other = Net(seed=4)
    with pytest.raises(BaseModelError, match=r"the weights of \S+ differ .*strict=False"):
        inlay.load(other, saved)
    assert type(other.first) is nn.Linear
    inlay.load(other, saved, strict=False)
    assert inlay.active(other) == ("default",)
    wide = Net(wide=6)
    with pytest.raises(BaseModelError, match=r"table.weight has shape \(11, 6\) here, \(11, 8\) there"):
        inlay.load(wide, saved)
    with pytest.raises(CheckpointError, match=r"shape \(2, 8\) in the adapter file; this model needs \(2, 6\)"):
        inlay.load(wide, saved, strict=False)
    assert type(wide.first) is nn.Linear


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    inlay.save(inlay.attach(tiny.build("llama", "causal"), LoRA(r=2, targets="q_proj")), tmp_path)
    with pytest.raises(BaseModelError, match="model_type is 'gpt2' here, 'llama' there"):
        inlay.load(tiny.build("gpt2", "causal"), tmp_path)
    with pytest.raises(BaseModelError, match="num_hidden_layers is 1 here, 2 there"):
        inlay.load(tiny.build("llama", "causal", num_hidden_layers=1), tmp_path)
    with pytest.raises(BaseModelError, match="there is no parameter"):
        inlay.load(tiny.build("llama"), tmp_path)
    edit(tmp_path, lambda config: config.update(auto_mapping=None, base_model_name_or_path="some/llama"))
    with pytest.raises(BaseModelError, match=r"adapts target_modules=\['q_proj'\] of some/llama, which GPT2"):
        inlay.load(tiny.build("gpt2", "causal"), tmp_path)


def test_a_head_of_the_adapters_own_is_not_the_bases_business(tmp_path: Path) -> None:
    """transformers draws a new head each time, so it cannot count as another base."""
    net = inlay.attach(tiny.build("bert", "sequence"), LoRA(r=2, targets="query"))
    randomise(net)
    inlay.save(net, tmp_path)
    fresh = tiny.build("bert", "sequence")
    with torch.no_grad():
        fresh.classifier.weight.normal_()
    inlay.load(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, net(IDS).logits)


def test_what_has_no_form_in_a_file_is_said_before_anything_is_written(tmp_path: Path) -> None:
    from inlay.engine.trained_copy import CopyMethod

    class Chosen(CopyMethod):
        kind = "chosen_for_this_test"

        def sites(self, index: Any) -> Any:
            return [site for site in index.parameters() if self.targets(site)]  # type: ignore[operator, misc]

    net = inlay.attach(Net(), Chosen(targets=lambda site: site.name == "first.weight"))
    with pytest.raises(UnsupportedError, match="callable as targets"):
        inlay.save(net, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_module_that_peft_would_save_by_its_ending_makes_it_no_peft_file(tmp_path: Path) -> None:
    model = tiny.build("distilbert", "sequence")
    inlay.attach(model, inlay.LoRA(r=2), modules_to_save=["classifier"])
    inlay.save(model, tmp_path / "part")
    assert json.loads((tmp_path / "part" / "adapter_config.json").read_text())["peft_type"] == "INLAY"
    inlay.detach(model)
    inlay.attach(model, inlay.LoRA(r=2))
    inlay.save(model, tmp_path / "both")
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["peft_type"] == "LORA"
