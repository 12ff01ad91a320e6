"""Test a tool round trip with thinking: a provider's answer is sent back to it unchanged."""

from typing import Any

import msgspec
import pytest

from schemas.codec import encode_event
from schemas.requests import Message
from services.delivery.requests.transcript import Transcript as Lookup
from services.producer.core.counting import GenerationCounter
from services.producer.core.dialects import dialect_of
from services.producer.core.generation import Generation
from services.producer.ports import UpstreamRequest
from tests.support.provider_transcripts import Transcript

USER = Message("user", "Weather in A?")
RESULT = Message("tool", "12 °C", tool_call_id="toolu_1")


def looked_up(dialect: str, case: str) -> Lookup:
    """Return the lookup of a recorded answer that went through the log."""
    transcript = Transcript(dialect, case)
    run = Generation(
        "g",
        epoch=1,
        next_seq=0,
        counter=lambda: GenerationCounter("o200k_base", True),
        counted_input=3,
        exact=True,
        encoding="o200k_base",
    )
    lookup = Lookup()
    wire = transcript.wire
    parser = transcript.parser()
    for at in range(0, len(wire), 50):
        for event in run.absorb(parser.feed(wire[at : at + 50]), 1.0):
            lookup.offer(encode_event(event))
    return lookup


def message_of(dialect: str, case: str) -> Message:
    """Return the answer as the message of the lookup, for the client's next request."""
    (message,) = looked_up(dialect, case).messages
    return msgspec.json.decode(msgspec.json.encode(message), type=Message)


def asked(dialect: Any, *messages: Message) -> list[dict[str, Any]]:
    request = dialect_of(dialect).request(UpstreamRequest(model="m", messages=list(messages)), "https://h", "k", {})
    body: dict[str, Any] = msgspec.json.decode(request.body)
    found: list[dict[str, Any]] = body["messages"]
    return found


def test_thinking_with_its_signature_goes_back_to_anthropic_before_the_tool_call() -> None:
    answer = message_of("anthropic", "thinking-tools")
    assert asked("anthropic", USER, answer, RESULT)[1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need the weather.", "signature": "EqQBCgIY"},
                {"type": "redacted_thinking", "data": "EmwKAhgB"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "A"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "12 °C"}],
                }
            ],
        },
    ]


def test_blocks_of_anthropic_server_tools_are_sent_back_in_order() -> None:
    (_, assistant) = asked("anthropic", USER, message_of("anthropic", "web-search"))
    assert [block["type"] for block in assistant["content"]] == [
        "server_tool_use",
        "web_search_tool_result",
        "text",
        "compaction",
    ]
    assert assistant["content"][0]["input"] == {"query": "rivers"}
    assert assistant["content"][1]["content"][0]["encrypted_content"] == "ZW5j"


def test_reasoning_details_go_back_to_openrouter() -> None:
    (_, assistant) = asked("openrouter", USER, message_of("openrouter", "reasoning-details"))
    assert assistant["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "text": "Let me see.",
            "signature": "c2ln",
            "format": "anthropic-claude-v1",
            "index": 0,
        },
        {"type": "reasoning.encrypted", "data": "ZW5j", "id": "rs_1", "format": "openai-responses-v1", "index": 1},
    ]


def test_thought_signatures_go_back_to_gemini_with_their_call() -> None:
    (_, assistant) = asked("openai", USER, message_of("openai", "foreign-gemini-signatures"))
    assert [call.get("extra_content") for call in assistant["tool_calls"]] == [
        {"google": {"thought_signature": "c2ln"}},
        None,
    ]
    assert assistant["extra_content"] == {"google": {"thought_signature": "bW9yZQ=="}}


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "cohere"])
def test_other_providers_get_an_answer_without_anthropic_signatures(dialect: str) -> None:
    (_, assistant, result) = asked(dialect, USER, message_of("anthropic", "thinking-tools"), RESULT)
    kinds = [part["type"] for part in assistant["content"]]
    assert kinds == (["thinking", "text"] if dialect == "cohere" else ["text"])
    assert not any("signature" in part for part in assistant["content"])
    assert assistant["tool_calls"][0]["function"]["name"] == "get_weather"
    assert result["tool_call_id"] == "toolu_1"


def test_a_thought_without_its_signature_is_not_sent_to_anthropic() -> None:
    thought = Message("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi."}])
    assert asked("anthropic", USER, thought)[1]["content"] == [{"type": "text", "text": "Hi."}]


def test_a_refusal_is_sent_back_as_the_assistants_message() -> None:
    refused = message_of("openai", "refusal")
    assert asked("anthropic", USER, refused)[1]["content"] == [{"type": "text", "text": refused.refusal}]
    assert asked("cohere", USER, refused)[1] == {"role": "assistant", "content": refused.refusal}
    assert asked("openai", USER, refused)[1] == {"role": "assistant", "refusal": refused.refusal}


def test_audio_is_named_in_the_next_request() -> None:
    (_, assistant) = asked("openai", USER, message_of("openai", "audio"))
    assert assistant == {"role": "assistant", "content": "Water.", "audio": {"id": "audio_1"}}
