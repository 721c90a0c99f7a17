"""What a plugin imports: decorators, the interfaces of components and what they speak of, the types of options.

    from llmrecipe.plugin import ClassVar, Conversion, DataFormat, Row, register

A plugin is an installed package. A recipe names it (`plugins: [my_package]`), or it declares the entry point group
`llmrecipe.plugins`. Each of its components is one file whose stem is the component's name, with one class that is marked
`@register` and inherits one of the interfaces below. The names are imported when they are first used, so importing this module
costs nothing. These names are stable; everything else in the package may change between versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import did_you_mean
from llmrecipe.core.lazy import load_module

if TYPE_CHECKING:
    from llmrecipe.core.errors import DataError, ModelError, RecipeError, RunError, UserError
    from llmrecipe.core.option_types import (
        Annotated,
        ClassVar,
        Field,
        Fraction,
        Literal,
        LossMaskName,
        NonNegativeFloat,
        NonNegativeInt,
        OpenFraction,
        PositiveFloat,
        PositiveFraction,
        PositiveInt,
        RefSync,
    )
    from llmrecipe.core.registry import options, register
    from llmrecipe.data.collate import Batch, Sequence
    from llmrecipe.data.formats.bad_row import BadRow
    from llmrecipe.data.formats.cells import filled_text, label_of, text_of
    from llmrecipe.data.formats.conversations import prompt_answers
    from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
    from llmrecipe.data.token_report import Report
    from llmrecipe.data.tokenize.answers import encode_answers, encode_prompts
    from llmrecipe.data.tokenize.chat_templates import ChatTemplate
    from llmrecipe.data.tokenize.encoder import Encoder, Item
    from llmrecipe.data.tokenize.loss_mask import Encoded, LossMask
    from llmrecipe.data.tokenize.row_type import RowType
    from llmrecipe.data.tokenize.sequences import encode_sequences
    from llmrecipe.data.tokenize.truncation import Limit, Truncation
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.evaluation.verify.bench import Bench
    from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
    from llmrecipe.feedback.judges.labeller import Ask, Judge
    from llmrecipe.feedback.judges.rule import judge_rule
    from llmrecipe.feedback.metric import Metric
    from llmrecipe.feedback.rewards.function import reward_function
    from llmrecipe.interop.adapter_hub.hub_layout import HubLayout
    from llmrecipe.interop.merge_method import MergeMethod
    from llmrecipe.interop.peft.converters import peft_converter
    from llmrecipe.interop.peft.layout import Adapter, Branch
    from llmrecipe.methods._base.late_values import Largest, Smallest
    from llmrecipe.methods._base.method import ParamGroup, Probe, Stage, Wrapper
    from llmrecipe.methods._engines.low_rank import add_to_weight
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.family import Family
    from llmrecipe.models.hooks.hook import Hook, device_of
    from llmrecipe.models.hooks.host import add_hook, merge_hooks
    from llmrecipe.models.hooks.shared_module import SharedModule, add_shared, shared_modules
    from llmrecipe.models.module_map import anatomy
    from llmrecipe.models.part_names import PartNames
    from llmrecipe.models.site import Site
    from llmrecipe.objectives.base import Loss, Measures, Objective
    from llmrecipe.objectives.reward_interface import Answer, Reward
    from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, token_loss
    from llmrecipe.optim.optimizer import Optimizer
    from llmrecipe.optim.schedule import Schedule
    from llmrecipe.pipelines.step import Step
    from llmrecipe.runs.adapter_format import AdapterFormat
    from llmrecipe.runs.delta import Layer
    from llmrecipe.runs.tracker import OpenTracker, Tracker

_HOMES = {
    "llmrecipe.core.errors": (
        "DataError",
        "ModelError",
        "RecipeError",
        "RunError",
        "UserError",
    ),
    "llmrecipe.core.option_types": (
        "Annotated",
        "ClassVar",
        "Field",
        "Fraction",
        "Literal",
        "LossMaskName",
        "NonNegativeFloat",
        "NonNegativeInt",
        "OpenFraction",
        "PositiveFloat",
        "PositiveFraction",
        "PositiveInt",
        "RefSync",
    ),
    "llmrecipe.core.registry": (
        "options",
        "register",
    ),
    "llmrecipe.data.collate": (
        "Batch",
        "Sequence",
    ),
    "llmrecipe.data.formats.bad_row": ("BadRow",),
    "llmrecipe.data.formats.cells": (
        "filled_text",
        "label_of",
        "text_of",
    ),
    "llmrecipe.data.formats.conversations": ("prompt_answers",),
    "llmrecipe.data.formats.data_format": (
        "Conversion",
        "DataFormat",
        "Row",
    ),
    "llmrecipe.data.token_report": ("Report",),
    "llmrecipe.data.tokenize.answers": (
        "encode_answers",
        "encode_prompts",
    ),
    "llmrecipe.data.tokenize.chat_templates": ("ChatTemplate",),
    "llmrecipe.data.tokenize.encoder": (
        "Encoder",
        "Item",
    ),
    "llmrecipe.data.tokenize.loss_mask": (
        "Encoded",
        "LossMask",
    ),
    "llmrecipe.data.tokenize.row_type": ("RowType",),
    "llmrecipe.data.tokenize.sequences": ("encode_sequences",),
    "llmrecipe.data.tokenize.truncation": (
        "Limit",
        "Truncation",
    ),
    "llmrecipe.engine.role_models": ("Roles",),
    "llmrecipe.evaluation.verify.bench": ("Bench",),
    "llmrecipe.evaluation.verify.verification": (
        "Measured",
        "NotApplicable",
        "Verification",
    ),
    "llmrecipe.feedback.judges.labeller": (
        "Judge",
        "Ask",
    ),
    "llmrecipe.feedback.judges.rule": ("judge_rule",),
    "llmrecipe.feedback.metric": ("Metric",),
    "llmrecipe.feedback.rewards.function": ("reward_function",),
    "llmrecipe.interop.adapter_hub.hub_layout": ("HubLayout",),
    "llmrecipe.interop.merge_method": ("MergeMethod",),
    "llmrecipe.interop.peft.converters": ("peft_converter",),
    "llmrecipe.interop.peft.layout": (
        "Adapter",
        "Branch",
    ),
    "llmrecipe.methods._base.method": (
        "ParamGroup",
        "Probe",
        "Stage",
        "Wrapper",
    ),
    "llmrecipe.methods._base.late_values": (
        "Largest",
        "Smallest",
    ),
    "llmrecipe.models.anatomy": ("Anatomy",),
    "llmrecipe.models.family": ("Family",),
    "llmrecipe.methods._engines.low_rank": ("add_to_weight",),
    "llmrecipe.models.hooks.hook": (
        "Hook",
        "device_of",
    ),
    "llmrecipe.models.hooks.host": (
        "add_hook",
        "merge_hooks",
    ),
    "llmrecipe.models.hooks.shared_module": (
        "SharedModule",
        "add_shared",
        "shared_modules",
    ),
    "llmrecipe.models.module_map": ("anatomy",),
    "llmrecipe.models.part_names": ("PartNames",),
    "llmrecipe.models.site": ("Site",),
    "llmrecipe.objectives.base": (
        "Loss",
        "Measures",
        "Objective",
    ),
    "llmrecipe.objectives.reward_interface": (
        "Answer",
        "Reward",
    ),
    "llmrecipe.objectives.token_math": (
        "TOKEN_METRICS",
        "collate_tokens",
        "token_loss",
    ),
    "llmrecipe.optim.optimizer": ("Optimizer",),
    "llmrecipe.optim.schedule": ("Schedule",),
    "llmrecipe.pipelines.step": ("Step",),
    "llmrecipe.runs.adapter_format": ("AdapterFormat",),
    "llmrecipe.runs.delta": ("Layer",),
    "llmrecipe.runs.tracker": (
        "OpenTracker",
        "Tracker",
    ),
}
"""Module -> what a plugin may import of it; the imports above say the same to type checkers."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(load_module(_MODULES[name]), name)
    raise AttributeError(f"module 'llmrecipe.plugin' has no attribute '{name}'{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
