"""What devices of stand-in sizes decide, and what uses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import device_profile, registry
from llmrecipe.core.device_profile import (
    TABLE,
    Decisions,
    DeviceFacts,
    Profile,
    decide,
    kept_profiles,
    machine_bytes,
    profile_from,
    profile_of,
    use,
)
from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.logprob import chunk_rows, token_logprobs
from llmrecipe.models import packed_attention as routes
from llmrecipe.models.packed_attention import attend_packed, routes_of
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import logit_bytes
from tests.models.test_packed_attention import call_of
from tests.tiny import tiny_model

GIB = 1 << 30
LARGE = DeviceFacts("cuda", "large", 80 * GIB, 72 * GIB)
MIDDLE = DeviceFacts("cuda", "middle", 24 * GIB, 20 * GIB)
SMALL = DeviceFacts("cuda", "small", 8 * GIB, 1 * GIB)


def profile(facts: DeviceFacts, **chosen: Any) -> Profile:
    return Profile(facts.kind, facts.name, decide(facts), chosen)


def test_a_cpu_of_unknown_memory_decides_by_its_kind_alone() -> None:
    """16 MiB of float32 logits: 131 rows of 32,000, and never fewer than 16."""
    found = profile(DeviceFacts("cpu"))
    assert found.decided == TABLE["cpu"]
    assert (found.micro_tokens, found.packed_attention, found.compile, found.optimizer) == (512, ("loop",), False, "fused")
    assert [found.logit_rows(v) for v in (32_000, 10_000_000)] == [131, 16]


@pytest.mark.parametrize(
    ("facts", "tokens", "rows"),
    [
        # 72 GiB / 128 = 576 MiB: 1177 rows of 128,256; the largest micro-batch there is.
        (LARGE, 8192, 1177),
        # 24 GiB / 5 MiB = 4915, and 4096 below it; 160 MiB hold 327 rows, and 1024 keep the device busy.
        (MIDDLE, 4096, 1024),
        # 1 GiB / 16 = 64 MiB is the most for the sake of a busy device: 130 rows.
        (SMALL, 1024, 130),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_gpu_decides_by_its_memory(facts: DeviceFacts, tokens: int, rows: int) -> None:
    found = profile(facts)
    assert found.micro_tokens == tokens
    assert found.logit_rows(128_256) == rows
    assert found.packed_attention == ("varlen", "flash", "flex", "loop")
    assert not found.compile and found.decoding == "continuous"


def test_another_device_is_not_measured() -> None:
    assert decide(DeviceFacts("xpu")) == Decisions()
    assert profile(DeviceFacts("mps")).logit_rows(32_000) == 131


def test_keys_override_one_decision_each() -> None:
    chosen: dict[str, Any] = {
        "micro_tokens": 7, "logit_rows": 3, "packed_attention": ("flash",), "compile": "blocks", "optimizer": "single",
        "decoding": "static",
    }  # fmt: skip
    found = profile(MIDDLE, **chosen)
    assert (found.micro_tokens, found.logit_rows(128_256), found.packed_attention) == (7, 3, ("flash",))
    assert (found.compile, found.compiled, found.optimizer, found.decoding) == (True, "blocks", "single", "static")
    assert profile(MIDDLE, micro_tokens=None).micro_tokens is None
    assert profile(MIDDLE, logit_rows=3).micro_tokens == 4096


def test_what_was_stored_decides_again_without_what_keys_had_set() -> None:
    stored = profile(MIDDLE, logit_rows=3).to_dict()
    stored["decided"] |= {"micro_tokens": 99, "of a later version": 1}
    del stored["decided"]["words"]
    stored["decided"]["compile"] = True
    found = profile_from(stored)
    assert (found.kind, found.name, found.chosen) == ("cuda", "middle", {})
    assert (found.micro_tokens, found.decided.words, found.compiled) == (99, TABLE["cuda"].words, "blocks")


@pytest.mark.parametrize("value", ["512", -1, None, 1.5, True])
def test_a_stored_value_of_another_kind_is_refused(value: object) -> None:
    stored = profile(MIDDLE).to_dict()
    stored["decided"]["micro_tokens"] = value
    with pytest.raises(ValueError, match="its device profile has micro_tokens="):
        profile_from(stored)


def test_a_profile_is_used_until_the_caller_gets_his_own_back() -> None:
    before = profile_of("cpu")
    with kept_profiles():
        use(profile(DeviceFacts("cpu"), logit_rows=5))
        assert chunk_rows(32_000, torch.device("cpu")) == 5
    assert profile_of("cpu") == before


def test_log_probabilities_are_cut_as_the_profile_says() -> None:
    """Ten positions, four at a time: three calls of the head, and the same numbers."""
    torch.manual_seed(0)
    hidden, target, calls = torch.randn(10, 6), torch.arange(10), []

    class Head(nn.Linear):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            calls.append(len(h))
            return super().forward(h)

    head = Head(6, 12).requires_grad_(False)
    whole = token_logprobs(hidden, target, head)["logprobs"]
    assert calls == [10]
    use(profile(DeviceFacts("cpu"), logit_rows=4))
    parts = token_logprobs(hidden, target, head)["logprobs"]
    assert calls[1:] == [4, 4, 2]
    torch.testing.assert_close(parts, whole)


def test_the_estimate_counts_the_chunk_of_the_device() -> None:
    model = tiny_model("llama").requires_grad_(False)
    vocabulary = model.config.vocab_size
    use(profile(DeviceFacts("cuda"), logit_rows=10))
    widths = 1000 * model.config.hidden_size * 4
    assert logit_bytes(model, 1000, 4, "cuda") == 4 * 3 * 10 * vocabulary + widths
    assert logit_bytes(model, 1000, 4, "cpu") == 4 * 3 * 1000 * vocabulary + widths


def test_packed_rows_take_the_first_route_of_the_profile_that_can_compute_them(monkeypatch: pytest.MonkeyPatch) -> None:
    call, taken = call_of(), []
    reference = attend_packed("loop", nn.Module(), call.layout, call.q, call.k, call.v, (), {})
    monkeypatch.setattr(routes, "COMPUTE", {name: lambda _, name=name: taken.append(name) for name in routes.ONE_CALL})
    monkeypatch.setattr(routes, "route_refusal", lambda route, _: "is refused" if route == "varlen" else None)

    def attend() -> Any:
        return attend_packed("auto", nn.Module(), call.layout, call.q, call.k, call.v, (), {})

    assert torch.equal(attend(), reference)
    use(Profile("cpu", "", Decisions(packed_attention=("varlen", "flash", "flex", "loop"))))
    attend()
    assert taken == ["flash"]
    monkeypatch.setattr(routes, "route_refusal", lambda route, _: "is refused")
    assert torch.equal(attend(), reference)


def test_routes_that_a_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "lacking", lambda route, device: None if route == "flex" else "is not here")
    assert routes_of(profile(LARGE), torch.device("cuda")) == ("flex", "loop")
    assert routes_of(profile(DeviceFacts("cpu")), torch.device("cpu")) == ("loop",)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop", "muon"])
@pytest.mark.parametrize(
    ("kernel", "flags"), [("fused", (True, None)), ("foreach", (None, True)), ("single", (None, False))], ids=str
)
def test_an_optimizer_takes_the_implementation_of_the_profile(kind: str, kernel: str, flags: tuple[bool | None, ...]) -> None:
    model = nn.Linear(3, 2)
    config = registry.load_class("optim", kind)()
    use(Profile("cpu", "", Decisions(optimizer=kernel)))
    made = build_optimizer(config, parameter_groups(model, config))
    for part in getattr(made, "parts", [made]):
        if "foreach" not in part.defaults:
            continue
        if kind == "rmsprop":
            assert part.defaults["foreach"] is (kernel != "single")
        else:
            assert (part.defaults["fused"] or None, part.defaults["foreach"]) == flags


def test_a_kernel_that_an_optimizer_lacks_is_refused_where_a_key_names_it() -> None:
    model, config = nn.Linear(3, 2), registry.load_class("optim", "rmsprop")()
    use(profile(DeviceFacts("cpu"), optimizer="fused"))
    with pytest.raises(RecipeError, match=r"runtime\.optimizer_kernel: this optimizer has no fused kernel"):
        build_optimizer(config, parameter_groups(model, config))


@pytest.mark.parametrize(
    ("gib", "tokens"),
    # 12 MiB a token: 341 and 682 of them, 1,024, 5,461; no fewer than 512 and no more than 1,024.
    [(4, 512), (8, 512), (12, 1024), (64, 1024)],
)
def test_a_cpu_cuts_micro_batches_by_the_memory_of_its_machine(gib: int, tokens: int) -> None:
    found = profile(DeviceFacts("cpu", memory=gib * GIB))
    assert found.micro_tokens == tokens
    assert found.decided == dataclasses.replace(TABLE["cpu"], micro_tokens=tokens)


def test_a_container_has_the_memory_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = machine_bytes()
    assert whole is not None and 2**28 < whole < 2**50
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_profile, "CGROUP", (str(limit), str(tmp_path / "absent")))
    for text, wanted in (("1048576\n", 1 << 20), ("max\n", None), (f"{2**62}\n", None)):
        limit.write_text(text)
        found = machine_bytes()
        assert found is not None and (found == wanted if wanted else found >= whole)


def test_a_cpu_is_known_by_its_memory_and_another_device_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert device_profile.facts_of("cpu") == DeviceFacts("cpu", memory=machine_bytes() or 0)
    monkeypatch.setattr(device_profile, "machine_bytes", lambda: None)
    assert device_profile.facts_of("cpu") == DeviceFacts("cpu")
    assert device_profile.facts_of(torch.device("meta")) == DeviceFacts("meta")
