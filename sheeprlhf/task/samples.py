"""Responses of the model to a few held-out prompts, for people to read."""

from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Example
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.shard import gathered
from sheeprlhf.rollout.engines import generate_responses
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.utils.lightning import Fabric


def log_samples(
    fabric: Fabric,
    run: Run,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    cfg: GenConfig,
    step: int,
) -> None:
    """All ranks; rank zero generates for the examples' prompts and logs prompt, response and reference.

    Both texts end with their end token, unless they were cut.

    The random numbers of training are untouched.
    """
    if not examples:
        return
    with gathered(policy), isolated_rng():
        if not fabric.is_global_zero:
            return
        prompts = [example.prompt_ids for example in examples]
        responses = generate_responses(policy.causal_lm(), tokenizer, prompts, cfg, with_end_token=True)
    blocks = []
    for example, response in zip(examples, responses, strict=True):
        prompt, reference = (tokenizer.decode(ids.tolist()) for ids in (example.prompt_ids, example.responses[0]))
        blocks.append(f"[prompt]\n{prompt}\n[model]\n{response}\n[reference]\n{reference}\n")
    run.log_text("samples", "\n".join(blocks), step)
