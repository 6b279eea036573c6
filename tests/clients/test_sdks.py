"""The real openai and anthropic SDKs: each of their formats, whole and streamed, with a tool round trip."""

import base64
import json
import struct

import pytest

from exchanges import SHORT
from fake_upstream import error_answer, json_answer, tool_results, tool_round_trip
from real_clients import MODEL, WIRES, Place, missing, sdk
from running_router import config_of, provider

QUESTION = "What is the weather in Paris?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
ARGUMENTS = {"city": "Paris"}
FINAL = "the tool said: sunny in Paris"
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def weather(arguments):
    """The tool that the tests run."""
    return "sunny in " + arguments["city"]


def handler(**fields):
    return tool_round_trip("weather", ARGUMENTS, reasoning="Let me look.", **fields)


@pytest.fixture
def openai_client():
    module, clients = sdk("openai"), []

    def make(url):
        clients.append(module.OpenAI(base_url=url + "/v1", api_key="dummy", max_retries=0, timeout=30))
        return clients[0]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def anthropic_client():
    module, clients = sdk("anthropic"), []

    def make(url):
        clients.append(module.Anthropic(base_url=url, api_key="dummy", max_retries=0, timeout=30))
        return clients[0]

    yield make
    for client in clients:
        client.close()


def check_upstream(place, wire, count=2):
    """Two calls in the upstream's format, the tool offered in both, its result in the second."""
    calls = place.chats(wire)
    assert len(calls) == count
    assert all("weather" in json.dumps(call.json["tools"]) for call in calls)
    assert tool_results(calls[-1].json) == ["sunny in Paris"]
    assert all("dummy" not in (call.header("authorization") or "") for call in calls) or not place.wire


def chat(client, stream, **fields):
    if not stream:
        return client.chat.completions.create(**fields)
    with client.chat.completions.stream(stream_options={"include_usage": True}, **fields) as events:
        for _ in events:
            pass
        return events.get_final_completion()


@both
def test_openai_chat(place, openai_client, stream):
    spot = place("openai", handler())
    client = openai_client(spot.url)
    function = {"name": "weather", "description": "weather of a city", "parameters": SCHEMA, "strict": True}
    fields = {"model": MODEL, "tools": [{"type": "function", "function": function}]}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    first = chat(client, stream, messages=messages, **fields)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    result = {"role": "tool", "tool_call_id": call.id, "content": weather(json.loads(call.function.arguments))}
    replay = choice.message.model_dump(exclude_none=True, exclude={"parsed", "tool_calls"})
    calls = [{"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}]
    messages += [dict(replay, tool_calls=calls), result]
    second = chat(client, stream, messages=messages, **fields)
    assert second.choices[0].message.content == FINAL
    assert second.choices[0].finish_reason == "stop"
    assert (second.usage.prompt_tokens, second.usage.completion_tokens) == (11, 7)
    check_upstream(spot, "openai")


def respond(client, stream, **fields):
    if not stream:
        return client.responses.create(**fields)
    with client.responses.stream(**fields) as events:
        for _ in events:
            pass
        return events.get_final_response()


@both
def test_openai_responses(place, openai_client, stream):
    spot = place("responses", handler())
    client = openai_client(spot.url)
    tool = {"type": "function", "name": "weather", "description": "weather", "parameters": SCHEMA, "strict": True}
    fields = {"model": MODEL, "tools": [tool], "store": False, "instructions": "Be brief."}
    items = [{"role": "user", "content": QUESTION}]
    first = respond(client, stream, input=items, **fields)
    assert first.status == "completed"
    [call] = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": weather(json.loads(call.arguments))}
    items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in first.output] + [output]
    second = respond(client, stream, input=items, **fields)
    assert second.output_text == FINAL
    assert (second.usage.input_tokens, second.usage.output_tokens) == (11, 7)
    check_upstream(spot, "responses")


def message(client, stream, **fields):
    if not stream:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as events:
        for _ in events:
            pass
        return events.get_final_message()


@both
def test_anthropic_messages(place, anthropic_client, stream):
    spot = place("anthropic", handler())
    client = anthropic_client(spot.url)
    tool = {"name": "weather", "description": "weather of a city", "input_schema": SCHEMA}
    fields = {"model": MODEL, "max_tokens": 1000, "tools": [tool], "system": "Be brief."}
    messages = [{"role": "user", "content": QUESTION}]
    first = message(client, stream, messages=messages, **fields)
    assert first.stop_reason == "tool_use"
    [call] = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("weather", ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(call.input)}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = message(client, stream, messages=messages, **fields)
    assert second.content[-1].text == FINAL
    assert second.stop_reason == "end_turn"
    assert (second.usage.input_tokens, second.usage.output_tokens) == (11, 7)
    assert second.model == MODEL
    check_upstream(spot, "anthropic")


@both
def test_anthropic_tool_runner(place, anthropic_client, stream):
    """The runner begins with a thread on the server; refused the right way, it goes on with the full history."""
    anthropic = sdk("anthropic")
    if not hasattr(anthropic, "beta_tool"):
        missing("this anthropic SDK has no tool runner")

    @anthropic.beta_tool(name="weather")
    def tool(city: str) -> str:
        """Weather of a city."""
        return weather({"city": city})

    spot = place("anthropic", handler())
    client = anthropic_client(spot.url)
    question = [{"role": "user", "content": QUESTION}]
    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=1000, tools=[tool], messages=question, stream=stream
    )
    if stream:
        last = None
        for turn in runner:
            for _ in turn:
                pass
            last = turn.get_final_message()
    else:
        last = runner.until_done()
    assert last.content[-1].text == FINAL
    answered = [call for call in spot.chats("anthropic") if "thread" not in call.json]
    assert tool_results(answered[-1].json) == ["sunny in Paris"]


@pytest.fixture
def failing_place(router, make_upstream):
    """As `place`: an origin of the client's own format that is down, and a fallback of another one that serves."""

    def make(client_wire, handler):
        origin = make_upstream(lambda call: error_answer(client_wire, 503))
        serving, wire = make_upstream(handler), WIRES[WIRES.index(client_wire) - 1]
        first = provider(origin, client_wire, id="first", models=[{"id": MODEL, "fallbackModels": ["second/m"]}])
        running = router(config_of(first, provider(serving, wire, id="second", models=["m"])), *SHORT)
        return Place(running.url, serving, wire)

    return make


@both
@pytest.mark.parametrize(
    "journey", [test_openai_chat, test_openai_responses, test_anthropic_messages, test_anthropic_tool_runner]
)
def test_a_fallback_of_another_format_serves_when_the_origin_is_down(request, failing_place, journey, stream):
    name = "anthropic_client" if "anthropic" in journey.__name__ else "openai_client"
    journey(failing_place, request.getfixturevalue(name), stream)


def test_anthropic_counts_tokens(place, anthropic_client):
    spot = place("anthropic")
    counted = anthropic_client(spot.url).messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}]
    )
    assert counted.input_tokens > 3


def test_the_model_lists(place, openai_client, anthropic_client):
    spot = place("openai")
    if not spot.wire:
        pytest.skip("the fake upstream has one list in one shape")
    assert any(MODEL in model.id for model in openai_client(spot.url).models.list())
    assert any(MODEL in model.id for model in anthropic_client(spot.url).models.list())


def test_the_model_lists_are_typed_as_the_sdks_want_them_and_page_both_ways(router, openai_client, anthropic_client):
    names = ["model/%d of many" % number for number in range(5)]
    listed = router(config_of(provider("http://127.0.0.1:9", "openai", models=names)))
    client = anthropic_client(listed.url)
    forth = [model for page in client.models.list(limit=2).iter_pages() for model in page.data]
    assert [model.id for model in forth if "many" in model.id] == ["fake/" + name for name in names]
    first, middle = client.models.list(limit=2), forth[3].id
    assert (first.first_id, first.last_id, first.has_more) == (forth[0].id, forth[1].id, True)
    back = list(client.models.list(limit=2, before_id=middle))
    assert [model.id for model in back] == [model.id for model in forth[1:3] + forth[:1]]
    one = client.models.retrieve("fake/" + names[0])
    for model in [*forth, one]:
        type(one).model_validate_json(model.model_dump_json(), strict=True)
        assert (model.type, model.lifecycle) == ("model", "active")
    plain = openai_client(listed.url).models
    assert [model.id for model in plain.list()] == [model.id for model in forth]
    found = plain.retrieve("fake/" + names[0])
    assert (found.id, found.object, found.owned_by) == ("fake/" + names[0], "model", "fake")
    assert found.created > 1_000_000_000


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings(place, openai_client, encoding):
    """Asked for nothing, the SDK asks for base64 and decodes it; told base64, it leaves the text alone."""
    vector = [0.25, -0.5]
    packed = base64.b64encode(struct.pack("<2f", *vector)).decode()

    def embed(call):
        wants_text = call.json.get("encoding_format") == "base64"
        entry = {"object": "embedding", "index": 0, "embedding": packed if wants_text else vector}
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return json_answer(200, {"object": "list", "model": MODEL, "data": [entry], "usage": usage})

    spot = place("openai", embed)
    if spot.wire not in ("", "openai"):
        pytest.skip("embeddings exist in the OpenAI format only")
    fields = {"encoding_format": encoding} if encoding else {}
    answer = openai_client(spot.url).embeddings.create(model=MODEL, input="hello", dimensions=2, **fields)
    assert answer.data[0].embedding == (packed if encoding == "base64" else vector)
    assert spot.upstream.calls[0].json["dimensions"] == 2


@both
def test_an_unknown_model_is_the_sdks_not_found(place, openai_client, anthropic_client, stream):
    spot = place("openai")
    if not spot.wire:
        pytest.skip("the fake upstream knows every model")
    question = [{"role": "user", "content": "hi"}]
    with pytest.raises(sdk("openai").NotFoundError) as caught:
        openai_client(spot.url).chat.completions.create(model="no/such", messages=question, stream=stream)
    assert caught.value.code == "model_not_found"
    with pytest.raises(sdk("anthropic").NotFoundError) as caught:
        anthropic_client(spot.url).messages.create(model="no/such", messages=question, max_tokens=5, stream=stream)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert spot.upstream.calls == []
