"""Loading models and tokenizers: nothing is run that was not asked for, nothing is initialised that was not announced.

- safetensors only, remote code off, both by explicit opt-in otherwise (`model.allow_pickle`, `model.trust_remote_code`);
- weights that are missing, extra, of another shape or newly initialised stop the load unless `model.allow_mismatch` names
  them; the new head of a classification model is expected, reported (`model.new_heads`) and trained;
- dtype: `auto` is float32 on the CPU and the checkpoint's own dtype on a GPU;
- attention goes through `llmrecipe.models.attention`, around sdpa, or eager for families that need it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.errors import ModelError, did_you_mean
from llmrecipe.models.source import check_folder, locate, offline, unreachable
from llmrecipe.recipe.schema import ModelSection, TokenizerSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LEGACY = (
    "*.position_ids",
    "*rotary_emb.inv_freq",
    "*.attn.bias",
    "*.attn.masked_bias",
    "*.attention.bias",
    "*.attention.masked_bias",
)
"""Buffers old checkpoints carry that today's models compute."""
POOLERS = ("pooler",)
"""Parts below the backbone that belong to a classification head: masked-LM checkpoints do not have them."""

AUTO = {
    "causal": ("AutoModelForCausalLM", "a causal language model"),
    "classification": ("AutoModelForSequenceClassification", "a sequence classifier"),
    "masked": ("AutoModelForMaskedLM", "a masked language model"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "an encoder-decoder"),
}
"""What an objective asks for -> the Transformers class that answers."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers prints its own load report; ours says the same in one place."""
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
    """The config of a model, with the recipe's values set.

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
        config = _with_code(section, lambda **kwargs: AutoConfig.from_pretrained(**kwargs), "config")
        if changes:
            _check_keys(changes, config)
            config = type(config).from_dict({**config.to_dict(), **changes})
        return config
    except ModelError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("huggingface_hub") or isinstance(error, (ValueError, TypeError, KeyError)):
            raise ModelError(f"model.config: {_first_line(error)}") from error
        raise


def _blank(kind: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ModelError(f"model.config.model_type: Transformers knows no '{kind}'{did_you_mean(kind, CONFIG_MAPPING.keys())}")
    return CONFIG_MAPPING[kind]()


def _check_keys(changes: dict[str, Any], config: PreTrainedConfig) -> None:
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), "hidden_size", "vocab_size"}
    for name in changes:
        if name not in known and not hasattr(config, name):
            raise ModelError(f"model.config.{name}: {config.model_type} has no such value{did_you_mean(name, known)}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _with_code(section: ModelSection, load: Any, what: str) -> Any:
    """Call a `from_pretrained`, with hub and remote-code failures turned into messages that teach."""
    place, local = locate(section.path)
    if local:
        check_folder(Path(place), section.allow_pickle, weights=section.init == "pretrained" and what != "tokenizer")
    reason = None if local else offline()
    kwargs = {"pretrained_model_name_or_path": place, "trust_remote_code": section.trust_remote_code}
    if not local:
        kwargs |= {"revision": section.revision, "local_files_only": reason is not None}
    try:
        with _quiet():
            return load(**kwargs)
    except pickle.UnpicklingError as error:
        raise ModelError(f"model.path: {section.path}: its pickle holds more than tensors, so it is not read") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"model.path: {section.path} comes with its own Python code, which is not run unless you opt in; "
                "read it first, then set model.trust_remote_code=true"
            ) from error
        if not local and isinstance(error, OSError):
            raise unreachable(section.path, reason or "the hub has no such model, or it needs a login (HF_TOKEN)") from error
        raise ModelError(f"model.path: {section.path}: cannot read its {what}: {_first_line(error)}") from error


# --- choices ---------------------------------------------------------------------------------------------------------


def resolve_dtype(dtype: str, config: PreTrainedConfig, device: str = "cpu") -> torch.dtype:
    """The dtype weights are loaded in.

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


def _model_class(config: PreTrainedConfig, rows_head: str) -> Any:
    """The Auto class for a head, after checking that the family has one."""
    import transformers

    if rows_head not in AUTO:
        raise ModelError(f"there is no model head '{rows_head}' (known: {', '.join(AUTO)})")
    fits = {head: type(config) in getattr(transformers, name)._model_mapping for head, (name, _) in AUTO.items()}
    # Encoders and encoder-decoders also have a causal class, which would leave out or misuse half of the checkpoint.
    is_encoder = fits["masked"] and not fits["seq2seq"] and not getattr(config, "is_decoder", False)
    fits["causal"] &= not config.is_encoder_decoder and not (is_encoder and "causal" not in _made_for(config))
    if config.model_type == "llmrecipe_native":
        wanted = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "seq2seq"}[config.kind]
        fits = {head: (head in (wanted, "classification") and wanted != "seq2seq") or head == wanted for head in AUTO}
    if not fits[rows_head] and not getattr(config, "auto_map", None):
        able = ", ".join(head for head, fit in fits.items() if fit) or "none of the heads llmrecipe trains"
        raise ModelError(f"model.path: the objective needs {AUTO[rows_head][1]}, but '{config.model_type}' offers: {able}")
    return getattr(transformers, AUTO[rows_head][0])


def _made_for(config: PreTrainedConfig) -> str:
    names = getattr(config, "architectures", None) or []
    return "causal" if any("CausalLM" in name or "LMHeadModel" in name for name in names) else ""


def _attention(section: ModelSection, model_class: type) -> str:
    """The stock attention backend of a model class.

    Raises:
        ModelError: the family or the machine lacks the backend that was asked for.
    """
    supports_sdpa = getattr(model_class, "_supports_sdpa", False)
    if section.attention == "auto":
        return "sdpa" if supports_sdpa else "eager"
    if section.attention == "sdpa" and not supports_sdpa:
        raise ModelError(f"model.attention: {model_class.__name__} has no sdpa attention; use eager or auto")
    if section.attention == "flash_attention_2":
        import importlib.util

        import torch

        if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
            raise ModelError("model.attention: flash_attention_2 needs a CUDA GPU and the flash-attn package; use sdpa")
        if not getattr(model_class, "_supports_flash_attn", False):
            raise ModelError(f"model.attention: {model_class.__name__} has no flash attention; use sdpa or auto")
    return section.attention


def _label_config(config: PreTrainedConfig, labels: list[str] | None) -> None:
    """Write the labels into the config; a checkpoint that already has the same set keeps its own order."""
    if labels is None:
        return
    known = [config.id2label[i] for i in sorted(config.id2label)] if config.id2label else []
    if set(map(str, labels)) != set(known):
        config.id2label = dict(enumerate(map(str, labels)))
        config.label2id = {name: index for index, name in config.id2label.items()}


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
) -> PreTrainedModel:
    """Load a model for an objective, in evaluation mode, with attention routed through `models.attention`.

    Args:
        rows_head: `causal`, `classification`, `masked` or `seq2seq`.
        labels: class names of a classification head, in order of their ids.
        load_kwargs: what quantizing wrappers need (`quantization_config`).
        tokenizer: where it has more tokens than the model has rows, the embedding grows (see `vocabulary.fit`) and the new
            rows always train (see `new_rows`).
        device: decides the meaning of `dtype: auto`; the weights stay where Transformers puts them.
        seed: of everything that is initialised here.

    The model carries `new_heads` (module paths initialised here), `position_offset` (see `models.vocabulary`) and
    `attention_routed` (whether packed rows and attention ports work).

    Raises:
        ModelError: before any weight is read where that can be known; else for weights that do not fit.
    """
    import torch

    config = load_config(section)
    auto = _model_class(config, rows_head)
    if rows_head == "classification":
        _label_config(config, labels)
    backend = _attention(section, _concrete(auto, config))
    dtype = resolve_dtype(section.dtype, config, device)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        if section.init == "random":
            model = auto.from_config(config, dtype=dtype, attn_implementation=backend)
            model.new_heads = ()
        else:
            model = _pretrained(section, auto, config, rows_head, dtype, backend, load_kwargs or {})
    return _finish(model.eval(), section, backend, tokenizer)


def skeleton(
    section: ModelSection,
    *,
    rows_head: str = "causal",
    labels: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """The same model on the meta device: shapes and names, no weights read and no memory taken.

    Raises:
        ModelError: as `load_model`, except for what only the weights can tell.
    """
    import torch

    config = load_config(section)
    auto = _model_class(config, rows_head)
    if rows_head == "classification":
        _label_config(config, labels)
    backend = _attention(section, _concrete(auto, config))
    with torch.device("meta"), _quiet():
        model = auto.from_config(config, dtype=resolve_dtype(section.dtype, config, device), attn_implementation=backend)
    model.new_heads = ()
    return _finish(model.eval(), section, backend, tokenizer)


def _concrete(auto: Any, config: PreTrainedConfig) -> type:
    found = auto._model_mapping.get(type(config), object)
    return found[0] if isinstance(found, tuple) else found


def _pretrained(
    section: ModelSection, auto: Any, config: PreTrainedConfig, rows_head: str, dtype: Any, backend: str, extra: dict[str, Any]
) -> PreTrainedModel:
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
    model, info = _with_code(section, lambda **place: auto.from_pretrained(**place, **kwargs), "weights")
    _judge(section, model, info, rows_head)
    return model


def _judge(section: ModelSection, model: PreTrainedModel, info: dict[str, Any], rows_head: str) -> None:
    """Refuse weights that do not fit; remember the heads that are new."""
    prefix = model.base_model_prefix + "."
    reshaped = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    fresh = set(info["missing_keys"]) | reshaped

    def is_head(key: str) -> bool:
        return rows_head == "classification" and (not key.startswith(prefix) or any(f".{part}." in key for part in POOLERS))

    def allowed(key: str) -> bool:
        return is_head(key) or any(fnmatch.fnmatchcase(key, p) for p in (*LEGACY, *section.allow_mismatch))

    problems = [
        (f"{len(keys)} {what}", keys)
        for what, keys in (
            ("missing from the checkpoint (they would be random)", sorted(k for k in fresh - reshaped if not allowed(k))),
            ("of another shape", sorted(k for k in reshaped if not allowed(k))),
            (
                "in the checkpoint that this model has no place for",
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


def _finish(model: PreTrainedModel, section: ModelSection, backend: str, tokenizer: Any) -> PreTrainedModel:
    from llmrecipe.models import new_rows, vocabulary
    from llmrecipe.models.anatomy import name_by_hand
    from llmrecipe.models.attention import install

    name_by_hand(model, section.anatomy)
    model.position_offset = vocabulary.position_offset(model)
    model.attention_routed = bool(getattr(model, "_supports_attention_backend", False))
    if model.attention_routed and backend in ("sdpa", "eager"):
        with _quiet():
            install(model, backend)
    if tokenizer is not None and (count := vocabulary.fit(model, tokenizer)):
        new_rows.add(model, count)
    # A config that says tied beside weights that are not, or the other way round, would change the model when it is reloaded.
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embed is not None and hasattr(model.config, "tie_word_embeddings"):
        model.config.tie_word_embeddings = getattr(head, "weight", None) is getattr(embed, "weight", None)
    return model


def prepare_for_training(model: nn.Module, section: ModelSection) -> None:
    """Gradient checkpointing where the recipe asks for it.

    Blocks are recomputed under the context of their original forward, and without re-entrance, so frozen inputs need no
    gradients and ports see the same role twice.

    Raises:
        ModelError: the family has no checkpointed blocks.
    """
    if not section.gradient_checkpointing:
        return
    from llmrecipe.context import checkpoint_contexts

    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"model.gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Re-entrant checkpointing needs inputs with gradients; ours does not, and they would cost a backward through frozen blocks.
    model.disable_input_require_grads()


def load_tokenizer(model: ModelSection, tokenizer: TokenizerSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe, with its template, added tokens and a padding token.

    Raises:
        ModelError: no tokenizer there, or a padding token it does not have.
    """
    from transformers import AutoTokenizer

    from llmrecipe.models import vocabulary

    path = tokenizer.path or model.path
    section = model.model_copy(update={"path": path, "init": "random"})
    place, local = locate(path, "tokenizer.path" if tokenizer.path else "model.path")
    if local and not any((Path(place) / name).is_file() for name in vocabulary.FILES):
        raise ModelError(
            f"tokenizer.path: {path} holds no tokenizer; name a folder or hub model that does (tokenizer.path=...)"
        )
    reason = None if local else offline()
    try:
        with _quiet():
            found = AutoTokenizer.from_pretrained(
                place,
                trust_remote_code=section.trust_remote_code,
                **(
                    {}
                    if local
                    else {"revision": None if tokenizer.path else model.revision, "local_files_only": reason is not None}
                ),
            )
    except (OSError, ValueError, KeyError) as error:
        if not local and isinstance(error, OSError):
            raise unreachable(path, reason or "the hub has no such model, or it needs a login (HF_TOKEN)") from error
        raise ModelError(f"tokenizer.path: {path}: cannot read its tokenizer: {_first_line(error)}") from error
    vocabulary.add_tokens(found, tokenizer.add_tokens)
    vocabulary.set_padding(found, tokenizer.pad_token)
    if tokenizer.chat_template is not None:
        from llmrecipe.data.templates import set_template

        set_template(found, tokenizer.chat_template)
    return found
