"""Fields of OpenAI, vLLM and their kin that this server knows and cannot honour.

One table: the values of each field that change nothing, and why others are refused. A field that stands neither here
nor in `server.schema` is unknown, and ignored with a warning if it looks like a misspelling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Test = Callable[[Any], bool]


class Unsupported(NamedTuple):
    """Which values of a field are `harmless`, and the `reason` for refusing all others. null always is harmless."""

    harmless: Test
    reason: str


def at(*values: Any) -> Test:
    """One of these values; true and false are no numbers here."""
    return lambda given: any(isinstance(given, bool) == isinstance(one, bool) and given == one for one in values)


def anything(given: Any) -> bool:
    """Every value: the field says nothing about the answer."""
    return True


def all_zero(given: Any) -> bool:
    return isinstance(given, dict) and all(map(at(0), given.values()))


SAMPLING = "masked diffusion has no token-by-token sampling to apply it to"
GRAMMAR = "answers cannot be held to a grammar"
TOOLS = 'answers hold no calls of tools; leave them out, or send tool_choice "none"'
FUNCTIONS = 'answers hold no calls of functions; leave them out, or send function_call "none"'
TEMPLATE = "the chat template is the model's own and takes no arguments"
TEXT = "this server reads and writes text"
IDS = "token ids stand in answers of /v1/chat/completions and /v1/completions alone"
STORE = "answers are not stored"

LISTS = {"tools": "tool_choice", "functions": "function_call"}  # which may hold anything where the choice is none
NO_CHOICE = ("none", {"type": "none"})  # OpenAI's and Anthropic's

COMMON = {
    # OpenAI
    "frequency_penalty": Unsupported(at(0), SAMPLING),
    "presence_penalty": Unsupported(at(0), SAMPLING),
    "logit_bias": Unsupported(all_zero, SAMPLING),
    "tools": Unsupported(at([]), TOOLS),
    "tool_choice": Unsupported(at("none", "auto"), TOOLS),
    "parallel_tool_calls": Unsupported(at(True, False), TOOLS),
    "functions": Unsupported(at([]), FUNCTIONS),
    "function_call": Unsupported(at("none", "auto"), FUNCTIONS),
    "audio": Unsupported(at(), TEXT),
    "modalities": Unsupported(at(["text"]), TEXT),
    "response_format": Unsupported(at({"type": "text"}), "only {'type': 'text'} is supported"),
    "suffix": Unsupported(at(""), "text after the answer is not supported"),
    "best_of": Unsupported(at(1), "send n"),
    "prediction": Unsupported(at(), "predicted output is not supported"),
    "reasoning_effort": Unsupported(at("none", "medium"), "the model does not reason before its answer"),
    "verbosity": Unsupported(at("medium"), "the length of answers is set by max_tokens alone"),
    "web_search_options": Unsupported(at(), "the model searches nothing"),
    "store": Unsupported(at(False), STORE),
    "service_tier": Unsupported(at("auto", "default"), "there is one tier; send priority or slo"),
    "metadata": Unsupported(anything, STORE),
    "safety_identifier": Unsupported(anything, STORE),
    "prompt_cache_key": Unsupported(anything, STORE),
    "prompt_cache_retention": Unsupported(anything, STORE),
    # vLLM: sampling
    "repetition_penalty": Unsupported(at(1), SAMPLING),
    "length_penalty": Unsupported(at(1), "there is no beam search"),
    "use_beam_search": Unsupported(at(False), "there is no beam search"),
    "logits_processors": Unsupported(at([]), SAMPLING),
    "prompt_logprobs": Unsupported(at(), "probabilities of the prompt are not computed"),
    "allowed_token_ids": Unsupported(at(), SAMPLING),
    "bad_words": Unsupported(at([]), SAMPLING),
    "thinking_token_budget": Unsupported(at(), "the model does not reason before its answer"),
    "include_reasoning": Unsupported(at(True, False), "the model does not reason before its answer"),
    "repetition_detection": Unsupported(at(), SAMPLING),
    "vllm_xargs": Unsupported(at({}), "it names extensions of another server"),
    # vLLM: grammars
    "guided_json": Unsupported(at(), GRAMMAR),
    "guided_regex": Unsupported(at(), GRAMMAR),
    "guided_choice": Unsupported(at(), GRAMMAR),
    "guided_grammar": Unsupported(at(), GRAMMAR),
    "guided_json_object": Unsupported(at(False), GRAMMAR),
    "guided_decoding_backend": Unsupported(at(), GRAMMAR),
    "guided_whitespace_pattern": Unsupported(at(), GRAMMAR),
    "structured_outputs": Unsupported(at(), GRAMMAR),
    "structural_tag": Unsupported(at(), GRAMMAR),
    # vLLM: text and templates
    "skip_special_tokens": Unsupported(at(True), "special tokens are never part of the text"),
    "spaces_between_special_tokens": Unsupported(at(True, False), "special tokens are never part of the text"),
    "truncate_prompt_tokens": Unsupported(at(), "prompts are never cut; shorten it"),
    "truncation_side": Unsupported(at("left", "right"), "prompts are never cut; shorten it"),
    "continue_final_message": Unsupported(at(False), "an answer begins a message of its own; use /v1/completions"),
    "add_generation_prompt": Unsupported(at(True), "an answer begins with the template's mark; use /v1/completions"),
    "documents": Unsupported(at([]), TEMPLATE),
    "chat_template": Unsupported(at(), TEMPLATE),
    "chat_template_kwargs": Unsupported(at({}), TEMPLATE),
    "mm_processor_kwargs": Unsupported(at({}), TEXT),
    "media_io_kwargs": Unsupported(at({}), TEXT),
    "prompt_embeds": Unsupported(at(), TEXT),
    # vLLM: the answer and the road to it
    "request_id": Unsupported(at(), "send the header x-request-id"),
    "return_token_ids": Unsupported(at(False), IDS),
    "return_tokens_as_token_ids": Unsupported(at(False), "send return_token_ids"),
    "return_prompt_text": Unsupported(at(False), "the prompt is not part of answers"),
    "cache_salt": Unsupported(anything, "nothing is shared between requests"),
    "kv_transfer_params": Unsupported(at({}), "K/V is not moved between servers"),
    "data_parallel_rank": Unsupported(at(), "the scheduler chooses the instance"),
    # SGLang
    "regex": Unsupported(at(), GRAMMAR),
    "ebnf": Unsupported(at(), GRAMMAR),
    "json_schema": Unsupported(at(), GRAMMAR),
    "stop_regex": Unsupported(at([]), "send stop"),
    "no_stop_trim": Unsupported(at(False), "send include_stop_str_in_output"),
    "min_new_tokens": Unsupported(at(0), "send min_tokens"),
    "return_hidden_states": Unsupported(at(False), "hidden states are not part of answers"),
    "lora_path": Unsupported(at(), "adapters are not supported"),
    "separate_reasoning": Unsupported(at(True, False), "the model does not reason before its answer"),
}
OPENAIS = {name: about for name, about in COMMON.items() if name != "return_token_ids"}
CHAT = OPENAIS | {
    "prompt": Unsupported(at(), "send messages here, or the prompt to /v1/completions"),
    "echo": Unsupported(at(False), "the messages are not part of the answer; use /v1/completions"),
    "add_special_tokens": Unsupported(at(False), "the chat template writes all special tokens"),
}
COMPLETIONS = OPENAIS | {
    "top_logprobs": Unsupported(at(0), "send the number as logprobs here"),
    "messages": Unsupported(at(), "send messages to /v1/chat/completions"),
    "add_special_tokens": Unsupported(at(True), "send token ids for a prompt without special tokens"),
}
TOKENIZE = {
    name: COMMON[name]
    for name in (
        *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
        *("mm_processor_kwargs", "media_io_kwargs", "tools"),
    )
} | {
    "return_token_strs": Unsupported(at(False), "send the ids to /detokenize one by one"),
}


def plain_text(given: Any) -> bool:
    """OpenAI's `text` of a response, where it asks for text."""
    return isinstance(given, dict) and all(
        value is None or (name == "format" and value == {"type": "text"}) or (name == "verbosity" and value == "medium")
        for name, value in given.items()
    )


def no_reasoning(given: Any) -> bool:
    known = isinstance(given, dict) and given.keys() <= {"effort", "summary", "generate_summary"}
    return known and given.get("effort") in (None, "none", "medium")


NO_REASONING = "the model does not reason before its answer"
HISTORY = "earlier answers are not kept; send the whole conversation as input"
RESPONSES = {name: about for name, about in COMMON.items() if name not in ("metadata", "response_format")} | {
    "previous_response_id": Unsupported(at(), HISTORY),
    "conversation": Unsupported(at(), HISTORY),
    "context_management": Unsupported(at([]), HISTORY),
    "background": Unsupported(at(False), "answers are not kept for later; leave it out, or stream"),
    "prompt": Unsupported(at(), "prompt templates are not kept here; send input"),
    "messages": Unsupported(at(), "send the conversation as input"),
    "text": Unsupported(plain_text, "only {'format': {'type': 'text'}} is supported"),
    "reasoning": Unsupported(no_reasoning, NO_REASONING),
    "truncation": Unsupported(at("disabled"), "prompts are never cut; shorten it"),
    "max_tool_calls": Unsupported(anything, TOOLS),
    "moderation": Unsupported(at(), "nothing is moderated here"),
    "prompt_cache_options": Unsupported(anything, STORE),
}


def not_thinking(given: Any) -> bool:
    return isinstance(given, dict) and given.get("type") == "disabled"


ANTHROPICS_TOOLS = 'answers hold no calls of tools; leave them out, or send tool_choice {"type": "none"}'
ANTHROPICS_TEXT = {
    "tools": Unsupported(at([]), ANTHROPICS_TOOLS),
    "tool_choice": Unsupported(at({"type": "none"}, {"type": "auto"}), ANTHROPICS_TOOLS),
    "thinking": Unsupported(not_thinking, NO_REASONING),
    "output_config": Unsupported(at({}), "only text is supported"),
    "cache_control": Unsupported(anything, STORE),
    "mcp_servers": Unsupported(at([]), ANTHROPICS_TOOLS),
    "speed": Unsupported(at("standard"), "there is one speed; send priority or slo"),
    "context_management": Unsupported(at(), "the conversation is taken as it is sent"),
}
COUNT_TOKENS = ANTHROPICS_TEXT
MESSAGES = ANTHROPICS_TEXT | {
    "service_tier": Unsupported(at("auto", "standard_only"), "there is one tier; send priority or slo"),
    "container": Unsupported(at(), "there is no code execution"),
    "inference_geo": Unsupported(at(), "there is one place: this server"),
    "diagnostics": Unsupported(anything, STORE),
    "stop": Unsupported(at([]), "send stop_sequences"),
    "return_token_ids": Unsupported(at(False), IDS),
}
