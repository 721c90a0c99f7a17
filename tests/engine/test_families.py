"""What a family does with padding, later tokens, positions and a cache is measured, and nothing of it is silent."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.data.collate import Batch, Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.generation import generate
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.methods._base.stack import Stack
from llmrecipe.training.model_checks import check_forward_pass
from tests.models.small_families import families, small_model
from tests.tiny import Tokenizer

ROWS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 12, 14], [11, 12, 13, 14, 15]]
READS_PADDING = {"fnet", "convbert", "funnel", "yoso", "mobilebert", "nystromformer"}
SEES_THE_FUTURE = {"xlnet"}
QUICK = {"masked": ("bert", "fnet", "convbert", "mpnet"), "causal": ("llama", "rwkv", "openai-gpt", "recurrent_gemma")}


def some(head: str) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK[head] else pytest.mark.slow) for n in families(head)]


def laid_out(rows: list[list[int]], side: str = "right") -> Batch:
    return pad([Sequence(row, [0] + [1] * (len(row) - 1)) for row in rows], 0, side)


def checked(model: Any, head: str, shard: str = "none") -> None:
    roles = Roles(Engine(model).eval(), Stack([]), Tokenizer(), torch.device("cpu"), False)  # type: ignore[arg-type]
    recipe, objective = SimpleNamespace(runtime=SimpleNamespace(shard=shard)), SimpleNamespace(model_head=lambda: head)
    check_forward_pass(recipe, objective, roles)  # type: ignore[arg-type]


def readable(model: Any) -> None:
    """The test skips where a family cannot read rows of these lengths at all."""
    try:
        with torch.no_grad():
            for row in ROWS:
                Engine(model)._read_together(laid_out([row]))
    except Exception as error:
        pytest.skip(f"it cannot read a row: {type(error).__name__}: {error}")


def equal_to_one_at_a_time(model: Any) -> None:
    engine = Engine(model)
    with torch.no_grad():
        alone = torch.cat([engine(laid_out([row]))["logprobs"] for row in ROWS])
        for side in ("right", "left") if engine.reading.apart else ("right",):
            torch.testing.assert_close(engine(laid_out(ROWS, side))["logprobs"], alone, rtol=1e-4, atol=1e-4)


def equal_to_the_stock_model(model: Any) -> None:
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    row = torch.tensor([ROWS[1]])
    with torch.no_grad():
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), **more).logits[0].float().log_softmax(-1)
        own = Engine(model)(laid_out([ROWS[1]]))["logprobs"]
    torch.testing.assert_close(own, logits[:-1].gather(-1, row[0, 1:, None])[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", some("masked"))
def test_rows_of_an_encoder_do_not_depend_on_their_neighbours_and_score_as_the_stock_model(family: str) -> None:
    model = small_model(family, "masked")
    if model.config.is_encoder_decoder:
        pytest.skip("an encoder-decoder fills gaps with both sides")
    readable(model)
    assert Engine(model).reading.apart == (family in READS_PADDING)
    equal_to_one_at_a_time(model)
    equal_to_the_stock_model(model)
    checked(model, "masked")


@pytest.mark.parametrize("family", some("causal"))
def test_a_decoder_scores_as_the_stock_model_and_answers_as_it_reads(family: str) -> None:
    """Answers of a batch are those of one prompt at a time, and those of passes over the whole text."""
    model = small_model(family)
    if model.config.is_encoder_decoder:
        pytest.skip("an encoder-decoder")
    readable(model)
    engine = Engine(model)
    if not engine.reading.causal:
        assert family in SEES_THE_FUTURE
        with pytest.raises(ModelError, match=f"'{family}' a token sees those that follow it"):
            checked(model, "causal")
        return
    equal_to_one_at_a_time(model)
    equal_to_the_stock_model(model)
    checked(model, "causal")
    how = Sampling(max_new_tokens=5)
    together = generate(model, Tokenizer(), ROWS, how)  # type: ignore[arg-type]
    assert together == [generate(model, Tokenizer(), [row], how)[0] for row in ROWS]  # type: ignore[arg-type]
    for prompt, answer in zip(ROWS, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in answer:
                scores = engine.head(engine.hidden(laid_out([ids]))[0, -1])
                assert float(scores.max() - scores[token]) <= 1e-4 * float(scores.abs().max())
                ids.append(token)


@pytest.mark.parametrize("family", ["fnet", "convbert"])
def test_gradients_of_rows_read_apart_are_those_of_one_row_at_a_time(family: str) -> None:
    model = small_model(family, "masked")
    engine = Engine(model)

    def gradients(batches: list[Batch]) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            engine(batch)["logprobs"].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together, alone = gradients([laid_out(ROWS)]), gradients([laid_out([row]) for row in ROWS])
    assert together.keys() == alone.keys() and len(together) > 10
    for name, grad in alone.items():
        torch.testing.assert_close(together[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


def test_a_classifier_of_such_a_family_scores_a_row_as_alone() -> None:
    model = small_model("fnet", "classification")
    engine = Engine(model)
    with torch.no_grad():
        alone = torch.cat([engine(laid_out([row]), want="scores")["scores"] for row in ROWS])
        torch.testing.assert_close(engine(laid_out(ROWS), want="scores")["scores"], alone, rtol=1e-4, atol=1e-5)


def test_features_stay_in_their_rows_where_rows_are_read_apart() -> None:
    """Of two rows of one length and one that is longer, each with features of its own."""
    from llmrecipe.data.collate import FeatureVectors
    from llmrecipe.data.row_groups import groups_by_length

    def row(ids: list[int], count: int, value: float) -> Sequence:
        return Sequence(ids, [0] * len(ids), features=FeatureVectors(torch.full((count, 2), value), torch.zeros(count, 2)))

    batch = pad([row([5, 6], 2, 1.0), row([7, 8, 9, 10], 3, 2.0), row([3], 3, 3.0)], 0)
    groups = groups_by_length(batch)
    assert [group.rows for group in groups] == [[0, 2], [1]]
    first, second = groups[0].batch, groups[1].batch
    assert first.input_ids.tolist() == [[0, 0, 5, 6], [0, 0, 0, 3]] and second.input_ids.tolist() == [[0, 0, 0, 7, 8, 9, 10]]
    assert first.slots is not None and first.slots.index.tolist() == [0, 1, 4, 5, 6]
    assert first.slots.values[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
    assert second.slots is not None and second.slots.index.tolist() == [0, 1, 2]


def test_an_encoder_that_mixes_tokens_elsewhere_does_not_continue_texts() -> None:
    Engine(small_model("bert", "masked")).check_masking()
    with pytest.raises(ModelError, match="'convbert' mixes tokens elsewhere than in attention"):
        Engine(small_model("convbert", "masked")).continued(laid_out(ROWS))


def test_processes_that_share_weights_do_not_read_rows_apart() -> None:
    checked(small_model("bert", "masked"), "masked", shard="zero3")
    with pytest.raises(RecipeError, match=r"runtime\.shard=zero3: the states of 'fnet' depend on the padding"):
        checked(small_model("fnet", "masked"), "masked", shard="zero3")


def test_an_encoder_is_no_decoder_until_its_config_says_so() -> None:
    checked(small_model("bert-generation", is_decoder=True), "causal")
    with pytest.raises(ModelError, match=r"set model\.config\.is_decoder=true"):
        checked(small_model("bert-generation", is_decoder=False), "causal")


def test_scores_that_are_not_the_models_own_are_refused() -> None:
    model = small_model("roberta", "masked")
    checked(model, "masked")
    model.position_offset = 0
    with pytest.raises(ModelError, match="'roberta' scores a few probe tokens with log-probabilities that differ by up to"):
        checked(model, "masked")


@pytest.mark.parametrize(
    ("family", "way"), [("llama", "continuous"), ("rwkv", "equal"), ("openai-gpt", "padded"), ("xlstm", "uncached")]
)
def test_the_first_way_to_decode_that_is_right_is_taken_and_trying_leaves_no_trace(family: str, way: str) -> None:
    model = small_model(family)
    state = torch.get_rng_state()
    warm = Sampling(4, temperature=1.0, seed=3)
    first = generate(model, Tokenizer(), ROWS, warm)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert next(name for name, right in model.decoders_tried.items() if right) == way
    assert generate(model, Tokenizer(), ROWS, warm) == first  # type: ignore[arg-type]


def test_a_model_that_cannot_be_run_is_refused_by_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")

    def broken(*arguments: Any, **more: Any) -> None:
        raise IndexError("no such row")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(ModelError, match="'llama' cannot be run on a few probe tokens, so nothing is generated: no such row"):
        generate(model, Tokenizer(), ROWS, Sampling(4))  # type: ignore[arg-type]
