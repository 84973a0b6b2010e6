import asyncio
import os
import sys

sys.path.pop(0)  # this script has the name of the package
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

agent = Agent(OpenAIChatModel(os.environ["MODEL"]))
print(agent.run_sync("Reverse: lamu").output)


async def streamed() -> str:
    async with agent.run_stream("Reverse: lamu") as result:
        return await result.get_output()


print(asyncio.run(streamed()))
