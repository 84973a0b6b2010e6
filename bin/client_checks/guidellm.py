import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
with tempfile.TemporaryDirectory() as home:
    data, report = Path(home) / "data.jsonl", Path(home) / "report.json"
    data.write_text("".join(json.dumps({"prompt": "Reverse: lamu", "output_tokens_count": 4}) + "\n" for _ in range(4)))
    words = [
        Path(sys.executable).parent / "guidellm",
        "run",
        "--disable-console",
        "--profile",
        "kind=concurrent,streams=2",
    ]
    words += ["--backend", f"kind=openai_http,target={url},model={os.environ['MODEL']}"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}"]
    words += ["--data", f"kind=json_file,path={data}", "--constraint", "kind=max_requests,count=4"]
    subprocess.run([*words, "--output", f"kind=json,path={report}"], check=True, stdout=sys.stderr)
    (run,) = json.loads(report.read_text())["benchmarks"]
counts = run["metrics"]["request_totals"]
if counts["successful"] != 4:
    sys.exit(f"of its requests: {counts}")
for request in run["requests"]["successful"]:
    print(request["output"])
