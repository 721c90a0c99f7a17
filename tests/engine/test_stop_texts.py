"""Stop texts: every way to decode ends an answer before the first of them, and no other row sees it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from llmrecipe.engine import decoders
from llmrecipe.engine.answer_ends import AnswerEnds, answer_ends
from llmrecipe.engine.generation import answered, generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.models import kv_cache
from tests.engine.test_continuous_batching import PROMPTS, counted, ending
from tests.methods.additive.harness import model_of
from tests.tiny import Tokenizer


class Spelled(Tokenizer):
    """A tokenizer whose tokens 3 to 62 are pairs of letters: 3 is `da`, 4 `ea`; the special ones have no text."""

    all_special_tokens: ClassVar[list[str]] = ["<pad>", "<s>", "</s>", "<mask>"]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i % 26) + chr(97 + i // 26) for i in ids if i not in self.all_special_ids)


HOW = Sampling(12, 1.0, seed=4)


def cut_by_hand(ids: list[int], stop: str) -> list[int]:
    """The tokens up to the one that completes the stop text."""
    for count in range(1, len(ids) + 1):
        if stop in Spelled().decode(ids[:count]):
            return ids[:count]
    return ids


@pytest.mark.parametrize("way", ["continuous", "static", "padded", "equal", "uncached"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_decoder_ends_a_row_with_its_stop_text_alone(way: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending(model_of(family))
    if way in ("continuous", "static") and kv_cache.fresh(model) is None:
        pytest.skip("its cache has no rows that could leave")
    named = {**decoders.WAYS, "uncached": decoders.uncached}
    monkeypatch.setattr("llmrecipe.engine.generation.decoder_of", lambda job, task: named[way])
    whole = generate(model, Spelled(), PROMPTS, HOW)
    longest = max(whole, key=len)
    text = Spelled().decode(longest)
    stop = text[3:7]  # from the middle of the second token to the middle of the fourth
    wanted = [cut_by_hand(ids, stop) for ids in whole]
    assert len(longest) > 5 and wanted != whole and sum(a != b for a, b in zip(wanted, whole, strict=True)) < len(whole)
    for batch in (1, 3, 16):
        sampling = dataclasses.replace(HOW, batch=batch, stop=("never here", stop))
        assert generate(model, Spelled(), PROMPTS, sampling) == wanted
    ends = answer_ends(model, Spelled(), sampling)
    cut = wanted[whole.index(longest)]
    assert ends.text(cut) == text[:3] and ends.finished(cut) and not ends.finished(cut[:-1])


def test_a_row_that_stops_leaves_the_batch_at_once() -> None:
    model, prompts = ending(model_of("llama")), [prompt for prompt in PROMPTS if len(prompt) > 1]
    whole = generate(model, Spelled(), prompts, HOW)
    stop = Spelled().decode(max(whole, key=len))[3:7]
    work = counted(model)
    sampling = dataclasses.replace(HOW, batch=3, stop=(stop,))
    found = dict(answered(model, Spelled(), prompts, sampling))
    assert sum(map(len, found.values())) < sum(map(len, whole))
    assert work.decoded == sum(len(ids) for ids in found.values()) - len(found)


class Written(Tokenizer):
    """A tokenizer of given token texts; id 2 is special."""

    all_special_ids: ClassVar[list[int]] = [2]
    all_special_tokens: ClassVar[list[str]] = ["<end>"]

    def __init__(self, *texts: str):
        self.texts = texts

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.texts[i] for i in ids if i != 2)


def test_texts_by_hand() -> None:
    def ends(*stop: str, **more: Any) -> AnswerEnds:
        return AnswerEnds(Written("Two ", "hens.\nQ", "", ": How", " many?"), [], Sampling(9, stop=stop, **more))

    two = ends("\nQ:", "many")
    assert [two.reached([0, 1, 3, 4][:n]) for n in range(1, 5)] == [False, False, True, True]
    assert two.text([0, 1, 3]) == "Two hens." and two.text([0, 1]) == "Two hens.\nQ"
    assert ends("Two").text([0, 1]) == "" and ends().text([0, 1, 2]) == "Two hens.\nQ"
    # A special token has no text; where it is a stop text, its token ends the answer.
    assert (
        ends("<end>").finished([0, 2]) and not ends("<e").finished([0, 2]) and ends("<end>").text([0, 1, 2]) == "Two hens.\nQ"
    )
    assert ends().reached([0] * 9) and not ends().finished([0] * 9)


def test_a_stop_text_is_found_however_far_the_answer_has_come() -> None:
    """Only the end of a long answer is decoded for each token; tokens without text do not hide a stop text."""
    tokenizer = Written("a", "S", "", "", "TO", "P and more of it")
    ends = AnswerEnds(tokenizer, [], Sampling(9999, stop=("STOP",)))
    assert ends.finished([*[0] * 500, 1, *[3] * 70, 4, 5]) and not ends.finished([*[0] * 500, 4, 5])
