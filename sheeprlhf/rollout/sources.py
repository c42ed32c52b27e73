"""Interfaces of what samples in place of the training processes, or with their sampler several times for a response.

`rollout=vllm` has servers, `rollout.environment` episodes. The classes that implement them are named by the option
classes (`RolloutSourceConfig.source`) and imported only where they are used.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sheeprlhf.data.example import Example
from sheeprlhf.rollout.sampler import Sampled


class ServerSource(Protocol):
    """Servers that get the policy's weights and sample. All ranks call the methods."""

    staleness: int  # rollouts that were learnt from since the weights of the newest one were written
    was_pending: bool  # the newest rollout was sampled before it was asked for
    speeds: dict[str, float]  # metrics of the newest rollout: tokens per second of each server

    def write_weights(self) -> None:
        """Write the weights that the next rollout is sampled with, as a new version."""

    def sample(self, prompts: Sequence[np.ndarray], uniforms: np.ndarray, number: int | None = None) -> list[Sampled]:
        """Return the responses to every prompt; rollout `number` may be pending, and is kept. Raises SheepError."""

    def has(self, prompts: Sequence[np.ndarray], uniforms: np.ndarray, number: int, weights_of: int) -> bool:
        """Return whether a rollout is pending, with the weights before the updates of rollout `weights_of` or older."""

    def sample_ahead(self, later: Mapping[int, tuple[Sequence[np.ndarray], np.ndarray]], weights_of: int) -> None:
        """Sample later rollouts in the background, which are pending until `sample` takes them."""

    def restore(self, first: int) -> None:
        """Before the first rollout, `first`, of this process: take those that a stopped process has sampled."""

    def saving(self, following: int) -> AbstractContextManager[None]:
        """Around the writing of a checkpoint, from which a run goes on with rollout `following`."""

    def check(self, tokens: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
        """Compare log-probabilities by the servers ("sampled") and the trainer ("logprobs"); return metrics."""

    def finish(self) -> None:
        """After the last rollout: remove what was written for the servers, and the rollouts."""


@dataclass
class Episode:
    """A response of several turns.

    Attributes:
        ids: its tokens.
        trained: for each, whether the model sampled it.
        logprobs: of the sampled tokens.
        reward: sum of the environment's rewards; 0 if it failed.
        turns: messages of the model.
        calls: tool calls, those that cannot be read included.
        invalid: those that cannot be read.
        error: why it failed; None if it did not.
        answer: text of its last message.
        finished: it ended with a message without a call, or the environment ended it; else it was cut.
    """

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0
    turns: int = 0
    calls: int = 0
    invalid: int = 0
    error: str | None = None
    answer: str = ""
    finished: bool = False

    def add(self, ids: Sequence[int], *, sampled: bool) -> None:
        """Append tokens."""
        self.ids += ids
        self.trained += [sampled] * len(ids)


def sampled_of(episodes: Sequence[Episode]) -> Sampled:
    """Return the episodes of one prompt as its responses."""
    return Sampled(
        tuple(np.array(one.ids, dtype=np.int32) for one in episodes),
        tuple(np.array(one.logprobs, dtype=np.float32) for one in episodes),
        tuple(one.finished for one in episodes),
    )


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return means over episodes: rewards, turns, calls, and the shares that failed or called wrongly; none without."""
    if not episodes:
        return {}
    count = len(episodes)
    return {
        "env/reward": sum(one.reward for one in episodes) / count,
        "env/turns": sum(one.turns for one in episodes) / count,
        "env/calls": sum(one.calls for one in episodes) / count,
        "env/invalid_calls": sum(one.invalid for one in episodes) / count,
        "env/failed": sum(one.error is not None for one in episodes) / count,
    }


class EpisodeSource(Protocol):
    """Samples responses of several turns."""

    def __call__(
        self,
        sample: Callable[..., list[Sampled]],
        prompts: Sequence[Example],
        uniforms_PKN: np.ndarray,
        progress: Callable[[int], object],
    ) -> list[list[Episode]]:
        """Return K episodes of each prompt; `sample` is called with prompts, random numbers and `limits`."""
