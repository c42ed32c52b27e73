"""A rollout: prompts, the responses that the policy sampled after them, and what was found out about each token.

```
             prompt         response (its end token is one)
tokens       p  p  p        a  b  EOS
head reads         ^        ^  ^           the place before each token: there the policy predicts it and the critic
                                           says what is still to come
logprobs                    0  1  2        of the response's tokens; reference, values, advantages and returns alike
rewards                     .  .  score    the score lands on the last token, an end token or the one it was cut at
```

Arrays of tokens have one number for each token of a row's responses, response after response, as the targets of a
batch of those rows have them. No padding is stored, and what is not a token of a response has no place.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sheeprlhf.data.example import Example


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Immutable; `with_tokens` gives a new one. The same on all ranks.

    Attributes:
        rows: a prompt with its sampled responses each.
        scores: (rows, K) float64, what each response is worth.
        finished: (rows, K) bool, whether an end token or a stop string ended it; else it was cut.
        tokens: by name, for each row the numbers of its responses' tokens, float32.
    """

    rows: tuple[Example, ...]
    scores: np.ndarray
    finished: np.ndarray
    tokens: dict[str, tuple[np.ndarray, ...]]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens that are computed for each."""
        return np.array([row.num_tokens() for row in self.rows])

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of every response, end token included, in the order of the token arrays."""
        return [len(response) for row in self.rows for response in row.responses]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Some rows, as a batch is made of them."""
        return [self.rows[index] for index in indices]

    def flat(self, name: str) -> Tensor:
        """(N,) the numbers of all responses' tokens, end to end."""
        return torch.from_numpy(np.concatenate(self.tokens[name]))

    def with_tokens(self, **values_N: Tensor) -> "Rollout":
        """The rollout with more numbers for each token, given end to end."""
        borders = np.cumsum([sum(map(len, row.responses)) for row in self.rows])[:-1]
        new = {
            name: tuple(np.split(values.detach().float().cpu().numpy(), borders)) for name, values in values_N.items()
        }
        return dataclasses.replace(self, tokens=self.tokens | new)


def columns(rollout: Rollout, part: list[int], names: Sequence[str]) -> dict[str, Tensor]:
    """(N,) numbers of some rows' tokens by name, in the order of the targets of a batch of those rows."""
    return {name: torch.from_numpy(np.concatenate([rollout.tokens[name][i] for i in part])) for name in names}
