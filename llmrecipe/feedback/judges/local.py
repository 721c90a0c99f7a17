"""A language model in this process as the judge."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError, UserError
from llmrecipe.core.forward_context import Context
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.feedback.judges.choice import Leads, read_paths
from llmrecipe.feedback.judges.chosen import Choice
from llmrecipe.feedback.judges.labeller import Ask, Judge, chunks, short_hash
from llmrecipe.recipe.content_key import REFERENCE, content_key
from llmrecipe.recipe.schema import ModelSection, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.engine.role_models import Roles

WAITING = 4
"""Questions handed over at once, over those answered at once: an answer that has ended makes room for one that waits."""
Path = tuple[int, ...]
"""Token ids of one way to write an option."""


@dataclass
class JudgeModel:
    """The judge's model: a separate one, or the model in training as it was at step 0."""

    roles: Any = None
    shared: bool = False


@register
class Local(Judge):
    """Any model path, hub name or run directory as the judge.

    With `base: true` the adapters of a run are left off: its base judges what its adapters write. Without a path the judge is
    the model in training as it was at step 0, and no second model is held; only rewards have one to share.

    A choice is one batched forward over the questions: the probability of an option is that of its spellings with and without
    a leading space, token by token where a spelling has several (the question is read once), less that of longer options that
    begin with it (`1` is not `10`).
    """

    path: str = ""
    """Model path, hub name or run directory."""
    base: bool = False
    """Use the base of the run, without its adapters."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights."""
    temperature: NonNegativeFloat = 0.0
    """Of texts; 0 is greedy."""
    max_new_tokens: PositiveInt = 128
    """Of texts."""
    stop: list[StopText] = Field(default_factory=list)
    """Before which texts end."""
    batch: PositiveInt = 32
    """Questions answered at once."""
    seed: NonNegativeInt = 0
    """Of texts that are sampled."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you opt in; never read from a run."""
    allow_pickle: bool = False
    """Read pickle weights (.bin). Off unless you opt in; never read from a run."""

    def check(self, where: str) -> None:
        """Refuse `base` without a path, and an unfinished run."""
        from llmrecipe.runs.open_model import run_folder

        if self.base and not self.path:
            raise RecipeError(f"{where}.base: true leaves the adapters of a run off; name the run: {where}.path=RUN")
        if self.path and not REFERENCE.search(self.path):
            try:
                run_folder(self.path)
            except UserError as error:
                raise RecipeError(f"{where}.path: {str(error).removeprefix('model.path: ')}") from error

    def held_models(self) -> list[ModelSection]:
        """Return its own model, where it has one."""
        if not self.path or REFERENCE.search(self.path):
            return []
        return [section_of(self.path, self.base, self.dtype, self._rights)]

    @property
    def _rights(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}

    @functools.cached_property
    def place(self) -> JudgeModel:
        """Hold the model, once the judge has been used."""
        return JudgeModel()

    @property
    def shares(self) -> bool:
        """Return whether it is the model in training: without a path it is."""
        return not self.path

    @functools.cached_property
    def identity(self) -> str:
        """Return the model's name and a digest of its files and of everything its replies depend on."""
        weights = content_key({"model": {"path": self.path}}, {})
        name = self.path.rstrip("/").rpartition("/")[2] or "policy"
        settings = [
            self.base,
            self.dtype,
            self.temperature,
            self.max_new_tokens,
            self.seed,
            *([self.stop] if self.stop else []),
        ]
        return f"local:{name}:{short_hash(weights, *settings)}"

    def open(self, roles: Roles | None = None) -> None:
        """Remember the model in training where it is the judge.

        Raises:
            RecipeError: there is none, and no path.
        """
        if self.path:
            return
        if roles is None:
            raise RecipeError("judge.path: must be given: a model path, a hub name or a run directory")
        self.place.roles, self.place.shared = roles, True

    @property
    def roles(self) -> Roles:
        """Return the model, loaded on first use."""
        if self.place.roles is None:
            self.place.roles = loaded_roles(self.path, self.base, self.dtype, self._rights)
        return self.place.roles

    def write(self, requests: Sequence[Ask]) -> Iterator[tuple[int, str | None]]:
        """Generate a continuation of each request."""
        from llmrecipe.engine.answer_ends import answer_ends
        from llmrecipe.engine.generation import generate
        from llmrecipe.engine.sampling import Sampling

        sampling = Sampling(self.max_new_tokens, self.temperature, batch=self.batch, seed=self.seed, stop=tuple(self.stop))
        ends = answer_ends(self.roles.model, self.roles.tokenizer, sampling)
        for first, part in chunks(requests, WAITING * self.batch):
            prompts = [self._ids(ask) for ask in part]
            with self._as_judge() as off:
                # Samples depend on the request alone, so a resumed run samples the same.
                keys = [ask.key("", "") for ask in part]
                new = generate(self.roles.model, self.roles.tokenizer, prompts, sampling, self._context(off), keys=keys)
            for offset, ids in enumerate(new):
                yield first + offset, ends.text(ids)

    def choose(self, requests: Sequence[Ask], options: Sequence[str]) -> Iterator[tuple[int, Choice | None]]:
        """Yield the summed probabilities of the options' spellings."""
        spellings = [spell(self.roles.tokenizer, option) for option in options]
        for first, part in chunks(requests, self.batch):
            prompts = [self._ids(ask) for ask in part]
            with self._as_judge() as off:
                found = choose(self.roles, prompts, spellings, self._role, off)
            for offset, row in enumerate(found):
                yield first + offset, row

    def _ids(self, ask: Ask) -> list[int]:
        from llmrecipe.data.tokenize.chat_templates import prompt_ids

        return prompt_ids(self.roles.tokenizer, ask.turns)

    def _context(self, off: frozenset[str]) -> Context:
        return Context(role=self._role, off=off)

    @property
    def _role(self) -> str:
        snapshot = self.place.shared and self.roles.stack.snapshot is None
        return "reference" if snapshot else "policy"

    @contextlib.contextmanager
    def _as_judge(self) -> Iterator[frozenset[str]]:
        """Enter evaluation mode without gradients, the model in training as it was at step 0; yield the wrappers to disable."""
        import torch

        roles = self.roles
        step_zero = roles.stack.reference(roles.model) if self.place.shared else contextlib.nullcontext()
        with torch.no_grad(), roles.evaluating(), step_zero:
            yield roles.reference_off if self.place.shared else frozenset()


def section_of(path: str, base: bool, dtype: str, rights: Mapping[str, bool]) -> ModelSection:
    """Return the section of a judge's model; with `base` that of the base of a run.

    Args:
        rights: what the recipe allows the model (see `recipe.rights`).
    """
    from llmrecipe.runs.open_model import resolve_section

    section = ModelSection.model_validate({"path": path, "dtype": dtype, **rights})
    return resolve_section(section)[0].model_copy(update={"adapters": {}}) if base else section


def loaded_roles(path: str, base: bool, dtype: str, rights: Mapping[str, bool]) -> Roles:
    """Load a separate model, with the log-probability engine around it.

    Args:
        rights: what the recipe allows the model (see `recipe.rights`).
    """
    import torch

    from llmrecipe.engine.forward import Engine
    from llmrecipe.engine.packing import packing_for
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.runs.open_model import open_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = open_model(section_of(path, base, dtype, rights), TokenizerSection(), device=device.type)
    loaded.model.to(device).requires_grad_(False)
    engine = Engine(loaded.model).eval()
    return Roles(engine, Stack([]), loaded.tokenizer, device, packing_for("auto", engine, device))


def spell(tokenizer: PreTrainedTokenizerBase, option: str) -> set[Path]:
    """Return token ids of an option with and without a leading space, and of the word as one entry of the vocabulary."""
    found = {tuple(call_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"]) for text in (option, f" {option}")}
    single = tokenizer.get_vocab().get(option)
    return {path for path in found if path} | ({(single,)} if single is not None else set())


def choose(
    roles: Roles, prompts: Sequence[Sequence[int]], spellings: Sequence[set[Path]], role: str, off: frozenset[str]
) -> list[Choice]:
    """Compute the choice that each prompt's answer begins with (see `choice`), from all tokens of all spellings, in float64."""
    paths = sorted({path for option in spellings for path in option})
    heads = sorted({path[:end] for path in paths for end in range(len(path))})
    steps = {head: sorted({p[len(head)] for p in paths if p[: len(head)] == head and len(p) > len(head)}) for head in heads}
    found = []
    for known in _edges(roles, prompts, steps, role, off):
        tables: dict[Path, dict[int, float]] = {head: {} for head in heads}
        for (head, token), value in known.items():
            tables[head][token] = math.exp(value)
        found.append(read_paths(tables, leads_of(spellings), len(spellings)).choice())
    return found


def leads_of(spellings: Sequence[set[Path]]) -> Leads:
    """Return a lookup of the option that a path of token ids spells, and of the options that continue it."""
    whole = {path: index for index, own in reversed(list(enumerate(spellings))) for path in own}
    further: dict[Path, set[int]] = {}
    for index, own in enumerate(spellings):
        for path in own:
            for end in range(len(path)):
                further.setdefault(path[:end], set()).add(index)
    return lambda path: (whole.get(path), frozenset(further.get(path, ())))


def _edges(
    roles: Roles, prompts: Sequence[Sequence[int]], steps: dict[Path, list[int]], role: str, off: frozenset[str]
) -> list[dict[tuple[Path, int], float]]:
    """Compute, for each prompt, log P(token | prompt, head) of every head and token of `steps`, in one forward pass."""
    import torch

    from llmrecipe.data.collate import Sequence as Tokens

    sequences: list[Tokens] = []
    owners: list[tuple[int, Path, int]] = []
    for number, prompt in enumerate(prompts):
        at = len(sequences)
        sequences.append(Tokens(list(prompt), [0] * len(prompt), prompt=len(prompt)))
        owners.append((number, (), at))
        for head in (h for h in steps if h):
            owners.append((number, head, len(sequences)))
            sequences.append(Tokens(list(head), [0] * len(head), parent=at))
    batch = roles.layout(sequences)
    source, target, place = [], [], []
    for number, head, at in owners:
        for token in steps[head]:
            source.append(int(batch.last[at]))
            target.append(token)
            place.append((number, head, token))
    device = batch.input_ids.device
    batch = dataclasses.replace(
        batch,
        source=torch.tensor(source, device=device),
        target=torch.tensor(target, device=device),
        sequence=torch.zeros(len(source), dtype=torch.long, device=device),
    )
    values = roles.engine(batch, role=role, off=off)["logprobs"].double().tolist()
    found: list[dict[tuple[Path, int], float]] = [{} for _ in prompts]
    for (number, head, token), value in zip(place, values, strict=True):
        found[number][head, token] = value
    return found
