"""What coding agents send, in their structure and our words: accepted, and shown in its place."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from http_harness import ApiHarness

MakeApi = Callable[..., ApiHarness]

SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"path": {"type": "string", "description": "Which file."}},
    "required": ["path"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def text(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def chat_call(arguments: str, **reasoning: str) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call], **reasoning}


QWEN_CODE = {
    "model": "tiny-coder",
    "messages": [
        {"role": "system", "content": "You work in a terminal."},
        {"role": "user", "content": text("Which files are there?")},
        chat_call('{"path":"."}', reasoning_content="I list.", reasoning="I list."),
        {"role": "tool", "tool_call_id": "call_1", "content": text("a.py")},
    ],
    "tools": [CHAT_TOOL],
    "max_tokens": 64000,
    "stream": True,
    "stream_options": {"include_usage": True},
}
OPENCODE = {
    **QWEN_CODE,
    "messages": [*QWEN_CODE["messages"], {"role": "user", "content": "And now?"}],
    "tool_choice": "auto",
    "max_tokens": 32000,
}
AIDER = {
    "model": "tiny-coder",
    "messages": [
        {"role": "system", "content": "You edit files."},
        {"role": "user", "content": "The files."},
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "Change it."},
    ],
    "stream": True,
    "temperature": 0,
}
PI = {
    **QWEN_CODE,
    "max_tokens": None,
    "max_completion_tokens": 32768,
    "reasoning_effort": "medium",
    "store": False,
    "tools": [{"type": "function", "function": {**CHAT_TOOL["function"], "strict": False}}],
}
CLINE = {**QWEN_CODE, "tool_choice": "auto", "max_tokens": None}
OPENHANDS = {
    "model": "tiny-coder",
    "messages": [
        {"role": "system", "content": text("You work in a box.")},
        {"role": "user", "content": text("Which files are there?")},
        chat_call('{"path": "."}'),
        {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": text("a.py")},
    ],
    "tools": [CHAT_TOOL],
    "prompt_cache_key": "conversation",
    "reasoning_effort": "high",
    "extra_body": {"metadata": {}},
}
CODEX = {
    "model": "tiny-coder",
    "stream": True,
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You work in a terminal."}],
        },
        {
            "type": "message",
            "id": "msg_2",
            "role": "developer",
            "content": [
                {"type": "input_text", "text": "Ask before you delete."},
                {"type": "input_text", "text": "Skills: none."},
            ],
        },
        {
            "type": "message",
            "id": "msg_3",
            "role": "user",
            "content": [{"type": "input_text", "text": "Which files are there?"}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "I list."}],
            "content": None,
            "encrypted_content": "of another server",
        },
        {
            "type": "function_call",
            "status": "completed",
            "id": "fc_1",
            "name": "look",
            "namespace": "files",
            "arguments": '{"path": "."}',
            "call_id": "call_1",
        },
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "a.py"},
    ],
    "tools": [
        {"type": "function", "name": "run", "strict": False, "parameters": SCHEMA},
        {
            "type": "namespace",
            "name": "files",
            "tools": [{"type": "function", "name": "look", "strict": False, "parameters": SCHEMA}],
        },
        {"type": "web_search", "external_web_access": True},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "thread",
    "client_metadata": {"turn_id": "1"},
}
KEEP = {"cache_control": {"type": "ephemeral"}}
CLAUDE_CODE = {
    "model": "tiny-coder",
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: version=1; entry=cli;"},
        {"type": "text", "text": "You work in a terminal.", **KEEP},
        {"type": "text", "text": "Ask before you delete.", **KEEP},
    ],
    "messages": [
        {"role": "user", "content": text("Which files are there?")},
        {"role": "system", "content": "Agents: none."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I list.", "signature": "of another server"},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"path": "."}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": text("a.py"),
                    "is_error": False,
                    **KEEP,
                }
            ],
        },
    ],
    "tools": [
        {"name": "look", "description": "Look.", "input_schema": SCHEMA},
        {"name": "later", "input_schema": {"type": "object"}, "defer_loading": True},
    ],
    "metadata": {"user_id": "user"},
    "max_tokens": 32000,
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages?beta=true"
AGENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen-code": (CHAT, QWEN_CODE),
    "opencode": (CHAT, OPENCODE),
    "aider": (CHAT, AIDER),
    "pi": (CHAT, PI),
    "cline": (CHAT, CLINE),
    "openhands": (CHAT, OPENHANDS),
    "codex": (RESPONSES, CODEX),
    "claude-code": (MESSAGES, CLAUDE_CODE),
}
REPLY = "I look again.\n</think>\n\nDone."


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agents_request_is_answered(make_api: MakeApi, agent: str) -> None:
    path, body = AGENTS[agent]
    api = make_api(REPLY)

    async def send() -> Any:
        async with api.client() as client:
            return await client.post(path, json=body)

    response = asyncio.run(send())
    assert response.status_code == 200, response.text
    ends = ("[DONE]", '"finish_reason":"stop"', "response.completed", "message_stop")
    assert any(end in response.text for end in ends)
    prompt = api.service.tokenizer.decode(api.engine.requests[0].tokens)
    shown = ["You work in a", "Which files are there?", "<function=look>", "a.py"]
    places = [prompt.index(words) for words in shown if agent != "aider"]
    assert places == sorted(places)
    assert "billing" not in prompt
    if agent in ("qwen-code", "pi", "codex", "claude-code"):
        assert "<think>\nI list.\n</think>" in prompt
