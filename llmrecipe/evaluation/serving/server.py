"""Running the server: the socket, the signals, and the end."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from llmrecipe.core.signals import handled_by
from llmrecipe.evaluation.serving.app import Api

if TYPE_CHECKING:
    from types import FrameType

CONNECTIONS = 256
"""Connections open at once, idle ones included."""
LEAVE = 3
"""Seconds that open requests have when the server is stopped."""


class ApiServer(uvicorn.Server):
    """A server on an open socket, which Ctrl-C, SIGTERM and SIGHUP end in order.

    Args:
        started: called once requests are taken.
    """

    def __init__(self, api: Api, opened: socket.socket, started: Callable[[], None]):
        config = uvicorn.Config(
            api.app(), log_config=None, access_log=False, lifespan="off", ws="none", limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=LEAVE, server_header=False, proxy_headers=False, h11_max_incomplete_event_size=1 << 16,
        )  # fmt: skip
        super().__init__(config)
        self.api, self.opened, self.on_start = api, opened, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests, and say so."""
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End what is being answered, then the server."""
        self.api.answers.close()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that end a program, as an order to stop and not as a failure."""
        with handled_by(self.handle_exit):
            yield

    def serve_until_stopped(self) -> None:
        """Serve until a signal comes."""
        try:
            self.run([self.opened])
        finally:
            self.api.answers.close()
