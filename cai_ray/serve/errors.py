"""Gives every error the form of OpenAI's API, wherever it comes from."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

from cai_ray.serve.guard import error_body


def invalid_request(message: str, param: str | None = None) -> Response:
    """The answer to a request that is at fault. `param` names the field."""
    return JSONResponse(error_body(message, "invalid_request_error", param=param), status_code=400)


def handle_errors(app: FastAPI) -> None:
    """Gives the errors of FastAPI and of request validation the common form."""
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _http_error(request: Request, e: Any) -> Response:
    kind = "invalid_request_error" if e.status_code < 500 else "server_error"
    return JSONResponse(error_body(str(e.detail), kind), status_code=e.status_code, headers=e.headers)


async def _validation_error(request: Request, e: Any) -> Response:
    first = e.errors()[0]
    where = ".".join(str(x) for x in first["loc"] if x != "body")
    message = first["msg"].removeprefix("Value error, ")
    return invalid_request(f"{where}: {message}" if where else message, where or None)


async def translate_errors(answer: Awaitable[Any]) -> Any:
    """Waits for an answer. Ray Serve LLM's exceptions, which carry a status and a message, are raised as FastAPI's."""
    try:
        return await answer
    except RayError:
        raise
    except Exception as e:
        status, message = getattr(e, "status_code", None), getattr(e, "message", None)
        if not isinstance(status, int) or not message:
            raise
        raise HTTPException(status, str(message)) from e
