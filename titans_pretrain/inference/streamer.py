"""Text printed while its tokens come; a token costs the same after any number of them."""

from collections.abc import Sequence
from typing import Any

_KEPT = 8  # tokens that stay as context of the next ones' text
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Streamer:
    """Prints what tokens decode to, each character once it is certain.

    It is a streamer of transformers' ``generate``, which gives it the prompt first.

    Args:
        tokenizer: of transformers.
        tokens: what the printed text begins with.
        hidden: first characters of it that are not printed.

    Attributes:
        text: what was printed.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[int], hidden: int = 0) -> None:
        self._tokenizer, self._tokens, self._told = tokenizer, list(tokens), ""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._control = {number for number, token in added.items() if token.special}
        self._prompt_comes = True
        self.text = ""
        self._tell(self._decode(tokens)[hidden:])
        self._trim()

    def put(self, value: Any) -> None:
        """Take a tensor of tokens; the first call's are known already."""
        if self._prompt_comes:
            self._prompt_comes = False
            return
        self.add(value.flatten().tolist())

    def add(self, tokens: Sequence[int]) -> None:
        """Print what tokens add, as far as later ones cannot change it."""
        self._tokens += tokens
        if self._is_open(self._tokens[-1]):
            return
        text = self._decode(self._tokens)
        if not text.endswith(_UNFINISHED):
            self._tell(text[len(self._told) :])
            self._trim()

    def end(self) -> None:
        """Print what was still uncertain, and a line's end."""
        self._tell(self._decode(self._tokens)[len(self._told) :])
        self._tokens, self._told = [], ""
        print(flush=True)

    def _tell(self, text: str) -> None:
        self.text += text
        print(text, end="", flush=True)

    def _trim(self) -> None:
        """Forget tokens on which the next ones' text does not depend."""
        first = max(len(self._tokens) - _KEPT, 0)
        while first and self._is_open(self._tokens[first]):
            first -= 1
        told = self._decode(self._tokens[first:])
        if told:  # else a space in front of the next token would count as the text's first
            self._tokens = self._tokens[first:]
        self._told = told or self._decode(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _is_open(self, token: int) -> bool:
        """Whether a token is a byte that others complete, or shows nothing between such."""
        if token in self._control:
            return True
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        return len(piece) == 6 and piece.startswith("<0x")
