"""Requests to prompts: chats are rendered by the model's template, texts are encoded."""

import json
from typing import Any

import fastlora
from fastlora.arguments import describe
from fastlora.generation.text import encode_prompt
from serving.errors import ApiError
from serving.schemas import ChatRequest, CompletionRequest, Message, Tool


def chat_prompt(tokenizer: fastlora.Tokenizer, request: ChatRequest) -> list[int]:
    """The ids of a chat up to the beginning of its next reply.

    Raises:
        ApiError: 400 if the chat template refuses the messages, or does not read the tools.
    """
    messages = [_message(i, m) for i, m in enumerate(request.messages)]
    tools = _tools(tokenizer, request.tools) if request.tool_choice != "none" else None
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    if not ids:
        raise ApiError(400, "messages: the chat has no token", param="messages")
    return ids


def _message(number: int, message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    given = message.model_dump(exclude_none=True, exclude={"annotations"})
    if isinstance(message.content, list):
        given["content"] = "".join(part.text for part in message.content)
    # "developer" is OpenAI's newer name of the system role; templates know the older one.
    given["role"] = "system" if message.role == "developer" else message.role
    if message.content is None:
        if not message.tool_calls:
            name = f"messages[{number}].content"
            raise ApiError(400, f"{name}: expected a text, got none", param=name)
        given["content"] = ""
    for i, call in enumerate(given.get("tool_calls", ())):
        # Clients send the arguments as JSON text; templates expect the values.
        name = f"messages[{number}].tool_calls[{i}].function.arguments"
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{name}: not valid JSON: {error}", param=name) from error
    return given


def _tools(tokenizer: fastlora.Tokenizer, tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    template = tokenizer.chat_templates.get("default")
    if template is not None and "tools" not in template.text:
        raise ApiError(400, "tools: the model's chat template does not read tools", param="tools")
    return [tool.model_dump() for tool in tools]


def completion_prompts(
    tokenizer: fastlora.Tokenizer, request: CompletionRequest, vocab_size: int
) -> list[list[int]]:
    """The ids of each prompt.

    Raises:
        ApiError: 400 if a prompt has no token, or an id is outside the vocabulary.
    """
    if not request.prompts:
        raise ApiError(400, "prompt: expected at least one prompt, got []", param="prompt")
    rows = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            try:
                prompt = encode_prompt(tokenizer, prompt)
            except ValueError as error:
                raise ApiError(400, str(error), param="prompt") from error
        wrong = [i for i in prompt if not 0 <= i < vocab_size]
        if wrong or not prompt:
            expected = f"one or more ids in [0, {vocab_size})"
            shown = describe(wrong or prompt)
            raise ApiError(400, f"prompt: got {shown}, expected {expected}", param="prompt")
        rows.append(prompt)
    return rows
