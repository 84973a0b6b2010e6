import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

length = {"min": 4, "max": 8, "mean": 6, "total_count": 8}
with tempfile.TemporaryDirectory() as home:
    config = {
        "api": {"type": "completion", "streaming": True},
        "server": {
            "type": "vllm",
            "model_name": os.environ["MODEL"],
            "base_url": os.environ["OPENAI_BASE_URL"].removesuffix("/v1"),
            "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": os.environ["TOKENIZER"]},
        "data": {"type": "synthetic", "input_distribution": length, "output_distribution": length},
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": 3}], "num_workers": 1},
        "storage": {"local_storage": {"path": home}},
    }
    file = Path(home) / "config.yml"
    file.write_text(json.dumps(config))
    words = [Path(sys.executable).parent / "inference-perf", "--config_file", str(file)]
    subprocess.run(words, check=True, stdout=sys.stderr)
    report = json.loads((Path(home) / "summary_lifecycle_metrics.json").read_text())
if report["successes"]["count"] != 6 or report["failures"]["count"]:
    sys.exit(f"of 6 requests {report['failures']['count']} failed")
print("answered")
