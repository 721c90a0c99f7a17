"""What belongs to the program that uses the library: its random generators, threads and determinism stay as they were."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from llmrecipe.core.device_profile import kept_profiles
from llmrecipe.core.errors import RunError
from llmrecipe.runtime.processes import KERNELS_KEPT

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", *KERNELS_KEPT)
"""Environment variables that a run sets for itself."""
_training = threading.Lock()


@contextlib.contextmanager
def one_training() -> Iterator[None]:
    """Allow one training at a time in this process: seeds, threads and the process group belong to the whole process.

    Raises:
        RunError: another training is running in this process.
    """
    if not _training.acquire(blocking=False):
        raise RunError("train: another training is running in this process; wait for its end, or start a second process")
    try:
        yield
    finally:
        _training.release()


@contextlib.contextmanager
def kept_for_caller() -> Iterator[None]:
    """Restore, on exit, the random generators of Python, NumPy and torch, the threads, the kernels and the device profile."""
    python, numpy = random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    environment = {name: os.environ.get(name) for name in VARIABLES}
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))), kept_profiles():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
