"""pydantic-ai through the router: its OpenAI models with a tool, whole and streamed, over each upstream format.

Its Anthropic model is left out: version 2.38 does not run with anthropic 2.12 (it instantiates what became a union).
"""

import asyncio

import pytest

from fake_upstream import tool_results, tool_round_trip
from real_clients import MODEL, sdk

MODELS = {"OpenAIChatModel": "openai", "OpenAIResponsesModel": "responses"}


async def run_agent(name, url, stream):
    """What the model says at last; the tool is run by the agent."""
    from httpx2 import AsyncClient
    from pydantic_ai import Agent
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    async with AsyncClient() as http:
        provider = OpenAIProvider(api_key="dummy", base_url=url + "/v1", http_client=http)
        agent = Agent(getattr(models, name)(MODEL, provider=provider), instructions="Be brief.")

        @agent.tool_plain
        def weather(city: str) -> str:
            """Weather of a city."""
            return "sunny in " + city

        question = "What is the weather in Paris?"
        if not stream:
            return (await agent.run(question)).output
        async with agent.run_stream(question) as result:
            return await result.get_output()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_agent_runs_its_tool(place, name, stream):
    sdk("pydantic_ai")
    spot = place(MODELS[name], tool_round_trip("weather", {"city": "Paris"}, reasoning="Let me look."))
    assert asyncio.run(run_agent(name, spot.url, stream)) == "the tool said: sunny in Paris"
    calls = spot.chats(MODELS[name])
    assert len(calls) == 2
    assert tool_results(calls[1].json) == ["sunny in Paris"]
