"""Next-token fine-tuning against the reference trainer, and what it has learned once a few rows are known by heart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe import compose
from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.finetuning.sft import Sft
from tests.objectives.parity import PAIRS, arguments, mean_loss, word_tokenizer, words
from tests.tiny import Tokenizer, roles_for, tiny_model

ROWS = [*({"prompt": words(r["prompt_ids"]), "completion": " " + words(r["chosen_ids"][:-1])} for r in PAIRS)]
ROWS += [{"prompt": words([30, 31]), "completion": " " + words([40, 41, 42, 43, 44, 45])}]


@pytest.mark.parity(method="sft", reference="trl SFTTrainer")
@pytest.mark.parametrize(
    ("options", "completion_only"),
    [({}, True), ({}, False), ({"loss_type": "dft"}, True), ({"label_smoothing": 0.1}, True)],
    ids=str,
)
def test_loss_and_gradients_of_unequal_micro_batches_are_those_of_the_reference(
    options: dict[str, Any], completion_only: bool, tmp_path: Path
) -> None:
    """Of the completion or of whole rows; plain, weighted by probabilities, smoothed. The trainer reads 1 row and then 3."""
    from datasets import Dataset

    pytest.importorskip("trl", reason="the reference is trl")
    from trl import SFTConfig, SFTTrainer

    model = tiny_model()
    theirs: Any = copy.deepcopy(model)
    named = {{"label_smoothing": "label_smoothing_factor"}.get(name, name): value for name, value in options.items()}
    config = SFTConfig(**arguments(tmp_path, 4, completion_only_loss=completion_only, **named))
    trainer = SFTTrainer(theirs, config, train_dataset=Dataset.from_list(ROWS), processing_class=word_tokenizer())
    known = list(trainer.train_dataset)
    parts = [trainer.data_collator(known[:1]), trainer.data_collator(known[1:])]
    count = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
    wanted = sum(trainer.compute_loss(theirs, part, num_items_in_batch=count) for part in parts)
    wanted.backward()
    rows = []
    for part in parts:
        for ids, labels, mask in zip(part["input_ids"], part["labels"], part["attention_mask"], strict=True):
            real = mask.bool()
            trained = (labels[real] != -100).long().tolist()
            rows.append({"row": len(rows), "ids": ids[real].tolist(), "trained": [0, *trained[1:]]})
    assert sum(sum(row["trained"]) for row in rows) == int(count)
    loss = mean_loss(Sft(**options), roles_for(model), rows)
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted.detach(), rtol=1e-5, atol=1e-6)
    for (name, own), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_eight_rows_that_are_known_by_heart_are_written_to_the_letter_and_end() -> None:
    """Greedy answers are the completions with their end token, which is trained like every other token."""
    model = tiny_model(scale=1.0)
    roles, objective = roles_for(model), Sft()
    draws = torch.Generator().manual_seed(0)
    rows, prompts, answers = [], [], []
    for i in range(8):
        answer = [*torch.randint(4, 60, (3 + i % 4,), generator=draws).tolist(), 2]
        prompts.append([1, 5 + i, 20])
        answers.append(answer)
        rows.append({"row": i, "ids": prompts[-1] + answer, "trained": [0] * 3 + [1] * len(answer)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        loss = mean_loss(objective, roles, rows)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02
    tokenizer: Any = Tokenizer()
    assert generate(model, tokenizer, prompts, Sampling(max_new_tokens=12)) == answers  # type: ignore[arg-type]


def test_an_evaluation_is_without_smoothing_and_other_losses_refuse_it() -> None:
    roles = roles_for(tiny_model())
    rows = [{"row": 0, "ids": [1, 5, 6, 2], "trained": [0, 0, 1, 1]}]
    smooth, plain = (Sft(label_smoothing=e) for e in (0.2, 0.0))
    batch = smooth.collate(rows, roles)
    found, wanted = (o.evaluate(batch, roles)["loss"] for o in (smooth, plain))
    assert float(found[0]) == float(wanted[0]) and float(smooth.loss(batch, roles).total) != float(wanted[0])
    assert float(smooth.loss(smooth.collate([], roles), roles).total) == 0.0
    with pytest.raises(RecipeError, match=r"objective\.label_smoothing: belongs to loss_type=nll"):
        Sft(label_smoothing=0.1, loss_type="dft").check(compose("sft").recipe, None)  # type: ignore[arg-type]
