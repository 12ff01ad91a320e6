"""Convert whole answers, sent in place of a stream, to the equivalent events of their dialect's stream."""

from typing import Any

from services.producer.core.dialects.leniency import dumped

__all__ = ["chat_events", "chunks_of", "message_events"]

Tree = dict[str, Any]


def chunks_of(tree: Tree, begun: set[int]) -> list[Tree]:
    """Return a chat completion as one chunk; empty if no choice has a message or text.

    ``begun``: choices that have content already; for them a last event with the whole message is a repeat (MiniMax).
    """
    choices = tree.get("choices")
    if not isinstance(choices, list):
        return []
    reported = [_choice(choice, tree, begun) if isinstance(choice, dict) else None for choice in choices]
    found = [choice for choice in reported if choice is not None]
    return [{**tree, "choices": found}] if found else []


def _choice(choice: Tree, tree: Tree, begun: set[int]) -> Tree | None:
    message, text = choice.get("message"), choice.get("text")
    if isinstance(message, dict) and tree.get("object") == "chat.completion.chunk":
        return {**choice, "delta": message}
    if isinstance(message, dict):
        index = choice.get("index")
        repeated = (index if isinstance(index, int) else 0) in begun
        calls = message.get("tool_calls")
        reason = choice.get("finish_reason") or ("tool_calls" if calls else "stop")
        return {**choice, "delta": {} if repeated else _delta(message), "finish_reason": reason}
    return {**choice, "delta": {"content": text}} if isinstance(text, str) else None


def _delta(message: Tree) -> Tree:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    numbered = [{"index": at, **call} if isinstance(call, dict) else call for at, call in enumerate(calls)]
    return {**message, "tool_calls": numbered}


def message_events(tree: Tree) -> list[Tree]:
    """Return an Anthropic message as the events of its stream; empty if ``tree`` is not one."""
    blocks = tree.get("content")
    if tree.get("type") != "message" or not isinstance(blocks, list):
        return []
    events: list[Tree] = [{"type": "message_start", "message": {**tree, "content": []}}]
    for index, block in enumerate(blocks):
        if isinstance(block, dict):
            events += ({**event, "index": index} for event in _block(block))
    delta = {"stop_reason": tree.get("stop_reason"), "stop_sequence": tree.get("stop_sequence")}
    return [*events, {"type": "message_delta", "delta": delta, "usage": tree.get("usage")}, {"type": "message_stop"}]


def _block(block: Tree) -> list[Tree]:
    """Return the events of one content block; content that is streamed in deltas is moved from its start to a delta."""
    deltas: list[Tree] = []
    start = dict(block)
    for field, kind in (("text", "text_delta"), ("thinking", "thinking_delta"), ("signature", "signature_delta")):
        if isinstance(block.get(field), str):
            start[field] = ""
            deltas.append({"type": kind, field: block[field]})
    if isinstance(block.get("input"), dict) and block["input"]:
        start["input"] = {}
        deltas.append({"type": "input_json_delta", "partial_json": dumped(block["input"]).decode()})
    if isinstance(block.get("citations"), list):
        start["citations"] = []
        deltas += ({"type": "citations_delta", "citation": citation} for citation in block["citations"])
    return [
        {"type": "content_block_start", "content_block": start},
        *({"type": "content_block_delta", "delta": delta} for delta in deltas),
        {"type": "content_block_stop"},
    ]


def chat_events(tree: Tree) -> list[Tree]:
    """Return a Cohere v2 chat answer as the events of its stream; empty if ``tree`` is not one."""
    message = tree.get("message")
    if not isinstance(message, dict) or "type" in tree:
        return []
    events: list[Tree] = [{"type": "message-start", "id": tree.get("id"), "delta": {"message": {"role": "assistant"}}}]
    if message.get("tool_plan"):
        events.append({"type": "tool-plan-delta", "delta": {"message": {"tool_plan": message["tool_plan"]}}})
    events += _each("content-delta", "content", message.get("content"))
    events += _each("tool-call-start", "tool_calls", message.get("tool_calls"))
    events += _each("citation-start", "citations", message.get("citations"))
    ending = {name: tree[name] for name in ("finish_reason", "usage", "error") if tree.get(name) is not None}
    return [*events, {"type": "message-end", "delta": ending}]


def _each(kind: str, field: str, items: Any) -> list[Tree]:
    if isinstance(items, str) and items:
        items = [{"type": "text", "text": items}]
    if not isinstance(items, list):
        return []
    return [{"type": kind, "index": at, "delta": {"message": {field: item}}} for at, item in enumerate(items)]
