import os

import litellm

given = {"model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["OPENAI_BASE_URL"]}
said = [{"role": "user", "content": "Reverse: lamu"}]
print(litellm.completion(messages=said, **given).choices[0].message.content)
stream = litellm.completion(messages=said, stream=True, **given)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
