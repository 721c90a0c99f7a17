"""The benchmark for GPUs, without one: its convention worked by hand, its report, and cells at tiny sizes on a CPU."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipe.models.packed_attention import ONE_CALL
from tests.benchmarks import gpu, gpu_decoding
from tests.benchmarks.gpu_cell import compared, on_cpu
from tests.benchmarks.gpu_flops import SHAPES, peak_tflops, step_flops, utilisation
from tests.benchmarks.gpu_peer import NEEDS, missing
from tests.benchmarks.gpu_work import (
    DETERMINISTIC,
    SIZES,
    Cell,
    Meter,
    group_of,
    kernel_shares,
    rows_at_once,
    rows_of,
    rows_per_step,
    sequence_lengths,
)
from tests.benchmarks.stamp import declared, read


def test_the_flops_of_llama_8b_by_hand() -> None:
    """A block: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336: 218,103,808 weights; 32 of them and a head of
    128256 x 4096 are 7,504,658,432. At 4096 tokens attention is 32 x 2 x 4096 x 4096 = 1,073,741,824 a token.
    """
    shape = SHAPES["llama-3.1-8b"]
    assert shape.matmul_weights == 32 * 218_103_808 + 525_336_576 == 7_504_658_432
    token = 2 * 7_504_658_432 + 1_073_741_824
    assert shape.forward_flops(4096) == 4096 * token
    assert step_flops(shape, [4096, 4096], "lora") == 2 * 2 * 4096 * token == step_flops(shape, [4096, 4096], "qlora")
    assert step_flops(shape, [4096], "full") == 3 * 4096 * token == step_flops(shape, [4096], "lora", reference=True)
    # Published: 12,473 tokens/s of LoRA on one H100 are 40.6 % of 989 TFLOP/s.
    assert utilisation(12_473 * 2 * token, "NVIDIA H100 80GB HBM3") == pytest.approx(0.406, abs=5e-4)


def test_attention_counts_by_the_square_of_each_length() -> None:
    """One layer of width 2 heads x 3: products 2 x weights x T, attention 2 x T^2 x 6."""
    shape = SHAPES["tiny"]
    short, long = (shape.forward_flops(n) - 2 * shape.matmul_weights * n for n in (10, 30))
    assert short == 2 * 2 * 10**2 * 32 and long == 9 * short


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3", "tiny-wide"])
def test_the_weights_are_those_of_the_model(name: str) -> None:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family, **shape.config()))
    assert shape.matmul_weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0), ("NVIDIA H200", 989.0), ("NVIDIA X900", None), ("x86_64", None),
    ],
)  # fmt: skip
def test_peaks_and_devices_without_one(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak
    assert utilisation(1e12, device) == (None if peak is None else pytest.approx(1 / peak))


def test_rates_by_hand() -> None:
    """Steps end at 5, 6, 8, 11 s with 10, 20, 40, 60 tokens of its own: 2/3 of 120 tokens in 5 s; or 40 of 60 counted."""
    meter = Meter(0.0, "cpu")
    meter.ends, meter.tokens, meter.losses = [5.0, 6.0, 8.0, 11.0], [10, 20, 40, 60], [1.0] * 4
    found = meter.report([100, 20], lambda lengths: 1e12 * sum(lengths))
    assert (found["tokens_per_s"], found["tflops_per_s"]) == pytest.approx((16.0, 16.0))
    assert (found["first_step_s"], found["step_s"]) == (5.0, 2.5)
    assert meter.report([100, 20], lambda lengths: 0, own=True)["tokens_per_s"] == pytest.approx(8.0)
    meter.ends = meter.ends[:2]
    with pytest.raises(RuntimeError, match="2 steps"):
        meter.report([1], len)


def test_losses_are_compared_relative_to_the_cpu() -> None:
    found = compared([2.0, 4.0], [2.002, 4.0], 1e-2)
    assert found["difference"] == pytest.approx(1e-3) and found["equal"]
    assert not compared([2.0, 4.0], [2.0, 4.1], 1e-2)["equal"]
    assert not compared([2.0], [math.nan], 1e-2)["equal"]


def test_shares_of_kernels_leave_out_the_operations_that_start_them() -> None:
    def event(key: str, kind: str, device: float, cpu: float) -> Any:
        return SimpleNamespace(key=key, device_type=kind, self_device_time_total=device, self_cpu_time_total=cpu, count=2)

    events = [
        event("aten::mm", "DeviceType.CPU", 600.0, 50.0),
        event("nvjet_tst_128x256", "DeviceType.CUDA", 600.0, 0.0),
        event("flash_fwd_kernel", "DeviceType.CUDA", 200.0, 0.0),
    ]
    on_gpu = kernel_shares(events, "cuda")
    assert [(k["group"], k["share"]) for k in on_gpu] == [("matrix products", 0.75), ("attention", 0.25)]
    assert [k["kernel"] for k in kernel_shares(events, "cpu")] == ["aten::mm"]
    assert group_of("void at::native::vectorized_elementwise_kernel") == "element by element"


def test_cells_cover_what_people_train_and_the_most_valuable_come_first() -> None:
    found = gpu.cells()
    assert [c.kind for c in found[:3]] == ["equal"] * 3 and found[3] == Cell("product", "sft", "lora", "llama-3.1-8b")
    speed = {(c.task, c.method) for c in found if c.kind == "speed" and c.side == "product"}
    assert speed == {("generate", "lora"), *((t, m) for t in ("sft", "dpo", "grpo") for m in ("lora", "qlora", "full"))}
    assert {c.shape for c in found if c.kind == "speed"} == {n for n in SHAPES if not n.startswith("tiny")}
    assert {c.lengths for c in found} == {"full", "real", "long", "prompts"} and {c.side for c in found} == set(NEEDS)
    assert len(set(found)) == len(found)


def test_each_form_of_recomputation_is_compared_and_timed() -> None:
    for kind, lengths in (("equal", "real"), ("speed", "full")):
        words = {c.words for c in gpu.cells() if (c.kind, c.lengths) == (kind, lengths)}
        found = {word for word in words if word.startswith("model.gradient_checkpointing=")}
        forms = {f"model.gradient_checkpointing={form}" for form in ("true", "selective", "offload")}
        assert found == forms
    cell, size = Cell("product", "sft", "lora", "llama-3.1-8b", "long"), SIZES["whole"]
    assert sequence_lengths(cell, rows_of(cell, size), size) == [32768] * size.steps
    assert gpu.side({"cell": {"side": "product", "words": "a=b"}, "settings": {}}) == "product (a=b)"


def test_compiled_blocks_and_kernels_are_compared_first_and_timed_net_of_what_compiling_takes() -> None:
    for words in (gpu.COMPILED, gpu.KERNELS):
        kinds = [c.kind for c in gpu.cells() if c.words == words]
        assert "speed" in kinds and "equal" in kinds and kinds == sorted(kinds)

    def result(words: str, step: float, warm: float, shape: str = "tiny") -> dict[str, Any]:
        cell = Cell("product", "sft", "lora", shape, words=words)
        return {"cell": asdict(cell), "step_s": step, "warm_s": warm}

    done = [result("", 2.0, 10.0), result(gpu.COMPILED, 1.5, 50.4), result(gpu.COMPILED, 1.0, 9.0, "tiny-qwen3")]
    name = "product sft lora tiny full speed bfloat16"
    assert gpu.payback(done) == [f"- {name} (model.compile=blocks): +25.0% of a step, 40.4 s more before: after 81 steps"]
    assert gpu.payback([result("", 1.0, 1.0), result(gpu.KERNELS, 1.5, 2.0)]) == [
        f"- {name} (model.kernels=liger): -50.0% of a step, 1.0 s more before: never"
    ]


def test_kernels_that_a_machine_lacks_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cell = Cell("product", "sft", "lora", "tiny", words=gpu.KERNELS)
    assert missing(cell, "cpu") == "liger needs a CUDA GPU, and the device is cpu"
    assert missing(Cell("product", "sft", "lora", "tiny"), "cpu") is None


def test_routes_and_8_bits_are_compared_with_the_cpu_and_deterministic_kernels_with_themselves() -> None:
    equal = {c.words: c for c in gpu.cells() if c.kind == "equal" and c.shape == "tiny-wide"}
    assert {f"{gpu.ROUTE}={route}" for route in ONE_CALL} < set(equal)
    assert on_cpu(equal["stack=[int8,lora]"]) == equal["stack=[int8,lora]"]
    assert on_cpu(equal[f"{gpu.ROUTE}=flex"]).words == "" and equal[f"{gpu.ROUTE}=flex"].dtype == "float32"
    assert missing(equal[f"{gpu.ROUTE}=varlen"], "cpu") == "varlen needs a CUDA GPU, and the device is cpu"
    assert missing(equal[DETERMINISTIC], "cpu") is None
    assert {c.task for c in gpu.cells() if c.words == DETERMINISTIC} == {"sft", "dpo", "grpo"}
    assert compared([0.0, 1.0], [0.0, 1.0], 0.0)["equal"] and not compared([0.0], [1e-6], 0.0)["equal"]


def test_ways_of_decoding_are_compared_first_and_timed_beside_the_first_one() -> None:
    found = [c for c in gpu.cells() if c.task == "generate"]
    assert [c.kind for c in found] == sorted(c.kind for c in found)
    assert {(c.shape, c.words) for c in found if c.kind == "speed"} == {
        (shape, f"runtime.decoding={way}") for shape in ("llama-3.2-1b", "llama-3.1-8b") for way in gpu_decoding.WAYS
    }
    graphs = next(c for c in found if c.words == "runtime.decoding=graphs")
    assert "graphs need a GPU" in str(missing(graphs, "cpu")) and missing(graphs, "cuda") is None

    def result(way: str, rate: float) -> dict[str, Any]:
        return {"cell": asdict(replace(found[-1], words=f"runtime.decoding={way}")), "tokens_per_s": rate}

    name = "product generate lora llama-3.1-8b prompts speed bfloat16"
    assert gpu_decoding.gains([result("continuous", 10.0), result("static", 8.0), result("graphs", 35.0)]) == [
        f"- {name}: static 0.80 x continuous",
        f"- {name}: graphs 3.50 x continuous",
    ]


def test_answers_are_compared_up_to_where_they_part() -> None:
    import torch

    own = [([5, 6, 2], torch.tensor([-1.0, -2.0, -3.0])), ([5, 7], torch.tensor([-1.0, -9.0]))]
    found = gpu_decoding.differences(own, [own[0], ([5, 8, 2], torch.tensor([-1.5, -1.0, -1.0]))])
    assert (found["same"], found["difference"], found["equal"]) == (0.5, 0.5, False)
    assert gpu_decoding.differences(own, own)["equal"]


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_full_rows_are_full_and_a_step_has_as_many_tokens_for_both_tasks(task: str) -> None:
    size, cell = SIZES["whole"], Cell("product", task, "lora", "llama-3.1-8b")
    size = SimpleNamespace(**{**size.__dict__, "steps": 1})
    lengths = sequence_lengths(cell, rows_of(cell, size), size)
    assert lengths == [4096] * 4 and rows_per_step(cell, size) * (2 if task == "dpo" else 1) == 4
    assert rows_at_once(cell, size) == (2 if task == "sft" else 1)


# --- cells on a CPU ---------------------------------------------------------------------------------------------------


CORE = (
    Cell("product", "dpo", "lora", "tiny", "real", "equal", "float32"),
    Cell("product", "sft", "lora", "tiny", "real"),
    Cell("transformers", "sft", "lora", "tiny", "real"),
    Cell("product", "grpo", "lora", "tiny", "prompts", "profile"),
    Cell("product", "sft", "lora", "tiny", "long", words="model.gradient_checkpointing=selective"),
)


def bench(tmp_path: Path, minutes: float = 5.0) -> gpu.Bench:
    return gpu.Bench("cpu", time.time() + 60 * minutes, tmp_path, tmp_path / "gpu-x", dry=True)


def test_a_dry_run_measures_writes_after_each_cell_and_outlives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    original = gpu.write

    def written(out: Path, *rest: Any) -> None:
        original(out, *rest)
        seen.append([r["status"] for r in json.loads(out.with_suffix(".json").read_text())["results"]])

    monkeypatch.setattr(gpu, "write", written)
    wrong = Cell("product", "sft", "lora", "no-such-shape")
    bench(tmp_path).run([wrong, *CORE])
    assert seen[:6] == [["failed", *["ok"] * n] for n in range(6)]
    report = json.loads((tmp_path / "gpu-x.json").read_text())
    assert report["harness"]["version"] == declared()["gpu"]["version"] and "torch" in report
    failed, equal, ours, theirs, profile, long = report["results"]
    assert "no-such-shape" in failed["error"]
    assert equal["equal"] and equal["difference"] == 0.0 and equal["cpu"][0] == pytest.approx(math.log(2))
    # Both sides read the very same tokens, and begin at the same loss: nothing learned yet, every word alike.
    assert ours["tokens"] == theirs["tokens"] and ours["mfu"] is None
    assert all(r["losses"][0] == pytest.approx(math.log(8192), abs=0.1) for r in (ours, theirs))
    assert sum(k["share"] for k in profile["kernels"]) == pytest.approx(1.0) and "tflops_per_s" not in profile
    assert long["tokens"] == 3 * 8 * SIZES["dry"].longest
    page = (tmp_path / "gpu-x.md").read_text()
    assert "| sft | lora | tiny | long | product (model.gradient_checkpointing=selective) |" in page
    assert "| sft | lora | tiny | real | transformers |" in page and "- product sft lora no-such-shape" in page
    assert read(tmp_path / "gpu-x.md") == report["harness"]


def test_nothing_starts_when_time_is_up_and_what_runs_is_stopped(tmp_path: Path) -> None:
    made = bench(tmp_path, minutes=0.1)
    made.run(list(CORE))
    assert [r["status"] for r in made.results] == ["skipped"] * len(CORE) and "no time left" in (
        tmp_path / "gpu-x.md"
    ).read_text()
    made = bench(tmp_path, minutes=0.0)
    os.mkfifo(tmp_path / "endless.json")
    with pytest.raises(TimeoutError, match="time was up"):
        made.start(tmp_path / "endless.json", tmp_path / "log.txt")


def test_a_process_that_fails_tells_why(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps({"cell": {"side": "product"}, "size": "dry"}))
    with pytest.raises(RuntimeError, match=r"(?s)exit 1.*missing 3 required positional arguments"):
        bench(tmp_path).start(tmp_path / "spec.json", tmp_path / "log.txt")


def test_without_a_gpu_the_command_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "1"])
    assert "--dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "1", "--dry-run", "--only", "llama-3.1-8b"])
    assert "no cell has all of" in capsys.readouterr().err


@pytest.mark.slow
def test_every_cell_runs_dry(tmp_path: Path) -> None:
    gpu.main(["--minutes", "30", "--dry-run", "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "gpu-x")])
    results = json.loads((tmp_path / "gpu-x.json").read_text())["results"]
    assert [r["cell"] for r in results if r["status"] == "failed"] == []
    known = ("not importable", "nothing to add", "liger needs", "graphs need", *ONE_CALL)
    assert all(r["status"] == "ok" or any(k in r["error"] for k in known) for r in results)
    ours = {(r["cell"]["task"], r["cell"]["lengths"]): r["tokens"] for r in results if r.get("settings") == {}}
    for r in results:
        trained = r["cell"]["kind"] == "speed" and r["cell"]["task"] != "generate"
        if trained and "tokens" in r and "packing" not in r["settings"].get("with", []):
            assert r["tokens"] == ours[r["cell"]["task"], r["cell"]["lengths"]], r["cell"]
