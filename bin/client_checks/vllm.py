import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
for kind, path in (("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")):
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "data.jsonl").write_text(json.dumps({"prompt": "Reverse: lamu"}) + "\n")
        words = [Path(sys.executable).parent / "vllm", "bench", "serve", "--model", os.environ["MODEL"]]
        words += ["--backend", kind, "--base-url", url, "--endpoint", path, "--tokenizer", os.environ["TOKENIZER"]]
        words += ["--dataset-name", "custom", "--dataset-path", "data.jsonl", "--custom-output-len", "8"]
        words += ["--num-prompts", "4", "--max-concurrency", "2", "--disable-tqdm"]
        words += ["--save-result", "--save-detailed", "--result-filename", "report.json"]
        words += ["--skip-chat-template"] if kind == "openai-chat" else []
        subprocess.run(words, check=True, stdout=sys.stderr, cwd=home)
        report = json.loads((Path(home) / "report.json").read_text())
    if report["failed"] or report["completed"] != 4:
        sys.exit(f"{kind}: {report['failed']} failed: {report['errors']}")
    for text in report["generated_texts"]:
        print(text)
