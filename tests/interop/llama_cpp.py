"""llama.cpp itself, as `xllamacpp` wraps it: its server on a GGUF file, in a process of its own, in float32 throughout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SERVE = """import sys
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.verbosity, p.warmup = sys.argv[1], 0, 1, 5, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""
LINE = re.compile(r"^[\d.]+ ([WE]) (.*)$")
EXPECTED = ("no API key is set", "chat template supports preserving reasoning")
"""Warnings that say nothing of a file."""
FORCED = 1e6


class LlamaCpp:
    """A served file.

    Args:
        log: where llama.cpp writes what it finds.
    """

    def __init__(self, address: str, log: Path) -> None:
        self.address, self._log = address, log

    def ask(self, place: str, **body: Any) -> Any:
        """The reply to a request."""
        request = urllib.request.Request(
            f"{self.address}{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """How a text is cut; with `special`, with the tokens that are added to it."""
        return list(self.ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"])

    def logprobs(self, ids: Sequence[int], size: int, next_id: int) -> Tensor:
        """log p (V,) of the token after these; `next_id` is a token whose text is complete, which a reply needs."""
        body = {"n_predict": 1, "n_probs": size, "temperature": 0, "cache_prompt": False, "logit_bias": [[next_id, FORCED]]}
        found = self.ask("/completion", prompt=list(ids), **body)["completion_probabilities"][0]["top_logprobs"]
        probabilities = torch.full((size,), float("nan"))
        for token in found:
            probabilities[token["id"]] = token["logprob"]
        return probabilities

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens after these, up to an end token and with it."""
        body = {"n_predict": most, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return list(self.ask("/completion", prompt=list(ids), **body)["tokens"])

    def rendered(self, turns: Sequence[dict[str, str]]) -> str:
        """The text of a conversation."""
        return str(self.ask("/apply-template", messages=list(turns))["prompt"])

    def answer(self, turns: Sequence[dict[str, str]], most: int) -> tuple[str, int, str]:
        """The answer to a conversation, how many tokens this had, and why the answer ends."""
        reply = self.ask("/v1/chat/completions", messages=list(turns), temperature=0, max_tokens=most, cache_prompt=False)
        choice = reply["choices"][0]
        return choice["message"]["content"], reply["usage"]["prompt_tokens"], choice["finish_reason"]

    def complaints(self) -> list[str]:
        """Warnings and errors of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [found[2] for line in lines if (found := LINE.match(line)) and not any(e in line for e in EXPECTED)]

    def ends(self) -> set[str]:
        """Tokens at which it stops, by its log."""
        return set(re.findall(r"print_info: EOG token +=\s+\d+ '(.*)'", self._log.read_text(encoding="utf-8")))


@contextmanager
def llama_cpp(file: Path) -> Iterator[LlamaCpp]:
    """llama.cpp's server on a file.

    Raises:
        AssertionError: llama.cpp does not take the file, with the end of its log.
    """
    log = file.with_suffix(".log")
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None and process.stdin is not None
            address = next((line.split()[1] for line in process.stdout if line.startswith("listening ")), None)
            assert address is not None, log.read_text(encoding="utf-8", errors="replace")[-2000:]
            yield LlamaCpp(address, log)
        finally:
            process.communicate("", timeout=60)
