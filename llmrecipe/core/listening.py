"""Sockets that a verb listens on."""

from __future__ import annotations

import socket

from llmrecipe.core.errors import RunError

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = frozenset({LOOPBACK, "localhost", "::1", "[::1]"})
"""Names under which a machine reaches itself."""


def cannot_serve(host: str, port: int, error: Exception) -> RunError:
    """Return why an address cannot be listened on, as an error that names what to do."""
    reason = getattr(error, "strerror", None) or error
    return RunError(f"--port: cannot serve at {host}:{port}: {reason}; --port 0 takes a free one")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        port: 0 takes a free one.

    Raises:
        RunError: the port is in use, or the address is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise cannot_serve(host, port, error) from error
