import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import APIConnectionError, OpenAI

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
served = {"model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none"}
config = {"model_list": [{"model_name": "here", "litellm_params": served}]}
client, said = OpenAI(base_url=f"http://127.0.0.1:{port}/v1"), [{"role": "user", "content": "Reverse: lamu"}]
environment = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
with tempfile.TemporaryDirectory() as home:
    (Path(home) / "config.yaml").write_text(json.dumps(config))
    words = [Path(sys.executable).parent / "litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(words, cwd=home, env=environment, stdout=subprocess.DEVNULL) as proxy:
        try:
            while proxy.poll() is None:
                try:
                    print(client.chat.completions.create(model="here", messages=said).choices[0].message.content)
                    break
                except APIConnectionError:
                    time.sleep(1)
            stream = client.chat.completions.create(model="here", messages=said, stream=True)
            print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
            print(client.responses.create(model="here", input="Reverse: lamu").output_text)
            body = {"model": "here", "max_tokens": 16, "messages": said}
            print(client.post("/messages", cast_to=dict, body=body)["content"][0]["text"])
        finally:
            proxy.terminate()
