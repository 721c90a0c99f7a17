"""Loading models and tokenizers: no code runs without opt-in, and nothing is newly initialized silently.

- safetensors only, remote code off, both by explicit opt-in otherwise (`model.allow_pickle`, `model.trust_remote_code`);
- weights that are missing, extra, of another shape or newly initialised stop the load unless `model.allow_mismatch` names
  them; the new head of a classification model is expected, reported (`model.new_heads`) and trained;
- dtype: `auto` is float32 on the CPU and the checkpoint's own dtype on a GPU;
- attention goes through `llmrecipe.models.attention`, around sdpa, or eager for families that need it.
"""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import is_panic
from llmrecipe.models import vocabulary
from llmrecipe.models.checkpoint_path import locate, offline, shown_reading, unreachable
from llmrecipe.models.resolve_class import (
    HEAD_MODULES,
    NEW_HEADS,
    SPANS,
    STATES,
    attention,
    first_line,
    load_config,
    model_class,
    own_code,
    quiet,
    resolve_dtype,
    set_head_outputs,
    with_code,
)
from llmrecipe.models.tokenizer_file import read_tokenizer
from llmrecipe.models.weight_headers import headers, stored_dtype
from llmrecipe.recipe.rights import how_to_give
from llmrecipe.recipe.schema import ModelSection, TokenizerSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from llmrecipe.models.checkpointing import Host
    from llmrecipe.models.pretrained import LanguageModel

LEGACY = (
    "*.position_ids",
    "*rotary_emb.inv_freq",
    "*.attn.bias",
    "*.attn.masked_bias",
    "*.attention.bias",
    "*.attention.masked_bias",
)
"""Buffers in old checkpoints that current models compute."""
POOLERS = ("pooler",)
"""Parts below the backbone that belong to a classification head: masked-LM checkpoints do not have them."""

# --- models ----------------------------------------------------------------------------------------------------------


def load_model(
    section: ModelSection,
    *,
    rows_head: str = "causal",
    labels: list[str] | None = None,
    load_kwargs: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> LanguageModel:
    """Load a model for an objective, in evaluation mode, with attention routed through `models.attention`.

    Args:
        rows_head: `causal`, `classification`, `masked`, `seq2seq`, `image`, or `states`: no head is read, so it may be new or
            missing.
        labels: class names of a classification head, in order of their ids.
        load_kwargs: arguments of quantizing wrappers (`quantization_config`).
        tokenizer: where it has more tokens than the model has rows, the embedding grows (see `vocabulary.fit`) and the new
            rows always train (see `new_rows`).
        device: determines the meaning of `dtype: auto`; the weights stay where Transformers puts them.
        seed: of everything that is initialized here.

    The model carries `new_heads` (module paths initialised here), `position_offset` (see `models.vocabulary`),
    `attention_routed` (whether packed rows and attention hooks work) and `stored_dtype` (that of the checkpoint).

    Raises:
        ModelError: before any weight is read where that can be known; else for weights that do not fit.
    """
    import torch

    config = load_config(section)
    auto = model_class(config, rows_head)
    set_head_outputs(config, rows_head, labels)
    _check_input(config, rows_head, _concrete(auto, config))
    backend = _backend(section, _concrete(auto, config), device)
    dtype, stored = resolve_dtype(section.dtype, config, device), _stored(section, config)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if section.init == "random":
            model = _from_config(section, auto, config, dtype, backend)
            model.new_heads = ()
        else:
            model = _pretrained(section, auto, config, rows_head, dtype, backend, load_kwargs or {})
    model.stored_dtype = stored or dtype
    return _finish(model.eval(), section, backend, tokenizer)


def _stored(section: ModelSection, config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype of the checkpoint that weights are read from; None where none is read, or it is unknown."""
    if section.init == "random":
        return None
    place, local = locate(section.path)
    return stored_dtype(config, Path(place) if local else None)


def skeleton(
    section: ModelSection,
    *,
    rows_head: str = "causal",
    labels: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
) -> LanguageModel:
    """Return the same model on the meta device: shapes and names, no weights read and no memory allocated.

    Raises:
        ModelError: as `load_model`, except for what only the weights can reveal.
    """
    import torch

    config = load_config(section)
    auto = model_class(config, rows_head)
    set_head_outputs(config, rows_head, labels)
    _check_input(config, rows_head, _concrete(auto, config))
    backend = _backend(section, _concrete(auto, config), device)
    dtype, stored = resolve_dtype(section.dtype, config, device), _stored(section, config)
    with torch.device("meta"), quiet():
        model = _from_config(section, auto, config, dtype, backend)
    model.stored_dtype = stored or dtype
    model.new_heads = _heads_without_weights(section, model) if rows_head in NEW_HEADS else ()
    return _finish(model.eval(), section, backend, tokenizer)


def _backend(section: ModelSection, cls: type, device: str) -> str:
    """Return the stock attention backend of a class.

    Raises:
        ModelError: the machine or the family lacks it, or the route that is named for packed rows.
    """
    from llmrecipe.models.packed_attention import check_route

    backend = attention(section, cls)
    check_route(section.packed_attention, device)
    if section.packed_attention != "auto" and not routes_attention(cls, backend):
        raise ModelError(
            f"model.packed_attention: {section.packed_attention} is never reached, because rows of {cls.__name__} with "
            f"{backend} attention are not packed; leave it at auto"
        )
    return backend


def _heads_without_weights(section: ModelSection, model: LanguageModel) -> tuple[str, ...]:
    """Return the classifiers of a model whose weights its checkpoint does not hold, as far as the headers tell."""
    heads = [name for name in HEAD_MODULES if hasattr(model, name)]
    place, local = locate(section.path) if section.init == "pretrained" else ("", False)
    stored = headers(Path(place)) if local else {}
    return tuple(head for head in heads if not any(name.startswith(f"{head}.") for name in stored))


def _from_config(
    section: ModelSection, auto: type[_BaseAutoModelClass], config: PreTrainedConfig, dtype: torch.dtype, backend: str
) -> LanguageModel:
    """Build a model without its weights; whether its code may run is always passed, else Transformers prompts on the terminal.

    Raises:
        ModelError: it needs code of its own, which is not allowed to run, or its config has values that do not fit together.
    """
    trust = section.trust_remote_code
    if config.architectures is None:
        # Where a family has several classes for a head, Transformers looks for the one named here.
        config.architectures = [_concrete(auto, config).__name__]
    try:
        return auto.from_config(config, dtype=dtype, attn_implementation=backend, trust_remote_code=trust)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, AssertionError) as error:
        if "trust_remote_code" in str(error):
            raise own_code(section) from error
        raise ModelError(f"model.config: no {config.model_type} can be built from it: {first_line(error)}") from error


def _check_input(config: PreTrainedConfig, rows_head: str, concrete: type) -> None:
    """Refuse a classifier of images that reads no pixels.

    Raises:
        ModelError: it reads something else, such as tokens of a palette.
    """
    reads = getattr(concrete, "main_input_name", "pixel_values")
    if rows_head == "image" and reads != "pixel_values":
        raise ModelError(f"model.path: '{config.model_type}' reads pictures as {reads}; the objective gives it pixel_values")


def _concrete(auto: type[_BaseAutoModelClass], config: PreTrainedConfig) -> type:
    found = cast(Any, auto)._model_mapping.get(type(config), object)
    return found[0] if isinstance(found, tuple) else found


def _pretrained(
    section: ModelSection,
    auto: type[_BaseAutoModelClass],
    config: PreTrainedConfig,
    rows_head: str,
    dtype: torch.dtype,
    backend: str,
    extra: dict[str, Any],
) -> LanguageModel:
    kwargs: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": backend,
        "use_safetensors": None if section.allow_pickle else True,
        # A classifier may come with another number of classes; `_judge` refuses any other mismatch.
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
        **extra,
    }
    renamed = backbone_names(_concrete(auto, config), config) if rows_head == SPANS else {}
    if renamed:
        kwargs["key_mapping"] = {rf"^{theirs}\.": f"{own}." for theirs, own in renamed.items()}
    model, info = with_code(section, lambda **place: auto.from_pretrained(**place, **kwargs), "weights")
    if renamed:
        # What was renamed for reading is written under the names of this class, which its own reader expects.
        mapped = set(kwargs["key_mapping"])
        model._weight_conversions = [c for c in model._weight_conversions if not mapped & {*c.source_patterns}]
    _judge(section, model, info, rows_head)
    return model


def backbone_names(cls: type, config: PreTrainedConfig) -> dict[str, str]:
    """Return the name of the backbone in checkpoints of the family -> its name in a class that has another; empty otherwise.

    Many decoders with a head of spans keep theirs under `transformer`, where the family's checkpoints have `model`.
    """
    from transformers import MODEL_MAPPING

    stock = getattr(MODEL_MAPPING.get(type(config), None), "base_model_prefix", "")
    own = getattr(cls, "base_model_prefix", "")
    return {stock: own} if stock and own and stock != own else {}


def _judge(section: ModelSection, model: LanguageModel, info: dict[str, Any], rows_head: str) -> None:
    """Refuse weights that do not fit; record the heads that are new in `model.new_heads`."""
    prefix = model.base_model_prefix + "."
    reshaped = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    fresh = set(info["missing_keys"]) | reshaped

    def is_head(key: str) -> bool:
        pooler = any(f".{part}." in f".{key}" for part in POOLERS)
        return rows_head in (*NEW_HEADS, STATES) and (not key.startswith(prefix) or pooler)

    def allowed(key: str) -> bool:
        return is_head(key) or any(fnmatch.fnmatchcase(key, p) for p in (*LEGACY, *section.allow_mismatch))

    problems = [
        (f"{len(keys)} {what}", keys)
        for what, keys in (
            ("missing from the checkpoint (they would be random)", sorted(k for k in fresh - reshaped if not allowed(k))),
            ("of another shape", sorted(k for k in reshaped if not allowed(k))),
            (
                "in the checkpoint that this model does not have",
                sorted(k for k in info["unexpected_keys"] if not allowed(k)),
            ),
        )
        if keys
    ]
    if info.get("error_msgs"):
        raise ModelError(f"model.path: {section.path}: {'; '.join(info['error_msgs'])}")
    if problems:
        lines = [f"  {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}" for what, keys in problems]
        names = [_pattern(key) for _, keys in problems for key in keys]
        raise ModelError(
            f"model.path: the weights of {section.path} do not fit {type(model).__name__}:\n"
            + "\n".join(lines)
            + "\nIf that is "
            f"intended, name them: model.allow_mismatch=[{','.join(dict.fromkeys(names[:6]))}]"
        )
    model.new_heads = tuple(sorted({key.rpartition(".")[0] for key in fresh}))


def _pattern(key: str) -> str:
    return key.rpartition(".")[0] + ".*" if "." in key else key


def _finish(
    model: LanguageModel, section: ModelSection, backend: str, tokenizer: PreTrainedTokenizerBase | None
) -> LanguageModel:
    from llmrecipe.models import new_token_rows, vocabulary
    from llmrecipe.models.attention import install_attention
    from llmrecipe.models.module_map import name_by_hand

    name_by_hand(model, section.anatomy)
    model.position_offset = vocabulary.position_offset(model)
    model.attention_routed = routes_attention(type(model), backend)
    if model.attention_routed:
        with quiet():
            install_attention(model, backend, section.packed_attention)
    if tokenizer is not None and (count := vocabulary.fit(model, tokenizer)):
        new_token_rows.add_token_rows(model, count)
    # A config that says tied for weights that are not, or the other way round, would change the model when it is reloaded.
    embed, head = vocabulary.input_embedding(model), model.get_output_embeddings()
    if head is not None and embed is not None and hasattr(model.config, "tie_word_embeddings"):
        model.config.tie_word_embeddings = getattr(head, "weight", None) is getattr(embed, "weight", None)
    return model


def routes_attention(cls: type, backend: str) -> bool:
    """Whether the loader routes a class through `models.attention`; packed rows and attention hooks work where it does.

    Most encoder-decoders of Transformers do not claim to take other backends, though they ask its table of attention functions
    like the rest. Their rows are never packed, and a hook is refused at each module that does not ask, so they are routed.
    """
    if backend not in ("sdpa", "eager"):
        return False
    interface = hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS") and getattr(cls, "_supports_sdpa", False)
    pair = getattr(getattr(cls, "config_class", None), "is_encoder_decoder", False)
    return bool(getattr(cls, "_supports_attention_backend", False) or (interface and pair is True))


def may_bypass_attention(section: ModelSection, rows_head: str) -> bool:
    """Whether some layer of a model may compute attention out of reach of hooks, by its config and class alone."""
    config = load_config(section)
    cls = _concrete(model_class(config, rows_head), config)
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    plain = all(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    return not (plain and routes_attention(cls, attention(section, cls)))


def prepare_for_training(model: LanguageModel, section: ModelSection, host: Host | None = None) -> None:
    """Turn on gradient checkpointing where the recipe sets it.

    Args:
        host: what moves the inputs of blocks away and back under `offload`; default: to the memory of the machine.

    Raises:
        ModelError: the family has no checkpointed blocks.
    """
    if section.gradient_checkpointing is not False:
        from llmrecipe.models.checkpointing import enable_checkpointing

        enable_checkpointing(model, section.gradient_checkpointing, host)


def load_tokenizer(model: ModelSection, tokenizer: TokenizerSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe, with its template, added tokens and a padding token.

    Raises:
        ModelError: no tokenizer there, or a padding token it does not have.
    """
    if tokenizer.train is not None:
        from llmrecipe.models.tokenizer_training import trained_tokenizer

        tokenizer = tokenizer.model_copy(update={"path": str(trained_tokenizer(tokenizer.train))})
    path = tokenizer.path or model.path
    place, local = locate(path, "tokenizer.path" if tokenizer.path else "model.path")
    if local and not any((Path(place) / name).is_file() for name in vocabulary.FILES):
        raise ModelError(f"tokenizer.path: {path} has no tokenizer; name a folder or hub model that does (tokenizer.path=...)")
    reason = None if local else offline()
    try:
        with quiet(), shown_reading(path, local):
            revision = None if tokenizer.path else model.revision
            hub = {} if local else {"revision": revision, "local_files_only": reason is not None}
            found = read_tokenizer(place, local, model.trust_remote_code, **hub)
    except ModelError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, panics, or whatever a damaged file leads to
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"tokenizer.path: the tokenizer of {path} comes with its own Python code, which is not run unless you opt in; "
                f"read it first, then {how_to_give('trust_remote_code')}"
            ) from error
        if not local and isinstance(error, OSError):
            raise unreachable(path, reason or "the hub has no such model, or it needs a login (HF_TOKEN)") from error
        raise ModelError(f"tokenizer.path: {path}: cannot read its tokenizer: {first_line(error)}") from error
    vocabulary.add_tokens(found, tokenizer.add_tokens)
    vocabulary.set_padding(found, tokenizer.pad_token)
    vocabulary.set_mask(found, tokenizer.mask_token)
    if tokenizer.chat_template is not None:
        from llmrecipe.data.tokenize.chat_templates import set_template

        set_template(found, tokenizer.chat_template)
    return found
