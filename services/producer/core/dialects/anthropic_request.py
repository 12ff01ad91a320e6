"""Translate requests in the OpenAI chat form to Anthropic messages."""

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from schemas.requests import Message
from services.producer.core.dialects.wire import UntranslatableCall
from services.producer.ports import UpstreamRequest

__all__ = ["DEFAULT_MAX_TOKENS", "is_own_block", "messages_body"]

DEFAULT_MAX_TOKENS: Final = 4096
_SAME: Final = ("temperature", "top_p", "top_k", "metadata", "thinking", "service_tier", "output_config")
_OWN: Final = re.compile(r"redacted_thinking|(server|mcp)_tool_use|[a-z_]+_tool_result|container_upload|compaction")
"""Blocks that only this provider can read, such as those of its own tools: they are sent back unchanged."""
_TOOL_CHOICES: Final = {"auto": "auto", "none": "none", "required": "any"}


def messages_body(call: UpstreamRequest) -> dict[str, Any]:
    """Return the body of a streamed request, without parameters that only other providers know.

    Raises:
        UntranslatableCall: several choices, or content that this API does not accept.
    """
    params = call.params
    if params.get("n") not in (None, 1):
        raise UntranslatableCall(f"this provider supports only n=1, not n={params['n']}")
    body = {name: params[name] for name in _SAME if params.get(name) is not None}
    limit = params.get("max_completion_tokens") or params.get("max_tokens") or DEFAULT_MAX_TOKENS
    body |= {"model": call.model, "max_tokens": limit, "messages": _messages(call.messages), "stream": True}
    if system := _system(call.messages):
        body["system"] = system
    if stop := params.get("stop"):
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if user := params.get("user"):
        body.setdefault("metadata", {"user_id": user})
    if schema := _schema(params.get("response_format")):
        body["output_config"] = {**body.get("output_config", {}), "format": schema}
    if params.get("tools"):
        body["tools"] = [_tool(tool) for tool in params["tools"]]
        if choice := _tool_choice(params):
            body["tool_choice"] = choice
    return body


def is_own_block(kind: object) -> bool:
    """Return whether content of this type is a block that only Anthropic can read."""
    return isinstance(kind, str) and _OWN.fullmatch(kind) is not None


def _system(messages: list[Message]) -> str:
    return "\n\n".join(_text(m.content) for m in messages if m.role in ("system", "developer"))


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return content or ""


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Return user and assistant turns; adjacent tool results share one user turn."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = list(_blocks(message))
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _blocks(message: Message) -> Iterator[dict[str, Any]]:
    if message.role == "tool":
        content = list(_content(message.content))
        yield {"type": "tool_result", "tool_use_id": message.tool_call_id or "", "content": content}
        return
    if message.role == "assistant":
        yield from _thoughts(message)
    yield from _content(message.content)
    if message.refusal:
        yield {"type": "text", "text": message.refusal}
    for call in message.tool_calls or ():
        function = call.get("function") or {}
        yield {
            "type": "tool_use",
            "id": call.get("id") or "",
            "name": function.get("name") or "",
            "input": _arguments(function.get("arguments")),
        }


def _thoughts(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the thinking in LiteLLM's ``thinking_blocks``, unless the content has its own."""
    content = message.content if isinstance(message.content, list) else ()
    if not any(part.get("type") in ("thinking", "redacted_thinking") for part in content):
        for block in message.thinking_blocks or ():
            yield from _content([block])


def _content(content: str | list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """Yield content blocks; omit empty texts, which the API rejects."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content or ():
        match part.get("type"):
            case "text" | "refusal":
                if text := part.get("text") or part.get("refusal"):
                    yield {"type": "text", "text": text}
            case "thinking":
                # The API rejects a thought without its signature; thoughts of other providers have none.
                if isinstance(part.get("thinking"), str) and part.get("signature"):
                    yield {"type": "thinking", "thinking": part["thinking"], "signature": part["signature"]}
            case kind if is_own_block(kind):
                yield part
            case "image_url":
                image = part.get("image_url")
                yield {"type": "image", "source": _source(image.get("url") if isinstance(image, dict) else image)}
            case other:
                raise UntranslatableCall(
                    f"content of type {other!r} is not supported by this provider: use text, image_url"
                )


def _source(url: Any) -> dict[str, str]:
    if not isinstance(url, str):
        raise UntranslatableCall("image_url must contain a url")
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    media_type, mark, data = url.removeprefix("data:").partition(";base64,")
    if not mark:
        raise UntranslatableCall("an image's data URL must be base64: data:<media type>;base64,<data>")
    return {"type": "base64", "media_type": media_type, "data": data}


def _arguments(text: Any) -> Any:
    if not text:
        return {}
    try:
        return msgspec.json.decode(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UntranslatableCall(f"arguments of a tool call are not JSON: {error}") from error


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    translated = {"name": function.get("name"), "input_schema": schema}
    if description := function.get("description"):
        translated["description"] = description
    return translated


def _tool_choice(params: dict[str, Any]) -> dict[str, Any] | None:
    choice = params.get("tool_choice")
    single = params.get("parallel_tool_calls") is False
    if isinstance(choice, dict):
        translated: dict[str, Any] = {"type": "tool", "name": (choice.get("function") or {}).get("name")}
    elif choice in _TOOL_CHOICES:
        translated = {"type": _TOOL_CHOICES[choice]}
    elif choice is None:
        translated = {"type": "auto"}
    else:
        raise UntranslatableCall(f"tool_choice {choice!r} is unknown: use auto, none, required or a function")
    if single and translated["type"] != "none":
        translated["disable_parallel_tool_use"] = True
    return translated if choice is not None or single else None


def _schema(format_: Any) -> dict[str, Any] | None:
    if not isinstance(format_, dict) or format_.get("type") != "json_schema":
        return None
    return {"type": "json_schema", "schema": (format_.get("json_schema") or {}).get("schema") or {}}
