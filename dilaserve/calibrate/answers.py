"""Ask problems at every threshold, and judge the answers."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.calibrate.kept import AnswerCount, MeasuredAnswer
from dilaserve.engine.engine import Engine
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, ConfigError
from dilaserve.profile import problems
from dilaserve.profile.decode_speed import LEVELS, Step
from dilaserve.profile.problems import TASKS, held_out
from dilaserve.profile.problems.problem import Problem

CHATTER = 16  # requests at once while quality is measured


class Question(msgspec.Struct, frozen=True):
    """One line of a JSONL file; without an answer, agreement with the model's own reference answer counts."""

    prompt: str
    answer: str | None = None
    task: str = "prompts"


Questions = Mapping[str, Sequence[tuple[Question, Problem | None]]]  # by task, with the package's own problem


class Answer(NamedTuple):
    right: bool
    steps: int


async def asked(
    engine: Engine, task: str, prompts: Mapping[int, str], level: int, heard: Callable[[MeasuredAnswer], None]
) -> None:
    """Ask the problems of a task, given by their place in it, a few at a time; `heard` gets each answer at its end.

    A request has one of `CHATTER` names as its task, so that its steps are counted apart from those of the others.
    """
    names: asyncio.Queue[str] = asyncio.Queue()
    for name in range(CHATTER):
        names.put_nowait(str(name))
    forecast = engine.scheduler.estimates.forecast
    forecast.learns = False  # it counts by these names
    length = longest_answer(engine)

    async def ask(place: int, prompt: str) -> None:
        name = await names.get()
        options = Options(confidence_threshold=LEVELS[level], task=name, max_tokens=length)
        try:
            answer = await engine.generate(chat(engine, prompt), options)
        except BadRequest as error:
            raise ConfigError(f"the problem {prompt[:60]!r} cannot be asked: {error.message}") from error
        steps = tuple(taken(forecast.counts, name))
        names.put_nowait(name)
        heard(MeasuredAnswer(task, level, place, answer.text, answer.usage.steps, steps))

    await asyncio.gather(*(ask(*one) for one in prompts.items()))


def taken(counts: dict[Step, int], kind: str) -> Iterator[AnswerCount]:
    """Take the steps of this kind out of the counts."""
    for step in [step for step in counts if step[0] == kind]:
        yield AnswerCount(*step[1:], counts.pop(step))


async def duration(engine: Engine, questions: Questions, missing: int) -> str:
    """A sentence on how long the `missing` answers will take, by how long the first few take."""
    task, items = next(iter(questions.items()))
    prompts = [item[0].prompt for item in items[:CHATTER]]
    await asked(engine, task, dict(enumerate(prompts[:1])), 0, unheard)  # the first steps are slower
    began = time.perf_counter()
    await asked(engine, task, dict(enumerate(prompts)), 0, unheard)
    minutes = (time.perf_counter() - began) * missing / len(prompts) / 60
    about = f"about {max(1, round(minutes))} min" if minutes >= 1 else "less than a minute"
    return f"{missing} answers will take {about}, then some hundreds of steps are timed"


def unheard(answer: MeasuredAnswer) -> None:
    """The answers by which the time is estimated are not counted."""


def longest_answer(engine: Engine) -> int:
    return min(128, engine.model.max_model_len // 2)


def chat(engine: Engine, prompt: str) -> str | list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if engine.text.template else prompt


def judged(item: tuple[Question, Problem | None], text: str, reference: str) -> bool:
    """By the task's rule, by the given answer, or by agreement with the reference threshold's answer."""
    question, problem = item
    if problem is not None:
        return problems.check(problem, text)
    expected = reference if question.answer is None else question.answer
    return " ".join(text.split()) == " ".join(expected.split())


def questions_from(file: Path | None, per_task: int) -> dict[str, list[tuple[Question, Problem | None]]]:
    """The problems of the package, or the questions of a JSONL file by their task; raises `ConfigError`."""
    if file is None:
        return {
            task: [(Question(problem.prompt, problem.answer, task), problem) for problem in held_out(task, per_task)]
            for task in TASKS
        }
    found: dict[str, list[tuple[Question, Problem | None]]] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line.strip():
                question = msgspec.json.decode(line, type=Question)
                found.setdefault(question.task, []).append((question, None))
    except OSError as error:
        raise ConfigError(f"cannot read the problems {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON lines of prompt, answer and task: {error}") from error
    if not found:
        raise ConfigError(f"{file} holds no problems")
    return {task: items[:per_task] for task, items in found.items()}
