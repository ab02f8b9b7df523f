"""The state that all requests share, and the way from a request to its response."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from fastlora.generation.engine import RowSettings
from fastlora.generation.sampling import Sampling
from serving.errors import ApiError
from serving.formats import ChatFormat, CompletionFormat, Format, Usage
from serving.limits import Limits, OpenStreams
from serving.metrics import Metrics
from serving.models import Served
from serving.prompts import chat_prompt, completion_prompts
from serving.replies import Piece, Replies
from serving.scheduler import Scheduler, default_slots
from serving.schemas import ChatRequest, CompletionRequest
from serving.sse import DONE, EventStream, client_is_gone, event

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
_CLIENT_CLOSED = 499  # as nginx logs it; the client does not see it
_CHOICE_SEEDS = 0x9E3779B97F4A7C15  # an odd number: choices of one request get distant seeds


class Service:
    """One base with its adapters, and everything that its requests share."""

    def __init__(self, served: Served, limits: Limits, *, slots: int | None = None) -> None:
        """`slots`: rows that run at once; None is as many as the memory holds."""
        self.served, self.limits, self.metrics = served, limits.check(), Metrics()
        self.open = OpenStreams(limits.streams)
        slots = default_slots(served.model, limits.streams) if slots is None else slots
        self.scheduler = Scheduler(served.model, slots=slots, metrics=self.metrics)
        self.started = int(time.time())
        self.stop_ids = served.stop_ids
        self.metrics.gauges = {
            "open_streams": ("Replies being generated or waited for.", lambda: self.open.open),
            "running_rows": ("Rows in the engine.", lambda: self.scheduler.running),
            "waiting_rows": ("Rows without a slot.", lambda: self.scheduler.waiting),
            "slots": ("Rows that can run at once.", lambda: self.scheduler.slots),
        }

    # ── requests ──────────────────────────────────────────────────────────────────────────

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """/v1/chat/completions."""
        adapter = self._adapter_id(body.model)
        with ExitStack() as held:
            held.enter_context(self._reserve(body.n or 1))
            # Rendering and encoding a long chat takes a while; other streams go on meanwhile.
            prompt = await asyncio.to_thread(chat_prompt, self.served.tokenizer, body)
            limit = body.max_completion_tokens or body.max_tokens
            field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            limits = [self._new_tokens(prompt, limit, field, "messages")]
            settings = self._settings(body, adapter, limits, bool(body.logprobs), body.top_logprobs)
            replies = self._replies([prompt], settings, body)
            style = ChatFormat(body.model, self.served.tokenizer, logprobs=bool(body.logprobs))
            return await self._respond(request, body, replies, style, held)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """/v1/completions."""
        adapter, tokenizer = self._adapter_id(body.model), self.served.tokenizer
        with ExitStack() as held:
            held.enter_context(self._reserve(len(body.prompts) * (body.n or 1)))
            vocabulary = self.served.model.spec.config.vocab_size
            prompts = await asyncio.to_thread(completion_prompts, tokenizer, body, vocabulary)
            limits = [
                self._new_tokens(
                    p, body.max_tokens, "max_tokens", "prompt", default=_COMPLETION_TOKENS
                )
                for p in prompts
            ]
            wants_logprobs = body.logprobs is not None
            settings = self._settings(body, adapter, limits, wants_logprobs, body.logprobs)
            replies = self._replies(prompts, settings, body)
            style = CompletionFormat(body.model, tokenizer, logprobs=wants_logprobs)
            return await self._respond(request, body, replies, style, held)

    def _adapter_id(self, name: str) -> int:
        if name not in self.served.adapter_ids:
            known = ", ".join(map(repr, self.served.adapter_ids))
            raise ApiError(
                404,
                f"model: there is no {name!r:.80}; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return self.served.adapter_ids[name]

    def _reserve(self, choices: int) -> Any:
        # More replies than streams would be refused with 429 whenever the client tries again.
        most = min(self.limits.choices, self.limits.streams)
        if choices > most:
            raise ApiError(
                400,
                f"n: the request asks for {choices} replies, expected at most {most}",
                param="n",
            )
        if not self.scheduler.alive:
            raise ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
        return self.open.reserve(choices)

    def _new_tokens(
        self,
        prompt: list[int],
        asked: int | None,
        field: str,
        prompt_field: str,
        *,
        default: int | None = None,
    ) -> int:
        """How many tokens a reply may have."""
        longest = self.served.model.spec.max_seq_length
        room = longest - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"{prompt_field}: {len(prompt)} tokens leave no room for a reply; the model's"
                f" limit is {longest} tokens together",
                param=prompt_field,
                code="context_length_exceeded",
            )
        most = min(room, self.limits.new_tokens)
        if asked is not None and asked > most:
            raise ApiError(
                400,
                f"{field}: got {asked}, expected at most {most}: the prompt has {len(prompt)}"
                f" tokens, the model's limit is {longest} together, and the server's is"
                f" {self.limits.new_tokens} for a reply",
                param=field,
                code="context_length_exceeded",
            )
        return asked or min(most, default or most)

    def _settings(
        self,
        body: ChatRequest | CompletionRequest,
        adapter: int,
        limits: list[int],
        logprobs: bool,
        alternatives: int | None,
    ) -> list[list[RowSettings]]:
        """For each prompt, the settings of its n rows."""
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k if body.top_k and body.top_k > 0 else None,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty or 1.0,
        )
        return [
            [
                RowSettings(
                    max_new_tokens=limit,
                    sampling=sampling,
                    seed=None if body.seed is None else (body.seed + j * _CHOICE_SEEDS) % 2**64,
                    stop=self.stop_ids,
                    adapter_id=adapter,
                    logprobs=logprobs,
                    alternatives=alternatives or 0,
                )
                for j in range(body.n or 1)
            ]
            for limit in limits
        ]

    def _replies(
        self,
        prompts: list[list[int]],
        settings: list[list[RowSettings]],
        body: ChatRequest | CompletionRequest,
    ) -> Replies:
        rows = [(prompt, row) for prompt, own in zip(prompts, settings, strict=True) for row in own]
        decode = self.served.tokenizer.decode
        bounded = bool(body.stream)
        return Replies(self.scheduler, rows, decode, body.stops, self.limits, bounded=bounded)

    # ── responses ─────────────────────────────────────────────────────────────────────────

    async def _respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        replies: Replies,
        style: Format,
        held: ExitStack,
    ) -> Response:
        n = body.n or 1
        prompt_tokens = sum(len(row.prompt) for row in replies.rows[::n])
        usage = lambda: Usage(prompt_tokens, replies.new_tokens)
        if body.stream:
            held.callback(replies.close)
            still_held = held.pop_all()

            def close(end: str) -> None:
                still_held.close()
                if end != "done":
                    self.metrics.replies[end] += len(replies.rows)

            events = self._events(replies, style, usage if body.includes_usage else None)
            return EventStream(events, replies.overflow, close)
        collect = asyncio.create_task(self._collect(replies))
        gone = asyncio.create_task(client_is_gone(request.receive))
        try:
            await asyncio.wait((collect, gone), return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                self.metrics.replies["disconnected"] += len(replies.rows)
                return Response(status_code=_CLIENT_CLOSED)
            pieces = await collect
        finally:
            replies.close()
            for task in (collect, gone):
                task.cancel()
            await asyncio.gather(collect, gone, return_exceptions=True)
        return JSONResponse(style.whole(pieces, len(replies.rows), usage()))

    async def _collect(self, replies: Replies) -> list[Piece]:
        pieces = []
        async for piece in replies.pieces():
            pieces.append(piece)
            self._count(piece)
        return pieces

    async def _events(self, replies: Replies, style: Format, usage: Any) -> AsyncIterator[str]:
        # With `include_usage`, every chunk has the field, and the last one its value.
        more = {} if usage is None else {"usage": None}
        text = lambda chunks: "".join(event(chunk | more) for chunk in chunks)  # one write
        try:
            yield text(style.opening(len(replies.rows)))
            async for piece in replies.pieces():
                self._count(piece)
                yield text(style.chunks(piece))
            if usage is not None:
                yield event(style.usage_chunk(usage()))
            yield DONE
        except ApiError as error:  # the status has been sent, so the error is an event
            self.metrics.replies["error"] += 1
            yield f"data: {error.body()}\n\n"

    def _count(self, piece: Piece) -> None:
        if piece.finish_reason:
            self.metrics.replies[piece.finish_reason] += 1

    def model_json(self, name: str) -> dict[str, Any]:
        """An entry of /v1/models. `parent` of an adapter is its base."""
        self._adapter_id(name)
        base = next(iter(self.served.adapter_ids))
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "fastlora",
            "parent": None if name == base else base,
            "max_model_len": self.served.model.spec.max_seq_length,
        }
