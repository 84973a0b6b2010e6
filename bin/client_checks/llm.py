import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as home:
    entry = f"- model_id: here\n  model_name: {os.environ['MODEL']}\n  api_base: {os.environ['OPENAI_BASE_URL']}\n"
    (Path(home) / "extra-openai-models.yaml").write_text(entry)
    command = [str(Path(sys.executable).parent / "llm"), "-m", "here", "Reverse: lamu"]
    for words in (command, [*command, "--no-stream"]):
        subprocess.run(words, env={**os.environ, "LLM_USER_PATH": home}, check=True)
