"""Where settings come from, what vLLM's names for them do, and how they are shown."""

import json
import os
import subprocess
import sys

import pytest
from command_line import failed

from dilaserve import Config, Engine, Options, config
from dilaserve.cli import COMMANDS, flags, parsed
from dilaserve.engine.assembly import plan_text
from dilaserve.errors import ConfigError
from dilaserve.setting_names import slips
from dilaserve.transport.devices import dtype_for


def test_a_file_takes_tables_and_dashes(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("max-queue = 7\n[server]\nport = 1\nlog-level = 'error'\n[model]\nserved-model-name = ['a', 'b']")
    found = config.load({}, {}, file)
    assert (found.scheduler.max_queue, found.server.port, found.server.log_level) == (7, 1, "error")
    assert found.model.names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[sever]\nport = 1", r"unknown table \[sever\]; tables are model, device, decode, scheduler, server"),
        ("[model]\nport = 1", r"port belongs into the table \[server\], not \[model\]"),
        ("port = 1\n[server]\nport = 2", "port is given twice in the file"),
        ("prot = 1", "unknown setting 'prot' .*; did you mean port?"),
        ("nothing_like_it = 1", "`dilaserve --help-all` lists them all"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        config.load({}, {}, file)


def test_variables_near_a_setting_are_warned_of_and_those_of_kubernetes_are_not():
    environ = ["DILASERVE_PROT", "DILASERVE_PORT", "DILASERVE_SERVICE_PORT", "DILASERVE_PORT_8000_TCP", "HOME"]
    warned = slips(environ, config.ENVIRONMENT, config.settings())
    assert warned == ["DILASERVE_PROT is no setting and is ignored; did you mean DILASERVE_PORT?"]


@pytest.mark.parametrize(
    ("sizes", "devices", "plan"),
    [({}, 4, "auto"), ({"tensor_parallel_size": 2}, 4, "2x2"), ({"data_parallel_size": 4}, 4, "4x1")],
)
def test_parallel_sizes_are_a_plan(sizes, devices, plan):
    device = Config.of(**sizes).device
    assert plan_text(device, devices) == plan
    assert device.planned == (plan == "auto")


def test_parallel_sizes_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="--plan 2x1 already says"):
        Config.of(plan="2x1", tensor_parallel_size=1)
    with pytest.raises(ConfigError, match="2 instances of 2 devices need 4 devices, and there are 3"):
        plan_text(Config.of(tensor_parallel_size=2, data_parallel_size=2).device, 3)


def test_half_and_float_are_what_vllm_means():
    assert [dtype_for("cpu", Config.of(dtype=name).model.dtype) for name in ("half", "float")] == ["float16", "float32"]


def test_several_names_may_follow_one_flag_or_several():
    found, _ = parsed(["--served-model-name", "a", "b", "--served-model-name", "c", "--port", "1"], "serve")
    assert found.model.names == ["a", "b", "c"]


def test_help_shows_the_usual_settings_every_command_and_examples():
    usual, whole = flags().format_help(), flags(everything=True).format_help()
    assert "--port" in usual
    assert "--step-timeout" not in usual
    assert "--step-timeout" in whole
    assert all(f"\n  {name} " in usual for name in COMMANDS)
    assert "examples:" in usual


def test_config_shows_sources_and_its_file_gives_the_same_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DILASERVE_API_KEY", "secret")
    monkeypatch.setenv("DILASERVE_MAX_QUEUE", "9")
    words = ["--accuracy-budget", "off", "--host", "::1", "127.0.0.1"]
    settings, extras = parsed(words, "config")
    COMMANDS["config"].run(settings, extras)
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert table["max_queue"].split(maxsplit=1) == ["9", "in the environment, as DILASERVE_MAX_QUEUE"]
    assert table["host"].split() == ['"::1,127.0.0.1"', "flag"]
    assert "secret" not in str(table)
    settings, extras = parsed([*words, "--toml"], "config")
    COMMANDS["config"].run(settings, extras)
    (file := tmp_path / "saved.toml").write_text(capsys.readouterr().out)
    monkeypatch.delenv("DILASERVE_MAX_QUEUE")
    assert parsed(["--config", str(file)], "config")[0] == settings


def test_what_prints_only_does_not_import_torch():
    guard = "import sys; sys.modules['torch'] = None\n"
    for words in (["config"], ["completion", "bash"], ["models", "--help"], ["--help"], ["--version"]):
        code = f"{guard}from dilaserve.cli import main; main({json.dumps(words)})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_commands_and_flags(shell, capsys):
    assert COMMANDS["completion"].run(*parsed([shell], "completion")) == 0
    text = capsys.readouterr().out
    assert "calibrate" in text
    assert "step-timeout" in text


def test_an_unknown_shell_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "dilaserve", "completion", "csh"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "invalid choice: 'csh'" in failed(done.returncode, done.stdout, done.stderr)


async def test_a_seed_of_the_server_makes_answers_repeat(random_model):
    settings = Config.of(model=str(random_model), devices="cpu", seed=5, cpu_threads=1)
    async with Engine(settings) as engine:
        drawn = Options(max_tokens=8, temperature=1.0, ignore_eos=True)
        first, again = [(await engine.generate("hello", drawn)).text for _ in range(2)]
    assert first == again
