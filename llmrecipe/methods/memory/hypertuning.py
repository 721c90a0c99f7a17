"""HyperTuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.foreign import reading
from llmrecipe.core.option_types import Literal, PositiveFloat, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods._engines.document_tokens import host_of
from llmrecipe.methods.additive._engines.prefix_kv import PrefixColumns, attention_sites, shape_of
from llmrecipe.methods.memory._engines.generated_adapter import Columns, GeneratedLowRank, Generator
from llmrecipe.methods.memory._engines.hypermodel import Hypermodel, RowBlock, WritingPlan, native_config
from llmrecipe.models.hooks.hook import device_of, row_index
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.hooks.shared_module import add_shared, shared_modules
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.tokenizer_file import read_tokenizer
from llmrecipe.models.vocabulary import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmrecipe.models.site import Site

TARGETS = {"lora": "attn.q|v", "prefix": "attn"}
"""Sites of each kind of adapter where `target` names none."""


@register
class Hypertuning(Wrapper):
    """HyperTuning: a hypermodel H reads examples S and writes the adapter of a frozen model, phi = H(S), in one forward pass.

    Only H trains: min over H of E_S[-log p(y | x; theta, phi = H(S))]. H is an encoder-decoder: the encoder reads the examples,
    the decoder a learned table of queries that see one another, and small networks turn its states into rows of phi. `emit:
    lora` writes A (r, in) and B (out, r) of every site of `target`, y = W x + (alpha / r) B A x, one query a row; `prefix`
    writes key/value columns of every attention. Every row of a batch has the adapter of its own examples.

    The rows of B start at zero, so step 0 is the base model and B still has gradients; prefixes take their share of each
    softmax, unless `prefix_gate` gives them one of their own, times a factor that starts at zero. H may be larger than an
    adapter by far: the method saves when adapters are used, not when it is trained. Not merged itself: `llmrecipe adapt RUN
    data.path=FILE` writes the adapter of a file of examples as an ordinary run. Without examples H reads nothing and writes one
    adapter for all, so that any objective can train it; caclm and hyper_mtf give examples.

    Paper: HyperTuning: Toward Adapting Large Language Models without Back-propagation (arXiv 2211.12485), whose code is not
    public. From designs that are: writers shared by layers (HINT, arXiv 2212.10315), a learned table of rows
    (`head_init: bias`, Text-to-LoRA, arXiv 2506.06105). Departures: a hypermodel from nothing where `path` names none; a
    learned vector before the examples.
    """

    alone: ClassVar[str] = (
        "writes the adapter of a frozen model, and a second method would train too; adapt first (`llmrecipe adapt`), then "
        "train on the run that gives"
    )
    stage: ClassVar[Stage] = Stage.INJECT
    unmergeable: ClassVar[str] = "it writes adapters from examples; `llmrecipe adapt` writes one as a run, which can be merged"

    modality: ClassVar[str] = "text"
    otherwise: ClassVar[str] = "use vpt or lora"
    reads_examples: ClassVar[bool] = True

    emit: Literal["lora", "prefix"] = "lora"
    """Kind of adapter."""
    target: str | None = None
    """Linear layers (default `attn.q|v`), or attention modules for a prefix (default `attn`)."""
    r: Rank = 8
    """Rank of A and B."""
    alpha: PositiveFloat = 16.0
    """Scale: the branch is multiplied by alpha / r."""
    num_virtual_tokens: Rank = 32
    """Virtual tokens of a prefix."""
    path: str | None = None
    """An encoder-decoder with the model's own vocabulary (a T5 for a T5) to start from; a new one where null."""
    width: PositiveInt | None = None
    """Width of a new hypermodel; that of the model where null, which also gives its embedding."""
    depth: PositiveInt = 2
    """Blocks on each side of a new hypermodel."""
    query_layout: Literal["per_row", "per_matrix"] = "per_row"
    """One query for each row of a matrix, or one for the whole of it."""
    head_hidden: PositiveInt | None = None
    """Width inside the networks that write rows; that of the hypermodel where null."""
    head_init: Literal["normal", "bias"] = "normal"
    """Rows of A and of prefixes start from random weights, or from a learned table while the weights start at zero."""
    decoder_causal: bool = False
    """Let a query see only those before it."""
    prefix_gate: bool = False
    """Give prefixes a softmax of their own and a factor that starts at zero."""
    phi_norm: bool = False
    """Keep rows of A and of prefixes at the size they start with."""

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base: a prefix without a gate changes every softmax."""
        return self.emit == "lora" or self.prefix_gate

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse options of the other kind of adapter.

        Raises:
            RecipeError: naming the option.
        """
        if self.prefix_gate and self.emit == "lora":
            raise RecipeError(f"stack.{self.name}.prefix_gate: only a prefix has a gate; set emit: prefix")
        if self.width is not None and self.path is not None:
            raise RecipeError(f"stack.{self.name}.width: {self.path} has its own width; leave it out")

    # --- building -------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add the hypermodel, a generator at each stack of blocks, and a hook without tensors at every site.

        Raises:
            ModelError: a site is not a linear layer, or `path` is no encoder-decoder with enough tokens.
            RecipeError: a prefix that does not belong to an attention module.
        """
        if self.emit == "lora":
            linear = self._linear_sites(model)
            blocks = [block for site in linear for block in self._factors(site)]
        else:
            modules = attention_sites(model, self.target or TARGETS["prefix"], self.name)
            blocks, columns = self._columns(model, modules)
        config = (structure or {}).get("config")
        plan = WritingPlan(
            self.query_layout == "per_matrix", self.head_hidden, self.head_init, self.phi_norm, self.decoder_causal
        )
        place = device_of(model)
        with torch.device(place):
            trunk = self._trunk(model, config, place.type == "meta")
            hypermodel = Hypermodel(trunk, blocks, plan)
        add_shared(model, hypermodel, self.name)
        if self.emit == "lora":
            for side in dict.fromkeys(site.side for site in linear):
                add_hook(host_of(model, side), self.name, Generator(hypermodel), self.name)
            for index, site in enumerate(linear):
                hook = GeneratedLowRank(2 * index, self.alpha / self.r, row_index(site))
                add_hook(site.module, site.name(self.name), hook, self.name)
            return
        for side, roles in modules.items():
            add_hook(host_of(model, side), self.name, Generator(hypermodel, columns[side], self.prefix_gate), self.name)
            for role, sites in roles.items():
                for index, site in enumerate(sites):
                    add_hook(site.module, self.name, PrefixColumns(role, index), self.name)

    def _linear_sites(self, model: nn.Module) -> list[Site]:
        sites = anatomy(model).at(self.target or TARGETS["lora"])
        for site in sites:
            inside = site.layer is not None and not site.role.startswith(("norm", "embed"))
            if site.tensor is not None or not inside or not hasattr(site.module, "weight"):
                raise ModelError(f"stack.{self.name}: {site.path} is not a linear layer of a block; hypertuning adapts those")
        return sites

    def _factors(self, site: Site) -> list[RowBlock]:
        """Return the blocks of A, whose rows have the size of an ordinary LoRA's, and of B."""
        kind = f"{site.side}.{site.role}"
        return [
            RowBlock(f"{kind}.A{site.width_in}", self.r, site.width_in, 1.0 / math.sqrt(3.0 * site.width_in)),
            RowBlock(f"{kind}.B{site.width_out}", self.r, site.width_out, 0.0),
        ]

    def _columns(
        self, model: nn.Module, modules: dict[str, dict[str, list[Site]]]
    ) -> tuple[list[RowBlock], dict[str, dict[str, list[Columns]]]]:
        """Return the blocks of keys and values, and where the columns of each module are among them, by side and role."""
        blocks: list[RowBlock] = []
        places: dict[str, dict[str, list[Columns]]] = {}
        for side, roles in modules.items():
            for role, sites in roles.items():
                for site in sites:
                    shape = shape_of(site, model, self.num_virtual_tokens)
                    places.setdefault(side, {}).setdefault(role, []).append(Columns(len(blocks), shape))
                    for letter, width in (("K", shape.heads * shape.key), ("V", shape.heads * shape.value)):
                        blocks.append(RowBlock(f"{side}.{role}.{letter}{width}", self.num_virtual_tokens, width, 1.0))
        return blocks, places

    def _trunk(self, model: nn.Module, config: dict[str, Any] | None, bare: bool) -> PreTrainedModel:
        """Return the encoder-decoder: that of a saved structure, of `path`, or a new one.

        Args:
            bare: make it without reading weights.
        """
        if config is not None:
            return AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32, trust_remote_code=False)
        if self.path is not None:
            return self._from_path(self.path, model, bare)
        embedding: Any = input_embedding(model)
        whole = pretrained(model).config.get_text_config()
        width = self.width or whole.hidden_size
        made = AutoModel.from_config(
            native_config(embedding.num_embeddings, width, self.depth, whole.pad_token_id), dtype=torch.float32
        )
        table = made.get_input_embeddings().weight
        if not bare and table.shape == embedding.weight.shape and embedding.weight.is_floating_point():
            with torch.no_grad():
                table.copy_(embedding.weight)
        return made

    def _from_path(self, path: str, model: nn.Module, bare: bool) -> PreTrainedModel:
        key = f"stack.{self.name}.path: {path}"
        with reading(key, "name an encoder-decoder in safetensors", ModelError):
            config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise ModelError(f"{key}: '{config.model_type}' is no encoder-decoder")
        embedding: Any = input_embedding(model)
        if config.vocab_size < embedding.num_embeddings:
            raise ModelError(
                f"{key}: it has {config.vocab_size} tokens and the model {embedding.num_embeddings}; a hypermodel reads the "
                "model's own tokens"
            )
        if bare:
            return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with reading(key, "name an encoder-decoder in safetensors", ModelError):
            return AutoModel.from_pretrained(
                path, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )

    # --- life cycle -----------------------------------------------------------------------------------------------

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the configuration of the hypermodel."""
        return {"config": self.hypermodel(model).trunk.config.to_dict()}

    def calibrates(self) -> bool:
        """Return whether the vocabulary of `path` is to be compared with the model's."""
        return self.path is not None

    def chooses(self) -> bool:
        """Return False: a comparison changes nothing."""
        return False

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Refuse a hypermodel that was trained with another vocabulary: it would read other words than were written.

        Raises:
            ModelError: naming the first token that differs.
        """
        if self.path is None:
            return
        with reading(f"stack.{self.name}.path: {self.path}", "its folder must hold its tokenizer", ModelError):
            theirs = read_tokenizer(self.path, Path(self.path).is_dir()).get_vocab()
        own = probe.tokenizer.get_vocab()
        other = next((token for token, number in own.items() if theirs.get(token) != number), None)
        if other is not None:
            raise ModelError(
                f"stack.{self.name}.path: {self.path} has another vocabulary: token {other!r} is {own[other]} here and "
                f"{theirs.get(other, 'absent')} there; use a hypermodel with the model's tokenizer, or leave path out"
            )

    def hypermodel(self, model: nn.Module) -> Hypermodel:
        """Return the hypermodel of an attached model."""
        return next(shared for _, shared in shared_modules(model, self.name) if isinstance(shared, Hypermodel))

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield the parts of the hypermodel with their numbers of parameters, and the gates."""
        hypermodel = self.hypermodel(model)
        for part, module in (("encoder-decoder", hypermodel.trunk), ("writers of rows", hypermodel.writers)):
            yield f"{self.name}: {part}", sum(p.numel() for p in module.parameters())
        yield f"{self.name}: queries", hypermodel.queries.numel() + hypermodel.first.numel()
        gates = [n for name, n in super().describe(model) if ".gates." in name]
        if gates:
            yield f"{self.name}: gates", sum(gates)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: every parameter of the hypermodel trains; AdamW keeps 8 bytes for each."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
