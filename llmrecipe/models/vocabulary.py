"""Tokens and their embedding rows: padding, added tokens, growing embeddings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError, did_you_mean
from llmrecipe.models.pretrained import pretrained

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
"""Tokens that serve as padding in known vocabularies, in order of preference."""
READ = ("input_ids", "inputs_embeds")
"""What embeddings that count positions from their padding make them from."""
BRACKETED = re.compile(r"<[^<>\s]+>|\[[A-Z_0-9]+\]")


def set_padding(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> None:
    """Make sure there is a padding token, without adding one to the vocabulary.

    Which token pads does not matter to training: targets and masks are determined by length, never by comparing ids, so an end
    token that is also the padding token is still learned.

    Raises:
        ModelError: the wanted token is not one token of the vocabulary, or nothing can pad.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            raise ModelError(
                f"tokenizer.pad_token: '{wanted}' is not in the vocabulary{did_you_mean(wanted, vocabulary)}; "
                "add it with tokenizer.add_tokens, or leave the key out"
            )
        tokenizer.pad_token = wanted
    if tokenizer.pad_token is not None and tokenizer.pad_token_id is not None:
        return
    found = next((token for token in PADDING if token in vocabulary), None) or tokenizer.unk_token or tokenizer.eos_token
    if found is None:
        raise ModelError("tokenizer: it has no padding, unknown or end token; name one with tokenizer.pad_token")
    tokenizer.pad_token = found


def set_mask(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Name the token that stands for a hidden one, adding it to the vocabulary where it does not exist.

    Args:
        wanted: `tokenizer.mask_token`; None leaves the tokenizer as it is.
    """
    if wanted is not None:
        tokenizer.add_special_tokens({"mask_token": wanted})


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> int:
    """Add tokens, those in brackets as special ones; return the number of new ones.

    Raises:
        ModelError: an empty token.
    """
    from tokenizers import AddedToken

    if any(not token.strip() for token in tokens):
        raise ModelError("tokenizer.add_tokens: a token must have at least one visible character")
    special = [AddedToken(t, special=True, normalized=False) for t in tokens if BRACKETED.fullmatch(t)]
    plain = [AddedToken(t, normalized=False) for t in tokens if not BRACKETED.fullmatch(t)]
    return tokenizer.add_tokens(special, special_tokens=True) + tokenizer.add_tokens(plain)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows an embedding needs: one more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds what a model reads: tokens, patches; None where it has none (convolutional networks)."""
    try:
        return pretrained(model).get_input_embeddings()
    except NotImplementedError:
        return None


def reads_images(model: nn.Module) -> bool:
    """Return whether a model reads images alone.

    A model that answers questions about images may name them as its main input; it embeds tokens all the same.
    """
    from torch import nn

    return getattr(model, "main_input_name", "") == "pixel_values" and not isinstance(input_embedding(model), nn.Embedding)


def fit(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grow the embedding (and head) to the tokenizer's vocabulary; return the number of new rows.

    New rows are initialized to the mean of the old ones, the same on every load, so that a run's base can be rebuilt. A tied
    head stays tied and the config gets the new size. Models with spare rows are left alone. Also sets the config's padding
    token. A model that reads no tokens is left as it is.
    """
    import torch
    from torch import nn

    embed = input_embedding(model)
    if not isinstance(embed, nn.Embedding):
        return 0
    rows, needed = int(embed.weight.shape[0]), vocabulary_size(tokenizer)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    if needed <= rows:
        return 0
    model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if tensor is not None and tensor.shape[0] == needed:
                    tensor[rows:] = tensor[:rows].float().mean(dim=0).to(tensor.dtype)
    return needed - rows


def position_offset(model: nn.Module) -> int:
    """Return the offset that RoBERTa-like families add to a position.

    Most count from padding_idx + 1; others keep a list of positions that begins later than 0.
    """
    for module in model.modules():
        start: Any = getattr(module, "padding_idx", None)
        if start is not None and any(hasattr(module, f"create_position_ids_from_{what}") for what in READ):
            return int(start) + 1
        places = module._buffers.get("position_ids")
        if places is not None and places.numel() and places.device.type != "meta":
            return int(places.flatten()[0])
    return 0
