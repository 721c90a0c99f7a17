"""Every wrapper (under SFT), objective and optimizer (under LoRA) that declares a value of `runtime.shard`, on two processes.

What declares nothing is refused before anything is read: see tests/recipe/test_sharding_rules.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core import registry
from tests.runtime.test_process_matrix import OBJECTIVES, WRAPPERS, Matrix, results

SHARDS = ("zero1", "zero2", "zero3")
OPTIMIZERS = {"sgd": ["sft_lora", "optim=sgd", "optim.momentum=0.9"]}
CASES = {
    **{f"stack {name}": words for name, words in WRAPPERS.items()},
    **{f"objective {name}": words for name, words in OBJECTIVES.items()},
    **{f"optim {name}": words for name, words in OPTIMIZERS.items()},
}


def declared(case: str) -> tuple[str, ...]:
    """The values under which a case has been shown right; LoRA and AdamW have all of them."""
    group, _, name = case.partition(" ")
    return tuple(registry.spec(group, name).facts.get("shards") or ())


class Sharded(Matrix):
    """The cases of one value, each run once on one process and once on two under that value."""

    def __init__(self, folder: Path, shard: str):
        self.folder = folder
        cases = {case: words for case, words in CASES.items() if shard in declared(case)}
        results(cases, folder / "1", 1)
        results({case: [*words, f"runtime={shard}"] for case, words in cases.items()}, folder / "2", 2)


@pytest.fixture(scope="module", params=SHARDS)
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Sharded]:
    """One process group for each value."""
    return request.param, Sharded(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case: str, matrix: tuple[str, Sharded]) -> None:
    shard, found = matrix
    if shard not in declared(case):
        pytest.skip(f"refused under runtime.shard={shard}")
    found.compare(case)
