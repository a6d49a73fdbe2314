"""Bodies that are understood, and errors in OpenAI's shape.

What OpenAI's API knows and this server does not do is refused by name, unless its value asks for
nothing (null, false, an empty list and the like).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gsa.generation.sampling import Sampling

UNSUPPORTED = {
    "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions", "logit_bias",
    "logprobs", "metadata", "min_p", "modalities", "parallel_tool_calls", "prediction",
    "presence_penalty", "reasoning_effort", "response_format", "service_tier", "store", "suffix",
    "tool_choice", "tools", "top_logprobs", "verbosity", "web_search_options",
}  # fmt: skip

NEUTRAL: dict[str, object] = {
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
}

GREEDY_BELOW = 1e-3
"""Temperatures under this are taken for 0: logits divided by them would overflow."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say it, UTF-8 cannot
        raise PydanticCustomError("surrogate", "holds half a surrogate pair") from None
    return text


Str = Annotated[str, AfterValidator(_whole)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[Str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class ApiError(Exception):
    """A request that is not answered, and why.

    Args:
        status: of HTTP.
        message: what was expected, what came, what to do.
        param: field of the body at fault.
        code: OpenAI's word for it, which programs look at.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            # A field's name may hold half a surrogate pair, which no answer could.
            "message": str(self).encode("utf-8", "replace").decode(),
            "type": kind.get(self.status, other),
            "param": self.param and self.param.encode("utf-8", "replace").decode(),
            "code": self.code,
        }
        return {"error": error}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class WriteRequest(Body):
    """What completions and chats have in common. null is as good as absent."""

    model: Str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    user: str | None = None
    """Taken and not looked at."""

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in sorted(UNSUPPORTED & data.keys()):
            if not _asks_nothing(name, data[name]):
                raise PydanticCustomError(
                    "unsupported",
                    "this server does not support it; leave it out",
                    {"param": name},
                )
        return {name: value for name, value in data.items() if name not in UNSUPPORTED}

    @model_validator(mode="after")
    def check_stream_options(self) -> "WriteRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream", "expected only with stream", {"param": "stream_options"}
            )
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, seed: int, max_tokens: int) -> Sampling:
        """How a text is written; where nothing is said, as OpenAI's API does."""
        temperature = 1.0 if self.temperature is None else self.temperature
        greedy = temperature < GREEDY_BELOW
        return Sampling(
            max_new_tokens=max_tokens,
            greedy=greedy,
            temperature=1.0 if greedy else temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed,
        )


Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]


class CompletionRequest(WriteRequest):
    """A text, or some, to be continued."""

    prompt: (
        Str
        | Annotated[list[Str], Field(min_length=1, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    )


class TextPart(Body):
    type: Literal["text"]
    text: Str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """Templates know no developer."""
        whole = self.content
        text = whole if isinstance(whole, str) else "".join(part.text for part in whole)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(WriteRequest):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    @model_validator(mode="after")
    def one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError(
                "limits", "expected one of max_tokens and max_completion_tokens, got both",
                {"param": "max_completion_tokens"},
            )  # fmt: skip
        return self


def _asks_nothing(name: str, value: object) -> bool:
    return value is None or value is False or value in ("", [], {}, NEUTRAL.get(name, ""))


def explain(errors: list[Any]) -> ApiError:
    """What validation found wrong with a body, as one error about its first field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON: {first['ctx']['error']}")
    if tuple(first["loc"]) == ("body",) and "ctx" not in first:
        reason = "body: expected a JSON object, sent with Content-Type: application/json"
        return ApiError(400, reason)
    param = first.get("ctx", {}).get("param") or _field(first)
    same = [error["msg"] for error in errors if _field(error) == _field(first)]
    reasons = "; ".join(dict.fromkeys(same))
    if first["type"] == "extra_forbidden":
        reasons = "no such field here"
    return ApiError(400, f"{param or 'body'}: {reasons}", param=param or None)


def _field(error: Any) -> str:
    """messages.0.role for its place, without names of alternatives that were tried."""
    loc = [part for part in error["loc"] if part != "body"]
    return str(loc[0]) if loc and loc[0] != "messages" else ".".join(map(str, loc[:3]))
