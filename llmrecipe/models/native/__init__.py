"""The transformer of this package: embedding, attention, feed-forward, positions and norms as named parts.

Importing it registers `llmrecipe_native` with Transformers, so `model.init=random model.config.model_type=llmrecipe_native`
builds one and saved ones load like any other checkpoint.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.heads import (
    NativeForCausalLM,
    NativeForImageClassification,
    NativeForMaskedLM,
    NativeForQuestionAnswering,
    NativeForSeq2SeqLM,
    NativeForSequenceClassification,
    NativeForTokenClassification,
)
from llmrecipe.models.native.model import NativeModel

AutoConfig.register(NativeConfig.model_type, NativeConfig, exist_ok=True)
AutoModel.register(NativeConfig, NativeModel, exist_ok=True)
AutoModelForCausalLM.register(NativeConfig, NativeForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(NativeConfig, NativeForImageClassification, exist_ok=True)
AutoModelForMaskedLM.register(NativeConfig, NativeForMaskedLM, exist_ok=True)
AutoModelForQuestionAnswering.register(NativeConfig, NativeForQuestionAnswering, exist_ok=True)
AutoModelForSeq2SeqLM.register(NativeConfig, NativeForSeq2SeqLM, exist_ok=True)
AutoModelForSequenceClassification.register(NativeConfig, NativeForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NativeConfig, NativeForTokenClassification, exist_ok=True)

__all__ = [
    "NativeConfig",
    "NativeForCausalLM",
    "NativeForImageClassification",
    "NativeForMaskedLM",
    "NativeForQuestionAnswering",
    "NativeForSeq2SeqLM",
    "NativeForSequenceClassification",
    "NativeForTokenClassification",
    "NativeModel",
]
