"""The page of `demo`: two tabs, the models' answers side by side. All text of models is shown in plain text boxes."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from sheeprlhf.apps.serve.compare import (
    ASK,
    MAX_CHARS,
    MAX_NEW_TOKENS,
    SUMMARISE,
    History,
    Panel,
    Settings,
    State,
    transcript,
)

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
_TABS = {
    SUMMARISE: ("Summarise", "Text", "Summarise"),
    ASK: ("Question answering", "Question", "Ask"),
}
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def build_page(panels: list[Panel], *, scored: str | None, max_new_tokens: int = 128) -> gr.Blocks:
    """The page.

    Args:
        panels: one a tab, of the same models.
        scored: name of the reward model, if there is one.
        max_new_tokens: initial value of the slider.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as page:
        gr.HTML(_ABOUT, elem_id="title")
        with gr.Accordion("Settings", open=False, render=False) as settings:
            inputs = _settings(max_new_tokens)
        with gr.Tabs():
            for panel in panels:
                with gr.Tab(_TABS[panel.kind][0], id=panel.kind):
                    _tab(panel, inputs, scored)
        settings.render()
    page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
    return page


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
