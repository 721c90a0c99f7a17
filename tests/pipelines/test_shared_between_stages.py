"""What stages, starts and requests share: plugins, wiring, results, counts, the way a judge is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.journal import Journal
from llmrecipe.core.paths import ASSETS
from llmrecipe.feedback.judges.feedback import judge_facts
from llmrecipe.feedback.judges.http import Http
from llmrecipe.feedback.judges.labeller import COUNT, Ask
from llmrecipe.pipelines.run_stages import state_of
from llmrecipe.pipelines.subprocesses import command_of
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.recipe_paths import find_recipe
from tests.servers import server

SCHEDULE = '''"""Half the rate."""

from __future__ import annotations

from llmrecipe.plugin import Schedule, register


@register
class {name}(Schedule):
    """Half the rate."""

    def factor(self, step: int, steps: int) -> float:
        """Return 1/2."""
        return 0.5
'''
PIPELINE = """
plugins: [{package}]
stages:
  one: {{recipe: sft_lora, schedule: {{kind: {kind}}}}}
  rows: {{kind: generate, model: tiny, prompts: "builtin:prompts"}}
  two: {{recipe: sft_lora, with: ["model.path=${{stage:one}}"]}}
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline whose first stage needs a plugin that the pipeline alone names."""
    monkeypatch.chdir(tmp_path)
    package, kind = f"own_{tmp_path.name}".replace("-", "_"), "halved_rate"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / f"{kind}.py").write_text(SCHEDULE.format(name="HalvedRate"))
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = list(registry._plugins)
    (tmp_path / "p.yaml").write_text(PIPELINE.format(package=package, kind=kind))
    yield "p.yaml"  # type: ignore[misc]
    registry._plugins[:] = kept
    registry._index.cache_clear()
    for name in [n for n in sys.modules if n.startswith(package)]:
        del sys.modules[name]


def test_plugins_of_a_pipeline_reach_its_stages(pipeline: str) -> None:
    """In the words of each process, in the recipe it keeps, and in its key."""
    made = plan(compose(pipeline))
    package = compose(pipeline).recipe.plugins[0]
    for planned in made.stages:
        assert f'plugins=["{package}"]' in command_of(planned, continued=False), planned.name
        assert planned.mapping["plugins"] == [package] and package in planned.code
    again = plan(compose(pipeline))
    assert [s.key for s in again.stages] == [s.key for s in made.stages]


def test_a_result_that_nobody_uses_gets_a_line(pipeline: str) -> None:
    notes = plan(compose(pipeline)).notes
    assert [n for n in notes if "no later stage" in n] == ["rows: no later stage uses its result; ${stage:rows} names it"]


def test_a_with_that_drops_the_wiring_gets_a_line(pipeline: str) -> None:
    def lines(*words: str) -> list[str]:
        return [n for n in plan(compose(pipeline, list(words))).notes if "replaces the whole list" in n]

    (line,) = lines("stages.two.with=['steps=3']")
    assert line.startswith("stages.two.with: ") and "${stage:one}" in line and "stages.two.KEY=VALUE" in line
    assert lines("stages.two.with=['model.path=${stage:one}','steps=3']") == []
    assert lines("stages.two.steps=3") == []


def test_a_finished_stage_without_its_result_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("stages: {one: {recipe: sft_lora}}\n")
    (planned,) = plan(compose("p.yaml")).stages
    planned.dir.mkdir(parents=True)
    (planned.dir / "recipe.yaml").write_text("{}\n")
    (planned.dir / "status.json").write_text('{"status": "done"}')
    assert state_of(planned) == "interrupted"
    (planned.dir / "final").mkdir()
    assert state_of(planned) == "done"


@pytest.mark.parametrize(("recipe", "rows"), [("rlhf", "comparisons"), ("rlaif", "preference")])
def test_the_overlap_of_prompts_is_the_one_that_the_recipe_states(recipe: str, rows: str) -> None:
    def prompts(name: str) -> list[Any]:
        lines = (ASSETS / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.dumps(json.loads(line)["prompt"]) for line in lines]

    policy, pairs = prompts("prompts"), set(prompts(rows))
    shared = sum(p in pairs for p in policy)
    assert f"{shared} of PPO's {len(policy):,} prompts" in find_recipe(recipe).read_text(encoding="utf-8")


# --- judges -----------------------------------------------------------------------------------------------------------


def reply(said: str, logprobs: bool = True) -> dict[str, Any]:
    top = [{"token": t, "logprob": p} for t, p in (("A", -0.1), ("B", -2.4))]
    content = [{"token": said, "logprob": top[0]["logprob"], "top_logprobs": top}]
    choice: dict[str, Any] = {"message": {"content": said}}
    return {
        "choices": [{**choice, **({"logprobs": {"content": content}} if logprobs else {})}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 1},
    }


def question(number: int) -> Ask:
    return Ask(({"role": "user", "content": f"question {number}"},))


def judge(url: str, **more: Any) -> Http:
    return Http(url=url, model="m", concurrency=1, retries=0, wait=0.01, price_in=1e6, **{"votes": 4, **more})


def test_counts_of_a_judge_survive_a_resume(tmp_path: Path) -> None:
    """Ten questions in one start, the same ten and five more in the next: what was spent is the sum."""
    with server((200, reply("A"))) as (url, asked):
        first = judge(url)
        first.use_cache(Journal(tmp_path / "judge.jsonl"))
        first.decide([question(i) for i in range(10)], ["A", "B"])
        second = judge(url)
        second.use_cache(Journal(tmp_path / "judge.jsonl"))
        second.decide([question(i) for i in range(15)], ["A", "B"])
    facts = judge_facts(second)
    assert len(asked) == 15 == facts["asked"] == facts["by_logprobs"] == facts["logprob_requests"]
    assert facts["prompt_tokens"] == 150 and facts["completion_tokens"] == 15 and facts["cost"] == pytest.approx(150.0)


def test_a_reply_and_its_count_are_kept_together(tmp_path: Path) -> None:
    """Wherever the file of a killed process ends, it counts as many replies as it holds."""
    with server((200, reply("A"))) as (url, _):
        first = judge(url)
        first.use_cache(Journal(tmp_path / "judge.jsonl"))
        first.decide([question(i) for i in range(4)], ["A", "B"])
    whole = (tmp_path / "judge.jsonl").read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for place in sorted({*ends, *(e + 5 for e in ends[:-1])}):
        (tmp_path / "cut.jsonl").write_bytes(whole[:place])
        memory = Journal(tmp_path / "cut.jsonl")
        replies = sum(key != COUNT for key in memory)
        counted = memory[COUNT]["by_logprobs"] if COUNT in memory else 0  # type: ignore[index]
        assert counted >= replies, "a request that was made may be known before its reply, never after"
        again = judge(url)
        again.use_cache(memory)
        assert again.count.by_logprobs == counted
        memory.close()


def test_one_reply_without_log_probabilities_costs_one_vote() -> None:
    with server((200, reply("A")), (200, reply("A", logprobs=False)), (200, reply("A", logprobs=False)), (200, reply("A"))) as (
        url,
        asked,
    ):
        one = judge(url, votes=1)
        found = one.decide([question(i) for i in range(40)], ["A", "B"])
    assert [c.how for c in found if c is not None] == ["logprobs", "votes"] + ["logprobs"] * 38
    facts = judge_facts(one)
    assert (facts["logprob_requests"], facts["vote_requests"], len(asked)) == (40, 1, 41)


def test_a_server_that_starts_without_log_probabilities_is_tried_again() -> None:
    """Three silent questions, then votes, and from the twentieth on log-probabilities: 3 + 41 and 19 votes of 4."""

    def answer(body: dict[str, Any]) -> bytes:
        seen.append(body)
        return json.dumps(reply("A", logprobs=len(seen) > 30)).encode()

    seen: list[Any] = []
    with server((200, answer)) as (url, _):
        one = judge(url)
        found = one.decide([question(i) for i in range(60)], ["A", "B"])
    assert [c.how for c in found if c is not None] == ["votes"] * 19 + ["logprobs"] * 41
    facts = judge_facts(one)
    assert facts["logprob_requests"] == 3 + 41 and facts["vote_requests"] == 19 * 4
    assert len(seen) == facts["logprob_requests"] + facts["vote_requests"]
