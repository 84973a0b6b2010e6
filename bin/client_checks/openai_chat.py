import os

from openai import OpenAI

client, said = OpenAI(), [{"role": "user", "content": "Reverse: lamu"}]
print(client.chat.completions.create(model=os.environ["MODEL"], messages=said).choices[0].message.content)
stream = client.chat.completions.create(model=os.environ["MODEL"], messages=said, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
