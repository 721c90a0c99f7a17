"""Resolving a model section before weights are read: config, Transformers class, dtype, attention backend."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmrecipe.core.errors import ModelError, did_you_mean
from llmrecipe.core.lazy import is_installed
from llmrecipe.models.checkpoint_path import check_folder, locate, offline, shown_reading, unreachable
from llmrecipe.recipe.rights import how_to_give
from llmrecipe.recipe.schema import ModelSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

T = TypeVar("T")

AUTO = {
    "causal": ("AutoModelForCausalLM", "a causal language model"),
    "classification": ("AutoModelForSequenceClassification", "a sequence classifier"),
    "masked": ("AutoModelForMaskedLM", "a masked language model"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "an encoder-decoder"),
    "image": ("AutoModelForImageClassification", "an image classifier"),
    "token_classification": ("AutoModelForTokenClassification", "a token classifier"),
    "question_answering": ("AutoModelForQuestionAnswering", "a model that marks spans"),
}
"""Head an objective needs -> (Transformers class, description)."""
CLASSIFIERS = ("classification", "image", "token_classification")
"""Heads with one output a class: they follow the labels of the data and may be new."""
SPANS = "question_answering"
"""The head with two outputs a token, the scores of being the first and the last one of a span; it may be new."""
NEW_HEADS = (*CLASSIFIERS, SPANS)
"""Heads that a checkpoint may lack."""
HEAD_MODULES = ("score", "classifier", "qa_outputs")
"""What the families call them."""
STATES = "states"
"""What an objective needs that reads hidden states alone: a decoder or an encoder, with the head of its language model."""
LANGUAGE = "language"
"""What an objective needs that trains the language model of any family: a decoder, an encoder or an encoder-decoder."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' own load report, which `load_model` replaces."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- config ----------------------------------------------------------------------------------------------------------


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the config of a model, with the recipe's values set.

    Raises:
        ModelError: no such model, no such config value, or values that do not fit together.
    """
    from transformers import AutoConfig

    import llmrecipe.models.native  # noqa: F401  (registers the native transformer)

    changes = dict(section.config)
    try:
        if "model_type" in changes:
            if section.init != "random":
                raise ModelError("model.config.model_type: only with model.init=random; a checkpoint has its own")
            kind = changes.pop("model_type")
            _check_keys(changes, _blank(kind))
            return AutoConfig.for_model(kind, **changes)
        config = with_code(section, lambda **kwargs: AutoConfig.from_pretrained(**kwargs), "config")
        if changes:
            _check_keys(changes, config)
            config = type(config).from_dict({**config.to_dict(), **changes})
        return config
    except ModelError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("huggingface_hub") or isinstance(error, (ValueError, TypeError, KeyError)):
            raise ModelError(f"model.config: {first_line(error)}") from error
        raise


def _blank(kind: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ModelError(f"model.config.model_type: Transformers knows no '{kind}'{did_you_mean(kind, CONFIG_MAPPING.keys())}")
    return CONFIG_MAPPING[kind]()


def _check_keys(changes: dict[str, Any], config: PreTrainedConfig) -> None:
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), "hidden_size", "vocab_size", *ids}
    for name in changes:
        if name not in known and not hasattr(config, name):
            raise ModelError(f"model.config.{name}: {config.model_type} has no such value{did_you_mean(name, known)}")


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error, with the next one where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def own_code(section: ModelSection) -> ModelError:
    """Return the error for a model that needs code of its own, which is not allowed to run."""
    return ModelError(
        f"model.path: {section.path} comes with its own Python code, which is not run unless you opt in; "
        f"read it first, then {how_to_give('trust_remote_code')}"
    )


def with_code(section: ModelSection, load: Callable[..., T], what: str) -> T:
    """Call a `from_pretrained`, turning hub and remote-code failures into messages that say what to do."""
    place, local = locate(section.path)
    if local:
        check_folder(Path(place), section.allow_pickle, weights=section.init == "pretrained" and what != "tokenizer")
    reason = None if local else offline()
    kwargs = {"pretrained_model_name_or_path": place, "trust_remote_code": section.trust_remote_code}
    if not local:
        kwargs |= {"revision": section.revision, "local_files_only": reason is not None}
    try:
        with quiet(), shown_reading(section.path, local):
            return load(**kwargs)
    except pickle.UnpicklingError as error:
        raise ModelError(f"model.path: {section.path}: its pickle contains more than tensors, so it is not read") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise own_code(section) from error
        if not local and isinstance(error, OSError):
            raise unreachable(section.path, reason or "the hub has no such model, or it needs a login (HF_TOKEN)") from error
        raise ModelError(f"model.path: {section.path}: cannot read its {what}: {first_line(error)}") from error


# --- choices ---------------------------------------------------------------------------------------------------------


def resolve_dtype(dtype: str, config: PreTrainedConfig, device: str = "cpu") -> torch.dtype:
    """Return the dtype weights are loaded in.

    `auto` is float32 on the CPU, where only some processors compute in bfloat16 and small models gain nothing from it, and
    the checkpoint's own dtype on a GPU.

    Raises:
        ModelError: float16 on a CPU, which has no arithmetic for it.
    """
    import torch

    if dtype == "auto":
        own = getattr(config, "dtype", None)
        return own if device != "cpu" and isinstance(own, torch.dtype) else torch.float32
    if dtype == "float16" and device == "cpu":
        raise ModelError("model.dtype: float16 on a CPU is about 90 times slower than bfloat16; use bfloat16 or float32")
    return getattr(torch, dtype)


def model_class(config: PreTrainedConfig, rows_head: str) -> type[_BaseAutoModelClass]:
    """Return the Auto class for a head, after checking that the family has one."""
    import transformers

    rows_head = family_head(config, rows_head)
    if rows_head not in AUTO:
        raise ModelError(f"there is no model head '{rows_head}' (known: {', '.join([*AUTO, STATES, LANGUAGE])})")
    fits = _fitting_heads(config)
    if not fits[rows_head] and not getattr(config, "auto_map", None):
        able = ", ".join(head for head, fit in fits.items() if fit) or "none of the heads llmrecipe trains"
        raise ModelError(f"model.path: the objective needs {AUTO[rows_head][1]}, but '{config.model_type}' offers: {able}")
    return getattr(transformers, AUTO[rows_head][0])


def family_head(config: PreTrainedConfig, rows_head: str) -> str:
    """Return the head that a family has in the place of one an objective needs.

    `causal` is `seq2seq` of an encoder-decoder, which answers a prompt too: the encoder reads it. `states` is `language_head`,
    and so is `language` of a decoder or an encoder.
    """
    if rows_head == LANGUAGE and config.is_encoder_decoder:
        return "seq2seq"
    if rows_head in (STATES, LANGUAGE):
        return language_head(config)
    return "seq2seq" if rows_head == "causal" and config.is_encoder_decoder else rows_head


def language_head(config: PreTrainedConfig) -> str:
    """Return the head of a model that reads one text: `causal` of a decoder, `masked` of an encoder.

    Raises:
        ModelError: the family is neither.
    """
    fits, own = _fitting_heads(config), getattr(config, "auto_map", None) or {}
    if not config.is_encoder_decoder:
        for head in ("causal", "masked"):
            if fits[head] or AUTO[head][0] in own:
                return head
    raise ModelError(f"model.path: the objective needs a decoder or an encoder, and '{config.model_type}' is neither")


def _fitting_heads(config: PreTrainedConfig) -> dict[str, bool]:
    import transformers

    fits = {head: type(config) in getattr(transformers, name)._model_mapping for head, (name, _) in AUTO.items()}
    # Encoders and encoder-decoders also have a causal class, which would leave out or misuse half of the checkpoint.
    is_encoder = fits["masked"] and not fits["seq2seq"] and not getattr(config, "is_decoder", False)
    fits["causal"] &= not config.is_encoder_decoder and not (is_encoder and "causal" not in _made_for(config))
    # Spans are marked in the text that is read, and an encoder-decoder's head stands on the one that is written.
    fits[SPANS] &= not config.is_encoder_decoder
    if config.model_type == "llmrecipe_native":
        heads = {
            "decoder": ("causal", "classification", "token_classification", SPANS),
            "encoder": ("masked", "classification", "token_classification", SPANS),
            # The loss that balances experts is added to what a head reads of one stack.
            "encoder_decoder": ("seq2seq",) if config.num_experts else ("seq2seq", "classification"),
            "vision": ("image",),
        }[config.kind]
        fits = {head: head in heads for head in AUTO}
    return fits


def _made_for(config: PreTrainedConfig) -> str:
    names = getattr(config, "architectures", None) or []
    return "causal" if any("CausalLM" in name or "LMHeadModel" in name for name in names) else ""


def attention(section: ModelSection, model_class: type) -> str:
    """Return the stock attention backend of a model class.

    Raises:
        ModelError: the family or the machine lacks the requested backend.
    """
    supports_sdpa = getattr(model_class, "_supports_sdpa", False)
    if section.attention == "auto":
        return "sdpa" if supports_sdpa else "eager"
    if section.attention == "sdpa" and not supports_sdpa:
        raise ModelError(f"model.attention: {model_class.__name__} has no sdpa attention; use eager or auto")
    if section.attention == "flash_attention_2":
        import torch

        if not torch.cuda.is_available() or not is_installed("flash_attn"):
            raise ModelError("model.attention: flash_attention_2 needs a CUDA GPU and the flash-attn package; use sdpa")
        if not getattr(model_class, "_supports_flash_attn", False):
            raise ModelError(f"model.attention: {model_class.__name__} has no flash attention; use sdpa or auto")
    return section.attention


def set_head_outputs(config: PreTrainedConfig, rows_head: str, labels: list[str] | None) -> None:
    """Write into the config how many outputs the head has: one a label of a classifier, a first and a last of spans."""
    if rows_head in CLASSIFIERS:
        label_config(config, labels)
    elif rows_head == SPANS and config.num_labels != 2:
        config.num_labels = 2


def own_order(config: PreTrainedConfig, labels: Iterable[str]) -> list[str] | None:
    """Return labels in the order of a checkpoint that has the same ones; None where it has others."""
    names: dict[Any, str] = config.id2label or {}
    known = [names[i] for i in sorted(names)]
    return known if set(map(str, labels)) == set(known) else None


def label_config(config: PreTrainedConfig, labels: list[str] | None) -> None:
    """Write the labels into the config; a checkpoint that already has the same set keeps its own order."""
    if labels is None:
        return
    if own_order(config, labels) is None:
        config.id2label = dict(enumerate(map(str, labels)))
        config.label2id = {name: index for index, name in config.id2label.items()}
