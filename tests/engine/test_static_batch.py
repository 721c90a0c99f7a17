"""Decoding in tensors of fixed shape: the answers of continuous batching, under every wrapper and family, in steps of one shape
that can be recorded."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from llmrecipe.core.device_profile import TABLE, Profile, use
from llmrecipe.core.errors import ModelError
from llmrecipe.engine import decoders, static_batch
from llmrecipe.engine.continuous_batching import PendingPrompt
from llmrecipe.engine.generation import generate, recorded_answers
from llmrecipe.engine.sampling import Sampling
from llmrecipe.engine.static_batch import StaticBatch, columns_for
from llmrecipe.models import kv_cache
from tests.engine.test_continuous_batching import FAMILIES, PROMPTS, counted, ending, family_of, same_as_alone
from tests.methods.additive.harness import model_of
from tests.methods.kinds import BASES, CHANGES, cell, matrix, put, refresh, wrapper_of
from tests.tiny import Tokenizer, tiny_model


def decided(way: str) -> None:
    """The device decodes in a way, which no key names."""
    use(Profile("cpu", "", dataclasses.replace(TABLE["cpu"], decoding=way)))


def named(way: str) -> None:
    """A key names a way."""
    use(Profile("cpu", "", TABLE["cpu"], {"decoding": way}))


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of fixed shape, whose columns are so few that rows move."""
    monkeypatch.setattr(static_batch, "BUCKET", 2)
    decided("static")


def is_static(model: nn.Module) -> bool:
    return model.decoders_tried.get("static", False)


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, ("llama", "native-decoder", "native-mixture")))
def test_every_wrapper_answers_as_one_prompt_at_a_time(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell(kind, family, moved=True)
    made.model.double()
    refresh(made.stack, made.model)
    same_as_alone(ending(made.model), monkeypatch, slots=(3,))
    assert is_static(made.model)


@pytest.mark.parametrize("base", BASES)
def test_quantized_bases_answer_as_one_prompt_at_a_time(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put(model_of("llama"), wrapper_of(base), wrapper_of("lora"))
    same_as_alone(ending(made.model, torch.float32), monkeypatch)
    assert is_static(made.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_position_and_cache_answers_as_one_prompt_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_of(family)
    same_as_alone(model, monkeypatch)
    assert is_static(model)


@pytest.mark.parametrize("positions", ["relative", "learned", "sinusoidal"])
def test_positions_of_the_native_model_are_those_of_its_rows(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llmrecipe_native", kind="decoder", positions=positions)
    same_as_alone(ending(model), monkeypatch)
    assert is_static(model)


@pytest.mark.parametrize("summary", ["first", "prompt_mean"])
def test_scores_of_a_prompt_stand_in_its_row(summary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell("apt", "llama", moved=True, summary=summary)
    same_as_alone(ending(made.model), monkeypatch)
    assert is_static(made.model)


@pytest.mark.parametrize("position", ["prefix", "after_bos"])
def test_virtual_tokens_stand_behind_the_dead_columns(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell("prompt_tuning", "llama", moved=True, position=position)
    same_as_alone(ending(made.model), monkeypatch)
    assert is_static(made.model)


def test_rows_of_several_tasks_keep_their_own() -> None:
    made = cell("ia3", "llama", moved=True, tasks=["a", "b"])
    model, tasks = ending(made.model), [i % 2 for i in range(len(PROMPTS))]
    found = generate(model, Tokenizer(), PROMPTS, Sampling(12, batch=3), tasks=tasks)
    assert is_static(model)
    decided("continuous")
    assert found == generate(model, Tokenizer(), PROMPTS, Sampling(12, batch=3), tasks=tasks)
    assert found[0] != found[3], "the same prompt under two tasks"


CASES = {
    "one row": (PROMPTS, Sampling(12, 1.0, batch=1, seed=1)),
    "one token": (PROMPTS, Sampling(1, 1.0, batch=3, seed=1)),
    "as many rows as prompts": (PROMPTS, Sampling(12, 1.0, batch=len(PROMPTS), seed=1)),
    "lengths far apart": (
        [[5], [4 + i % 60 for i in range(70)], [9, 8], [7], [6] * 40, [3]],
        Sampling(30, 1.0, batch=2, seed=1),
    ),
    "many short ones": ([[3 + i, 5 + i % 7] for i in range(40)], Sampling(9, 1.0, batch=4, seed=3)),
    "cut and warm": (PROMPTS, Sampling(12, 0.9, 0.95, 40, batch=3, seed=5)),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_and_their_log_probabilities_are_those_of_continuous_batching(case: str) -> None:
    prompts, how = CASES[case]
    model = ending(model_of("llama"))
    with recorded_answers() as found:
        answers = generate(model, Tokenizer(), prompts, how)
    assert is_static(model)
    decided("continuous")
    with recorded_answers() as wanted:
        assert generate(model, Tokenizer(), prompts, how) == answers
    key = [sorted((a.prompt, a.tokens, a.logprobs.tolist()) for a in each) for each in (found, wanted)]
    for (_, tokens, own), (_, right, logprobs) in zip(*key, strict=True):
        assert tokens == right and own == pytest.approx(logprobs, abs=1e-6)
    assert max(map(len, answers)) <= how.max_new_tokens


def test_answers_that_end_at_their_first_token_leave_their_row_to_others() -> None:
    model = model_of("llama").double()
    first = [answer[0] for answer in generate(model, Tokenizer(), PROMPTS, Sampling(1))]
    model.generation_config.eos_token_id = sorted(set(first[:4]))
    found = generate(model, Tokenizer(), PROMPTS, Sampling(8, batch=2))
    assert sum(len(answer) == 1 for answer in found) >= 4 and is_static(model)
    decided("continuous")
    assert generate(model, Tokenizer(), PROMPTS, Sampling(8, batch=2)) == found


# --- fixed shapes -----------------------------------------------------------------------------------------------------


def test_columns_are_the_longest_prompt_and_answer_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_batch, "BUCKET", 64)
    prompts = [PendingPrompt(0, (5,) * 30, None), PendingPrompt(1, (5,) * 100, None)]
    assert [columns_for(prompts, new, rows) for new, rows in ((28, 2), (29, 2), (28, 1))] == [128, 192, 192]


def test_every_step_has_one_shape_and_tensors_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, moved = [], []
    inner, move = StaticBatch.step, kv_cache.FixedCache.move

    def step(self: StaticBatch) -> Any:
        fixed = [*(layer.keys for layer in self.cache.layers), self.inputs, self.at, self.cache.column]
        seen.append(tuple((x.data_ptr(), x.shape) for x in fixed))
        assert int(self.cache.column) == self.cache.seen == self.columns + self.virtual
        return inner(self)

    def moving(self: kv_cache.FixedCache, columns: int) -> None:
        moved.append(columns)
        move(self, columns)

    model = ending(model_of("llama"))
    work = counted(model)
    monkeypatch.setattr(StaticBatch, "step", step)
    monkeypatch.setattr(kv_cache.FixedCache, "move", moving)
    generate(model, Tokenizer(), [[3 + i, 5 + i % 7, 6] for i in range(40)], Sampling(24, 1.0, batch=8, seed=3))
    assert len(set(seen)) == 1 and {rows for rows, columns in work.passes if columns == 1} == {8}
    assert moved and max(moved) < 0


def test_a_prompt_wider_than_what_stands_moves_the_rows_to_the_right() -> None:
    """Prompts out of order, as no caller of `decode_continuously` gives them."""
    model, how = ending(model_of("llama")), Sampling(12, 1.0, batch=2, seed=1)
    generate(model, Tokenizer(), [[3]], how)
    order = [[5], [9, 8], [7] * 30, [6, 5, 4], [4] * 50]
    from llmrecipe.core.forward_context import Context
    from llmrecipe.engine.answer_ends import answer_ends
    from llmrecipe.engine.sampling import Picker

    found = {}
    with torch.no_grad():
        for way in (decoders.static, decoders.continuous):
            job = decoders.Decoding(
                model, Tokenizer(), how, Picker(how, range(5)), answer_ends(model, Tokenizer(), how), Context()
            )
            found[way] = dict(way(job, [PendingPrompt(i, tuple(p), None) for i, p in enumerate(order)]))
    assert found[decoders.static] == found[decoders.continuous]


# --- capture ----------------------------------------------------------------------------------------------------------


class Recorded:
    """A stand-in for a CUDA graph: the operations of one pass on the tensors they were on, done again without its Python."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, compute: static_batch.Compute, device: torch.device) -> static_batch.Compute:
        self.captures += 1
        compute()
        graph = make_fx(lambda: compute())()

        def replay() -> torch.Tensor:
            self.replays += 1
            return graph()

        return replay


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Steps are recorded by the stand-in, as if this machine could."""
    made, inner = Recorded(), decoders._lacking
    monkeypatch.setattr(decoders, "captured", made)
    monkeypatch.setattr(decoders, "_lacking", lambda model, name: inner(model, "static" if name == "graphs" else name))
    return made


STACKS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {}, "ia3": {"tasks": ["a", "b"]}, "adapter": {}, "prefix_tuning": {}, "prompt_tuning": {}, "apt": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", [
    "llama", "gemma2", "prefix_tuning", "ia3",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3_text", "mistral", "gpt2", "bloom", "qwen3")),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in STACKS if kind not in ("prefix_tuning", "ia3")),
])  # fmt: skip
def test_a_step_is_captured_once_for_a_call_and_replayed(kind: str, capture: Recorded) -> None:
    """A recording raises where the host would read a value, so nothing of these steps waits for the device."""
    of_stack = kind in STACKS
    model = ending(cell(kind, "llama", moved=True, **STACKS[kind]).model if of_stack else family_of(kind), torch.float32)
    how, tasks = Sampling(12, 1.0, batch=3, seed=1), [i % 2 for i in range(len(PROMPTS))] if STACKS.get(kind) else None
    wanted = generate(model, Tokenizer(), PROMPTS, how, tasks=tasks)
    assert capture.captures == 0
    named("graphs")
    assert generate(model, Tokenizer(), PROMPTS, how, tasks=tasks) == wanted
    assert capture.captures == 2, "the trial and the call"
    before = capture.replays
    assert generate(model, Tokenizer(), PROMPTS, how, tasks=tasks) == wanted
    assert capture.captures == 3 and capture.replays > before
    generate(model, Tokenizer(), PROMPTS, dataclasses.replace(how, max_new_tokens=1), tasks=tasks)
    assert capture.captures == 3, "without a step there is nothing to capture"


@pytest.mark.parametrize(("kind", "family"), [("diff_pruning", "llama"), ("esft", "native-mixture")])
def test_a_step_in_which_values_decide_is_not_replayed(kind: str, family: str, capture: Recorded) -> None:
    """Gates that are read, and experts that are chosen in Python: found out by the trial."""
    model = ending(cell(kind, family, moved=True).model, torch.float32)
    how = Sampling(6, 1.0, batch=3, seed=1)
    wanted = generate(model, Tokenizer(), PROMPTS, how)
    decided("graphs")
    assert generate(model, Tokenizer(), PROMPTS, how) == wanted
    assert not model.decoders_tried["graphs"] and model.decoders_tried["continuous"]


def failing(compute: static_batch.Compute, device: torch.device) -> static_batch.Compute:
    """A capture that this machine refuses."""
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_falls_back_with_one_line_where_no_key_names_it(
    capture: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ending(model_of("llama"))
    wanted = generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3))
    monkeypatch.setattr(decoders, "captured", failing)
    decided("graphs")
    for _ in range(2):
        assert generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3)) == wanted
    line = "runtime.decoding: 'llama' is not decoded by graphs: operation not permitted when stream is capturing; it is decoded"
    assert capsys.readouterr().out.count(line) == 1 and model.decoders_tried["continuous"]
    other, warnings = ending(model_of("llama")), []
    decoders.report_decoding(other, warnings.append)
    generate(other, Tokenizer(), PROMPTS, Sampling(6, batch=3))
    assert len(warnings) == 1 and warnings[0].startswith(line)
    named("graphs")
    with pytest.raises(ModelError, match=r"is not decoded by graphs: .* when stream is capturing; use auto"):
        generate(ending(model_of("llama")), Tokenizer(), PROMPTS, Sampling(6, batch=3))


def test_a_capture_that_fails_later_goes_on_without(
    capture: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ending(model_of("llama"))
    wanted = generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3))
    decided("graphs")
    assert generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3)) == wanted
    monkeypatch.setattr(decoders, "captured", failing)
    assert generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3)) == wanted
    assert "is not decoded by graphs: a step cannot be captured: operation not permitted" in capsys.readouterr().out
    named("graphs")
    with pytest.raises(ModelError, match="a step cannot be captured"):
        generate(model, Tokenizer(), PROMPTS, Sampling(6, batch=3))


@pytest.mark.parametrize("way", ["continuous", "static", "graphs", "graphs that fail"])
def test_a_cache_is_freed_with_its_call(way: str, capture: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reference counts alone: a device that is full does not look for cycles of Python's objects."""
    model = ending(model_of("llama"))
    decided(way.partition(" ")[0])
    generate(model, Tokenizer(), PROMPTS, Sampling(12, batch=3))
    if way == "graphs that fail":
        monkeypatch.setattr(decoders, "captured", failing)
    made: list[weakref.ref[Any]] = []
    fresh, fixed = kv_cache.fresh, kv_cache.FixedCache.__init__

    def noted_fresh(model: nn.Module) -> Any:
        made.append(weakref.ref(cache := fresh(model)))
        return cache

    def noted_fixed(self: Any, *args: Any) -> None:
        made.append(weakref.ref(self))
        fixed(self, *args)

    monkeypatch.setattr(kv_cache, "fresh", noted_fresh)
    monkeypatch.setattr(kv_cache.FixedCache, "__init__", noted_fixed)
    gc.collect()
    gc.disable()
    try:
        generate(model, Tokenizer(), PROMPTS, Sampling(12, batch=3))
        assert len(made) > 3 and not any(cache() is not None for cache in made)
    finally:
        gc.enable()


# --- which way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "family", "why"),
    [
        ("graphs", "llama", "it needs a CUDA GPU, and the device is cpu"),
        ("static", "t5", "the model has no cache of fixed shape"),
        ("static", "gpt_neo", "the model has no cache of fixed shape"),
        ("continuous", "t5", "the cache has no rows that can leave and join"),
    ],
)
def test_a_way_that_a_key_names_is_taken_or_refused(way: str, family: str, why: str) -> None:
    local = {"attention_types": [[["global", "local"], 1]]}
    model = tiny_model(family, **local) if family == "gpt_neo" else model_of(family)
    named(way)
    with pytest.raises(ModelError, match=f"runtime.decoding: '{family}' is not decoded by {way}: {why}; use auto"):
        generate(model, Tokenizer(), PROMPTS, Sampling(2))
    decided(way)
    assert len(generate(model, Tokenizer(), PROMPTS, Sampling(2))) == len(PROMPTS)


def test_scores_that_differ_refuse_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = StaticBatch._pass
    monkeypatch.setattr(StaticBatch, "_pass", lambda self: inner(self).roll(1, -1))
    model = ending(model_of("llama"))
    found = generate(model, Tokenizer(), PROMPTS, Sampling(6))
    assert model.decoders_tried == {"static": False, "continuous": True} and found
    named("static")
    with pytest.raises(ModelError, match="by static: its scores are not those without a cache"):
        generate(model, Tokenizer(), PROMPTS, Sampling(6))
