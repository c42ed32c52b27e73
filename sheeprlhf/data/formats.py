"""Row formats: one function for each dataset, which makes text of a row.

Your own files have `prompt` + `response`, `prompt` + `chosen` + `rejected`, `prompt` + `responses`, or `messages`. A
`label` next to a response says whether it is desirable; tasks of unpaired data need it. `completions` are the steps of
a response, `labels` tell which of them are right (task=prm). Tasks that sample their responses take rows with only a
prompt too.
"""

from collections.abc import Mapping
from typing import Any

from sheeprlhf.data.conversation import ConversationExample, extra_of_prompt, has_messages, margin_of, read_conversation
from sheeprlhf.data.rows import (
    CONVERSATION_EXTRAS,
    STEPS,
    DropRowError,
    MissingColumnError,
    PreferenceExample,
    best_first,
    has_value,
    is_desirable,
    led_by_space,
    optional_text,
    text,
    texts,
)
from sheeprlhf.utils.chat_templates import check_has_template
from sheeprlhf.utils.errors import DataError

MARK = "TL;DR:"  # of summarization
TURN = "\n\nAssistant:"  # of helpful_harmless
HUMAN = "Human:"
SHAPES = "a row has prompt and response, or prompt, chosen and rejected, or prompt and ranked responses, or messages"


def docstrings_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """A Python signature with its author's summary, and its imperative (chosen) and third-person (rejected) forms."""
    return PreferenceExample(
        prompt=text(row, "prompt"),
        response=text(row, "response"),
        chosen=optional_text(row, "chosen"),
        rejected=optional_text(row, "rejected"),
    )


def summarization_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """A Reddit post, a new line and "TL;DR:" without a space; the summaries begin with that space (N+, detail 1)."""
    post = text(row, "prompt").rstrip().removesuffix(MARK).rstrip()
    # the dataset repeats the mark before each summary
    chosen, rejected = (led_by_space(text(row, of).strip().removeprefix(MARK)) for of in ("chosen", "rejected"))
    return PreferenceExample(prompt=f"{post}\n{MARK}" if post else "", chosen=chosen, rejected=rejected)


def helpful_harmless_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """A dialogue up to and with the last "Assistant:"; the answers begin with a space (Dahoas/full-hh-rlhf)."""
    dialogue = text(row, "prompt").rstrip().removesuffix(TURN).rstrip()
    return PreferenceExample(
        prompt=f"{dialogue}{TURN}" if dialogue else "",
        chosen=led_by_space(text(row, "chosen")),
        rejected=led_by_space(text(row, "rejected")),
    )


def format_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | ConversationExample | None:
    """The row as it is; messages go through the chat template. Raises DataError and DropRowError."""
    row = best_first(row)
    if has_messages(row):
        _check_template(row, tokenizer)
        return read_conversation(row)
    row = _named(row)
    if row.get(STEPS[0]) is not None:
        return _with_steps(row)
    margin = margin_of(row)
    if row.get("responses") is not None:
        ranked = texts(row, "responses")
        return PreferenceExample(text(row, "prompt"), optional_text(row, "response"), ranked=ranked, margin=margin)
    if row.get("response") is None and row.get("chosen") is None:
        raise MissingColumnError(SHAPES)
    chosen, rejected = optional_text(row, "chosen"), optional_text(row, "rejected")
    if (chosen is None) != (rejected is None):
        raise MissingColumnError("chosen and rejected go together, and one of the two is missing or null")
    response, label = optional_text(row, "response"), row.get("label")
    return PreferenceExample(text(row, "prompt"), response, chosen, rejected, margin=margin, label=label)


def _with_steps(row: Mapping[str, Any]) -> PreferenceExample:
    """A row of steps, each with its label."""
    steps, labels = texts(row, STEPS[0], fewest=1), row.get(STEPS[1])
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        raise DataError(f"column '{STEPS[1]}' must be a list of as many labels as column '{STEPS[0]}' has steps")
    return PreferenceExample(text(row, "prompt"), label=tuple(map(is_desirable, labels)), steps=steps)


def format_prompt(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | ConversationExample | None:
    """As `format_row`, for tasks that sample: responses may be missing, messages may end with the user's."""
    row = best_first(row)
    if has_messages(row):
        _check_template(row, tokenizer)
        return read_conversation(row, as_prompt=True)
    row = _named(row)
    if any(row.get(column) is not None for column in ("response", "chosen", "rejected", "responses")):
        return format_row(row, tokenizer)
    return PreferenceExample(text(row, "prompt"))


def _check_template(row: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise DataError if there is no chat template for what makes a conversation of a prompt."""
    if (name := extra_of_prompt(row)) is not None:
        joined = f"'data.columns={{prompt: [{name}, prompt]}}' joins to the prompt and " if name == "system" else ""
        check_has_template(tokenizer, f"column '{name}', which {joined}'data.ignore_columns=[{name}]' leaves out,")


def _named(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of texts under the names that are read here; two dialogues get their common start as prompt."""
    row = dict(row)
    for name in CONVERSATION_EXTRAS:
        if has_value(row.get(name)):
            raise DataError(f"column '{name}' is read next to messages or a prompt, and this row has none; write one")
    if row.get("chosen") is None and row.get("rejected") is None and row.get("rejected_response") is not None:
        row |= {"chosen": row.get("response"), "rejected": row["rejected_response"]}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is None and isinstance(chosen, str) and isinstance(rejected, str):
        row |= _common_dialogue(chosen, rejected)
    return row


def _common_dialogue(chosen: str, rejected: str) -> dict[str, str]:
    """Prompt and answers of two dialogues that begin with the same question; nothing for other texts.

    Raises DropRowError if the dialogues differ before their last answers.
    """
    first = chosen.find(TURN) + len(TURN)
    if first < len(TURN) or chosen[:first] != rejected[:first] or not chosen.lstrip().startswith(HUMAN):
        return {}
    last = chosen.rfind(TURN) + len(TURN)
    if chosen[:last] != rejected[:last] or TURN in rejected[last:]:
        raise DropRowError("more_than_one_answer")
    return {
        "prompt": chosen[:last],
        "chosen": led_by_space(chosen[last:]),
        "rejected": led_by_space(rejected[last:]),
    }
