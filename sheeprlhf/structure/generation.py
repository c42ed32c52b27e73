"""Sampling options."""

from dataclasses import dataclass

from sheeprlhf.structure.option import Config, option


@dataclass(unsafe_hash=True)
class GenConfig(Config):
    """Sampling of shown texts, and of rollouts, which always sample; a model's own generation defaults never apply."""

    max_new_tokens: int = option(64, "Longest generated response.", unit="tokens", minimum=1)
    num_beams: int = option(1, "Beams of beam search; 1 is plain decoding.", minimum=1)
    do_sample: bool = option(False, "Sample; false takes the likeliest token.")
    top_k: int = option(0, "Sample among the k likeliest tokens; 0 is all.", minimum=0)
    top_p: float = option(1.0, "Sample among the likeliest tokens of this total probability.", above=0.0, maximum=1.0)
    temperature: float = option(1.0, "Divides the logits before sampling.", above=0.0)
    engine: str = option(
        "native",
        "Sampler of rollouts: this project's, or transformers' generate, whose responses also depend on the number of "
        "processes and on task.token_budget.",
        choices=("native", "hf"),
    )
    stop_strings: list[str] = option(
        help="A response ends, and counts as finished, when its text contains one of them; what is shown and scored is "
        "the text before it.",
        factory=list,
    )
