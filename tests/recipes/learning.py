"""What every packaged recipe is proven to learn: a metric of its whole run, the bound it reaches, the bound its control misses.

A control is the same recipe on training rows (or a reward) from which nothing about the held-out rows can be learned; the
held-out rows stay as they are. Where an exact answer is within a minute's reach it is the metric. A loss has its bound below
what a control reaches, for a control too learns how answers look: with answers of other rows the list task ends near 1
nat a token, and whoever copies the words of the request, in whatever order, near 0.3.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrecipe.core.registry import PACKAGE
from llmrecipe.feedback.rewards.function import reward_function
from llmrecipe.models.tiny import FOLDER

DATA = PACKAGE / "assets" / "data"
Row = dict[str, Any]
Spoil = Callable[[Path], list[str]]
"""Words for a recipe whose run can learn nothing, and what they need in a folder."""


@dataclass(frozen=True)
class Learns:
    """A whole run as shipped ends at `reached` or better, its control at `missed` or worse; a loss where reached < missed."""

    metric: str
    reached: float
    missed: float
    spoil: Spoil
    words: tuple[str, ...] = ()
    """Words for both runs."""
    within: tuple[tuple[str, float, float], ...] = ()
    """Other metrics of the run with their least and greatest value, where a score alone could be had by cheating."""

    def holds(self, value: float) -> bool:
        """Whether a run has learned."""
        return value >= self.reached if self.reached > self.missed else value <= self.reached

    def fails(self, value: float) -> bool:
        """Whether a control has not."""
        return value <= self.missed if self.reached > self.missed else value >= self.missed


@dataclass(frozen=True)
class ShownBy:
    """Another test runs the recipe and asks what it has learned; its node id."""

    test: str


# --- controls ---------------------------------------------------------------------------------------------------------


def spoiled(folder: Path, name: str, change: Callable[[list[Row], random.Random], list[Row]]) -> list[str]:
    """A built-in set with changed training rows, its other rows as they are."""
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (DATA / name / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(row) + "\n" for row in change(rows, random.Random(0))]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    for split in ("valid.jsonl", "test.jsonl"):
        (folder / split).write_bytes((DATA / name / split).read_bytes())
    return [f"data.path={folder}"]


def permuted(name: str, column: str) -> Spoil:
    """Every row gets the column of another row."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        values = [row[column] for row in rows]
        chance.shuffle(values)
        return [{**row, column: value} for row, value in zip(rows, values, strict=True)]

    return lambda folder: spoiled(folder, name, change)


def mixed_glossaries(folder: Path) -> list[str]:
    """The pairs of a list come from all lists, so that a text says nothing about its other parts."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        pairs = [pair for row in rows for pair in row["text"].split("; ")]
        chance.shuffle(pairs)
        return [{"text": "; ".join(pairs[12 * i : 12 * i + 12])} for i in range(len(rows))]

    return spoiled(folder, "glossaries", change)


def shuffled_pictures(column: str) -> Spoil:
    """Every training picture gets the column of another one."""

    def spoil(folder: Path) -> list[str]:
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            table = pa.ipc.open_file(str(DATA / "pictures" / f"{split}.arrow")).read_all()
            if split == "train":
                values = table.column(column).to_pylist()
                random.Random(0).shuffle(values)
                place = table.schema.get_field_index(column)
                table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
            with pa.ipc.new_file(str(folder / f"{split}.arrow"), table.schema) as file:
                file.write_table(table)
        return [f"data.path={folder}"]

    return spoil


def swapped(name: str) -> Spoil:
    """The better and the worse answer change places in a random half of the pairs."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        turned = [chance.random() < 0.5 for _ in rows]
        return [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if t else r for r, t in zip(rows, turned, strict=True)]

    return lambda folder: spoiled(folder, name, change)


def mixed(text: str, chance: random.Random) -> str:
    """The words of a text out of order."""
    words = text.split()
    return " ".join(chance.sample(words, len(words)))


def mixed_answers(folder: Path) -> list[str]:
    """Answers of the list task with their words out of order: how often each word comes is left, what follows it is not."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        return [{**r, "completion": [{"role": "assistant", "content": mixed(r["answer"], chance)}]} for r in rows]

    return spoiled(folder, "sft", change)


def mixed_stories(folder: Path) -> list[str]:
    """Stories with their words out of order."""
    return spoiled(folder, "stories", lambda rows, chance: [{**r, "text": mixed(r["text"], chance)} for r in rows])


def mixed_labelled(folder: Path) -> list[str]:
    """Labelled remarks with their words out of order."""
    return spoiled(folder, "classify", lambda rows, chance: [{**r, "text": mixed(r["text"], chance)} for r in rows])


def mixed_remarks(folder: Path) -> list[str]:
    """Training texts that are no more in order than the outliers are."""
    return spoiled(folder, "outliers", lambda rows, chance: [{**r, "text": mixed(r["text"], chance)} for r in rows])


def mixed_sentences(folder: Path) -> list[str]:
    """Stories whose sentences come from all of them, so that none follows another."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        counts = [row["text"].count(".") for row in rows]
        sentences = [part.strip() for row in rows for part in row["text"].split(".") if part.strip()]
        chance.shuffle(sentences)
        return [{**row, "text": ". ".join(sentences.pop() for _ in range(n)) + "."} for row, n in zip(rows, counts) if n]

    return spoiled(folder, "stories", change)


def mixed_talk(folder: Path) -> list[str]:
    """Stories, and the answers of conversations, with their words out of order."""
    stories = mixed_stories(folder / "stories")[0].removeprefix("data.path=")

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        def turn(m: Row) -> Row:
            return {**m, "content": mixed(m["content"], chance)} if m["role"] == "assistant" else m

        return [{**r, "messages": [turn(m) for m in r["messages"]]} for r in rows]

    talk = spoiled(folder / "chat", "chat", change)[0].removeprefix("data.path=")
    return [f"data.path=[{stories},{talk}]"]


def nothing_left(folder: Path) -> list[str]:
    """Noise that removes every token, so that there is nothing to restore a text from."""
    return ["objective.delete=1.0"]


def other_spans(folder: Path) -> list[str]:
    """Passages with any of their sentences as the answer, whatever the question is."""

    def change(rows: list[Row], chance: random.Random) -> list[Row]:
        def answered(row: Row) -> Row:
            span = chance.choice(row["context"].removesuffix(".").split(". "))
            return {**row, "answers": {"text": [span], "answer_start": [row["context"].index(span)]}}

        return [answered(row) for row in rows]

    return spoiled(folder, "passages", change)


def mixed_tags(folder: Path) -> list[str]:
    """Sentences with their tags out of order."""
    return spoiled(folder, "tags", lambda rows, c: [{**r, "ner_tags": c.sample(r["ner_tags"], len(r["tokens"]))} for r in rows])


@reward_function
def chance(text: str, prompt: str) -> float:
    """A reward that has nothing to do with the answer's worth."""
    return random.Random(f"{prompt} {text}").random()


def by_chance(folder: Path) -> list[str]:
    """The policy follows `chance`; the rule of the recipe is only watched."""
    return ["objective.reward.rule.weight=0.0", "+objective.reward.chance={kind: function, function: chance}"]


def fresh_teacher(folder: Path) -> list[str]:
    """A teacher of the embedded model's shape and tokenizer that has learned nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(folder)
    return [f"objective.teacher={folder}"]


LISTS, LABELS = permuted("sft", "completion"), permuted("classify", "label")
PAIRS, SINGLES, COMPARISONS = swapped("preference"), permuted("unpaired", "label"), swapped("comparisons")


# --- the table --------------------------------------------------------------------------------------------------------


def exact(reached: float = 0.9) -> Learns:
    """Held-out lists turned around to the letter; with answers of other rows none is."""
    return Learns("eval/exact_match", reached, 0.05, LISTS, ("eval.metrics=[exact_match]",))


def copied(reached: float) -> Learns:
    """Held-out loss of the list task, where the method does not find the order of the words within a minute."""
    return Learns("eval/loss", reached, 0.85, LISTS)


def labelled(reached: float) -> Learns:
    """Accuracy on four equally frequent labels, 0.25 by chance."""
    return Learns("eval/accuracy", reached, 0.45, LABELS)


def preferred(reached: float, spoil: Spoil = PAIRS, missed: float = 0.75) -> Learns:
    """Share of the held-out pairs whose better answer has the larger reward."""
    return Learns("eval/rewards/accuracies", reached, missed, spoil)


def mannered(reached: float, missed: float) -> Learns:
    """The rule on answers to held-out prompts, from below 0.65: a few nats away from the start, and answers that end."""
    sane = (("eval/kl", 0.0, 8.0), ("eval/eos_rate", 0.95, 1.0))
    return Learns("eval/rewards/rule", reached, missed, by_chance, ("objective.show=0",), sane)


LEARNING: dict[str, Learns | ShownBy] = {
    # pretraining
    "tiny_model": Learns("eval/loss", 1.5, 3.0, mixed_talk),
    # The embedded model has read these stories: only fresh weights have something to learn.
    "clm": Learns("eval/loss", 2.3, 3.3, mixed_stories, ("model.init=random",)),
    "nsp": Learns("eval/nsp/auc", 0.8, 0.6, mixed_sentences),
    "clm_from_nothing": Learns("eval/bits_per_byte", 0.7, 1.3, mixed_stories),
    "mlm": Learns("eval/loss", 2.6, 3.3, mixed_stories),
    # What A and D say of C, in nats a token; in the control a list's words have the names of other lists.
    "caclm": Learns("eval/context_gain", 0.13, 0.03, mixed_glossaries),
    # Words that only the picture decides: 0.35 by chance.
    "mmlm": Learns("eval/accuracy", 0.8, 0.45, shuffled_pictures("image")),
    # Of 120 pictures and texts, some of which say the same in other words, the right one among the first five: 0.04 by chance.
    "clip": Learns("eval/recall@5", 0.9, 0.15, shuffled_pictures("image")),
    # What the noise left is copied; where it leaves nothing, remarks are written by heart.
    "dae": Learns("eval/loss", 0.7, 1.0, nothing_left, (), (("eval/accuracy/copied", 0.9, 1.0),)),
    "outliers": Learns("eval/outlier/auc", 0.95, 0.8, mixed_remarks),
    "t5_spans": Learns("eval/loss", 2.2, 2.8, mixed_stories),
    "tsdae": Learns("eval/loss", 1.35, 2.0, mixed_labelled),
    # Fresh weights find 2 % of the texts; trained on the positives of other rows they give every text one vector.
    "contrastive": Learns("eval/recall@1", 0.9, 0.1, permuted("triples", "positive")),
    # finetuning
    "sft": exact(0.95),
    "classify": labelled(0.95),
    # The words of four labels after the text: 0.25 by chance.
    "sentiment": Learns("eval/rank_accuracy", 0.95, 0.45, LABELS),
    "image_classification": Learns("eval/accuracy", 0.9, 0.45, shuffled_pictures("label")),
    # A token of a caption: what the words before it give away is all that is left with pictures of other captions.
    "caption": Learns("eval/loss", 0.4, 0.6, shuffled_pictures("image")),
    # Fourteen answers to four questions: 0.35 by chance, for whoever knows which answers fit a question.
    "vqa": Learns("eval/accuracy", 0.65, 0.5, shuffled_pictures("image")),
    # Tags out of order: what stays is how often each is.
    "token_classification": Learns("eval/f1", 0.95, 0.3, mixed_tags),
    # Numbers of other pairs leave nothing to rank by.
    "regression": Learns("eval/spearman", 0.9, 0.4, permuted("ratings", "score")),
    # Swapped pairs teach the worse answer.
    "choices": Learns("eval/rank_accuracy", 0.95, 0.75, PAIRS),
    # The span that answers is found in the passage word for word; a control may answer with any of its three sentences.
    "squad": Learns("eval/exact_match", 0.95, 0.55, other_spans),
    # The same passages, with a head that marks the span.
    "extractive_qa": Learns("eval/exact_match", 0.95, 0.55, other_spans),
    # Numbers of other problems: the most frequent answer is right for one problem in seven.
    "arithmetic": Learns("eval/last_number", 0.5, 0.3, permuted("problems", "completion")),
    # All summaries have one form, which a control learns as well.
    "summaries": Learns("eval/rouge_l", 0.9, 0.7, permuted("summaries", "completion")),
    # The same JSON with other values is no answer, and a control learns the form alone.
    "intents": Learns("eval/json_equal", 0.7, 0.2, permuted("intents", "completion")),
    "translation": Learns("eval/chrf", 90.0, 40.0, permuted("translations", "completion")),
    # A student of fresh weights has the teacher alone to learn from: no token of the rows is in the loss.
    "distill": Learns("eval/nll", 1.6, 4.0, fresh_teacher),
    "gkd": Learns("eval/nll", 2.8, 4.0, fresh_teacher),
    "search_lora": ShownBy("tests/recipes/test_pipelines_learn.py::test_the_search_finds_a_rate_that_learns"),
    # additive
    "adapter": exact(0.85),
    "parallel_adapter": exact(0.95),
    "prefix_tuning": copied(0.45),
    "prompt_tuning": copied(0.55),
    "p_tuning_v2": labelled(0.85),
    "apt": labelled(0.85),
    "vpt": Learns("eval/accuracy", 0.9, 0.45, shuffled_pictures("label")),
    "ia3": copied(0.6),
    "ia3_tfew": Learns("eval/rank_accuracy", 0.85, 0.75, PAIRS),
    "coda": copied(0.45),
    # selective
    "bitfit": copied(0.6),
    "fishmask": exact(),
    "child_tuning": exact(),
    "group_mask": exact(),
    "diff_pruning": exact(),
    "spt": exact(),
    # reparameterized
    "sft_lora": exact(0.95),
    "dora": exact(0.95),
    "dylora": exact(0.85),
    "adalora": exact(),
    # hybrid
    "mam": labelled(0.85),
    "llm_adapters": copied(0.45),
    "unipelt": labelled(0.85),
    "s4": labelled(0.85),
    "autopeft": labelled(0.8),
    "noah": Learns("eval/accuracy", 0.85, 0.45, shuffled_pictures("label")),
    # found
    "autopeft_found": labelled(0.85),
    "noah_found": Learns("eval/accuracy", 0.85, 0.45, shuffled_pictures("label")),
    # memory
    "qlora": exact(0.95),
    "lora_fa": exact(0.95),
    "smt": exact(),
    # Fresh experts between frozen fresh layers learn which word comes next; the control has answers that go nowhere.
    "esft": Learns("eval/accuracy", 0.55, 0.35, mixed_answers),
    "freeze": copied(0.55),
    "loreft": copied(0.6),
    "direft": copied(0.77),
    # What examples say of a task that was never trained, in nats a token; those of other tasks say nothing in the control.
    "hypertuning": Learns("eval/task_gain", 0.5, 0.25, permuted("namings", "task")),
    # Forward passes alone learn how an answer goes, not yet which: their control has answers that go nowhere.
    "mezo": Learns("eval/loss", 2.7, 3.2, mixed_answers),
    "mezo_lora": Learns("eval/loss", 2.7, 3.2, mixed_answers),
    # alignment
    "dpo": preferred(0.95),
    "dpo_lora": preferred(0.95),
    "ipo": preferred(0.95),
    "ipo_lora": preferred(0.95),
    "kto": preferred(0.95, SINGLES),
    "kto_lora": preferred(0.95, SINGLES),
    # Without a reference the reward is the likelihood itself, which leans one way whatever the labels say.
    "orpo": preferred(0.95, missed=0.85),
    "orpo_lora": preferred(0.95, missed=0.85),
    "simpo": preferred(0.95),
    "simpo_lora": preferred(0.95),
    # Each rejected answer has one fault; whoever sees rudeness alone is right in three of four.
    "reward": preferred(0.78, COMPARISONS, 0.65),
    "reward_lora": preferred(0.78, COMPARISONS, 0.65),
    "grpo": mannered(0.95, 0.85),
    "rloo": mannered(0.95, 0.85),
    "ppo": mannered(0.88, 0.78),
    # pipelines
    "sft_dpo": ShownBy("tests/recipes/test_pipelines_learn.py::test_dpo_on_a_fine_tuned_model_learns_the_preferences"),
    "searched_dpo": ShownBy("tests/recipes/test_pipelines_learn.py::test_dpo_on_the_best_of_a_search_learns_the_preferences"),
    **dict.fromkeys(
        ("dae_sft", "mmlm_caption", "mmlm_vqa", "nsp_qa"),
        ShownBy("tests/recipes/test_pipelines_learn.py::test_pretraining_first_helps_over_seeds"),
    ),
    "distill_answers": ShownBy("tests/recipes/test_pipelines_learn.py::test_a_student_learns_what_its_teacher_knows"),
    "noah_search": ShownBy("tests/recipes/test_pipelines_learn.py::test_sub_networks_that_were_found_learn_from_the_start"),
    "s4_design": ShownBy("tests/pipelines/test_search_costs.py::test_the_design_space_procedure_of_s4_finds_a_planted_design"),
    "rlhf": ShownBy("tests/feedback/test_reward_model.py::test_a_learned_reward_teaches_manners"),
    "rlaif": ShownBy("tests/recipes/test_pipelines_learn.py::test_a_preference_model_teaches_what_its_labels_say"),
    "rlaif_dpo": ShownBy("tests/recipes/test_pipelines_learn.py::test_labels_of_a_judge_teach_its_preferences"),
    # regularization
    **dict.fromkeys(
        ("l2sp", "ewc", "sft_replay", "forgetting_leaderboard"),
        ShownBy("tests/recipes/test_pipelines_learn.py::test_what_is_done_against_forgetting_keeps_the_old_task"),
    ),
    # leaderboards
    "peft_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_every_method_of_the_board_learns"),
    "survey_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_methods_of_the_survey_learn"),
    "hybrid_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_hybrids_and_their_parts_learn"),
    "memory_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_the_memory_of_methods_follows_their_formulas"),
    "pretraining_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_a_pretext_of_the_board_is_worth_something"),
    "alignment_leaderboard": ShownBy("tests/recipes/test_pipelines_learn.py::test_objectives_of_the_board_learn"),
}
"""Recipe -> what its run learns."""
