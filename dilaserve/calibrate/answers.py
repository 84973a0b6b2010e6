"""Ask problems at every threshold, and judge the answers."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.engine.engine import Engine
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, ConfigError
from dilaserve.profile import problems
from dilaserve.profile.decode_speed import LEVELS
from dilaserve.profile.problems import TASKS, held_out
from dilaserve.profile.problems.problem import Problem

CHATTER = 16  # requests at once while quality is measured


class Question(msgspec.Struct, frozen=True):
    """One line of a JSONL file; without an answer, agreement with the model's own reference answer counts."""

    prompt: str
    answer: str | None = None
    task: str = "prompts"


class Answer(NamedTuple):
    right: bool
    steps: int


async def asked(
    engine: Engine, task: str, prompts: Sequence[str], level: float, one_more: Callable[[], None]
) -> list[tuple[str, int]]:
    """Answers and their steps, a few requests at a time."""
    gate = asyncio.Semaphore(CHATTER)
    options = Options(confidence_threshold=level, task=task, max_tokens=longest_answer(engine))

    async def ask(prompt: str) -> tuple[str, int]:
        async with gate:
            try:
                answer = await engine.generate(chat(engine, prompt), options)
            except BadRequest as error:
                raise ConfigError(f"the problem {prompt[:60]!r} cannot be asked: {error.message}") from error
        one_more()
        return answer.text, answer.usage.steps

    return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))


async def duration(engine: Engine, questions: Mapping[str, Sequence[tuple[Question, Problem | None]]]) -> str:
    """A sentence on how long the questions will take, by how long the first few take."""
    forecast = engine.scheduler.estimates.forecast
    forecast.learns = False
    task, items = next(iter(questions.items()))
    prompts = [item[0].prompt for item in items[:CHATTER]]
    await asked(engine, task, prompts[:1], LEVELS[0], unheard)  # the first steps are slower
    began = time.perf_counter()
    await asked(engine, task, prompts, LEVELS[0], unheard)
    forecast.counts.clear()  # they are asked again
    total = len(LEVELS) * sum(map(len, questions.values()))
    minutes = (time.perf_counter() - began) * total / len(prompts) / 60
    about = f"{max(1, round(minutes))} min" if minutes >= 1 else "less than a minute"
    return f"{total} answers will take about {about}, then some hundreds of steps are timed"


def unheard() -> None:
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
