# A task to be answered, and one of choices whose likelihoods are compared; both from files, not from a hub.
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url = os.environ["OPENAI_BASE_URL"]
ROW = {"word": "lamu", "reverse": "umal", "choices": ["lamu", "umal"], "gold": 1}
TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "Reverse: {{word}}"}
ANSWERED = {"output_type": "generate_until", "doc_to_target": "{{reverse}}"}
ANSWERED |= {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16}, "metric_list": [{"metric": "exact_match"}]}
CHOSEN = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
CHOSEN |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
CHAT = {"base_url": f"{url}/chat/completions"}
LIKELIHOOD = {
    "base_url": f"{url}/completions",
    "tokenizer": os.environ["TOKENIZER"],
    "header": {"x-likelihood": "pseudo"},
}

with tempfile.TemporaryDirectory() as home:
    (Path(home) / "row.jsonl").write_text(json.dumps(ROW) + "\n")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": home}
    tasks = {
        "answered": (ANSWERED, "local-chat-completions", CHAT),
        "chosen": (CHOSEN, "local-completions", LIKELIHOOD),
    }
    for name, (task, kind, given) in tasks.items():
        file, report = Path(home) / f"{name}.yaml", Path(home) / name
        data = {"dataset_kwargs": {"data_files": {"test": f"{home}/row.jsonl"}}}
        file.write_text(json.dumps({"task": name} | TASK | task | data))
        words = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", str(file), "--apply_chat_template"]
        words += ["--model_args", json.dumps(given | {"model": os.environ["MODEL"]}), "--output_path", str(report)]
        subprocess.run(words, check=True, stdout=sys.stderr, cwd=home, env=offline)
        (found,) = report.rglob("results*.json")
        results = json.loads(found.read_text())["results"][name]
        if results[f"{task['metric_list'][0]['metric']},none"] != 1:
            sys.exit(f"{name}: {results}")
print("answered")
