"""What `tokenizer.train` means for the rest of a recipe: which rows it reads, and the vocabulary of a model from nothing.

The size of the vocabulary and the ids of special tokens follow from the recipe alone: special tokens come first, in the order
of their roles, and a tokenizer that turns out larger or smaller than `vocab_size` is refused when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipe.core import registry
from llmrecipe.recipe.schema import Recipe, TokenizerTrainingSection

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep", "cls")
"""Roles of special tokens in the order of their ids."""
IDS = ("pad", "bos", "eos")
"""Roles that a model's config names by id."""
UNKNOWN = "<unk>"
BYTES = 256


def special_tokens(train: TokenizerTrainingSection) -> dict[str, str]:
    """Return role -> token of the special tokens that have a role, in the order of their ids."""
    named = {role: getattr(train.special, role) for role in ROLES}
    if train.algorithm == "wordpiece" and named["unk"] is None:
        named["unk"] = UNKNOWN
    return {role: token for role, token in named.items() if token is not None}


def bind(recipe: Recipe) -> Recipe:
    """Return the recipe with the training's rows named in it and the vocabulary written into the config of a new model."""
    train = recipe.tokenizer.train
    if train is None:
        return recipe
    spec = registry.spec("objective", str(recipe.objective["kind"]))
    bound = train.bound(recipe.data, str(spec.facts.get("rows") or "text"))
    update = {"tokenizer": recipe.tokenizer.model_copy(update={"train": bound})}
    if recipe.model.init != "random":
        return recipe.model_copy(update=update)
    tokens = list(special_tokens(train))
    ids = {f"{role}_token_id": tokens.index(role) if role in tokens else None for role in IDS}
    config = {**recipe.model.config, "vocab_size": train.vocab_size, **ids}
    return recipe.model_copy(update={**update, "model": recipe.model.model_copy(update={"config": config})})


def mistakes(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key, what is wrong) for a tokenizer that cannot be trained, or not for this model or objective."""
    train, at = recipe.tokenizer.train, ("tokenizer", "train")
    if train is None:
        return
    if recipe.tokenizer.path is not None:
        yield (
            ("tokenizer", "path"),
            f"names the tokenizer {recipe.tokenizer.path}, and tokenizer.train makes one; leave one of them out "
            "(tokenizer.path=null)",
        )
    if recipe.model.init != "random" and not train.replace:
        yield (
            at,
            f"the weights of {recipe.model.path} were trained on the tokens of its own tokenizer, and another one gives every "
            "row of their embedding another meaning; train from nothing (model.init=random), keep its tokenizer "
            "(tokenizer.train=null), or say that this is wanted: tokenizer.train.replace=true",
        )
    tokens = [*special_tokens(train).values(), *train.special.extra]
    if twice := next((token for token in tokens if tokens.count(token) > 1), None):
        yield (*at, "special"), f"'{twice}' is there {tokens.count(twice)} times; every special token is declared once"
    if any(not token.strip() for token in tokens):
        yield (*at, "special"), "a special token must have at least one visible character"
    least = len(tokens) + (0 if train.algorithm == "wordpiece" else BYTES)
    if train.vocab_size < least:
        start = f"{len(tokens)} special tokens" + ("" if train.algorithm == "wordpiece" else f" and the {BYTES} bytes")
        yield (
            (*at, "vocab_size"),
            f"{train.vocab_size} is less than the {start} that the vocabulary starts with; at least {least}",
        )
    kind = str(recipe.objective["kind"])
    for role in registry.spec("objective", kind).facts.get("special_tokens") or ():
        if role not in special_tokens(train):
            yield (
                (*at, "special", role),
                f"null, and objective={kind} cannot do without such a token; give it a text, such as <{role}>",
            )
