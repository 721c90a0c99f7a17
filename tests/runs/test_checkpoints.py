"""Checkpoints: round trips to the bit, crashes, damaged files, full disks, rotation."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import RunError
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.runs import durable
from llmrecipe.runs.checkpoint_io import latest_checkpoint, read_checkpoint, rotate, save_checkpoint, steps
from llmrecipe.training.optimizer_state import optimizer_state, random_state, restore_optimizer, restore_random_state

ROOT = Path(__file__).resolve().parents[2]


def write(root: Path, step: int, size: int = 4) -> Path:
    return save_checkpoint(root, step, {"delta": {"w": torch.full((size,), float(step))}}, {"progress": {"step": step}})


def test_tensors_of_every_kind_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).T,
        "slice": torch.randn(10)[2:9:2],
        "bf16": torch.randn(7).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "zero_d": torch.tensor(41.0),
        "zero_d_int": torch.tensor(7, dtype=torch.int64),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "f64": torch.randn(2, dtype=torch.float64),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "name with spaces/and:ünïcode": torch.ones(1),
    }
    saved = read_checkpoint(save_checkpoint(tmp_path, 3, {"delta": tensors}, {}))
    assert saved.step == 3 and saved.tensors["delta"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = saved.tensors["delta"][name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), (
            name
        )


def test_documents_come_back_exactly(tmp_path):
    value = {"lr": 0.1 + 0.2, "big": 2**130, "text": 'ä\n"', "none": None, "best": float("inf")}
    assert read_checkpoint(save_checkpoint(tmp_path, 1, {}, {"progress": value})).documents["progress"] == value


def test_latest_passes_over_damaged_ones_and_says_so(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    with open(tmp_path / "step-000004" / "delta.safetensors", "r+b") as file:
        file.truncate(20)
    flipped = bytearray((tmp_path / "step-000003" / "delta.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "step-000003" / "delta.safetensors").write_bytes(flipped)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert "step-000004 is not usable: delta.safetensors has 20 bytes" in caplog.text
    assert "step-000003 is not usable: delta.safetensors has changed" in caplog.text
    with pytest.raises(RunError, match="has changed since it was written"):
        read_checkpoint(tmp_path / "step-000003")
    (tmp_path / "step-000002" / "progress.json").unlink()
    (tmp_path / "step-000001" / "checksums.json").write_text("{")
    with pytest.raises(RunError, match=r"no checkpoint in .* is intact \(step-000004: .*progress.json is missing"):
        latest_checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-12.bak").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(RunError, match="is not a checkpoint folder"):
        read_checkpoint(tmp_path / "step-12.bak")


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    assert rotate(tmp_path, keep=2, best=2) == [1, 3]
    assert steps(tmp_path) == [2, 4, 5]
    assert rotate(tmp_path, keep=2, best=5) == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1, size=4)
    write(tmp_path, 1, size=9)
    assert read_checkpoint(tmp_path / "step-000001").tensors["delta"]["w"].shape == (9,)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


KILL = """
    import os, shutil, signal, sys, torch
    from pathlib import Path
    from llmrecipe.runs import checkpoint_io as checkpoint
    root, moment = Path(sys.argv[1]), int(sys.argv[2])
    calls = 0
    def killing(function):
        def wrapped(*args):
            global calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapped
    save = lambda step, value: checkpoint.save_checkpoint(
        root, step, {"delta": {"w": torch.full((50000,), value)}}, {"progress": {"step": step}})
    save(1, 1.0)
    save(2, 2.0)
    for name in ("fsync", "rename", "open"):
        setattr(os, name, killing(getattr(os, name)))
    shutil.rmtree = killing(shutil.rmtree)
    save(int(sys.argv[3]), 3.0)
    print("survived")
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)], capture_output=True, text=True, env=env, cwd=ROOT
    )


FORK = """
    import os, sys
    import torch
    from llmrecipe.runs import checkpoint_io as checkpoint
    outcomes = []
    for step in (3, 2):
        for moment in range(1, 40):
            root = sys.argv[2] + f"/{step}-{moment}"
            child = os.fork()
            if child == 0:
                sys.argv = ["kill", root, str(moment), str(step)]
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                exec(sys.argv_script)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            outcomes.append((step, moment, os.WIFSIGNALED(status)))
            if not os.WIFSIGNALED(status):
                break
    print(outcomes)
"""


def test_kill_at_any_moment_of_a_save_costs_no_good_checkpoint(tmp_path):
    """SIGKILL at each system call of a save: of a new step 3, and of step 2 over an older one."""
    script = f"import sys; sys.argv_script = {textwrap.dedent(KILL)!r}\n" + textwrap.dedent(FORK)
    done = run(script, "x", tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes = eval(done.stdout)
    killed = [o for o in outcomes if o[2]]
    assert len(killed) >= 12 and {s for s, _, _ in killed} == {2, 3}
    for step, moment, was_killed in outcomes:
        root = tmp_path / f"{step}-{moment}"
        newest = latest_checkpoint(root)
        assert newest is not None
        value = read_checkpoint(newest).tensors["delta"]["w"]
        assert value.shape == (50000,) and value.unique().tolist() in ([2.0], [3.0])
        assert was_killed or value[0] == 3.0
        # The next save clears what the dead process left.
        save_checkpoint(root, 4, {}, {"progress": {}})
        assert not [p for p in root.iterdir() if p.name.startswith(durable.ASIDE)]


def test_a_full_disk_is_a_clear_error_and_keeps_the_last_good_one(tmp_path, monkeypatch):
    root = tmp_path / "run" / "checkpoints"
    write(root, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"checkpoint of step 2 .*No space left on device.*last good checkpoint is .*step-000001.*resume="
    ):
        write(root, 2)
    monkeypatch.undo()
    assert [p.name for p in root.iterdir()] == ["step-000001"] and latest_checkpoint(root) == root / "step-000001"


def test_a_write_that_really_fails_in_the_middle(tmp_path):
    """A file size limit makes the kernel refuse the write half way through, as a full disk does."""
    done = run(
        """
        import resource, sys, torch
        from pathlib import Path
        from llmrecipe.core.errors import RunError
        from llmrecipe.runs.checkpoint_io import latest_checkpoint, save_checkpoint
        root = Path(sys.argv[1])
        save_checkpoint(root, 1, {"delta": {"w": torch.ones(10)}}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(root, 2, {"delta": {"w": torch.ones(100_000)}}, {})
        except RunError as error:
            print(error)
        print([p.name for p in root.iterdir()], latest_checkpoint(root).name)
        """,
        tmp_path,
    )
    assert "cannot write the checkpoint of step 2" in done.stdout, done.stderr
    assert done.stdout.endswith("['step-000001'] step-000001\n")


def model_and_optimizer(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 80), nn.Linear(80, 64), nn.LayerNorm(64), nn.Linear(64, 7))
    config = registry.load_class("optim", kind)(lr=1e-2)
    return model, build_optimizer(config, parameter_groups(model, config))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = (torch.arange(5) + step) % 7
    nn.functional.cross_entropy(model(ids), (ids * 3) % 7).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", registry.names("optim"))
def test_every_optimizer_resumes_to_the_bit(kind, tmp_path):
    model, optimizer = model_and_optimizer(kind)
    for step in range(3):
        advance(model, optimizer, step)
    tensors, facts = optimizer_state(optimizer)
    path = save_checkpoint(tmp_path, 3, {"delta": dict(model.state_dict()), "optimizer": tensors}, {"optimizer": facts})
    for step in range(3, 6):
        advance(model, optimizer, step)

    other, resumed = model_and_optimizer(kind, seed=1)
    saved = read_checkpoint(path)
    other.load_state_dict(saved.tensors["delta"])
    restore_optimizer(resumed, saved.tensors["optimizer"], saved.documents["optimizer"])
    for step in range(3, 6):
        advance(other, resumed, step)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_8bit_state_stays_8bit_and_its_code_books_are_stored_once():
    model, optimizer = model_and_optimizer("adamw_8bit")
    advance(model, optimizer, 0)
    tensors, facts = optimizer_state(optimizer)
    assert tensors["1.weight//state1"].dtype == torch.uint8
    assert [k for k in tensors if "qmap" in k] == ["1.weight//qmap1", "1.weight//qmap2"]
    assert facts["values"]["1.weight"]["step"] == 1


def test_state_of_another_optimizer_or_other_parameters_is_refused():
    model, optimizer = model_and_optimizer("adamw")
    advance(model, optimizer, 0)
    tensors, facts = optimizer_state(optimizer)
    with pytest.raises(RunError, match="holds the state of AdamW, the recipe has SGD"):
        restore_optimizer(model_and_optimizer("sgd")[1], tensors, facts)
    model[1].requires_grad_(False)
    config = registry.load_class("optim", "adamw")()
    with pytest.raises(RunError, match=r"other parameters than this recipe: they differ in 1\.bias, 1\.weight"):
        restore_optimizer(build_optimizer(config, parameter_groups(model, config)), tensors, facts)


def draw(generators) -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(1)),
        float(torch.randn(1)),
        *(
            float(torch.rand(1, generator=g)) if isinstance(g, torch.Generator) else float(g.random())
            for g in generators.values()
        ),
    ]


def test_every_random_generator_continues_where_it_was():
    generators = {
        "torch": torch.Generator().manual_seed(3),
        "numpy": np.random.default_rng(4),
        "mt": np.random.Generator(np.random.MT19937(5)),
    }
    np.random.randn()  # leaves a cached second normal behind
    draw(generators)
    state = json.loads(json.dumps(random_state(generators)))
    expected = [draw(generators) for _ in range(3)]
    generators["torch"] = torch.Generator().manual_seed(0)
    restore_random_state(state, generators)
    assert [draw(generators) for _ in range(3)] == expected
    with pytest.raises(RunError, match="no state of the random generator 'noise'"):
        restore_random_state(state, {"noise": torch.Generator()})


def test_the_generator_of_a_gpu_continues_on_the_gpu_the_process_has_now(monkeypatch):
    """Saved on the second of two GPUs, continued on the only one, and on the fourth of four."""
    states, here = [torch.tensor([number], dtype=torch.uint8) for number in (10, 11)], 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda given: [states.__setitem__(i, s) for i, s in enumerate(given)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda given: states.__setitem__(here, given))
    saved = json.loads(json.dumps(random_state()))
    for count, place in ((1, 0), (4, 3)):
        states, here = [torch.zeros(1, dtype=torch.uint8) for _ in range(count)], place
        restore_random_state(saved)
        assert states[place].tolist() == [11]
    del saved["cuda_place"]
    states, here = [torch.zeros(1, dtype=torch.uint8)], 0
    restore_random_state(saved)
    assert states[0].tolist() == [10], "as versions wrote it that knew one place"


def test_a_checkpoint_weighs_what_trains(tmp_path):
    """The frozen base is not in it; AdamW's two averages and 64 KB for everything else are the bound."""
    base = nn.Linear(600, 600)
    base.requires_grad_(False)
    model = nn.Sequential(base, nn.Linear(600, 4))
    config = registry.load_class("optim", "adamw")()
    optimizer = build_optimizer(config, parameter_groups(model, config))
    model(torch.ones(1, 600)).sum().backward()
    optimizer.step()
    tensors, facts = optimizer_state(optimizer)
    delta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    path = save_checkpoint(tmp_path, 1, {"delta": delta, "optimizer": tensors}, {"optimizer": facts, "random": random_state()})
    trained = 4 * sum(p.numel() for p in delta.values())
    size = sum(f.stat().st_size for f in path.iterdir())
    assert 3 * trained < size < 3 * trained + 65536 < 4 * 600 * 600


def test_no_pickle_is_written_or_read(tmp_path):
    """A hostile pickle in the folder is not opened, and the modules that save know no pickle."""
    path = write(tmp_path, 1)
    (path / "optimizer.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    (path / "pytorch_model.bin").write_bytes((path / "optimizer.pkl").read_bytes())
    assert read_checkpoint(path).tensors.keys() == {"delta"}
    assert not (tmp_path / "owned").exists()
    for module in ("runs/checkpoint_io", "training/optimizer_state"):
        text = (ROOT / "llmrecipe" / f"{module}.py").read_text()
        assert "import pickle" not in text and "torch.load" not in text and "torch.save" not in text


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"files": []}', '{"files": {"delta.safetensors": null}}', '{"files": {"delta.safetensors": {"bytes": 1}}}',
     '{"files": {"../x": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}', "\ud800"],
)  # fmt: skip
def test_damaged_checksums_are_a_damaged_checkpoint(text, tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "step-000002" / "checksums.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000005")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
