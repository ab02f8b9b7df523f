"""The routes of the server."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import fastlora
from serving.errors import add_error_handlers
from serving.guard import Guard
from serving.schemas import ChatRequest, CompletionRequest
from serving.service import Service

PAGE = Path(__file__).parent / "page.html"


def make_app(service: Service, *, key: str | None, hosts: Collection[str] | None) -> FastAPI:
    """The app.

    Args:
        service: not started; the app's lifespan starts and stops its scheduler.
        key: the bearer key; None serves everybody who can connect.
        hosts: names in the Host header that are answered; None answers all.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.scheduler.start()
        yield
        await service.scheduler.stop()

    # The documentation pages load scripts from another host, which a closed network refuses.
    app = FastAPI(
        title="fastlora",
        version=fastlora.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    add_error_handlers(app)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, key=key, hosts=hosts)
    _add_pages(app, service)
    _add_api(app, service)
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def _() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def _() -> Response:
        if service.open.stopping or not service.scheduler.alive:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def _() -> Response:
        return PlainTextResponse(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def _() -> Response:
        models = [service.model_json(name) for name in service.served.adapter_ids]
        return JSONResponse({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}")
    async def _(name: str) -> Response:
        return JSONResponse(service.model_json(name))

    @app.post("/v1/chat/completions", response_model=None)
    async def _(request: Request, body: ChatRequest) -> Response:
        return await service.chat(request, body)

    @app.post("/v1/completions", response_model=None)
    async def _(request: Request, body: CompletionRequest) -> Response:
        return await service.completion(request, body)


def _page() -> tuple[str, str]:
    """The page at / and its policy: only the script and the styles inside it, nothing loaded."""
    page = PAGE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text is not None, tag
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy
