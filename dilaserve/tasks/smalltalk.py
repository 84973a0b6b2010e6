"""What people type first: greetings, thanks, questions about the model, and requests that it cannot fulfil.

Each kind has one answer, so that a rule can check it.
"""

import random
from collections.abc import Callable

from dilaserve.tasks.forms import drawn
from dilaserve.tasks.problem import Problem
from dilaserve.tasks.requests import request

ANSWERS = {
    "greeting": "Hello! Ask me what I can do.",
    "feeling": "I am fine, thank you. Ask me what I can do.",
    "thanks": "You are welcome.",
    "farewell": "Goodbye!",
    "identity": "I am dilaserve-tiny, a small diffusion language model.",
    "ability": (
        "I can do six things:\n"
        "- sums: What is 347+85?\n"
        "- chains: Start with 35: -6 +9\n"
        "- word problems: Tom has 12 pens, wins 5. How many pens now?\n"
        "- sorting: Sort: 57 12 93\n"
        "- words: Reverse: lamu\n"
        "- JSON: Ann is 27 and lives in Rome."
    ),
    "refusal": "Sorry, I can only do a few small tasks; ask me what I can do.",
}
GREETINGS = (
    *("Hi", "Hello", "Hey", "Hi there", "Hello there", "Hey there", "Good morning", "Good evening", "Good afternoon"),
    *(
        "Good day",
        "Greetings",
        "Howdy",
        "Hallo",
        "Hiya",
        "Yo",
        "Hello again",
        "Hi again",
        "Hello world",
        "Heya",
        "Morning",
    ),
    *(
        "Hello you",
        "Hi all",
        "Nice to meet you",
        "Hello, nice to meet you",
        "Hi, good morning",
        "Hello, hello",
        "Hi hi",
    ),
    *("Hello, is anybody there", "Are you there", "Anybody there", "Hello, can you hear me", "Hello, good to see you"),
)
NAMED = (
    "",
    "",
    "",
    "",
    " friend",
    " dilaserve",
    " dilaserve-tiny",
    " tiny",
    " assistant",
    " bot",
    " my friend",
    " model",
)
FEELINGS = (
    *("How are you", "How are you doing", "How are you today", "How is it going", "How do you do", "What's up"),
    *(
        "How do you feel",
        "How's it going",
        "Are you well",
        "Are you OK",
        "How have you been",
        "How are things",
        "How is life",
    ),
    *("Hi, how are you", "Hello, how are you", "Hey, how are you", "Hello! How are you today", "Hi! How's it going"),
    *(
        "How was your day",
        "How are you feeling",
        "Is everything OK",
        "You OK",
        "Hello. How are you doing",
        "Hey, what's up",
    ),
)
THANKS = (
    *(
        "Thanks",
        "Thank you",
        "Thanks a lot",
        "Thank you very much",
        "Many thanks",
        "Thank you so much",
        "Great, thanks",
    ),
    *(
        "OK, thanks",
        "Perfect, thank you",
        "Thanks, that was right",
        "Cheers",
        "Thank you for your help",
        "Nice, thanks",
    ),
    *(
        "Well done",
        "Good job",
        "Great",
        "Thanks for that",
        "Very good",
        "That is right",
        "Correct",
        "Nice",
        "Wow, thanks",
    ),
)
FAREWELLS = (
    *("Bye", "Goodbye", "Good bye", "See you", "See you later", "Bye bye", "Good night", "Farewell", "Bye for now"),
    *(
        "That's all, bye",
        "See you soon",
        "Have a nice day",
        "Thanks, bye",
        "OK, bye",
        "Goodbye for now",
        "Until next time",
    ),
    *(
        "I have to go, bye",
        "Talk to you later",
        "Thank you, goodbye",
        "Take care",
        "See you tomorrow",
        "Good night and bye",
    ),
)
IDENTITIES = (
    *(
        "Who are you",
        "What are you",
        "What is your name",
        "What's your name",
        "Who am I talking to",
        "Tell me who you are",
    ),
    *(
        "Which model are you",
        "What model are you",
        "Are you an AI",
        "Are you a robot",
        "Introduce yourself",
        "Your name",
    ),
    *("Are you ChatGPT", "Are you human", "Who made you", "Who is this", "Say who you are", "Tell me about yourself"),
    *(
        "What kind of model are you",
        "Are you a language model",
        "What are you called",
        "Do you have a name",
        "Name yourself",
    ),
    *(
        "Hi, who are you",
        "Hello, who are you",
        "And who are you",
        "So who are you",
        "Who exactly are you",
        "Are you a bot",
    ),
    *(
        "What is this",
        "What is dilaserve-tiny",
        "Who or what are you",
        "Can you introduce yourself",
        "Please introduce yourself",
    ),
)
ABILITIES = (
    *(
        "What can you do",
        "What can you do for me",
        "What do you do",
        "Help",
        "What are you able to do",
        "How can you help me",
    ),
    *(
        "What can I ask you",
        "What can I ask",
        "What do you know",
        "Tell me what you can do",
        "List what you can do",
        "help me",
    ),
    *(
        "Show me what you can do",
        "Can you help me",
        "What are your abilities",
        "What are you good at",
        "What are your skills",
    ),
    *(
        "What tasks can you do",
        "Which tasks do you know",
        "What things can you do",
        "Give me a list of what you can do",
    ),
    *(
        "Hi, what can you do",
        "Hello, what can you do",
        "I need help",
        "How do you work",
        "How do I use you",
        "/help",
        "?",
    ),
    *(
        "What questions can you answer",
        "What can this model do",
        "What else can you do",
        "Give me an example",
        "Examples",
    ),
    *(
        "What should I ask you",
        "What are you for",
        "How can I use this",
        "What is possible",
        "Name the things you can do",
    ),
    *(
        "Okay, what can you do",
        "So what can you do",
        "What exactly can you do",
        "Which things can you do",
        "Your abilities",
    ),
)
ENDS = ("", "", "!", ".", "?", "??", "!!", " :)", "...", " ")
KINDS = {
    "greeting": (GREETINGS, ("", "", "!", ".", "!!", " :)", "?", " ", ",")),
    "feeling": (FEELINGS, ("?", "?", "?", "", "??", "?!", " ?", " :)")),
    "thanks": (THANKS, ("", "!", ".", "!!", " :)", " ")),
    "farewell": (FAREWELLS, ("", "!", ".", "!!", " :)")),
    "identity": (IDENTITIES, ("?", "?", "?", "", "??", ".", " ?", "!")),
    "ability": (ABILITIES, ("?", "?", "?", "", "??", ".", " ?", "!")),
}


def said(kind: str) -> Callable[[random.Random], tuple[str, str]]:
    """Draws a text of this kind; it is its own form."""

    def draw(rng: random.Random) -> tuple[str, str]:
        texts, ends = KINDS[kind]
        text = rng.choice(texts) + (rng.choice(NAMED) if kind in ("greeting", "thanks", "farewell") else "")
        looks = rng.random()
        text = text.lower() if looks < 0.3 else text.upper() if looks < 0.34 else text
        text += rng.choice(ends)
        return text, text

    return draw


def small_talk(kind: str, rng: random.Random, held_out: bool = False) -> Problem:
    """A text of this kind with its answer; kinds are those of `ANSWERS`."""
    text = drawn(request if kind == "refusal" else said(kind), rng, held_out)
    return Problem(kind, text, ANSWERS[kind])
