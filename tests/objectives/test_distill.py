"""Distillation: divergences by hand and in float64, parity with the reference trainer, stored tokens, servers, tokenizers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.data.batch_parts import sequences_in
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine import logprob
from llmrecipe.engine.teacher import Teacher, TopCache, TopTokens, aligned, same_vocabulary
from llmrecipe.engine.teacher_server import TeacherServer
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.tiny import FOLDER
from llmrecipe.objectives.divergences import divergence, generalised_jsd, kl, on_top_tokens, sorted_distance
from llmrecipe.objectives.finetuning.distill import Distill
from tests.objectives.harness import rows_of
from tests.objectives.parity import word_tokenizer
from tests.servers import server
from tests.tiny import roles_for, tiny_model
from tests.trainings import curve, resume, stop_after, train_recipe

KINDS = ("forward_kl", "reverse_kl", "jsd")


def two_models(double: bool = True, packing: bool = True) -> Any:
    """A student and, as the teacher, a model of other weights."""
    student, teacher = tiny_model(), tiny_model(seed=9)
    if double:
        student.double(), teacher.double()
    roles = roles_for(student, Stack([]), packing)
    roles.others["teacher"] = Teacher(teacher, word_tokenizer(), torch.device("cpu"))
    return roles


def loss_and_gradients(objective: Any, roles: Any, rows: list[dict[str, Any]] | None = None) -> tuple[torch.Tensor, dict]:
    """The mean loss over targets, and every gradient of it."""
    roles.model.zero_grad(set_to_none=True)
    batch = objective.collate(rows or rows_of(objective), roles)
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in roles.model.named_parameters()}


def test_divergences_by_hand() -> None:
    """P = (1/2, 1/2), Q = (1/4, 3/4)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl(p, q)) == pytest.approx(forward)
    assert float(divergence(p, q, "reverse_kl", 0.5)) == pytest.approx(reverse)
    half = (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)), (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(1.2))
    assert float(generalised_jsd(p, q, 0.5)) == pytest.approx(0.5 * sum(half))


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_the_generalised_divergence_goes_over_into_both_directions(beta: float, limit: str) -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    scaled = generalised_jsd(p, q, beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, divergence(p, q, limit, 0.5), rtol=1e-4, atol=1e-6)


@pytest.mark.parity(method="gkd", reference="trl GKDTrainer")
@pytest.mark.parametrize(("kind", "beta", "theirs"), [("forward_kl", 0.5, 0.0), ("reverse_kl", 0.5, 1.0), ("jsd", 0.3, 0.3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_the_reference(kind: str, beta: float, theirs: float, temperature: float) -> None:
    pytest.importorskip("trl", reason="the reference is trl")
    from trl.experimental.gkd import GKDTrainer

    roles = two_models()
    options = {"divergence": kind, "beta": beta, "temperature": temperature, "squared": False}
    loss, gradients = loss_and_gradients(Distill(**options), roles)
    rows = rows_of(Distill())
    batch = pad([Sequence(r["ids"], r["trained"]) for r in rows], 0)
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.source + 1] = batch.target
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    roles.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        taught = roles.others["teacher"].model(**inputs).logits
    wanted = GKDTrainer.generalized_jsd_loss(
        roles.model(**inputs).logits[:, :-1], taught[:, :-1], labels[:, 1:], beta=theirs, temperature=temperature
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in roles.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_temperature_squared_and_cross_entropy_add_up() -> None:
    roles = two_models()
    plain, _ = loss_and_gradients(Distill(temperature=2.0, squared=False), roles)
    whole, _ = loss_and_gradients(Distill(temperature=2.0, nll_coef=0.5), roles)
    batch = Distill().collate(rows_of(Distill()), roles)
    nll = -roles.engine(batch)["logprobs"].mean()
    torch.testing.assert_close(whole, 4 * plain + 0.5 * nll.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", [{"divergence": "jsd"}, {"top_k": 5}, {"divergence": "uld"}], ids=str)
def test_chunks_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen positions at a time, each chunk computed again in the backward pass."""
    roles = two_models()
    roles.tokenizer = word_tokenizer()
    whole = loss_and_gradients(Distill(**options), roles)
    monkeypatch.setattr(logprob, "chunk_rows", lambda width, device: 16)
    pieces = loss_and_gradients(Distill(**options), roles)
    torch.testing.assert_close(pieces[0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(pieces[1][name], value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_bound_the_divergence_from_below_and_reach_it(kind: str) -> None:
    """Over K tokens and the class of all others; where all 64 are kept, the loss and gradients over the whole vocabulary."""
    roles = two_models()
    whole = loss_and_gradients(Distill(divergence=kind), roles)
    found = [loss_and_gradients(Distill(divergence=kind, top_k=k), roles) for k in (1, 4, 16, 64)]
    values = [float(loss) for loss, _ in found]
    assert values == sorted(values) and 0.0 < values[0] < float(whole[0])
    assert values[-1] == pytest.approx(float(whole[0]), rel=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(found[-1][1][name], value, rtol=1e-4, atol=1e-5)


def test_the_class_of_others_by_hand() -> None:
    """P keeps 0.6 and leaves 0.4; Q = (0.2, 0.3, 0.5) gives the kept token 0.3."""
    p, q = on_top_tokens(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[1]]), torch.tensor([[0.6]]).log())
    torch.testing.assert_close(p.exp(), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(q.exp(), torch.tensor([[0.3, 0.7]]))
    certain, _ = on_top_tokens(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[1]]), torch.zeros(1, 1))
    assert bool(torch.isfinite(certain).all()), "a certain teacher leaves nothing, not minus infinity"


def test_stored_tokens_are_read_again_and_a_damaged_file_is_not(tmp_path: Path) -> None:
    class Never:
        def top(self, *_: Any) -> list[TopTokens]:
            raise AssertionError("all sequences are known")

    teacher = two_models(double=False).others["teacher"]
    sequences = [Sequence([5, 6, 7], [0, 1, 1]), Sequence([8, 9], [0, 1])]
    path = tmp_path / "top.safetensors"
    cache = TopCache(path)
    first = cache.get(sequences, teacher, 4, 1.0)
    cache.save()
    again = TopCache(path).get(sequences[::-1], Never(), 4, 1.0)
    torch.testing.assert_close(again.logprobs, first.logprobs[[2, 0, 1]])
    assert torch.equal(again.ids, first.ids[[2, 0, 1]])
    held = load_file(path)
    held["logprobs"][0, 0] += 1
    save_file(held, path, metadata={"sha256": "0" * 64})
    assert not TopCache(path).known and not path.exists()


def test_a_batch_gives_back_its_sequences_in_both_layouts() -> None:
    wanted = [Sequence([5, 6, 7], [0, 1, 1], prompt=1), Sequence([8, 9, 3, 4], [0, 0, 0, 1], prompt=3)]
    assert sequences_in(pack(wanted)) == wanted == sequences_in(pad(wanted, 0)) == sequences_in(pad(wanted, 0, "left"))


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """What a server says of a model that only counts: token t is followed by t + 1 with 0.7, t + 2 with 0.2."""
    listed = [{str(t + 1): {"logprob": math.log(0.7)}, str(t + 2): {"logprob": math.log(0.2)}} for t in body["prompt"][:-1]]
    return {"choices": [{"prompt_logprobs": [None, *listed]}]}


def test_a_server_gives_the_likeliest_tokens_of_the_targets() -> None:
    with server((200, reply)) as (url, requests):
        teacher = TeacherServer(url, "large")
        found = teacher.top([Sequence([5, 6, 9], [0, 1, 1]), Sequence([3, 4], [0, 0])], 2, 1.0)
    assert [f.ids.tolist() for f in found] == [[[6, 7], [7, 8]], []]
    torch.testing.assert_close(found[0].logprobs.exp(), torch.tensor([[0.7, 0.2], [0.7, 0.2]]))
    assert len(requests) == 1 and requests[0]["body"]["prompt_logprobs"] == 2 and requests[0]["body"]["model"] == "large"
    assert requests[0]["path"].endswith("/completions")


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": [{"text": "hello"}]},
        {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -(10**400)}, "6": {"logprob": -1}}]}]},
        b"[" * 100_000,
    ],
)
def test_a_reply_without_log_probabilities_is_refused(reply: object) -> None:
    with (
        server((200, reply)) as (url, _),
        pytest.raises(RunError, match="prompt_logprobs, as vLLM gives"),
    ):
        TeacherServer(url, "large").top([Sequence([5, 6], [0, 1])], 2, 1.0)


def test_sorted_probabilities_by_hand() -> None:
    """(0.7, 0.3) against (0.2, 0.3, 0.5), in order: |0.7 - 0.5| + |0.3 - 0.3| + |0 - 0.2|."""
    assert float(sorted_distance(torch.tensor([[0.3, 0.7]]), torch.tensor([[0.2, 0.3, 0.5]]))) == pytest.approx(0.4)


def test_uld_of_one_tokenizer_is_the_distance_of_the_same_positions() -> None:
    """Where both read the same tokens, every target is paired with itself."""
    roles = two_models()
    roles.tokenizer = word_tokenizer()
    rows = [{"row": 0, "ids": [1, 5, 6, 7, 8, 2], "trained": [0, 0, 0, 1, 1, 1]}]
    loss, _ = loss_and_gradients(Distill(divergence="uld"), roles, rows)
    ids = torch.tensor([rows[0]["ids"]])
    with torch.no_grad():
        p, q = (m(ids).logits[0, 2:5].softmax(-1) for m in (roles.others["teacher"].model, roles.model))
    torch.testing.assert_close(loss, sorted_distance(p, q).mean(), rtol=1e-9, atol=1e-12)


def test_agreement_counts_equal_best_tokens_and_uld_has_none() -> None:
    roles = two_models()
    roles.tokenizer = word_tokenizer()
    objective = Distill()
    batch = objective.collate(rows_of(objective), roles)
    plain = pad([Sequence(r["ids"], r["trained"]) for r in rows_of(objective)], 0)
    with torch.no_grad():
        guesses = [
            m(plain.input_ids, attention_mask=plain.attention_mask).logits.flatten(0, 1)[plain.source].argmax(-1)
            for m in (roles.model, roles.others["teacher"].model)
        ]
        equal = float((guesses[0] == guesses[1]).sum())
        loss = objective.loss(batch, roles)
    total, count = loss.metrics["agreement"]
    assert (float(total), count) == (equal, float(batch.target.numel())) and loss.metrics.keys() == objective.measures().keys()
    other = Distill(divergence="uld")
    found = other.loss(other.collate(rows_of(other), roles), roles).metrics
    assert found.keys() == other.measures().keys() == {"divergence", "nll", "accuracy"}


def test_uld_pairs_tokens_of_two_tokenizers_run_by_run() -> None:
    """The teacher splits each word into letters: w05 is w, 0, 5, so the two words of a run meet the first two of six tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({**{c: i + 3 for i, c in enumerate("w0123456789")}, "<e>": 2}, unk_token="w"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    letters = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="w")
    roles = two_models()
    teacher = roles.others["teacher"] = Teacher(tiny_model(seed=9), letters, torch.device("cpu"))
    batch = pad([Sequence([4, 5, 6, 7, 8, 2], [0, 1, 1, 0, 1, 1])], 0)
    states, place = aligned(batch, teacher, word_tokenizer())
    # Runs: "w05 w06" -> 6 letters, "w08" and its end -> 3 letters and the end.
    assert len(states) == 10 and place.tolist() == [0, 1, 6, 7]


def test_unlike_vocabularies_are_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match="divergence=uld"):
        same_vocabulary(word_tokenizer(), type("T", (), {"get_vocab": lambda self: {"a": 0}})(), "large")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.teacher=''"], "objective.teacher: must be given"),
        (["objective.divergence=uld", "objective.top_k=4"], "uld sorts whole distributions"),
        (["objective.teacher=http://localhost:1/v1"], "objective.teacher_model"),
        (["objective.teacher=http://localhost:1/v1", "objective.teacher_model=m"], "objective.top_k"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        train_recipe(tmp_path / "run", "distill", *words)


def test_no_targets_are_nothing() -> None:
    roles = two_models()
    loss = Distill(top_k=3).loss(pack([]), roles)
    assert float(loss.total.detach()) == 0.0 and loss.total.requires_grad


@pytest.mark.slow
def test_a_server_and_a_folder_with_the_same_weights_teach_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs; what is stored is read by `eval` and by a second run, without the teacher."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    taught = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            top = taught(torch.tensor([body["prompt"]])).logits[0, :-1].log_softmax(-1).topk(body["prompt_logprobs"])
        listed = [
            {str(int(i)): {"logprob": float(v)} for i, v in zip(*row, strict=True)}
            for row in zip(top.indices, top.values, strict=True)
        ]
        return {"choices": [{"prompt_logprobs": [None, *listed]}]}

    words = ["steps=2", "data.limit=4", "batch.size=2", "eval.batches=1", "model.config.num_hidden_layers=1", "eval.test=false"]
    words += ["objective.top_k=6"]
    with server((200, answer)) as (url, requests):
        train_recipe(tmp_path / "server", "distill", *words, f"objective.teacher={url}", "objective.teacher_model=large")
        assert len(requests) == 4 + 70, "each row of training and validation once"
    train_recipe(tmp_path / "folder", "distill", *words)
    one, two = (curve(tmp_path / name) for name in ("server", "folder"))
    assert [c[1:3] for c in one] == [pytest.approx(c[1:3], rel=1e-4) for c in two]
    monkeypatch.setattr(Teacher, "top", lambda *_: pytest.fail("all rows are stored"))
    train_recipe(tmp_path / "again", "distill", *words)
    assert curve(tmp_path / "again") == two


def test_a_run_is_not_resumed_under_other_weights_of_its_teacher(tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    small = {"num_hidden_layers": 1, "vocab_size": 931, "hidden_size": 32}
    shutil.copytree(FOLDER, teacher)
    tiny_model(**small).save_pretrained(teacher)
    few = ["data.limit=4", "batch.size=2", "eval.every=null", "eval.test=false", "model.config.num_hidden_layers=1", "steps=4"]
    stop_after(2, run, "distill", *few, f"objective.teacher={teacher}")
    tiny_model(seed=1, **small).save_pretrained(teacher)
    with pytest.raises(RunError, match=r"teacher/model.safetensors has other content"):
        resume(run)
    tiny_model(**small).save_pretrained(teacher)
    resume(run)
    assert len(curve(run)) == 4
