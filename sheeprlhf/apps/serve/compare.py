"""One prompt to several models, for a page: what is asked of each, its answer as it grows, and its score."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.security.redaction import plain_text
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.task.text_generator import RewardScorer, TextGenerator
from sheeprlhf.utils.errors import DataError

MAX_CHARS = 20_000  # of a prompt
MAX_NEW_TOKENS = 512
MAX_TURNS = 40  # of a conversation, questions and answers
SUMMARISE, ASK = "summarise", "ask"
_INSTRUCTION = "Summarise this text in one or two sentences:\n\n"
_MIN_INTERVAL = 0.05  # seconds between two states of one answer

History = list[Turn]


class Settings(NamedTuple):
    """Settings of a request; checked here, since a request need not come from the page."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int

    def config(self) -> GenConfig:
        """Sampling settings.

        Raises:
            DataError: a value is out of its range.
        """
        ranges = (
            ("temperature", self.temperature, 0, 5),
            ("top-p", self.top_p, 0.01, 1),
            ("top-k", self.top_k, 0, 10_000),
            ("the most new tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS),
            ("the seed", self.seed, 0, 2**62),
        )
        for name, value, least, most in ranges:
            if not isinstance(value, int | float) or not least <= value <= most:
                raise DataError(f"{name} has to be a number from {least} to {most:,}")
        return GenConfig(
            max_new_tokens=int(self.max_new_tokens),
            do_sample=self.temperature > 0,
            temperature=float(self.temperature) or 1.0,
            top_p=float(self.top_p),
            top_k=int(self.top_k),
        )


class State(NamedTuple):
    """State of a page; not changed after it is shown.

    Attributes:
        status: a line about the whole.
        histories: what was said to and by each model; with a question that is being answered.
        scores: of each model's newest answer, as text; empty where there is none.
    """

    status: str
    histories: list[History]
    scores: list[str]


class Panel:
    """The models of one page, for one kind of task.

    Args:
        kind: SUMMARISE or ASK.
        generators: the models by name.
        scorer: scores the answers; None: no scores.
    """

    def __init__(self, kind: str, generators: Sequence[tuple[str, TextGenerator]], scorer: RewardScorer | None) -> None:
        self.kind, self._scorer = kind, scorer
        self.names = [name for name, _ in generators]
        self.generators = [
            generator.in_form(_form(kind, generator.form_name, generator)) for _, generator in generators
        ]

    def start(self) -> State:
        """Start without messages."""
        return State("", [[] for _ in self.generators], [""] * len(self.generators))

    def answer(self, prompt: str, before: Sequence[History], settings: Settings) -> Iterator[State]:
        """Ask all models, one after the other; the states that a page shows in turn.

        Args:
            prompt: as it was typed.
            before: what was said to and by each model; for a task without turns it is forgotten.
            settings: how to sample; the same for all.
        """
        histories, scores = [list(history) for history in before], self.start().scores

        def shown(status: str) -> State:
            return State(status, list(histories), list(scores))

        try:
            cfg = settings.config()
            if not prompt.strip():
                raise DataError("the prompt is empty: write something")
            if len(prompt) > MAX_CHARS:
                raise DataError(
                    f"the prompt has {len(prompt):,} characters, and {MAX_CHARS:,} are the most: shorten it"
                )
        except DataError as error:
            yield shown(str(error))
            return
        notes: list[str] = []
        for index, (name, generator) in enumerate(zip(self.names, self.generators, strict=True)):
            earlier = histories[index][-MAX_TURNS:] if self.kind == ASK and generator.form.turns else []
            question = Turn("user", prompt)
            answer, last = "", 0.0
            try:
                for answer in generator.answer([*earlier, self._question(generator, prompt)], cfg, settings.seed):
                    if time.monotonic() - last > _MIN_INTERVAL:
                        histories[index] = [*earlier, question, Turn("assistant", answer)]
                        yield shown(f"{name} is writing ...")
                        last = time.monotonic()
                histories[index] = [*earlier, question, Turn("assistant", answer)]
                scores[index] = self._score(earlier, prompt, answer)
            except DataError as error:
                notes.append(f"{name}: {error}")
            yield shown(f"{name} is done")
        yield shown("; ".join(notes) or self._summary(scores))

    def _question(self, generator: TextGenerator, prompt: str) -> Turn:
        instruct = self.kind == SUMMARISE and generator.form_name == "template"
        return Turn("user", f"{_INSTRUCTION if instruct else ''}{prompt}")

    def _score(self, earlier: History, prompt: str, answer: str) -> str:
        if self._scorer is None or not answer.strip():
            return ""
        form = _form(self.kind, self._scorer.form_name, self._scorer)
        return f"{self._scorer.score(form, [*earlier, Turn('user', prompt)], answer):.3f}"

    def _summary(self, scores: Sequence[str]) -> str:
        """Name the answer with the highest reward, if there are several."""
        found = [(float(score), name) for score, name in zip(scores, self.names, strict=True) if score]
        best = [name for score, name in found if score == max(found)[0]]
        return f"done; highest score: {best[0]}" if len(best) == 1 < len(found) else "done"


def _form(kind: str, own: str, model: TextGenerator | RewardScorer) -> str:
    """The form of a task for a model that was trained in the form `own`."""
    if own in (("docstring", "tldr") if kind == SUMMARISE else ("dialogue", "template")):
        return own
    if getattr(model.tokenizer, "chat_template", None):
        return "template"
    return "tldr" if kind == SUMMARISE else "text"


def transcript(history: History, *, turns: bool) -> str:
    """A conversation as plain text; without turns, the newest answer only."""
    if not turns:
        return plain_text(history[-1].text).strip() if history else ""
    who = {"user": "You", "assistant": "Model"}
    return "\n\n".join(f"{who[turn.role]}: {plain_text(turn.text).strip()}" for turn in history)
