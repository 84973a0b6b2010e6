"""What an interrupted calibration keeps, and how the next one goes on from it."""

import pytest
from virtual_time import run_on_virtual_time

from dilaserve import Config, Engine
from dilaserve.calibrate.answers import Question
from dilaserve.calibrate.kept import AnswerCount, MeasuredAnswer, MeasuredStep, Measurements, resumed
from dilaserve.calibrate.quality import quality
from dilaserve.errors import ConfigError
from dilaserve.profile.decode_speed import LEVELS
from dilaserve.profile.step_cost import Features
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.tokenizer.tokenizer import Text

ANSWER = MeasuredAnswer("add", 2, 5, "4", 7, (AnswerCount(2, 0, 13, 4, 1), AnswerCount(2, 0, 12, 0, 1)))
STEP = MeasuredStep(1, "3x256/32/32", "1x64/64/32", 0, Features(64, 4096, 64, 32, 1), 0.5, 0.01)
SETTINGS = {"model": "here", "devices": "cpu"}


def kept(folder, settings=SETTINGS, restart=False, add=()):
    """What is there, what was said of it, and the file, to which `add` is added."""
    said = []
    with resumed([folder / "profile.json"], settings, restart, said.append) as (found, file):
        there = [*found.answers.values(), *found.steps.values()]
        for one in add:
            found.add(one)
    return there, " ".join(said), file


def test_measurements_are_there_again_in_the_next_run(tmp_path):
    assert kept(tmp_path, add=(ANSWER, STEP))[:2] == ([], "")
    there, said, file = kept(tmp_path)
    assert there == [ANSWER, STEP]
    assert file == tmp_path / "profile.json.partial"
    assert said == f"going on from 1 answers and 1 timings of steps in {file}; --restart measures them again"


@pytest.mark.parametrize("cut", [b'{"type":"answer","task":"add"', b'{"type":"answer"}\n', b"\xff\n"])
def test_a_line_that_is_cut_off_or_damaged_is_measured_again(tmp_path, cut):
    *_, file = kept(tmp_path, add=(ANSWER,))
    whole = file.read_bytes()
    file.write_bytes(whole + cut)
    assert kept(tmp_path, add=(STEP,))[0] == [ANSWER]
    assert file.read_bytes().startswith(whole)
    assert kept(tmp_path)[0] == [ANSWER, STEP]


def test_measurements_of_something_else_are_started_over_which_is_said(tmp_path):
    kept(tmp_path, add=(ANSWER,))
    there, said, file = kept(tmp_path, SETTINGS | {"devices": "cuda:0", "dtype": "float16"}, add=(STEP,))
    assert (there, said) == ([], f"{file} is started over: it was measured with another devices, dtype")
    file.write_bytes(b"[]\n" + file.read_bytes())
    there, said, _ = kept(tmp_path, add=(ANSWER,))
    assert (there, said) == ([], f"{file} is started over: it is damaged")
    assert kept(tmp_path, restart=True)[:2] == ([], "")
    assert not file.exists(), "nothing is in it"


def test_two_calibrations_do_not_write_to_one_file(tmp_path):
    with (
        resumed([tmp_path / "profile.json"], SETTINGS, False, print),
        pytest.raises(ConfigError, match="another calibration writes"),
    ):
        kept(tmp_path)


def test_measurements_are_kept_where_the_profile_will_be(tmp_path):
    with resumed([tmp_path / "file" / "profile.json", tmp_path / "profile.json"], {}, False, print) as (_, file):
        assert file == tmp_path / "file" / "profile.json.partial"
    (tmp_path / "taken").write_text("")
    with resumed([tmp_path / "taken" / "profile.json", tmp_path / "profile.json"], {}, False, print) as (_, file):
        assert file == tmp_path / "profile.json.partial"
    with pytest.raises(ConfigError, match="cannot be kept in"):
        kept(tmp_path / "taken")


def test_only_missing_answers_are_asked_for_and_the_profile_is_that_of_all(random_model):
    questions = {"own": [(Question("a" * n, task="own"), None) for n in (5, 40)]}
    total = 2 * len(LEVELS)
    whole, half = Measurements(), Measurements()

    async def measured(engine, measurements):
        progress = []
        return await quality(engine, questions, lambda *seen: progress.append(seen), measurements), progress

    async def runs():
        parts = pretended(llada_8b_h200(), 1, 1024, text=Text(random_model))
        async with Engine(Config.of(), assemble=parts) as engine:
            yielded = [await measured(engine, whole)]
            for answer in list(whole.answers.values())[: total // 2]:
                half.add(answer)
            return [*yielded, await measured(engine, whole), await measured(engine, half)]

    (profile, first), (again, none), (_, rest) = run_on_virtual_time(runs())
    assert first == [("quality", done, total) for done in range(1, total + 1)]
    counted = sum(step.times for one in whole.answers.values() for step in one.counts)
    laws = [law for parts in profile.tasks["own"].laws for law in parts]
    assert counted == sum(sum(map(sum, law.unmasked)) for law in laws) > 0
    assert (again, none) == (profile, [("quality", total, total)])
    assert rest == [("quality", done, total) for done in range(total // 2, total + 1)]
    assert half.answers.keys() == whole.answers.keys()
