"""A stand-in for vLLM's server: its three addresses over the base model of Transformers, with adapters read by PEFT."""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import torch

from tests.servers import answering


class StandIn:
    """The state of a server: its base, and one adapter at a time by name."""

    def __init__(self, base: Any) -> None:
        self.base, self.model, self.name = base, base, ""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.stale_after: int | None = None
        """Loads after which it keeps its weights and says that it took them."""
        self.loads = 0
        self.scale = 1.0
        """Factor of its logits; another than 1 is another model."""
        self.forbidden = False
        self.short = False
        self.by_prompt = False
        """Whether an answer depends on its prompt and its turn since the last load instead of the seed in the request."""
        self.turns: Counter[tuple[int, ...]] = Counter()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            if self.forbidden and "lora" in path:
                return 404, {"detail": "Not Found"}
            if path.endswith("/load_lora_adapter"):
                return self.load(body)
            if path.endswith("/unload_lora_adapter"):
                return (200, "Success") if body["lora_name"] == self.name else (404, {"message": "no such adapter"})
            if body["model"] != self.name:
                return 404, {"message": f"The model {body['model']} does not exist."}
            return 200, {"choices": [self.choice(body)]}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        from peft import PeftModel

        self.loads += 1
        self.turns.clear()
        if self.stale_after is None or self.loads <= self.stale_after:
            if isinstance(self.model, PeftModel):
                self.model = self.model.unload()
            self.model = PeftModel.from_pretrained(self.model, body["lora_path"]).eval()
        self.name = body["lora_name"]
        return 200, f"Success: LoRA adapter '{self.name}' added successfully."

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float() * self.scale

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = list(body["prompt"])
        if "prompt_logprobs" in body:
            read = self.logits(ids).log_softmax(-1)
            return {
                "prompt_logprobs": [None, *({str(ids[i]): {"logprob": float(read[i - 1, ids[i]])}} for i in range(1, len(ids)))]
            }
        seed = body["seed"] % 2**63
        if self.by_prompt:
            self.turns[tuple(ids)] += 1
            seed = zlib.crc32(f"{ids} {self.turns[tuple(ids)]}".encode())
        generator = torch.Generator().manual_seed(seed)
        tokens, logprobs = [], []
        while len(tokens) < body["max_tokens"] - (2 if self.short else 0):
            read = (self.logits([*ids, *tokens])[-1] / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(read.exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append(float(read[token]))
            if token in body["stop_token_ids"] and not self.short:
                break
        return {"logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs}}


@contextmanager
def serving(base: Any) -> Iterator[tuple[str, StandIn]]:
    """A running stand-in and its address."""
    state = StandIn(base)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            code, content = state.reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with answering(Handler) as address:
        yield f"{address}/v1", state
