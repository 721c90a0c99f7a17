"""vLLM itself, where it is installed: rollouts that it samples, and the folders that are exported for it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.engine.generation import decode_ids, generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.interop.load_run import load
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.vllm_lora import export_vllm_lora
from llmrecipe.models.checkpoint_path import TINY
from tests.trainings import events, train_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("vllm") is None, reason="needs the vllm command on the path, in whatever environment"),
]
PLAIN = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
PATIENCE = 300.0
"""Seconds in which a server must have started."""
ADAPTERS = ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs"]
QUESTION = [{"role": "user", "content": "Tell me about the goat, not the fish."}]


@contextmanager
def serving(folder: Path, *words: str, command: Sequence[str] = ("vllm", "serve", str(TINY))) -> Iterator[str]:
    """A running server and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # Its environment is its own.
    own = {name: value for name, value in own.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    log = folder / "server.txt"
    with log.open("wb") as out:
        running = subprocess.Popen(
            [*command, *words, "--port", str(port)], stdout=out, stderr=out, env=own, start_new_session=True
        )
    url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + PATIENCE
    try:
        while not _answers(f"{url}/models"):
            assert running.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        running.terminate()
        running.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def answer(url: str, model: str) -> str:
    """The greedy answer of a served model."""
    body = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    asked = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as reply:
        found: dict[str, Any] = json.load(reply)
    return str(found["choices"][0]["message"]["content"]).strip()


@pytest.mark.parametrize(("recipe", "more"), [
    ("grpo", []), ("ppo", ["objective.temperature=0.7", "objective.stop=[' and']"]),
])  # fmt: skip
def test_it_samples_rollouts_as_training_reads_them(recipe: str, more: list[str], tmp_path: Path) -> None:
    with serving(tmp_path, *PLAIN, *ADAPTERS) as url:
        train_recipe(tmp_path / "run", recipe, "steps=3", "objective.max_new_tokens=12", f"objective.sampler={url}", *more)
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 3
    for step in steps:
        assert 0 < step["sampler/logprob_diff"] < 1e-5 and step["sampler/logprob_diff_max"] < 1e-3


def test_exported_folders_answer_as_the_run_does(tmp_path: Path) -> None:
    run = tmp_path / "zoo"
    train_recipe(run, "sft_lora", "steps=30", "optim.lr=1e-2")
    model, tokenizer = load(run)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    wanted = decode_ids(tokenizer, generate(model, tokenizer, [ids], Sampling(max_new_tokens=24))[0])
    assert wanted
    merged = export_merged(run, tmp_path / "merged")
    with serving(tmp_path, *PLAIN, command=["vllm", "serve", str(merged.path)]) as url:
        assert answer(url, str(merged.path)) == wanted
    adapter = export_vllm_lora(run, tmp_path / "adapter")
    (printed,) = [note.removeprefix("vLLM: ") for note in adapter.notes if note.startswith("vLLM: ")]
    with serving(tmp_path, *PLAIN, command=shlex.split(printed)) as url:
        assert answer(url, "zoo") == wanted
