"""The requests that the server accepts. Fields and defaults are those of OpenAI's API.

Fields that would change the reply but are not supported accept only the value that changes nothing,
so that no setting is lost without notice. `top_k`, `min_p` and `repetition_penalty` are additions.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from fastlora.arguments import ENCODABLE_TEXT


def _only(*values: Any) -> AfterValidator:
    def check(value: Any) -> Any:
        if not any(value == v and type(value) is type(v) for v in values):
            raise ValueError(f"not supported: expected {values[-1]!r}, or no such field")
        return value

    return AfterValidator(check)


def _encodable(text: str) -> str:
    if not ENCODABLE_TEXT.accepts(text):
        raise ValueError("a text with half of a surrogate pair, which UTF-8 does not encode")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
Zero = Annotated[Any, _only(None, 0.0, 0)]
Empty = Annotated[Any, _only(None, {})]
Null = Annotated[Any, _only(None)]
NoList = Annotated[Any, _only(None, [])]
No = Annotated[Any, _only(None, False)]
TextFormat = Annotated[Any, _only(None, {"type": "text"})]
NoSuffix = Annotated[Any, _only(None, "")]
TextOnly = Annotated[Any, _only(None, ["text"])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _only(None, False)] = None


class _Request(_Strict):
    model: Text  # the base's name or an adapter's
    temperature: float | None = Field(None, ge=0, le=2)  # None is 1
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1 set no limit, as in vLLM
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(None, ge=1)
    stop: StopText | list[StopText] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted and ignored, as are the next five
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Empty = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError(f"{len(stop)} texts; expected at most 16")
        return stop

    @field_validator("stream_options")
    @classmethod
    def _beside_stream(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("expected stream=true beside it")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Strict):
    """A call that the assistant made. `arguments` is JSON."""

    name: Text
    arguments: Text


class ToolCall(_Strict):
    """An entry of an assistant's `tool_calls`."""

    id: Text
    type: Literal["function"]
    function: FunctionCall


class Message(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Null = None
    # The client writes these fields when it turns a reply into a dict.
    annotations: NoList = None
    audio: Null = None
    function_call: Null = None


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None  # accepted and ignored
    response_format: TextFormat = None
    modalities: TextOnly = None

    @field_validator("top_logprobs")
    @classmethod
    def _beside_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("expected logprobs=true beside it")
        return value


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)  # how many alternatives; None: no logprobs
    echo: No = None
    best_of: Annotated[Any, _only(None, 1)] = None
    suffix: NoSuffix = None

    @property
    def prompts(self) -> list[Any]:
        """Each prompt, a text or ids."""
        is_one = isinstance(self.prompt, str) or any(isinstance(i, int) for i in self.prompt)
        return [self.prompt] if is_one else list(self.prompt)
