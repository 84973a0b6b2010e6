import os

from openai import OpenAI

client, model = OpenAI(), os.environ["MODEL"]
print(client.responses.create(model=model, input="Reverse: lamu").output_text)
with client.responses.stream(model=model, input="Reverse: lamu") as stream:
    print("".join(event.delta for event in stream if event.type == "response.output_text.delta"))
