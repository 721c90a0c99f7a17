"""Packed and padded layouts give the numbers of separate documents."""

from __future__ import annotations

import pytest
import torch

from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.logprob import token_logprobs
from tests.tiny import tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "gpt2", "gpt_neox", "opt"]


def documents(seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (7, 1, 12, 5):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        found.append(Sequence(ids, [1] * length))
    return found


def separate_logprobs(model: torch.nn.Module, documents: list[list[int]]) -> torch.Tensor:
    parts = []
    for ids in documents:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        parts.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_log_probabilities_equal_separate_documents(family: str) -> None:
    extra = {"sliding_window": 4} if family in ("mistral", "gemma2") else {}
    if family == "opt":
        extra = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    model = tiny_model(family, **extra)
    engine = Engine(model).eval()
    docs = documents()
    wanted = separate_logprobs(model, [list(d.ids) for d in docs])
    with torch.no_grad():
        packed = engine(pack(docs))["logprobs"]
        padded = engine(pad(docs, 0))["logprobs"]
    torch.testing.assert_close(padded.double(), wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(packed.double(), wanted, atol=2e-5, rtol=1e-4)


def test_a_neighbour_never_changes_a_document() -> None:
    model = tiny_model()
    engine = Engine(model).eval()
    docs = documents()
    other = [Sequence([9] * len(docs[0].ids), [1] * len(docs[0].ids)), *docs[1:]]
    own = lambda batch, t: t[batch.sequence > 0]  # noqa: E731
    with torch.no_grad():
        a, b = pack(docs), pack(other)
        assert torch.equal(own(a, engine(a)["logprobs"]), own(b, engine(b)["logprobs"]))


def test_a_shared_prompt_equals_writing_it_out_twice() -> None:
    model = tiny_model()
    engine = Engine(model).eval()
    prompt, chosen, rejected = [5, 6, 7, 8], [9, 10, 2], [11, 2]
    tree = [Sequence(prompt, [0] * 4), Sequence(chosen, [1] * 3, parent=0), Sequence(rejected, [1] * 2, parent=0)]
    flat = [Sequence(prompt + chosen, [0] * 4 + [1] * 3), Sequence(prompt + rejected, [0] * 4 + [1] * 2)]
    with torch.no_grad():
        wanted = engine(pad(flat, 0))["logprobs"]
        for batch in (pack(tree), pad(tree, 0)):
            torch.testing.assert_close(engine(batch)["logprobs"], wanted, atol=1e-5, rtol=1e-5)
            assert batch.sequence.tolist() == [1, 1, 1, 2, 2]


def test_padding_side_and_width_do_not_matter() -> None:
    model = tiny_model()
    engine = Engine(model).eval()
    docs = documents()
    with torch.no_grad():
        plain = engine(pad(docs, 0))["logprobs"]
        for batch in (pad(docs, 0, "left"), pad(docs, 0, columns=29), pad(docs, 2)):
            torch.testing.assert_close(engine(batch)["logprobs"], plain, atol=1e-5, rtol=1e-5)


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    batch = pack([Sequence([5, 6], [1, 1]), Sequence([7, 8, 9], [1, 1, 1])])
    assert batch.target.tolist() == [6, 8, 9]
    assert batch.source.tolist() == [0, 2, 3]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]


def test_the_first_token_of_an_answer_is_predicted_from_the_prompts_last() -> None:
    tree = [Sequence([5, 6], [0, 0]), Sequence([7], [1], parent=0), Sequence([8, 9], [1, 1], parent=0)]
    batch = pack(tree)
    assert batch.source.tolist() == [1, 1, 3]
    assert batch.target.tolist() == [7, 8, 9]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_a_token_is_predicted_from_the_one_before_it(shift: int) -> None:
    """States that know the next token cost nothing; those that know their own token or the one after the next cost much."""
    ids = [5, 9, 6, 11, 7, 13, 8]
    batch = pack([Sequence(ids, [0] + [1] * 6)])
    knows = torch.tensor([ids[min(max(i + 1 + shift, 0), 6)] for i in range(7)])
    states = 40.0 * torch.nn.functional.one_hot(knows, 16).float()
    head = torch.nn.Linear(16, 16, bias=False)
    torch.nn.init.eye_(head.weight)
    loss = -token_logprobs(states[batch.source], batch.target, head)["logprobs"].mean().detach()
    assert (float(loss) < 1e-6) == (shift == 0) and (shift == 0 or float(loss) > 30)


def test_packed_gradients_equal_padded_gradients() -> None:
    docs = documents()
    grads = []
    for build in (pack, lambda d: pad(d, 0)):
        model = tiny_model().double()
        (-Engine(model)(build(docs))["logprobs"].sum()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-10, rtol=1e-8)


def test_the_filler_of_a_process_without_rows_is_no_token_it_read() -> None:
    assert [pack([]).tokens, pad([], 0).tokens, pad([], 0, columns=4).tokens] == [0, 0, 0]
    assert pack([]).input_ids.shape == (1, 1), "the model still reads something, so that the process takes part in the step"
    assert [pack([Sequence([0], [0])]).tokens, pad([Sequence([0], [0])], 0).tokens] == [1, 1]
