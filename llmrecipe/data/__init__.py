"""Data: from files to token rows.

`prepare` turns a recipe's `data` section into `TokenData`, `order` shuffles an epoch, `TokenStream` reads rows as they come.
"""

from llmrecipe.data.formats.splits import has_split
from llmrecipe.data.prepare import order, prepare
from llmrecipe.data.streaming import StreamedRows, TokenStream
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.token_report import Report

__all__ = ["Report", "StreamedRows", "TokenData", "TokenStream", "has_split", "order", "prepare"]
