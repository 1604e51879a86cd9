"""What people do with an OpenAI endpoint through clients that know nothing of Aurora. Each fails by an exception."""

import json
from collections.abc import Callable
from typing import Any

import openai

QUESTION: list[Any] = [{"role": "user", "content": "Where does the sun shine?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
# Without `strict` vLLM's hermes parser leaves the arguments free: any JSON, a string, too (docs/clients.md).
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
TOKENS = 24


def _client(url: str) -> tuple[openai.OpenAI, str]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    return client, client.models.list().data[0].id


def _check_city(text: str) -> None:
    said = json.loads(text)
    assert said["city"] in ("Rome", "Oslo"), text
    assert said["days"] in (1, 2, 3), text


def openai_streams(url: str) -> None:
    """Chat and completions; the chunks add up to the answer that comes whole, and usage counts the same."""
    client, model = _client(url)
    fields: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": TOKENS}
    whole = client.chat.completions.create(messages=QUESTION, **fields)
    chunks = list(
        client.chat.completions.create(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **fields)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage
    complete = client.completions.create(prompt="The sun shines", **fields).choices[0].text
    parts = client.completions.create(prompt="The sun shines", stream=True, **fields)
    assert "".join(part.choices[0].text for part in parts) == complete


def openai_calls_a_tool(url: str) -> None:
    """A strict tool, named and as `required`, whole and streamed: arguments that its schema allows."""
    client, model = _client(url)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        fields: dict[str, Any] = {
            "model": model,
            "messages": QUESTION,
            "tools": [TOOL],
            "tool_choice": choice,
            "temperature": 0,
            "max_tokens": 200,
        }
        (call,) = client.chat.completions.create(**fields).choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        _check_city(call.function.arguments)
        deltas = [c.choices[0].delta for c in client.chat.completions.create(stream=True, **fields) if c.choices]
        calls = [call.function for delta in deltas for call in delta.tool_calls or [] if call.function]
        assert [call.name for call in calls if call.name] == ["weather"]
        _check_city("".join(call.arguments or "" for call in calls))


def openai_structured_output(url: str) -> None:
    """`response_format` with a JSON schema."""
    client, model = _client(url)
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for temperature in (0.0, 0.8):
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, response_format=form, temperature=temperature, seed=1, max_tokens=200
        )
        _check_city(answer.choices[0].message.content or "")


def openai_logprobs(url: str) -> None:
    """The chosen token's and the likeliest ones' for every token of a greedy answer."""
    client, model = _client(url)
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=TOKENS, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content
    assert answer.usage is not None
    assert len(found.content) == answer.usage.completion_tokens
    for token in found.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0, "greedy takes the likeliest"


def langchain_chats(url: str) -> None:
    """`ChatOpenAI`: whole, streamed, several at once, structured output."""
    from langchain_openai import ChatOpenAI

    model = _client(url)[1]
    fields: Any = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0}
    chat = ChatOpenAI(max_tokens=TOKENS, **fields)
    whole = chat.invoke("Where does the sun shine?")
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Where does the sun shine?"))
    assert streamed == whole.content
    assert whole.usage_metadata is not None
    assert 0 < whole.usage_metadata["output_tokens"] <= TOKENS
    assert len(chat.batch(["one", "two", "three"])) == 3
    form = {"title": "city", **CITY}
    said = (
        ChatOpenAI(max_tokens=200, **fields)
        .with_structured_output(form, method="json_schema")
        .invoke("Where does the sun shine?")
    )
    _check_city(json.dumps(said))


WANT_SENSE = frozenset({openai_structured_output, langchain_chats})  # of the model: that it ends the JSON it began
# The server wants `--enable-auto-tool-choice --tool-call-parser=NAME` for these.
WITH_TOOLS: dict[str, tuple[Callable[[str], None], ...]] = {"openai": (openai_calls_a_tool,)}
EXERCISES: dict[str, tuple[Callable[[str], None], ...]] = {  # package -> what is done with it
    "openai": (openai_streams, openai_structured_output, openai_logprobs),
    "langchain-openai": (langchain_chats,),
}
