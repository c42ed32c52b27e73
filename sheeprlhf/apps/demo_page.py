"""The page of `demo`: one prompt to several models, their answers side by side as plain text, and the runs' report."""

import html
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from sheeprlhf.apps.chat import sampling
from sheeprlhf.apps.report import page_of_runs
from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.security.redaction import plain_text
from sheeprlhf.structure.run import GenConfig
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
        """Sampling settings. Raises DataError if a value is out of its range."""
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
        return sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=self.max_new_tokens
        )


class State(NamedTuple):
    """State of a page: a line about the whole, what was said to and by each model, and scores of the newest answers."""

    status: str
    histories: list[History]
    scores: list[str]


class Panel:
    """The models of one page by name, for one kind of task (SUMMARISE or ASK); without a scorer there are no scores."""

    def __init__(self, kind: str, generators: Sequence[tuple[str, TextGenerator]], scorer: RewardScorer | None) -> None:
        self.kind, self._scorer = kind, scorer
        self.names = [name for name, _ in generators]
        self.generators = [one.in_form(_form(kind, one.form_name, one)) for _, one in generators]

    def start(self) -> State:
        """Start without messages."""
        return State("", [[] for _ in self.generators], [""] * len(self.generators))

    def answer(self, prompt: str, before: Sequence[History], settings: Settings) -> Iterator[State]:
        """Ask all models in turn, `before` being what each has said; yield the states that a page shows."""
        histories, scores = [list(history) for history in before], self.start().scores

        def shown(status: str) -> State:
            return State(status, list(histories), list(scores))

        try:
            cfg = settings.config()
            if not prompt.strip():
                raise DataError("the prompt is empty: write something")
            if len(prompt) > MAX_CHARS:
                raise DataError(f"the prompt has {len(prompt):,} characters, more than {MAX_CHARS:,}: shorten it")
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
    if own != "text" and getattr(model.tokenizer, "chat_template", None):
        return "template"
    return "tldr" if kind == SUMMARISE else "text"


def transcript(history: History, *, turns: bool) -> str:
    """A conversation as plain text; without turns, the newest answer only."""
    if not turns:
        return plain_text(history[-1].text).strip() if history else ""
    who = {"user": "You", "assistant": "Model"}
    return "\n\n".join(f"{who[turn.role]}: {plain_text(turn.text).strip()}" for turn in history)


TITLE = "SheepRLHF demo"
THEME = gr.themes.Default(
    primary_hue="emerald",
    font=["system-ui", "sans-serif"],  # no font is fetched from anywhere
    font_mono=["ui-monospace", "monospace"],
).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important;}
#title h1 {font-size: 1.5rem; font-weight: 650; margin: 0 0 .15rem 0;}
#title p {opacity: .75; margin: 0;}
.answer textarea {font-size: 1rem; line-height: 1.5;}
.status, .status textarea {border: 0 !important; box-shadow: none !important; background: transparent !important;}
@media (max-width: 640px) {.answers {flex-direction: column !important;} .gradio-container {padding: .5rem !important;}}
"""
_ABOUT = (
    "<h1>SheepRLHF demo</h1><p>One prompt, every checkpoint's answer. The models run on the machine that serves this "
    "page; they can be wrong, and what you type stays there.</p>"
)
_TABS = {SUMMARISE: ("Summarise", "Text", "Summarise"), ASK: ("Question answering", "Question", "Ask")}
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def build_page(
    panels: list[Panel], *, scored: str | None, runs: Sequence[str] = (), max_new_tokens: int = 128
) -> gr.Blocks:
    """The page: a tab for each panel, one for the report of `runs`; `scored` names the reward model, if any."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as page:
        gr.HTML(_ABOUT, elem_id="title")
        with gr.Accordion("Settings", open=False, render=False) as settings:
            inputs = _settings(max_new_tokens)
        with gr.Tabs():
            for panel in panels:
                with gr.Tab(_TABS[panel.kind][0], id=panel.kind):
                    _tab(panel, inputs, scored)
            if runs:
                with gr.Tab("Runs", id="runs") as tab:
                    report = gr.HTML()
                tab.select(lambda: report_frame(runs), outputs=report, show_progress="hidden", **_PRIVATE)
        settings.render()
    page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
    return page


def report_frame(runs: Sequence[str]) -> str:
    """The report of the runs as they are now, as a frame in which nothing can run."""
    page = html.escape(page_of_runs(list(runs)))
    return f'<iframe title="Report" sandbox="" style="width:100%;height:80vh;border:0" srcdoc="{page}"></iframe>'


def _settings(max_new_tokens: int) -> list[gr.Component]:
    with gr.Row():
        temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 takes the likeliest token")
        top_p = gr.Slider(0.05, 1, 1.0, step=0.05, label="Top-p", info="likeliest tokens of this probability")
        top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="the k likeliest tokens; 0 is all")
    with gr.Row():
        length = gr.Slider(1, MAX_NEW_TOKENS, max_new_tokens, step=1, label="Longest answer", info="tokens")
        seed = gr.Number(42, label="Seed", info="the same seed gives the same answers", precision=0, minimum=0)
    return [temperature, top_p, top_k, length, seed]


def _tab(panel: Panel, settings: list[gr.Component], scored: str | None) -> None:
    _, label, verb = _TABS[panel.kind]
    start = panel.start()
    histories = gr.State(start.histories)
    prompt = gr.Textbox(
        label=label,
        lines=5 if panel.kind == SUMMARISE else 2,
        max_lines=14,
        max_length=MAX_CHARS,
        placeholder=panel.generators[0].form.example,
        elem_id=f"{panel.kind}-prompt",
    )
    with gr.Row():
        size: dict[str, Any] = {"size": "md", "min_width": 60}
        go = gr.Button(verb, variant="primary", elem_id=f"{panel.kind}-go", **size)
        stop = gr.Button("Stop", elem_id=f"{panel.kind}-stop", **size)
        example = gr.Button("Example", elem_id=f"{panel.kind}-example", **size)
        new = gr.Button("New", elem_id=f"{panel.kind}-new", visible=panel.kind == ASK, **size)
    status = gr.Textbox(
        show_label=False, container=False, interactive=False, elem_id=f"{panel.kind}-status", elem_classes=["status"]
    )
    answers, scores = [], []
    with gr.Row(elem_classes=["answers"], equal_height=True):
        for index, (name, generator) in enumerate(zip(panel.names, panel.generators, strict=True)):
            with gr.Column(min_width=280):
                answers.append(
                    gr.Textbox(
                        label=name,
                        info=f"takes {generator.form.meaning}",
                        lines=6,
                        max_lines=24,
                        interactive=False,
                        buttons=["copy"],
                        elem_id=f"{panel.kind}-answer-{index}",
                        elem_classes=["answer"],
                    )
                )
                scores.append(
                    gr.Textbox(
                        label=f"Score by {scored}",
                        lines=1,
                        interactive=False,
                        visible=scored is not None,
                        elem_id=f"{panel.kind}-score-{index}",
                    )
                )
    outputs = [status, histories, *answers, *scores]
    asked = go.click(_answers(panel), [prompt, histories, *settings], outputs, show_progress="hidden", **_PRIVATE)
    stop.click(None, cancels=[asked], **_PRIVATE)
    example.click(lambda: panel.generators[0].form.example, outputs=prompt, **_PRIVATE)
    new.click(lambda: _shown(panel, panel.start()), outputs=outputs, **_PRIVATE)


def _answers(panel: Panel) -> Callable[..., Iterator[list[Any]]]:
    def answers(prompt: str, histories: list[History], *settings: Any) -> Iterator[list[Any]]:
        for state in panel.answer(prompt, histories, Settings(*settings)):
            yield _shown(panel, state)

    return answers


def _shown(panel: Panel, state: State) -> list[Any]:
    texts = [
        transcript(history, turns=panel.kind == ASK and generator.form.turns)
        for history, generator in zip(state.histories, panel.generators, strict=True)
    ]
    return [state.status, state.histories, *texts, *state.scores]
