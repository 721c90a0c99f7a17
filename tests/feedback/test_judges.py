"""Every kind of judge through the same promises: a rule, a model in this process, a model behind HTTP."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.data.toy import grammar, scorers
from llmrecipe.feedback.judges.labeller import LEAST, Ask, Forgetful, Judge, build_judge
from llmrecipe.feedback.judges.rule import judge_rule, soften
from tests.servers import server


def compare(first: str, second: str, prompt: str = "Tell me about the owl, not the cow.") -> Ask:
    words = f"Which answer is polite? A: {first} B: {second}"
    return Ask(({"role": "user", "content": words},), "compare", {"prompt": prompt, "first": first, "second": second})


def revise(answer: str, prompt: str = "Tell me about the owl, not the cow.") -> Ask:
    words = f"Make this answer polite: {answer}"
    return Ask(({"role": "user", "content": words},), "revise", {"prompt": prompt, "answer": answer})


OWL = "The owl is green and likes cake."
GOOD, BAD = f"{grammar.POLITE[0]} {OWL}", f"{grammar.RUDE[0]} {OWL}"
PAIRS = [(GOOD, BAD), (BAD, GOOD), (f"{grammar.RUDE[2]} {OWL}", f"{grammar.POLITE[3]} {OWL}")]


def chat(body: dict[str, Any]) -> dict[str, Any]:
    """A server that is polite by rule: logprobs where they are asked for, else text."""
    said = body["messages"][-1]["content"]
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": ""}}
    pair = re.fullmatch(r"Which answer is polite\? A: (.*) B: (.*)", said)
    if pair:
        first = 0.9 if scorers.polite(pair[1]) else 0.1
        tokens = {"A": 0.5 * first, " A": 0.4 * first, "B": 0.9 * (1 - first), "It": 0.1}
        choice["message"]["content"] = "A" if first > 0.5 else "B"
        if body.get("logprobs"):
            top = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
            choice["logprobs"] = {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": top}]}
    else:
        choice["message"]["content"] = scorers.corrected("", said.partition(": ")[2])
    return {"choices": [choice], "usage": usage}


@pytest.fixture(params=["rule", "local", "http"])
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    with server((200, chat)) as (url, _):
        options = {"local": {"path": "tiny"}, "http": {"url": url, "model": "judge"}}
        made = build_judge({"kind": request.param, **options.get(request.param, {})}, "judge")
        made.check("judge")
        made.open()
        yield made


def test_contract_choices(judge: Judge) -> None:
    asks = [compare(*pair) for pair in PAIRS]
    found = judge.choice_logprobs(asks, ["A", "B"])
    assert [len(row) for row in found] == [2, 2, 2]
    # The better answer is chosen, wherever it stands.
    assert [row[0] > row[1] for row in found] == [True, False, False]
    # Log-probabilities: at most all mass is on the options, and nearly all of it is here.
    assert all(0.5 < math.fsum(map(math.exp, row)) <= 1.0 + 1e-6 for row in found)
    # A value belongs to its option, not to its place.
    judge.use_cache(Forgetful())
    swapped = judge.choice_logprobs(asks, ["B", "A"])
    if judge.__class__.__name__ != "Rule":  # a rule's weights are for the first and the second answer
        assert swapped == [pytest.approx(row[::-1], abs=1e-5) for row in found]


def test_contract_texts(judge: Judge) -> None:
    texts = judge.generate([revise(BAD), revise(GOOD), revise(f"{grammar.RUDE[3]} {OWL}")])
    assert texts[0] == GOOD and texts[2] == f"{grammar.POLITE[3]} {OWL}"
    assert judge.generate([revise(BAD)]) == [GOOD]


def test_contract_stop_texts(judge: Judge) -> None:
    """A text ends before the first of them: a model's is cut, a server is asked to cut, a rule writes none of its own."""
    kind = judge.identity.partition(":")[0]
    if kind == "rule":
        pytest.skip("a rule has no stop texts")
    with server((200, chat)) as (url, asked):
        own = {"local": {"path": "tiny"}, "http": {"url": url, "model": "judge"}}[kind]
        stopped = build_judge({"kind": kind, **own, "stop": [" and"]}, "judge")
        stopped.open()
        (text,) = stopped.generate([revise(BAD)])
        assert asked[0]["body"]["stop"] == [" and"] if kind == "http" else text == GOOD.partition(" and")[0] != GOOD
    assert stopped.identity != build_judge({"kind": kind, **own}, "judge").identity


def test_contract_memory(judge: Judge) -> None:
    """The same question is put once, also inside a call; a memory handed on asks nothing at all."""
    memory = Forgetful()
    judge.use_cache(memory)
    asks = [compare(*PAIRS[0]), compare(*PAIRS[1]), compare(*PAIRS[0])]
    first = judge.choice_logprobs(asks, ["A", "B"])
    assert first[0] == first[2] and (judge.count.requested, judge.count.remembered) == (2, 1)
    texts = judge.generate([revise(BAD)])
    assert len(memory) == 3
    again = build_judge({"kind": "rule"}, "judge")
    again.__dict__["write"] = again.__dict__["choose"] = None
    assert judge.choice_logprobs(asks, ["A", "B"]) == first and judge.generate([revise(BAD)]) == texts
    assert (judge.count.requested, judge.count.remembered) == (3, 5)
    assert judge.choice_logprobs([], ["A", "B"]) == [] == judge.generate([])


def test_contract_identity(judge: Judge) -> None:
    kind = judge.identity.partition(":")[0]
    assert kind in registry.names("judge") and judge.identity == judge.identity
    options = {name: getattr(judge, name) for name in registry.spec("judge", kind).options}
    changed = {"rule": {"sure": 0.8}, "local": {"temperature": 0.5}, "http": {"temperature": 0.1}}[kind]
    assert build_judge({"kind": kind, **options}, "judge").identity == judge.identity
    assert build_judge({"kind": kind, **options, **changed}, "judge").identity != judge.identity


def test_a_rule_is_as_sure_as_it_is_told() -> None:
    assert [math.exp(v) for v in soften([1.0, 0.0], 0.9)] == pytest.approx([0.9, 0.1])
    assert [math.exp(v) for v in soften([0.5, 0.5], 0.9)] == pytest.approx([0.5, 0.5])
    assert [math.exp(v) for v in soften([0.0, 0.0, 1.0, 0.0], 0.7)] == pytest.approx([0.1, 0.1, 0.7, 0.1])
    sure = build_judge({"kind": "rule", "sure": 1.0}, "judge")
    assert sure.choice_logprobs([compare(*PAIRS[0])], ["A", "B"]) == [[0.0, LEAST]]


def test_the_rule_criticises_and_rates() -> None:
    judge = build_judge("rule", "judge")
    parts = {
        "prompt": "Tell me about the owl, not the cow.",
        "answer": "Go away and be quiet. The cow is white and likes corn.",
    }
    critique = judge.generate([Ask(({"role": "user", "content": "?"},), "critique", parts)])[0]
    assert critique == " ".join(scorers.critique(parts["prompt"], parts["answer"])) and "rude" in critique and "cow" in critique
    numbers = [str(i) for i in range(1, 11)]

    def best(answer: str) -> str:
        ask = Ask(({"role": "user", "content": "?"},), "rate", {**parts, "answer": answer})
        row = judge.choice_logprobs([ask], numbers)[0]
        assert math.fsum(map(math.exp, row)) == pytest.approx(1.0) and math.exp(max(row)) == pytest.approx(0.9)
        return numbers[row.index(max(row))]

    assert [best(GOOD), best(parts["answer"])] == ["10", "1"]
    assert best(BAD) in ("5", "6")


def test_a_rule_of_ones_own(own_rules: None) -> None:
    @judge_rule
    def longest(ask: Ask, options: Any) -> Any:
        return [len(ask.parts["first"]), len(ask.parts["second"])] if options else None

    judge = build_judge({"kind": "rule", "rule": "longest", "sure": 1.0}, "judge")
    judge.check("judge")
    assert judge.choice_logprobs([compare("abc", "a")], ["A", "B"]) == [pytest.approx([math.log(0.75), math.log(0.25)])]
    assert judge.generate([revise("x")]) == [None] and judge.count.failures == 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_of_a_rule_that_are_none(own_rules: None, weights: list[float]) -> None:
    @judge_rule
    def wrong(ask: Ask, options: Any) -> Any:
        return weights

    with pytest.raises(RecipeError, match="one finite weight >= 0 for each option"):
        build_judge({"kind": "rule", "rule": "wrong"}, "judge").choice_logprobs([compare("a", "b")], ["A", "B"])


def test_a_rule_that_scores_both_answers_zero_prefers_neither(own_rules: None) -> None:
    """Zero is a weight: 0 of 5 points for each of two bad answers is one half for each, as 5 of 5 is."""

    @judge_rule
    def points(ask: Ask, options: Any) -> Any:
        return [float(ask.parts[place].count("+")) for place in ("first", "second")]

    judge = build_judge({"kind": "rule", "rule": "points", "sure": 1.0}, "judge")
    even = pytest.approx([math.log(0.5)] * 2)
    assert judge.choice_logprobs([compare("bad", "worse"), compare("++", "++")], ["A", "B"]) == [even, even]
    found = judge.choice_logprobs([compare("+", "none")], ["A", "B"])[0]
    assert found is not None and math.exp(found[0]) == pytest.approx(1.0)


def test_local_choices_are_the_models_probabilities() -> None:
    """Against the plain softmax of the whole model, and for options of several tokens against continuations one by one."""
    import torch

    from llmrecipe.data.tokenize.chat_templates import prompt_ids
    from llmrecipe.feedback.judges.local import spell

    judge = build_judge({"kind": "local", "path": "tiny", "batch": 2}, "judge")
    asks = [compare(*pair) for pair in PAIRS]
    roles = judge.roles  # type: ignore[attr-defined]
    tokenizer, model = roles.tokenizer, roles.model

    def log(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    assert spell(tokenizer, "A") == {(tokenizer.convert_tokens_to_ids(t),) for t in ("A", "\u0120A")}
    found = judge.choice_logprobs(asks, ["A", "B"])
    for ask, row in zip(asks, found, strict=True):
        probabilities = log(prompt_ids(tokenizer, ask.turns)).exp()
        for option, value in zip("AB", row, strict=True):
            wanted = math.fsum(float(probabilities[path[0]]) for path in spell(tokenizer, option))
            assert math.exp(value) == pytest.approx(wanted, rel=1e-4)

    digits = {d: tokenizer.convert_tokens_to_ids(d) for d in "10"}
    assert (digits["1"], digits["0"]) in spell(tokenizer, "10")
    numbers = [str(i) for i in range(1, 11)]
    row = judge.choice_logprobs(asks[:1], numbers)[0]
    ids = prompt_ids(tokenizer, asks[0].turns)
    ten = 0.0
    for path in spell(tokenizer, "10"):
        ten += math.exp(sum(float(log([*ids, *path[:i]])[path[i]]) for i in range(len(path))))
    one = math.fsum(math.exp(float(log(ids)[path[0]])) for path in spell(tokenizer, "1") if len(path) == 1)
    assert math.exp(row[9]) == pytest.approx(ten, rel=1e-3)
    assert math.exp(row[0]) == pytest.approx(one - ten, rel=1e-3)


def test_local_without_packing_gives_the_same() -> None:
    one, other = (build_judge({"kind": "local", "path": "tiny"}, "judge") for _ in range(2))
    other.roles.packing = not one.roles.packing  # type: ignore[attr-defined]
    asks = [compare(*pair) for pair in PAIRS]
    for options in (["A", "B"], ["1", "10", "2"]):
        for row, same in zip(one.choice_logprobs(asks, options), other.choice_logprobs(asks, options), strict=True):
            assert row == pytest.approx(same, abs=1e-4)


def test_the_base_under_a_run_judges_without_its_adapters(tmp_path: Any) -> None:
    from tests.trainings import train_recipe

    run = tmp_path / "run"
    train_recipe(run, "sft_lora", "steps=4", "optim.lr=2e-3", "batch.size=4", "eval.batches=1", "schedule=constant")
    asks = [compare(*pair) for pair in PAIRS]
    judges = [{"path": "tiny"}, {"path": str(run), "base": True}, {"path": str(run)}]
    plain, base, adapted = (
        build_judge({"kind": "local", **options}, "judge").choice_logprobs(asks, ["A", "B"]) for options in judges
    )
    assert base == [pytest.approx(row, abs=1e-6) for row in plain]
    assert max(abs(a - b) for x, y in zip(plain, adapted) for a, b in zip(x, y)) > 1e-2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"kind": "rull"}, r"judge.kind: there is no judge 'rull'; did you mean 'rule'"),
        ({"kind": "rule", "shure": 1}, r"judge.shure: rule has no option 'shure'; did you mean 'sure'"),
        ({"kind": "rule", "rule": "maners"}, r"judge.rule: .*did you mean 'manners'"),
        ({"kind": "rule", "sure": 0.2}, r"judge.sure: must be >= 0.5"),
        ({"kind": "http", "url": "localhost", "model": "m"}, r"judge.url: must be an address"),
        ({"kind": "http", "url": "http://x"}, r"judge.model: must be given"),
        ({"kind": "http", "url": "http://x", "model": "m", "key_env": "NO_SUCH_KEY_SET"}, r"NO_SUCH_KEY_SET is not set"),
        ({"kind": "local", "base": True}, r"judge.base: .*judge.path=RUN"),
        ({}, r"judge: must be a mapping with a kind.*http, local, rule"),
    ],
)
def test_wrong_options_are_explained(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_judge(body, "judge").check("judge")


def test_a_local_judge_needs_a_model() -> None:
    with pytest.raises(RecipeError, match=r"judge.path: must be given"):
        build_judge("local", "judge").open()


def test_spellings_that_begin_with_each_other_are_counted_once() -> None:
    """P(1) = .3 + .1 (two spellings) less P(10) = .3 * .5; hand-worked, with a spelling of its own inside another one."""
    from llmrecipe.feedback.judges.choice import read_paths
    from llmrecipe.feedback.judges.local import leads_of

    tables = {(): {1: 0.3, 2: 0.1}, (1,): {0: 0.5}, (1, 0): {0: 0.25}}
    one, ten, hundred = {(1,), (2,)}, {(1, 0)}, {(1, 0, 0)}
    found = read_paths(tables, leads_of([one, ten, hundred]), 3).choice()
    assert [math.exp(v) for v in found.logprobs] == pytest.approx([0.4 - 0.15, 0.15 - 0.0375, 0.0375])
    assert found.mass == pytest.approx(0.4)
    twice = read_paths(tables, leads_of([{(1,), (1, 0)}]), 1).choice()
    assert math.exp(twice.logprobs[0]) == pytest.approx(0.3)


def test_random_pairs_are_judged_by_the_embedded_model() -> None:
    rng = Random(5)
    asks, wanted = [], []
    for _ in range(24):
        request = grammar.request(rng)
        first = rng.random() < 0.5
        answers = [grammar.answer(rng, request, polite, True) for polite in (first, not first)]
        asks.append(compare(*answers, request.text))
        wanted.append(first)
    rule, local = build_judge("rule", "judge"), build_judge({"kind": "local", "path": "tiny"}, "judge")
    for judge, least in itertools.product((rule, local), (23,)):
        found = judge.choice_logprobs(asks, ["A", "B"])
        assert sum((row[0] > row[1]) == first for row, first in zip(found, wanted, strict=True)) >= least
