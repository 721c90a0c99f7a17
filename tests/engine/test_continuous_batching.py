"""Continuous refill: the answers of one prompt at a time, in fewer passes and with no row that is computed for nothing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.engine import continuous_batching, generation, sampling
from llmrecipe.engine.answer_ends import end_tokens
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Picker, Sampling, stream
from llmrecipe.models import kv_cache
from tests.methods.additive.harness import model_of
from tests.methods.kinds import BASES, CHANGES, GENERATE, cell, matrix, put, refresh, wrapper_of
from tests.tiny import Tokenizer, tiny_model

ENDS = list(range(2, 64, 7))
"""Tokens that end an answer: enough of them for lengths to differ."""
PROMPTS = [
    [5, 9, 3, 41, 17],
    [8, 1, 44, 12, 30, 6],
    [7],
    [5, 9, 3, 41, 17],
    [33, 20],
    [61, 4, 4],
    [50, 3, 3, 3, 22, 27, 28, 29],
    [8],
]
FAMILIES = ("gpt2", "gemma2", "gemma3_text", "qwen3", "mixtral", "mistral", "bloom", "gpt_neox")


def ending(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with many end tokens."""
    model.to(dtype).generation_config.eos_token_id = ENDS
    return model


def family_of(name: str) -> nn.Module:
    """A tiny model; windows are shorter than the answers. In float32: softmaxes that are written out take it as given."""
    more: dict[str, Any] = {"sliding_window": 4} if name in ("gemma2", "gemma3_text", "mistral") else {}
    if name == "gemma3_text":
        more["layer_types"] = ["sliding_attention", "full_attention"]
    return ending(tiny_model(name, **more), torch.float32)


def alone(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    """The model's own greedy `generate` on one prompt."""
    from transformers import GenerationConfig

    pair = model.config.is_encoder_decoder
    ids = torch.tensor([prompt])
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=end_tokens(model, Tokenizer()), pad_token_id=0)
    config.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    with activate(Context(prompt_lengths=torch.tensor([len(prompt)]))), torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    model.generation_config = kept
    return out[0, 1 if pair else len(prompt) :].tolist()


def same_as_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch, slots: tuple[int, ...] = (1, 3, 5, 16)) -> list[list[int]]:
    """Asserts that answers equal those of one prompt at a time through the model's own `generate`, greedy and sampled, for
    several numbers of slots; returns the sampled ones, which tell more about the logits."""
    greedy, sampled = Sampling(12), Sampling(12, 1.0, seed=4)
    wanted = [alone(model, prompt, 12) for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(kv_cache, "fresh", lambda model: None)
        drawn = [generate(model, Tokenizer(), [prompt], sampled, keys=[i])[0] for i, prompt in enumerate(PROMPTS)]
    for count in slots:
        assert generate(model, Tokenizer(), PROMPTS, dataclasses.replace(greedy, batch=count)) == wanted, count
        assert generate(model, Tokenizer(), PROMPTS, dataclasses.replace(sampled, batch=count)) == drawn, count
    assert len({tuple(answer) for answer in drawn}) > 2 and len({len(answer) for answer in drawn}) > 1
    return drawn


@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, GENERATE))
def test_every_wrapper_answers_as_one_prompt_at_a_time(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell(kind, family, moved=True)
    made.model.double()
    refresh(made.stack, made.model)
    same_as_alone(ending(made.model), monkeypatch, slots=(3,))
    assert (kv_cache.fresh(made.model) is None) == bool(made.model.config.is_encoder_decoder)


@pytest.mark.parametrize("base", BASES)
def test_quantized_bases_answer_as_one_prompt_at_a_time(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put(model_of("llama"), wrapper_of(base), wrapper_of("lora"))
    same_as_alone(ending(made.model, torch.float32), monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_position_and_cache_answers_as_one_prompt_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_of(family)
    assert kv_cache.fresh(model) is not None
    same_as_alone(model, monkeypatch)


@pytest.mark.parametrize("summary", ["first", "prompt_mean"])
def test_scores_of_a_prompt_move_with_its_row(summary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell("apt", "llama", moved=True, summary=summary)
    same_as_alone(ending(made.model), monkeypatch)


@pytest.mark.parametrize("position", ["prefix", "after_bos"])
def test_virtual_tokens_stand_behind_the_dead_columns(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell("prompt_tuning", "llama", moved=True, position=position)
    same_as_alone(ending(made.model), monkeypatch)


def test_rows_of_several_tasks_keep_their_own() -> None:
    made = cell("ia3", "llama", moved=True, tasks=["a", "b"])
    model = ending(made.model)
    tasks = [i % 2 for i in range(len(PROMPTS))]
    wanted = [generate(model, Tokenizer(), [p], Sampling(12), tasks=[t])[0] for p, t in zip(PROMPTS, tasks, strict=True)]
    assert generate(model, Tokenizer(), PROMPTS, Sampling(12, batch=3), tasks=tasks) == wanted
    assert wanted[0] != wanted[3], "the same prompt under two tasks"


# --- sampling --------------------------------------------------------------------------------------------------------

WARM = Sampling(12, temperature=0.9, top_p=0.95, top_k=40, seed=5)


@pytest.mark.parametrize("how", [WARM, Sampling(12, 1.0, seed=5)])
def test_sampled_answers_do_not_depend_on_what_shares_their_batch(how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending(model_of("llama"))
    wanted = generate(model, Tokenizer(), PROMPTS, how)
    assert wanted[0] != wanted[3], "answers to one prompt have streams of their own"
    for slots in (1, 3, 64):
        assert generate(model, Tokenizer(), PROMPTS, dataclasses.replace(how, batch=slots)) == wanted
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, Tokenizer(), [prompt], how, keys=[i]) == [wanted[i]]
    monkeypatch.setattr(kv_cache, "fresh", lambda model: None)
    for slots in (2, 16):
        assert generate(model, Tokenizer(), PROMPTS, dataclasses.replace(how, batch=slots)) == wanted


def test_encoder_decoders_sample_from_the_same_streams() -> None:
    model = ending(model_of("t5"))
    wanted = generate(model, Tokenizer(), PROMPTS, WARM)
    assert generate(model, Tokenizer(), PROMPTS, dataclasses.replace(WARM, batch=3)) == wanted
    assert wanted != generate(model, Tokenizer(), PROMPTS, dataclasses.replace(WARM, seed=6))


def test_only_a_missing_seed_draws_from_the_running_state() -> None:
    model = ending(model_of("llama"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for how in (WARM, Sampling(4)):
        generate(model, Tokenizer(), PROMPTS, how)
    assert torch.equal(torch.get_rng_state(), before)
    unseeded = dataclasses.replace(WARM, seed=None)
    first, second = (generate(model, Tokenizer(), PROMPTS, unseeded) for _ in range(2))
    assert first != second
    torch.set_rng_state(before)
    assert generate(model, Tokenizer(), PROMPTS, unseeded) == first


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0.0, 0.0, 3 / 7, 4 / 7]),
        # 0.4 + 0.3 is not yet 0.75, so the third token is kept too.
        ({"temperature": 1.0, "top_p": 0.75}, [0.0, 2 / 9, 3 / 9, 4 / 9]),
        # The temperature comes first: of 16, 9, 4 and 1 thirtieths two make 0.83.
        ({"temperature": 0.5, "top_p": 0.75}, [0.0, 0.0, 9 / 25, 16 / 25]),
    ],
)
def test_tokens_are_drawn_from_the_tempered_and_cut_distribution(how: dict[str, Any], wanted: list[float]) -> None:
    count = 20_000
    picker = Picker(Sampling(1, seed=1, **how), range(count))
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(count, -1)
    tokens = picker.pick(logits, range(count), [0] * count)
    shares = torch.bincount(tokens, minlength=4) / count
    for share, p in zip(shares.tolist(), wanted, strict=True):
        assert abs(share - p) <= 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("how", [{}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 9, "top_p": 0.5}])
def test_tokens_are_the_same_where_sums_of_floats_may_not_be_used(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is to be deterministic has no running sums of floats."""
    count = 400
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(2)) * 2
    picker = Picker(Sampling(1, **{"temperature": 1.0, "seed": 1, **how}), range(count))
    wanted = picker.pick(logits, range(count), [0] * count)
    monkeypatch.setattr(sampling, "_sums_vary", lambda x: True)
    assert torch.equal(picker.pick(logits, range(count), [0] * count), wanted)
    shares = logits.double().softmax(-1)
    torch.testing.assert_close(sampling.running_sums(shares), shares.cumsum(-1), rtol=0, atol=1e-14)


def test_scores_that_are_no_numbers_end_no_gpu() -> None:
    """A token outside the vocabulary is an error of the host, and of a GPU one that ends every further call."""
    picker = Picker(Sampling(1, 1.0, seed=1), range(2))
    scores = torch.stack([torch.zeros(5), torch.full((5,), float("nan"))])
    drawn = picker.pick(scores, range(2), [0, 0])
    assert drawn[0] < 5 and drawn[1] == 5
    assert sampling.in_vocabulary(drawn, 5, torch.device("cuda")).tolist() == [int(drawn[0]), 4]
    assert sampling.in_vocabulary(drawn, 5, torch.device("cpu")) is drawn


def test_a_deterministic_gpu_gets_no_running_sums_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    kinds = [(place, sampling._sums_vary(SimpleNamespace(device=torch.device(place)))) for place in ("cpu", "cuda")]
    assert kinds == [("cpu", False), ("cuda", True)]


def test_streams_follow_from_seed_and_key_alone() -> None:
    assert torch.equal(stream(1, 2, 5), stream(1, 2, 9)[:5])
    assert not torch.equal(stream(1, 2, 5), stream(1, 3, 5)) and not torch.equal(stream(1, 2, 5), stream(2, 2, 5))
    numbers = torch.cat([stream(0, key, 100) for key in range(200)])
    assert (
        float(numbers.min()) > 0
        and float(numbers.max()) <= 1
        and abs(float(numbers.mean()) - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5
    )


# --- work ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Work:
    """Passes of a model: rows and columns of each."""

    passes: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def decoded(self) -> int:
        """Rows of passes over one column."""
        return sum(rows for rows, columns in self.passes if columns == 1)


def counted(model: nn.Module) -> Work:
    """Counts what goes through a model from now on; how to decode it has been tried before."""
    generate(model, Tokenizer(), [[3, 5]], Sampling(1))
    work = Work()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: work.passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return work


def test_no_row_is_decoded_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending(model_of("llama"))
    prompts = [[3 + i, 5 + i % 7, 6] for i in range(40)]
    how = Sampling(24, 1.0, batch=8, seed=3)
    work = counted(model)
    answers = generate(model, Tokenizer(), prompts, how)
    refilled = Work(list(work.passes))
    work.passes.clear()
    monkeypatch.setattr(kv_cache, "fresh", lambda model: None)
    assert generate(model, Tokenizer(), prompts, how) == answers
    lengths = [len(answer) for answer in answers]
    assert max(lengths) == 24 and min(lengths) <= 2, "lengths are mixed"
    # The first token of each answer comes from the pass over its prompt; every other one takes one row of one pass.
    assert refilled.decoded == sum(lengths) - len(lengths)
    assert work.decoded >= 2 * refilled.decoded
    assert len(refilled.passes) < len(work.passes)


def test_a_prompt_is_read_once_for_all_its_answers() -> None:
    model = ending(model_of("llama"))
    work = counted(model)
    answers = generate(model, Tokenizer(), [PROMPTS[0]] * 6 + [PROMPTS[1]] * 6, Sampling(12, 1.0, batch=12, seed=1))
    assert work.passes[0] == (2, 6) and len({tuple(a) for a in answers}) > 6


def test_the_cache_holds_no_column_that_is_dead_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = ending(model_of("llama")), []
    inner = continuous_batching.RunningBatch.step

    def step(self: continuous_batching.RunningBatch) -> Any:
        assert min(row.start for row in self.rows) == 0
        assert self.columns == self.cache.get_seq_length() == max(len(r.request.ids) + len(r.new) - 1 for r in self.rows)
        widths.append(self.columns)
        return inner(self)

    monkeypatch.setattr(continuous_batching.RunningBatch, "step", step)
    generate(model, Tokenizer(), [[5] * 20, *[[i] for i in range(3, 40)]], Sampling(16, 1.0, batch=4, seed=1))
    assert max(widths) > 19 and widths[-1] < 17


def test_settings_of_the_model_are_put_back() -> None:
    model = ending(model_of("llama")).train()
    answers = generation.answered(model, Tokenizer(), PROMPTS, Sampling(4))
    next(answers)
    assert not model.training
    answers.close()
    assert model.training and end_tokens(model, Tokenizer()) == sorted({*ENDS, 2})


@pytest.mark.parametrize("family", ["t5", "bamba"])
def test_other_caches_take_padded_batches(family: str) -> None:
    model = model_of("t5") if family == "t5" else tiny_model("bamba", num_key_value_heads=4, mamba_n_heads=8, mamba_d_head=8)
    assert kv_cache.fresh(model) is None


def test_a_prompt_without_tokens_is_named() -> None:
    from llmrecipe.core.errors import RunError
    from llmrecipe.engine.generation import generate
    from tests.tiny import Tokenizer

    with pytest.raises(RunError, match=r"generation: prompt 2 of 3 has no token \(1 have none\)"):
        generate(tiny_model(), Tokenizer(), [[3], [], [4]], Sampling(max_new_tokens=1))
