"""Encoder-decoders under `sft` and `choices`: the encoder reads the prompt, the decoder answers, as in Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.interop.load_run import open_run
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.training.dry_run import check
from tests.data.toys import byte_tokenizer
from tests.models.configs import tiny
from tests.tiny import roles_for
from tests.trainings import QUIET, curve, events, learned, resume, stop_after, train_recipe

IDS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES = ("t5", "t5-untied", "bart", "native")
ROWS = [([5, 9, 3, 44], [7, 8, 1]), ([6, 21], [40, 41, 42, 43, 1]), ([33, 4, 17], [9, 1])]
"""(prompt, answer) in token ids."""


def pair_model(family: str) -> Any:
    """A seeded encoder-decoder without dropout; BART's has a bias on its logits, as Marian's checkpoints do."""
    torch.manual_seed(0)
    if family == "native":
        from llmrecipe.models.native import NativeConfig, NativeForSeq2SeqLM

        config = NativeConfig(
            kind="encoder_decoder", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, decoder_start_token_id=2, **IDS,
        )  # fmt: skip
        return NativeForSeq2SeqLM(config).eval()
    if family == "bart":
        model: Any = tiny(
            "bart", dropout=0.0, max_position_embeddings=128, decoder_start_token_id=1, forced_eos_token_id=None, **IDS
        )
        model.final_logits_bias.normal_()
        return model
    changes = {"scale_decoder_outputs": False, "tie_word_embeddings": False} if family == "t5-untied" else {}
    return tiny("t5", dropout_rate=0.0, **{**IDS, "decoder_start_token_id": 2, **changes})


def folder_of(family: str, path: Path) -> Path:
    """A checkpoint of a family with a byte-level tokenizer, and rows of short questions beside it."""
    model = pair_model(family)
    model.save_pretrained(path / "model")
    byte_tokenizer(template=None).save_pretrained(path / "model")
    rows = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b), "options": [str(a + b), str(a - b)]} for a in (1, 2) for b in (3, 4)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path / "model"


def words(family: str, path: Path, *more: str) -> list[str]:
    """Recipe words of two steps on such a folder."""
    folder = folder_of(family, path)
    return [
        f"model.path={folder}", f"data.path={path / 'rows.jsonl'}", "data.max_length=64", "steps=2", "batch.size=2",
        "eval.at_start=false", "schedule=constant", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_labels_in_transformers(family: str) -> None:
    model = pair_model(family).double()
    width = max(len(p) for p, _ in ROWS)
    ids = torch.tensor([p + [2] * (width - len(p)) for p, _ in ROWS])
    longest = max(len(a) for _, a in ROWS)
    labels = torch.tensor([a + [-100] * (longest - len(a)) for _, a in ROWS])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p, _ in ROWS])
    wanted = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    # The native class computes its loss in float32.
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    rows = [{"row": i, "ids": p + a, "trained": [0] * len(p) + [1] * len(a)} for i, (p, a) in enumerate(ROWS)]
    roles = roles_for(model, Stack([]))
    objective = Sft()
    batch = objective.collate(rows, roles)
    loss = objective.loss(batch, roles)
    assert objective.weight(batch) == 10
    (loss.total / 10).backward()
    bound = 1e-6 if family == "native" else 1e-11
    torch.testing.assert_close(loss.total.detach() / 10, wanted.detach().double(), atol=bound, rtol=bound)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=bound, rtol=bound, msg=f"gradient of {name}")


@pytest.mark.parametrize("family", ["t5", "bart", "native"])
def test_a_run_starts_at_the_loss_of_transformers_and_opens_as_what_it_was(family: str, tmp_path: Path) -> None:
    run = train_recipe(tmp_path / "run", "sft", *words(family, tmp_path, "steps=1", "batch.size=4"))
    text = run.tokenizer
    losses, count = 0.0, 0
    model = pair_model(family)
    for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = text(row["prompt"], return_tensors="pt").input_ids
        answer = torch.tensor([[*text(row["completion"]).input_ids, text.eos_token_id]])
        with torch.no_grad():
            losses += float(model(input_ids=prompt, labels=answer).loss) * answer.numel()
        count += answer.numel()
    assert curve(tmp_path / "run")[0][1] == pytest.approx(losses / count, rel=1e-5)
    opened = open_run(str(tmp_path / "run"))
    assert opened.head == "seq2seq" and type(opened.model) is type(model)
    stock = type(model).from_pretrained(tmp_path / "run" / "final" / "model").eval()
    prompt = text("1+3=").input_ids
    first = stock.config.decoder_start_token_id
    settings = GenerationConfig(max_new_tokens=9, eos_token_id=1, pad_token_id=2, decoder_start_token_id=first)
    stock.generation_config = GenerationConfig()
    wanted = stock.generate(input_ids=torch.tensor([prompt]), generation_config=settings)[0, 1:].tolist()
    assert generate(opened.model, text, [prompt], Sampling(max_new_tokens=9)) == [wanted]


def test_metrics_score_what_transformers_generates(tmp_path: Path) -> None:
    """A BART whose bias allows the letters a to f: with its own answers as the right ones, all are exact at step 0."""
    words_of_run = words("bart", tmp_path)
    text, model = byte_tokenizer(template=None), pair_model("bart")
    letters = [text.convert_tokens_to_ids(letter) for letter in "abcdef"]
    model.final_logits_bias.fill_(-100.0)
    model.final_logits_bias[0, letters] = 0.0
    model.save_pretrained(tmp_path / "model")
    rows = []
    for prompt in ("1+2=", "7-4=", "80+9="):
        ids = text(prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:]
        rows.append({"prompt": prompt, "completion": text.decode([t for t in out.tolist() if t in letters])})
    assert all(4 <= len(row["completion"]) <= 6 for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    longest = max(len(row["completion"]) for row in rows)
    more = ["eval.at_start=true", "eval.metrics=[exact_match]", f"eval.max_new_tokens={longest}"]
    train_recipe(tmp_path / "run", "sft", *words_of_run, f"data.validation={tmp_path / 'rows.jsonl'}", *more, "steps=1")
    assert events(tmp_path / "run", "evaluation")[0]["eval/exact_match"] == 1.0


TRAIN: dict[str, list[str]] = {
    "lora": ["stack.lora.target=attn.q|v"],
    "bitfit": ["stack.bitfit.missing=add_zero"],
    "fishmask": [],
    "ia3": [],
    "adapter": [],
    "mezo": [],
    "coda": [],
    "prefix_tuning": [],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=() if i % 3 == j else pytest.mark.slow)
        for i, kind in enumerate(TRAIN)
        for j, family in enumerate(("t5", "bart", "native"))
    ],
)
def test_wrappers_train_and_reload_to_the_same_loss(kind: str, family: str, tmp_path: Path) -> None:
    """A finished adapter, opened again, has the loss that the run left, which is not that of the base."""
    more = words(family, tmp_path, f"stack=[{kind}]", *TRAIN[kind], "batch.size=4", "optim.lr=1e-2", "eval.batches=1")
    assert check("sft", [*QUIET, *more]).trained > 0
    run = train_recipe(tmp_path / "run", "sft", *more)
    opened = open_run(str(tmp_path / "run"))
    rows = [{"row": 0, "ids": [5, 9, 3, 7, 8, 1], "trained": [0, 0, 0, 1, 1, 1]}]
    losses = []
    for model, stack in ((run.model, run.stack), (opened.model, Stack([]))):
        roles = roles_for(model.eval(), stack)
        with torch.no_grad():
            losses.append(float(Sft().loss(Sft().collate(rows, roles), roles).total))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    with torch.no_grad():
        base = pair_model(family)(torch.tensor([[5, 9, 3]]), labels=torch.tensor([[7, 8, 1]])).loss * 3
    assert losses[0] != pytest.approx(float(base), abs=1e-4)


def test_choices_train(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "choices", *words("bart", tmp_path, "batch.size=4", "eval.at_start=true"))
    steps = events(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(sum(steps[0][part] for part in ("nll", "unlikelihood", "ranking")), rel=1e-5)
    assert steps[1]["nll"] < steps[0]["nll"]


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (
            "clm",
            [],
            "'bart' is an encoder-decoder, and objective=clm trains decoders only; .*both: caclm, choices, hyper_mtf, sft",
        ),
        ("dpo", [], "objective=dpo trains decoders only"),
        ("sft", ["objective.mask=all"], "leaves the encoder of 'bart' nothing to read"),
        ("sft", ["model.config.decoder_start_token_id=null"], "states no token that its decoder starts with"),
    ],
)
def test_what_an_encoder_decoder_cannot_train_is_refused_before_rows_are_read(
    recipe: str, more: list[str], message: str, tmp_path: Path
) -> None:
    overrides = [*QUIET, *words("bart", tmp_path, *more)]
    for way in (lambda: check(recipe, overrides), lambda: train_recipe(tmp_path / "run", recipe, *overrides)):
        with pytest.raises(RecipeError, match=message):
            way()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "native"])
def test_a_resumed_run_is_the_whole_one_to_the_bit(family: str, tmp_path: Path) -> None:
    more = words(family, tmp_path, "steps=4", "stack=[lora]", "stack.lora.target=attn.q|v", "stack.lora.dropout=0.1")
    train_recipe(tmp_path / "whole", "sft", *more)
    stop_after(2, tmp_path / "part", "sft", *more)
    resume(tmp_path / "part")
    assert curve(tmp_path / "part") == curve(tmp_path / "whole")
    whole, part = learned(tmp_path / "whole"), learned(tmp_path / "part")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_branch_at_an_embedding_that_is_never_called_is_refused(kind: str, family: str) -> None:
    """T5 and BART lend one weight to two embeddings; the native model calls the one it has."""
    model = pair_model(family)
    stack = Stack([registry.load_class("stack", kind)(name=kind, target="embed")])
    if family == "native":
        stack.attach(model)
        return
    with pytest.raises(ModelError, match=rf"stack\.{kind}: (model\.)?shared only lends its weight .* leave embed out of"):
        stack.attach(model)


WRAPPERS = {
    "lora": "lora.target=all-linear",
    "ia3": "",
    "adapter": "",
    "bitfit": "bitfit.missing=add_zero",
    "fishmask": "fishmask.num_samples=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "native"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_choices_trains_with_wrappers(kind: str, family: str, tmp_path: Path) -> None:
    """Two steps, stopped in between and resumed to the bit; the run opens with the logits it ended with."""
    more = [f"stack=[{kind}]", *(f"stack.{word}" for word in WRAPPERS[kind].split()), "optim.lr=1e-2"]
    given = words(family, tmp_path, *more)
    run = train_recipe(tmp_path / "whole", "choices", *given)
    stop_after(1, tmp_path / "parts", "choices", *given)
    resume(tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert learned(tmp_path / "parts").keys() == learned(tmp_path / "whole").keys()
    ids = torch.tensor([[5, 9, 3, 44]])
    with torch.no_grad():
        ended = run.model.eval()(input_ids=ids, decoder_input_ids=ids).logits
        opened = open_run(str(tmp_path / "parts")).model(input_ids=ids, decoder_input_ids=ids).logits
        before = pair_model(family)(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(opened, ended, rtol=1e-6, atol=1e-6)
    assert float((ended - before).abs().max()) > 1e-4
