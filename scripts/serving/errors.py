"""Errors as OpenAI's API reports them: a status code, and JSON that names the field at fault."""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastlora.arguments import describe

LOG = logging.getLogger("fastlora.serving")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_SHOWN_PROBLEMS = 5
_WHOLE = "body"  # where a problem concerns no single field


class ApiError(Exception):
    """A refusal that the client sees."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` is the field at fault; `code` is a word that programs can compare."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> str:
        """The JSON of the response, in ASCII: a message may quote half of a surrogate pair."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        """The complete HTTP response."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def field_name(location: Sequence[str | int]) -> str:
    """A path into the request as text: ("messages", 0, "role") -> "messages[0].role"."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 400 that names all wrong fields, or the 415. `problems` is pydantic's list."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if tuple(first["loc"]) == ("body",) and isinstance(first["input"], bytes):  # not parsed
        message = "send the body as JSON, with the header 'Content-Type: application/json'"
        return ApiError(415, message, code="unsupported_media_type")
    lines: dict[str, str] = {}
    for problem in problems:
        # The location begins with "body". Parts with "-" or "[" are pydantic's names of the
        # members of a union, not fields.
        path = [p for p in problem["loc"][1:] if isinstance(p, int) or p.isidentifier()]
        name = field_name(path) or _WHOLE
        if problem["type"] == "extra_forbidden":
            lines.setdefault(name, f"{name}: unknown field")
        elif problem["type"] == "missing":
            lines.setdefault(name, f"{name}: this field is required")
        else:
            given = describe(problem["input"])
            reason = problem["msg"].removeprefix("Value error, ")
            lines.setdefault(name, f"{name}: {reason}; got {given}")
    # A field of several types has a problem for each. The deepest belongs to the type that fits.
    deepest = [
        n for n in lines if not any(m != n and m.startswith((f"{n}[", f"{n}.")) for m in lines)
    ]
    message = "; ".join(lines[name] for name in deepest[:_MAX_SHOWN_PROBLEMS])
    param = None if deepest[0] == _WHOLE else deepest[0]
    return ApiError(400, message, param=param, code="invalid_value")


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of the app leave as OpenAI's JSON."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if detail == HTTPStatus(error.status_code).phrase:
            detail = f"{request.method} {request.url.path}: {detail}"
        return ApiError(error.status_code, detail, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        # The details go to the log only: they may hold paths and tensors of the machine.
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed; its log has the reason").response()
