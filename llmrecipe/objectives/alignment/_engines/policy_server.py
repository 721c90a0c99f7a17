"""A vLLM server as the sampler of rollouts: it gets the policy's adapter before each one and proves that it answers with it.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R --logprobs-mode processed_logprobs

The server holds the base model in an environment of its own; what is trained must be a low-rank change of it (see
`interop.vllm_lora`). Before a rollout the adapter is written to a folder that both can read, loaded under a name that was never
used before, and the one before it is unloaded.

A server that goes on answering with older weights, or with another base, trains the policy on answers that are not its own, and
nothing else would show it. So after each hand-over both give log-probabilities of the same probe of n tokens, p_t here and q_t
there, and the run ends where

    mean |q_t - p_t| > 0.2                          another base model, or an adapter that it applies in another way
    mean |q_t - p_s| < mean |q_t - p_t| / 2         the weights of an earlier hand-over s
    q_t = q_s although mean |p_t - p_s| > 0.01      the same, where rounding hides the difference

Interface: vLLM's OpenAI-compatible server, POST URL/completions with token ids, /load_lora_adapter, /unload_lora_adapter.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import tempfile
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.http_client import Client, Refused
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.answer_ends import AnswerEnds, answer_ends
from llmrecipe.engine.generation import ScoredAnswer
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.interop.peft import layout
from llmrecipe.interop.peft.exporter import branches_of
from llmrecipe.interop.vllm_lora import check_rules
from llmrecipe.methods._base.method import Stage

if TYPE_CHECKING:
    from llmrecipe.runs.open_model import LoadedModel

WHERE = "objective.sampler"
LOAD, UNLOAD, COMPLETIONS = "/load_lora_adapter", "/unload_lora_adapter", "/completions"
PROBE = 64
"""Most tokens of the probe."""
LARGEST, VISIBLE = 0.2, 0.01
"""Largest mean difference of log-probabilities that is rounding; a change of them that no rounding hides wholly."""
ID = "token_id:"
"""Begins a token in a reply that names tokens by their number."""


@dataclass(frozen=True)
class Probed:
    """Log-probabilities of the probe after one hand-over, (n,) each."""

    here: Tensor
    there: Tensor


class PolicyServer:
    """The connection to a server and what was handed over to it.

    Args:
        url: address up to and without /completions.
        key_env: environment variable with a bearer token.
        loaded: the model that trains, with the stacks mounted below its own.
    """

    def __init__(self, url: str, key_env: str | None, loaded: LoadedModel):
        self.client = Client(url, "sampler", "answers", key_env, timeout=600.0)
        self.loaded = loaded
        self.name: str | None = None
        """The adapter that is served."""
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        """Where it lies."""
        self.probe: Sequence | None = None
        self.first: Probed | None = None
        self.before: Probed | None = None

    # --- weights --------------------------------------------------------------------------------------------------

    def hand_over(self, prompts: Seq[Seq[int]], roles: Roles) -> None:
        """Give the server the policy as it is now; every process returns when the adapter is served and proven.

        Args:
            prompts: of the coming rollout; those of the first hand-over make the probe.

        Raises:
            ModelError: the policy is no low-rank change of its base that vLLM loads.
            RunError: the server refuses the adapter, or answers with other weights.
        """
        main = roles.runtime is None or roles.runtime.rank == 0
        number = roles.sum([float(secrets.randbelow(2**40)) if main else 0.0])[0]
        name = f"policy-{int(number):010x}"
        if main:
            self._load(name, roles)
            if self.probe is None:
                ids = [token for prompt in prompts for token in prompt][:PROBE]
                self.probe = Sequence(ids, [0] + [1] * (len(ids) - 1))
            self._prove(name, roles)
        roles.sum([0.0])
        self.name = name

    def _load(self, name: str, roles: Roles) -> None:
        adapter = policy_adapter(self.loaded, roles)
        parent = None if roles.events is None or roles.events.path is None else roles.events.path.parent
        # It stays until the next one takes its place: a server may read an adapter again that its cache has dropped.
        folder = tempfile.TemporaryDirectory(prefix="sampler-", dir=parent, ignore_cleanup_errors=True)
        layout.write_adapter_folder(Path(folder.name), adapter)
        try:
            if self.name is not None:
                self.client.post({"lora_name": self.name}, UNLOAD)
            self.client.post({"lora_name": name, "lora_path": str(Path(folder.name).resolve())}, LOAD)
        except Refused as error:
            hint = (
                "; adapters can be changed only where the server runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                "--enable-lora, and where it can read the folder of the run"
            )
            raise RunError(f"{WHERE}: {error}{hint}") from error
        self.folder = folder

    @torch.no_grad()
    def _prove(self, name: str, roles: Roles) -> None:
        """Compare the log-probabilities of the probe here and there.

        Raises:
            RunError: the server answers with other weights than the policy's.
        """
        assert self.probe is not None
        batch = pad([self.probe], roles.pad_id).to(roles.device)
        now = Probed(roles.engine(batch)["logprobs"].float().cpu(), self._probed(name))
        apart = float((now.there - now.here).abs().mean())
        about = f"{WHERE}: the server at {self.client.url}"
        if not apart <= LARGEST:
            raise RunError(
                f"{about} gives {len(now.here)} tokens log-probabilities that differ from the policy's by {apart:.3f} on "
                f"average (rounding stays below {LARGEST}): it serves another base model, or applies the adapter in another way"
            )
        for earlier in (self.first, self.before):
            if earlier is None:
                continue
            moved = float((now.here - earlier.here).abs().mean())
            same = torch.equal(now.there, earlier.there) and moved > VISIBLE
            if same or float((now.there - earlier.here).abs().mean()) < apart / 2:
                raise RunError(
                    f"{about} still answers with the weights of an earlier update: since then the policy's log-probabilities "
                    f"have moved by {moved:.4f} on average, the server's have not. Does a cache of prompts or adapters stand "
                    "between?"
                )
        self.first = self.first or now
        self.before = now

    def _probed(self, name: str) -> Tensor:
        """Return the server's log-probabilities of the probe's tokens but the first, (n,)."""
        assert self.probe is not None
        ids = list(self.probe.ids)
        body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        reply = self.client.post(body, COMPLETIONS)
        try:
            listed = parse_json(reply)["choices"][0]["prompt_logprobs"]
            return torch.tensor([float(listed[i][str(ids[i])]["logprob"]) for i in range(1, len(ids))])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise self._unreadable(
                "the log-probability of every token of a prompt (choices[0].prompt_logprobs)", reply
            ) from error

    # --- answers --------------------------------------------------------------------------------------------------

    def answers(self, prompts: Seq[Seq[int]], sampling: Sampling, roles: Roles) -> list[ScoredAnswer]:
        """Sample an answer to each prompt from the policy that was handed over.

        Raises:
            RunError: the server gave no answer, or one that ended before an end token, a stop text or the limit.
        """
        ends = answer_ends(roles.model, roles.tokenizer, sampling)
        if not prompts:
            return []
        with ThreadPoolExecutor(min(sampling.batch, len(prompts))) as pool:
            places = range(len(prompts))
            return list(pool.map(lambda i: self._answer(list(prompts[i]), _seed(sampling.seed, i), sampling, ends), places))

    def _answer(self, prompt: list[int], seed: int, sampling: Sampling, ends: AnswerEnds) -> ScoredAnswer:
        # What a checkpoint's generation settings would add is named and switched off; ends are those of the own decoders.
        body: dict[str, Any] = {
            "model": self.name, "prompt": prompt, "max_tokens": sampling.max_new_tokens, "seed": seed,
            "temperature": sampling.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 1, "return_tokens_as_token_ids": True,
            "ignore_eos": True, "stop_token_ids": sorted(ends.tokens), "stop": list(ends.stops),
            "include_stop_str_in_output": True, "skip_special_tokens": False,
        }  # fmt: skip
        reply = self.client.post(body, COMPLETIONS)
        try:
            found = parse_json(reply)["choices"][0]["logprobs"]
            tokens = [int(str(token).removeprefix(ID)) for token in found["tokens"]]
            logprobs = [float(value) for value in found["token_logprobs"]]
            if not tokens or len(tokens) != len(logprobs) or not all(map(math.isfinite, logprobs)) or min(tokens) < 0:
                raise ValueError("no log-probability for each token")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            wanted = "token ids with their log-probabilities (choices[0].logprobs under return_tokens_as_token_ids)"
            raise self._unreadable(wanted, reply) from error
        length = next((n for n in range(1, len(tokens) + 1) if ends.reached(tokens[:n])), None)
        if length is None:
            text = (
                f"{WHERE}: an answer of {self.client.url} ended after {len(tokens)} tokens, before objective.max_new_tokens "
                "and without an end token or stop text; is --max-model-len too small?"
            )
            raise RunError(self.client.clean(text))
        return ScoredAnswer(tokens[:length], torch.tensor(logprobs[:length]))

    def _unreadable(self, wanted: str, reply: bytes) -> RunError:
        text = f"{WHERE}: the reply of {self.client.url} has no {wanted}, as vLLM gives them; got {reply[:200]!r}"
        return RunError(self.client.clean(text))


def policy_adapter(loaded: LoadedModel, roles: Roles) -> layout.Adapter:
    """Return the policy's whole change of its base as one LoRA adapter of one rank.

    Raises:
        ModelError: it is no such change, or one that vLLM does not load.
    """
    wrappers = [w for w in (*loaded.mounted, *roles.stack) if w.stage is not Stage.BASE and not w.role]
    branches = branches_of(loaded.model, wrappers, WHERE)
    adapter = layout.lora_adapter(layout.with_one_rank(layout.concatenate_branches(branches)))
    adapter.config |= {"base_model_name_or_path": loaded.section.path, "task_type": "CAUSAL_LM"}
    check_rules(adapter, WHERE)
    return adapter


def _seed(seed: int | None, place: int) -> int:
    """Return the seed of one answer, which depends on that of the rollout and its place alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()) >> 1
