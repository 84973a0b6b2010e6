import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
TEXT = "Reverse: lamu"
TEXTS = {"completions": f"<|startoftext|><|user|>{TEXT}<|eot_id|><|assistant|>"}  # no chat template is applied there
for kind in ("chat", "completions", "responses", "messages"):
    with tempfile.TemporaryDirectory() as home:
        data = Path(home) / "data.jsonl"
        data.write_text((json.dumps({"text": TEXTS.get(kind, TEXT)}) + "\n") * 4)
        words = [Path(sys.executable).parent / "aiperf", "profile", "--model", os.environ["MODEL"], "--url", url]
        words += ["--endpoint-type", kind, "--streaming", "--tokenizer", os.environ["TOKENIZER"], "--ui", "none"]
        words += ["--request-count", "4", "--concurrency", "2", "--output-artifact-dir", home]
        words += ["--extra-inputs", "max_tokens:64"]  # for messages it asks for 1024, more than the bundled model holds
        words += ["--input-file", str(data), "--custom-dataset-type", "single_turn"]
        subprocess.run(words, check=True, stdout=sys.stderr)
        report = json.loads((Path(home) / "profile_export_aiperf.json").read_text())
    if report["request_count"]["avg"] != 4 or report["error_summary"]:
        sys.exit(f"{kind}: {report['error_summary']}")
print("answered")
