"""Strings that end a response: detect one in a growing text, and cut the text before it."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from transformers import PreTrainedTokenizerBase

from sheeprlhf.config.shell import shell_word
from sheeprlhf.utils.decoding import ResponseDecoder
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError

_MARGIN = 8  # tokens before the tail: a decoder may drop the first one's space, or begin inside a character


class StopStrings:
    """Called with a response's tokens so far, after each one: True if their text contains one of the strings.

    The text is what `decode` gives without special tokens; `text` has the space too with which a response begins. A
    string that is a special token's own text means that token. The tokens stay as they were sampled, the one that
    completed the string among them; `text` is cut.

    Args:
        strings: none of them empty; without any, nothing ever stops.
        tokenizer: of the tokens.
        as_message: the text is the content of a message, to which the chat template adds a space where it wants one.

    Raises:
        ConfigError: one of them is more than a special token's text, so that no text has it.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, as_message: bool = False) -> None:
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for string, content in product(strings, special.values()):
            if content and content in string and content != string:
                shown = dict.fromkeys(content if one == string else one for one in strings)
                raise ConfigError(
                    f"generation.stop_strings: {string!r} is more than the special token {content!r}, which no text "
                    f"shows: give {content!r} alone, {shell_word('generation.stop_strings', list(shown))}"
                )
        self._end_ids = end_token_ids(tokenizer)
        self._tokenizer = tokenizer
        self._response_text = None if as_message else ResponseDecoder(tokenizer)
        self._special = np.array(list(special), dtype=np.int64)
        self._ids = frozenset(i for i, content in special.items() if content in strings)
        self._strings = tuple(strings)
        # The newest token completed the string, and each of the others has at least a byte of it. Twice as many are
        # looked at, because some decoders write less than the tokens hold (" ." becomes ".").
        self._tail = 2 * max((len(string.encode()) for string in strings), default=0) + _MARGIN

    def __bool__(self) -> bool:
        """True if there are any."""
        return bool(self._strings)

    def __call__(self, ids: np.ndarray) -> bool:
        """True if a response ends here.

        Args:
            ids: (R,) its tokens so far, R >= 1; without those before the newest one it has not ended.
        """
        if not self._strings or int(ids[-1]) in self._ids:
            return bool(self._strings)
        written = ids[~np.isin(ids, self._special)]
        # The end alone is cheap to decode; where it seems to have a string, the whole text decides.
        return self._found(self._decode(written[-self._tail :])) >= 0 and self._found(self._decode(written)) >= 0

    def text(self, ids: np.ndarray) -> str:
        """Decode (R,) tokens without special ones and the end token, up to the first stop string, which is left out."""
        ended = len(ids) > 0 and int(ids[-1]) in self._end_ids  # it need not be a special token
        written = ids[:-1] if ended else ids
        text = self._decode(written)
        whole = text if self._response_text is None else self._response_text(written.tolist())
        space = whole.removesuffix(text) if whole.endswith(text) else ""  # that the decoder drops at a text's start
        end = self._found(text)
        return space + (text if end < 0 else text[:end])

    def _found(self, text: str) -> int:
        """Position of the first of the strings; -1 if there is none."""
        return min((place for string in self._strings if (place := text.find(string)) >= 0), default=-1)

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))
