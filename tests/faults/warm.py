"""Imported once by the process that forks the commands: the libraries, and one training that builds what is built lazily."""

from __future__ import annotations

import io
import os
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from llmrecipe.cli import app
from llmrecipe.pipelines import run_stages
from tests.faults.server import forked_stage
from tests.golden.runs import own_cache

run_stages.execute = forked_stage

with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()), own_cache(Path(folder)):
    for recipe in ("sft_lora", "dpo_lora"):
        words = [f"recipe={recipe}", "steps=1", "data.limit=8", "batch.size=2", "eval.batches=1", "log.live=off"]
        app.run_command(["train", *words])
