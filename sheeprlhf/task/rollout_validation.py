"""What a policy answers to held-out prompts, and whether it still writes like the data."""

import math
from itertools import pairwise

from torch import nn

from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.step import evaluate
from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.collector import Collector
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.task.train.sft import sft_loss
from sheeprlhf.utils.lightning import Fabric

NUMBER = (1 << 32) - 1  # of the validation's rollout: it samples with numbers that no rollout of training has
_FAR = 1.5  # times the first perplexity of the data's own responses, before a warning
_NEGATIVE = -1.0  # nats of KL a response, which sampling alone does not make


class HeldOut:
    """Answers the same held-out prompts with the same random numbers at every validation.

    Args:
        fabric: where it runs.
        run: the run.
        collect: samples and scores.
        module: the policy, set up.
        rows: the prompts, with the dataset's own responses where it has some.
    """

    def __init__(self, fabric: Fabric, run: Run, collect: Collector, module: nn.Module, rows: TokenizedSplit) -> None:
        task = run.cfg.task
        assert isinstance(task, OnlineTaskConfig)
        self._fabric, self._run, self._collect, self._module, self._rows = fabric, run, collect, module, rows
        self._task = task
        asked = len(rows) if task.eval_iters is None else task.eval_iters * task.mini_batch_size
        self._count = min(len(rows), asked)
        self._first: dict[str, float] = {}

    def __call__(self, step: int) -> dict[str, float]:
        """All ranks: the figures, for the log; a sample table goes to the run's records.

        "objective" is what training maximises, score - price * KL; "perplexity" is that of the dataset's own
        responses, where every row has one; "distinct_2" the share of different pairs of words among all that were
        written.
        """
        rollout = self._collect(self._rows.examples(range(self._count)), NUMBER, group=1, validates=True)
        result = {name.partition("/")[2]: value for name, value in self._collect.figures.items()}
        result["objective"] = result["scores"] - self._task.kl_price() * result["kl"]
        texts = self._collect.texts
        result["distinct_2"] = distinct_pairs(texts.responses)
        if not self._rows.unanswered:
            micro_batches = self._collect.tokens.first(self._rows, self._count, "validating")
            nll = evaluate(self._fabric, self._module, micro_batches, sft_loss)["nll"]
            result["perplexity"] = math.exp(min(nll, 700.0))
        if self._task.num_sample_prompts:
            self._run.log_text("samples", sample_table(rollout, texts, self._task.num_sample_prompts), step)
        self._warn(result)
        return result

    def _warn(self, result: dict[str, float]) -> None:
        """Say what usually causes what should not be."""
        self._first = self._first or result
        if result["kl"] < _NEGATIVE:
            self._run.say(
                f"warning: the KL divergence is estimated as {result['kl']:.1f} nats a response, and it is never "
                "negative: responses were not sampled from the policy alone (generation.*, a bug in the model's cache)"
            )
        first, perplexity = (of.get("perplexity", 0.0) for of in (self._first, result))
        if result["scores"] > self._first["scores"] and perplexity > _FAR * first:
            self._run.say(
                f"warning: scores rise and the data's own responses become unlikely (perplexity {first:.1f} -> "
                f"{perplexity:.1f}): the policy may be finding what the reward overlooks; look at samples/, raise "
                "task.init_kl_coeff (task.beta) or lower the learning rate"
            )


def distinct_pairs(texts: list[str]) -> float:
    """The share of different ones among all pairs of neighbouring words; 0.0 if there is none."""
    pairs = [pair for text in texts for words in [text.split()] for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def sample_table(rollout: Rollout, texts: Texts, num_rows: int) -> str:
    """Prompt, response, score and KL of the first rows, and the dataset's own responses if given, for people."""
    references = texts.columns.get("reference")
    blocks = []
    for row in range(min(num_rows, len(rollout))):
        kl = float((rollout.tokens["logprobs"][row] - rollout.tokens["reference"][row]).sum())
        cut = "" if texts.finished[row] else ", cut"
        blocks.append(
            f"[prompt]\n{texts.prompts[row]}\n[model] score {rollout.scores[row, 0]:.3f}, KL {kl:.2f}{cut}\n"
            f"{texts.responses[row]}\n" + ("" if references is None else f"[reference]\n{references[row]}\n")
        )
    return "\n".join(blocks)
