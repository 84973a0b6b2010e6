import os

from anthropic import Anthropic

client, model, said = Anthropic(), os.environ["MODEL"], [{"role": "user", "content": "Reverse: lamu"}]
print(client.messages.create(model=model, max_tokens=64, messages=said).content[0].text)
with client.messages.stream(model=model, max_tokens=64, messages=said) as stream:
    print("".join(stream.text_stream))
