"""`chat`: talk to a run or a model in the terminal; answers appear as they are written."""

import select
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sheeprlhf.apps.arguments import Flag, read_flags
from sheeprlhf.apps.terminal import Screen, clean, flag_entries, paragraph, print_help
from sheeprlhf.config.model_lookup import find_trained
from sheeprlhf.config.run_lookup import is_newest
from sheeprlhf.security.redaction import plain_text
from sheeprlhf.security.version_guard import check_versions
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sheeprlhf.task.text_generator import TextGenerator

WEIGHTS = Flag("weights", "Which of a run's weights; by default the final ones.", value="final|best|last|step-<n>")
TEMPLATE = Flag(
    "chat-template",
    "Chat template instead of the model's own: one of its names, a built-in one (chatml, ...) or a .jinja file.",
    value="name or file",
)
TEMPLATE_ARGS = Flag(
    "template-args",
    "Variables for the chat template instead of those of the run, such as '{enable_thinking: false}'.",
    value="{name: value}",
)
SAMPLING = (
    Flag("temperature", "Divides the logits before sampling; 0 takes the likeliest token.", 0.7, float, minimum=0),
    Flag("top-p", "Sample among the likeliest tokens of this probability.", 1.0, float, minimum=0.01, maximum=1),
    Flag("top-k", "Sample among the k likeliest tokens; 0 is all.", 0, int, minimum=0),
    Flag("max-new-tokens", "Longest answer, in tokens.", 256, int, minimum=1),
    Flag("seed", "Seed of the first answer; the next one has the next.", 42, int, minimum=0, maximum=2**62),
)
FLAGS = (
    WEIGHTS,
    TEMPLATE,
    TEMPLATE_ARGS,
    Flag("system", "Text for the model before the conversation; needs a chat template.", value="text"),
    *SAMPLING,
)
_COMMANDS = "/reset forgets the conversation, /help shows this, /quit or Ctrl-D ends; Ctrl-C stops an answer."
_LONGEST_ESCAPE = 40  # characters
_MORE_SECONDS = 0.05  # lines that come sooner after another one were pasted with it


def number_problems(usage: str, words: Sequence[str], most: int = 1) -> list[str]:
    """The sentence for another number of runs or models than from one to `most`."""
    if 1 <= len(words) <= most:
        return []
    number = "one run or model" if most == 1 else f"one to {most} runs or models"
    what = f"{len(words)} were given" if words else "`list runs` shows the runs"
    return [f"`{usage.partition(' ')[0]}` takes {number}: `{usage}`; {what}"]


def sampling(*, temperature: float, top_p: float, top_k: float, max_new_tokens: float) -> GenConfig:
    """Settings of a sampler; a temperature of 0 takes the likeliest token."""
    return GenConfig(
        max_new_tokens=int(max_new_tokens),
        do_sample=temperature > 0,
        temperature=float(temperature) or 1.0,
        top_p=float(top_p),
        top_k=int(top_k),
    )


def run(arguments: list[str]) -> int:
    """Answer what is typed, or what is piped in. Raises SheepError for a wrong model or flag."""
    given = read_flags("chat", FLAGS, arguments)
    if given is None:
        meaning = (
            "Talk to a run, a model's folder or a model of `list models`. A model that has a chat template, or was "
            "trained on dialogues, remembers the conversation; any other one continues with each prompt as it was "
            "trained to."
        )
        piped = "From a pipe, all of the input is one prompt, and only the answer is printed: `echo ... | chat <run>`."
        texts = [meaning, _COMMANDS, piped]
        return print_help("chat <run or model> [--flag value ...]", texts, "Flags", flag_entries(FLAGS))
    if problems := number_problems("chat <run>", given.words):
        raise ConfigError(*problems)
    trained = find_trained(
        given.words[0],
        given.values["weights"],
        chat_template=given.values[TEMPLATE.name],
        template_args=given.values[TEMPLATE_ARGS.name],
    )
    if is_newest(given.words[0]):
        _note(f"{given.words[0]}: {trained.word}")
    check_versions()
    prompt = None if sys.stdin.isatty() else _read_piped()

    from transformers.utils import logging as transformers_logging

    from sheeprlhf.data.prompt_encoder import FORMS
    from sheeprlhf.task.text_generator import load_text_generator

    transformers_logging.disable_progress_bar()
    generator = load_text_generator(trained, _note)
    system = given.values["system"]
    if system is not None and generator.form is not FORMS["template"]:
        raise ConfigError(f"--system: {trained.word} is asked without a chat template: leave it out")
    cfg = sampling(**{flag.name.replace("-", "_"): given.values[flag.name] for flag in SAMPLING if flag.name != "seed"})
    conversation = Conversation(generator, cfg, given.values["seed"], system)
    if prompt is not None:
        conversation.say(prompt)
        return 0
    _note(f"This model takes {generator.form.meaning}.")
    how = "" if generator.form.turns else " Each prompt is a conversation of its own: end it with an empty line."
    _note(f"{_COMMANDS}{how}\n")
    _loop(conversation, _read_message if generator.form.turns else _read_block)
    return 0


def _read_piped() -> str:
    """All of standard input, as one prompt. Raises ConfigError if it is closed, empty or no text."""
    advice = "pipe a text (`echo ... | chat <run>`), or run `chat` in a terminal"
    try:
        text = sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"standard input cannot be read as text ({error}): {advice}") from error
    if not text.strip():
        raise ConfigError(f"the prompt is empty: standard input is closed or holds no text: {advice}")
    return text


def _note(text: str) -> None:
    """A line that is not the model's, next to the answers."""
    Screen(stderr=True).print(paragraph(text), style="faint")


class Conversation:
    """A conversation: what was said, how answers are sampled, and the seed of the next one."""

    def __init__(self, generator: "TextGenerator", cfg: GenConfig, seed: int, system: str | None = None) -> None:
        self._generator, self._cfg, self._seed, self._system = generator, cfg, seed, system
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        from sheeprlhf.data.prompt_encoder import Turn

        self.turns: list[Turn] = [] if self._system is None else [Turn("system", self._system)]

    def say(self, text: str) -> None:
        """Ask and print the answer as it is written, up to Ctrl-C. Raises DataError; nothing has been said then."""
        from sheeprlhf.data.prompt_encoder import Turn

        asked = [*self.turns, Turn("user", text)]
        kept, _ = self._generator.fit(asked)
        if self._generator.form.turns and len(kept) < len(asked):
            _note("(the oldest turns have no room any more and were left out)")
        answer = ""
        try:
            answer = print_growing(self._generator.answer(kept, self._cfg, self._seed))
        except KeyboardInterrupt as stop:
            answer = str(stop)
            _note("\n(stopped)")
        print(flush=True)
        self._seed += 1
        if self._generator.form.turns:
            self.turns = [*kept, Turn("assistant", answer)] if answer.strip() else self.turns


def print_growing(texts: Iterator[str]) -> str:
    """Print a text as it grows, without control codes; return it. KeyboardInterrupt has the text so far."""
    text = shown = ""
    try:
        for text in texts:
            begun = text.rfind("\x1b", -_LONGEST_ESCAPE)  # whose end may still be to come
            safe = plain_text(text if begun < 0 else text[:begun]).lstrip()
            if safe.startswith(shown):
                print(safe[len(shown) :], end="", flush=True)
                shown = safe
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text) from None
    safe = plain_text(text).lstrip()
    print(safe[len(shown) :] if safe.startswith(shown) else f"\n{safe}", end="", flush=True)
    return text


def _loop(conversation: Conversation, read: Callable[[], str]) -> None:
    """Read, answer, until the end of input or /quit."""
    while True:
        try:
            text = read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _note("\n(Ctrl-D ends)")
            continue
        except UnicodeDecodeError as error:
            _note(f"this is not text in {error.encoding}: type it again")
            continue
        command = text.strip().casefold()
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            conversation.reset()
            _note("(forgotten)")
        elif command.startswith("/") and "\n" not in command:
            _note(_COMMANDS if command == "/help" else f"there is no {clean(command)}: {_COMMANDS}")
        elif command:
            try:
                conversation.say(text)
            except DataError as error:
                _note(str(error))


def _read_message() -> str:
    """One line; and with it those that were pasted with it."""
    lines = [input("> ")]
    while select.select([sys.stdin], [], [], _MORE_SECONDS)[0]:
        lines.append(input())
    return "\n".join(lines)


def _read_block() -> str:
    """Lines up to an empty one; a command ends at its own line. Raises EOFError if nothing was typed."""
    lines = [input("> ")]
    while lines[-1].strip() and not lines[0].startswith("/"):
        try:
            lines.append(input("  "))
        except EOFError:
            break
    return "\n".join(lines).rstrip()
