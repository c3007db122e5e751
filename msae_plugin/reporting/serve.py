"""`msae serve`: a page of this machine's own on which a text is looked at and a latent turned up.

One SAE and its language model stay loaded. Answers go to the loopback address alone, to requests
that name it as their host (so that a web page that resolves its own name to 127.0.0.1 reads
nothing), and only to JSON, which no other site's form can send.
"""

from __future__ import annotations

import html
import socket
import threading
from collections.abc import Callable
from importlib import resources
from typing import Annotated

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from msae_plugin.common.errors import InputError
from msae_plugin.reporting.look import SAEInModel

HOST = "127.0.0.1"
CONTENT_SECURITY_POLICY = "default-src 'self' 'unsafe-inline'; img-src data:"
MOST_TOKENS = 200
"""New tokens per request; each is a pass of the model."""

_Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class _LookRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: _Text
    top: Annotated[int, Field(ge=1, le=50)] = 5


class _SteerRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: _Text
    latent: Annotated[int, Field(ge=0)]
    added: Annotated[float, Field(allow_inf_nan=False)]
    new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 20


def application(sae: SAEInModel) -> Starlette:
    """The page and its two answers, as an ASGI application."""
    page = resources.files("msae_plugin.reporting") / "templates" / "serve.html"
    one_at_a_time = threading.Lock()  # hooks are the model's, not the request's

    def look(asked: _LookRequest) -> dict[str, object]:
        with one_at_a_time:
            found = sae.look(asked.text, asked.top)
        return {"l0": found.l0, "rows": [vars(row) for row in found.rows]}

    def steer(asked: _SteerRequest) -> dict[str, object]:
        with one_at_a_time:
            without = sae.continue_text(asked.text, asked.new_tokens, asked.latent)
            steered = sae.continue_text(asked.text, asked.new_tokens, asked.latent, asked.added)
        return {"without": without, "with": steered}

    async def answer_look(request: Request) -> Response:
        return await _answer(request, lambda body: look(_LookRequest.model_validate_json(body)))

    async def answer_steer(request: Request) -> Response:
        return await _answer(request, lambda body: steer(_SteerRequest.model_validate_json(body)))

    async def show_page(_request: Request) -> Response:
        return HTMLResponse(
            page.read_text(encoding="utf-8").replace("<!-- SAE -->", _title(sae)),
            headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
        )

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/look", answer_look, methods=["POST"]),
            Route("/steer", answer_steer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def require_free(port: int) -> None:
    """Refuse a port that is taken, or not this user's to open, before anything is loaded."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port}: {error.strerror}", "choose another --port") from error


def serve(sae: SAEInModel, port: int) -> None:
    """Serve the page until interrupted."""
    uvicorn.run(application(sae), host=HOST, port=port, log_level="warning")


async def _answer(request: Request, work: Callable[[bytes], dict[str, object]]) -> Response:
    """Run the work beside the event loop; what is wrong with the request comes back in one line."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return JSONResponse({"error": "send application/json"}, status_code=415)
    try:
        return JSONResponse(await run_in_threadpool(work, await request.body()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}"}, status_code=422)
    except InputError as error:
        return JSONResponse({"error": str(error)}, status_code=422)


def _title(sae: SAEInModel) -> str:
    names = (sae.evaluated.name, sae.language_model.model_name, sae.evaluated.hook_name)
    return html.escape(" · ".join(names))
