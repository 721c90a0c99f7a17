"""Errors of the server, in the form that clients of the OpenAI API read."""

from __future__ import annotations

from typing import Any

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: what is wrong and what is allowed.
        param: key of the request that is wrong.
        code: short name of the error, such as `model_not_found`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return `{"error": {message, type, param, code}}`."""
        kind = SERVER if self.status >= 500 else INVALID
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
