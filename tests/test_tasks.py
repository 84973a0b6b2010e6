"""The problems and conversations that the bundled model is trained and measured on."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.tasks import TASKS, check, held_out, is_held_out, training
from dilaserve.tasks.conversation import Conversations, sensible
from dilaserve.tasks.first_contact import first_contact
from dilaserve.tasks.forms import is_held_out_form
from dilaserve.tasks.phrasing import PATTERNS, TEMPLATES, recognised, rephrased
from dilaserve.tasks.smalltalk import ANSWERS, small_talk

seeds = st.integers(0, 2**32)
MIX = dict.fromkeys(TASKS, 1.0)


def worked_out(problem):
    """The answer by a calculation that the generators do not share."""
    name, slots = recognised(problem.prompt)
    if name in ("plus", "minus"):
        return str(int(slots["a"]) + int(slots["b"]) if name == "plus" else int(slots["a"]) - int(slots["b"]))
    if name == "sort":
        return " ".join(sorted(slots["all"].split(), key=int))
    if name == "compare":
        return "yes" if int(slots["a"]) > int(slots["b"]) else "no"
    if name == "contains":
        return "yes" if slots["word"] in slots["all"].split() else "no"
    return slots["word"][::-1] if name == "reverse" else slots["word"].upper()


@given(seeds, st.sampled_from(["add", "sort", "reverse", "compare", "contains"]), st.floats(0, 1))
def test_answers_are_right(seed, task, difficulty):
    problem = TASKS[task].draw(random.Random(seed), difficulty)
    assert problem.answer == worked_out(problem)
    assert check(problem, f" {problem.answer}\n")
    assert not check(problem, problem.answer + "0")


@given(seeds)
def test_every_step_of_a_chain_is_the_sum_of_what_was_there_and_its_operation(seed):
    problem = TASKS["chain"].draw(random.Random(seed), 1.0)
    value, *operations = map(int, re.findall(r"[+-]?\d+", problem.prompt))
    steps = re.findall(r"([+-]\d+)=(\d+)", problem.answer)
    assert [int(operation) for operation, _ in steps] == operations
    assert [int(result) for _, result in steps] == list(itertools.accumulate(operations, initial=value))[1:]


@given(seeds)
def test_the_answer_of_a_word_problem_is_what_its_amounts_add_up_to(seed):
    problem = TASKS["word"].draw(random.Random(seed), 1.0)
    gained = sum(map(int, re.findall(r"(?:finds|buys|gets|wins) (\d+)", problem.prompt)))
    lost = sum(map(int, re.findall(r"(?:loses|sells|gives away|breaks) (\d+)", problem.prompt)))
    start = int(re.search(r"has (\d+)", problem.prompt)[1])
    assert problem.answer.endswith(f"#### {start + gained - lost}")


@given(seeds, st.sampled_from(list(TASKS)), st.booleans())
def test_a_problem_in_other_words_keeps_its_parts_its_answer_and_its_side(seed, task, held):
    problem = TASKS[task].draw(random.Random(seed), 1.0)
    other = rephrased(problem, random.Random(seed), held)
    assert (other.task, other.answer, other.origin) == (task, problem.answer, problem.prompt)
    assert is_held_out(other) == is_held_out(problem)
    numbers = re.findall(r"\d+", problem.prompt)
    assert sorted(re.findall(r"\d+", other.prompt)) == sorted(numbers)
    assert "{" not in other.prompt


def test_each_pattern_reads_its_first_template():
    for name, pattern in PATTERNS.items():
        text = re.sub(r"\{(\w+)\}", lambda slot: "3" if slot[1] in ("a", "b", "start") else "x", TEMPLATES[name][0])
        assert re.fullmatch(pattern, text.replace("{commas}", "x")), name


def test_other_prompts_than_the_tasks_own_are_not_rephrased():
    with pytest.raises(ValueError, match="no task asks in these words: 'Hello'"):
        recognised("Hello")


@given(seeds)
def test_a_conversation_for_training_holds_nothing_that_is_held_out(seed):
    conversation = next(Conversations(random.Random(seed), MIX))
    if conversation.problem.task in TASKS:
        assert not is_held_out(conversation.problem)
    assert sensible(conversation.problem, conversation.answer)
    said = [message.content for message in conversation.messages if message.role == "user"]
    assert conversation.problem.prompt in (said or [conversation.text])[-1]


def test_first_contact_is_of_held_out_problems_and_forms():
    contacts = first_contact(random.Random(0), 200)
    assert len(contacts) == 200
    problems = [conversation.problem for _, conversation in contacts]
    assert all(is_held_out(problem) for problem in problems if problem.task in TASKS)
    assert {problem.task for problem in problems} == {*TASKS, *ANSWERS}
    known = {next(Conversations(random.Random(seed), MIX)).problem.prompt for seed in range(300)}
    assert not known & {problem.prompt for problem in problems}


@given(seeds, st.sampled_from([kind for kind in ANSWERS if kind != "refusal"]), st.booleans())
def test_small_talk_is_its_own_form(seed, kind, held):
    problem = small_talk(kind, random.Random(seed), held)
    assert is_held_out_form(problem.prompt) == held
    assert problem.answer == ANSWERS[kind]


def test_held_out_problems_and_those_for_training_never_meet():
    for task in TASKS:
        asked = {problem.prompt for problem in held_out(task, 50)}
        stream = training(task, random.Random(0), lambda: 1.0)
        assert len(asked) == 50
        assert not asked & {next(stream).prompt for _ in range(2000)}


def test_the_list_of_abilities_names_six_things_that_are_tasks():
    examples = re.findall(r"^- [\w ]+: (.*)$", ANSWERS["ability"], re.MULTILINE)
    assert len(examples) == 6
    own = ("plus", "chain", "word", "sort", "reverse")
    assert [recognised(example)[0] for example in examples[:5]] == list(own)
