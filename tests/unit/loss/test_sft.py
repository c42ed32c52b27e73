"""Cross-entropy against hand-computed numbers."""

import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.loss.sft import cross_entropy


def test_plain_loss_is_minus_the_logprob() -> None:
    assert_close(cross_entropy(torch.tensor([-0.5, -2.0])), torch.tensor([0.5, 2.0]))


def test_label_smoothing_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): log p = (-0.693147, -1.386294, -1.386294), mean -1.155245; e = 0.1, target 0:
    # 0.9 * 0.693147 + 0.1 * 1.155245 = 0.739357
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log()
    loss = cross_entropy(logprobs[:1], logprobs.mean()[None], label_smoothing=0.1)
    assert_close(loss, torch.tensor([0.739357]), rtol=0, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logprobs[None], torch.tensor([0]), label_smoothing=0.1)
    assert_close(loss[0], expected, rtol=0, atol=1e-6)


def test_smoothing_without_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_logprobs_N"):
        cross_entropy(torch.zeros(1), label_smoothing=0.1)
