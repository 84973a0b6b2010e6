"""The simulator: its clock, step costs, arrivals and traces, and the `simulate` command."""

import asyncio
import gzip
import itertools
import random

import msgspec
import pytest
from simulated_runs import run

from dilaserve.cli import main
from dilaserve.errors import ConfigError
from dilaserve.profile import profile_file
from dilaserve.profile.block_chain import chain
from dilaserve.profile.step_cost import ExpertCounts, Features
from dilaserve.sim import workload
from dilaserve.sim.clock import Stalled, VirtualLoop
from dilaserve.sim.h200 import STEPS, law_at, llada_8b_h200


def test_virtual_time_jumps_and_a_wait_without_an_event_raises():
    async def sleepy():
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(sleepy()) == pytest.approx(3600)
        with pytest.raises(Stalled):
            runner.run(asyncio.Event().wait())


def test_the_same_seed_gives_the_same_run():
    first, second = run(), run()
    assert first.outcomes == second.outcomes
    assert first.outcomes != run(seed=1).outcomes


def test_larger_degrees_cost_less_and_never_in_proportion():
    laws = [law_at(degree) for degree in (1, 2, 4, 8)]
    for point in (Features(32, 32 * 256, 256, 32, 1), Features(1024, 4 * 256 * 256, 1024, 128, 4)):
        seconds = [law.seconds(point) for law in laws]
        assert seconds == sorted(seconds, reverse=True)
        assert all(a < 2 * b for a, b in itertools.pairwise(seconds))


def test_the_built_in_profile_has_the_published_steps():
    laws = llada_8b_h200().quality.tasks["any"].laws
    assert [8 * chain([law[0]], 32).steps[32] for law in laws] == pytest.approx(list(STEPS), rel=0.01)


@pytest.mark.parametrize("kind", workload.ARRIVALS)
def test_arrivals_come_at_their_rate(kind):
    times = list(itertools.islice(workload.arrivals(kind, 10.0, random.Random(0)), 20_000))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.1)


def test_a_trace_is_read_and_stretched(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,20\n1.5,30,40\n3.0,50,60\n")
    rows = workload.trace(file)
    assert rows == [(0.0, 10, 20), (1.5, 30, 40), (3.0, 50, 60)]
    jobs = workload.jobs(workload.scaled(rows, 10.0), 5.0, 64, (None,), ((None, 1.0),), 0)
    assert len(jobs) == pytest.approx(50, abs=25)
    assert all(job.prompt_tokens + job.max_tokens <= 64 for job in jobs)
    file.write_text("a,b\n")
    with pytest.raises(ConfigError, match="not a CSV"):
        workload.trace(file)
    with pytest.raises(ConfigError, match="cannot read"):
        workload.trace(tmp_path / "none.csv")


def test_the_command_prints_and_saves(tmp_path, capsys):
    flags = ["--rate", "4", "--seconds", "10", "--sim-devices", "2", "--deadline", "1.5:1,8:1", "--out", str(tmp_path)]
    assert main(["simulate", *flags]) == 0
    assert "of deadlines met" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"outcomes.json", "report.json", "timeline.png"}


def test_a_report_without_arrivals_has_no_figures(capsys):
    assert main(["simulate", "--rate", ".0001", "--seconds", "5", "--sim-devices", "1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "nothing arrived after the warm-up of 0.5 s; raise --rate or --seconds"
    assert not any("%" in line or "latency" in line for line in rest)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--rate", "0"], "--rate: '0' is no number above 0"),
        (["--prompt", "x"], "--prompt: 'x' is no whole number from 1 to 1000000"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "inf"], "--rate"),
        (["--seconds", "inf"], "--seconds"),
        (["--rate", "1e9", "--seconds", "1e9"], "--rate times --seconds"),
        (["--deadline", "x"], "--deadline 'x'"),
        (["--deadline", "nan"], "--deadline 'nan'"),
        (["--deadline", "1e-9"], "--deadline '1e-9'"),
        (["--deadline", "2:1,3:-0.5"], "--deadline '2:1,3:-0.5'"),
        (["--costs", "nope"], "cannot read the profile nope"),
        (["--arrivals", "x"], "unknown arrivals 'x'"),
        (["--task", "x"], "--task 'x'"),
        (["--sim-devices", "0"], "--sim-devices"),
        (["--sim-devices", "4097"], "--sim-devices: 4097 devices are too many to plan for; at most 4096"),
        (["--out", __file__], "cannot write to"),
        (["--trace", "/"], "cannot read the trace /"),
        (["--prompt", "1000000"], "--prompt 1000000 and --answer 256 exceed the canvas of 4096 tokens"),
    ],
)
def test_impossible_flags_give_one_sentence(words, pattern, capsys):
    try:
        code = main(["simulate", *words])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert pattern in captured.err
    assert len(captured.err.splitlines()) == 1


def test_damaged_traces_are_named(tmp_path):
    whole = gzip.compress(b"0,10,20\n" * 1000)
    for name, data in (("cut.csv.gz", whole[:20]), ("odd.csv.gz", whole[:15] + b"x" * 9 + whole[15:]), ("no.gz", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="the trace"):
            workload.trace(tmp_path / name)
    for text in ("nan,1,1\n", "0,inf,1\n", "0,1\n", "0,1,1\x00,\n" + "0," + "9" * 200_000, "", "\xff,1,1"):
        (tmp_path / "trace.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="the trace"):
            workload.trace(tmp_path / "trace.csv")


@pytest.mark.parametrize("line", ["1,1000000000,5", "1,5,-1", "1,5,0", "1,0,5", "1,5", "1,x,5", "nan,5,5", "1,1e999,5"])
def test_an_impossible_request_in_a_trace_is_named_by_its_line(tmp_path, line):
    file = tmp_path / "trace.csv"
    file.write_text(f"arrival_s,prompt_tokens,output_tokens\n0,10,20\n{line}\n2,10,20\n")
    with pytest.raises(ConfigError, match=f"the trace {file} is not a CSV of .*: line 3: "):
        workload.trace(file)


def test_requests_that_are_cut_to_the_canvas_are_counted(tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text("0,100,20\n1,5000,20\n2,100,5000\n3,100,20\n")
    words = ["simulate", "--trace", str(file), "--rate", "1", "--seconds", "3", "--sim-devices", "1"]
    assert main(words) == 0
    assert "\n2 of 3 requests were cut to the 4096 tokens that the model holds" in capsys.readouterr().out
    file.write_text("0,100,20\n")
    assert main(words) == 0
    assert "cut" not in capsys.readouterr().out


def test_a_trace_of_one_moment_and_a_tiny_canvas_still_give_jobs_that_can_be_asked():
    jobs = workload.jobs(workload.scaled([(5.0, 10, 20)] * 4, 2.0), 10.0, 2, (None,), ((None, 1.0),), 0)
    assert len(jobs) == 20
    assert {(job.prompt_tokens, job.max_tokens) for job in jobs} == {(1, 1)}


def test_a_profile_with_missing_entries_is_damaged(tmp_path):
    known = llada_8b_h200()
    task = known.quality.tasks["any"]
    (key, law), *_ = known.costs.items()
    nothing = msgspec.structs.replace(law, fixed=0.0, token=0.0)
    endless = [msgspec.structs.replace(law, **wrong) for wrong in ({"fixed": 1e300}, {"fixed": 86401.0}, {"key": 1e4})]
    endless += [
        msgspec.structs.replace(law, expert=expert, experts=ExpertCounts(*counts))
        for expert, counts in ((1e-3, (0, 0)), (0.0, (8, 9)), (-1e-3, (8, 2)), (0.0, (8, -1)))
    ]
    short = msgspec.structs.replace(known.quality, tasks={"any": msgspec.structs.replace(task, drop=(0.0,))})
    wrong_costs = [{"costs": {key: wrong}} for wrong in (nothing, *endless)]
    for changed in ({"costs": {}}, *wrong_costs, {"quality": short}):
        (tmp_path / "profile.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(known, **changed)))
        with pytest.raises(ConfigError, match="damaged"):
            profile_file.read(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(known))
    assert profile_file.read(tmp_path / "profile.json") == known
