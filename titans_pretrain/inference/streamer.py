"""Text printed while its tokens come; a token costs the same after any number of them."""

import codecs
from collections.abc import Sequence
from typing import Any

from titans_pretrain.inference.token_stream import BYTE_PIECES

_KEPT = 8  # tokens that stay as context of the next ones' text
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: so many tokens may spell it


class Streamer:
    """Prints what tokens decode to, each character once it is there.

    It is a streamer of transformers' ``generate``, which gives it the prompt first. What is printed
    is what the tokenizer decodes all tokens to, with one exception: of bytes side by side, the
    characters before one that fits nowhere stay, where the tokenizer would take them back.

    Args:
        tokenizer: of transformers.
        tokens: what the printed text begins with.
        hidden: first characters of it that are not printed.

    Attributes:
        text: what was printed.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[int], hidden: int = 0) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._control = {number for number, token in added.items() if token.special}
        self._bytes = self._byte_tokens()
        self._context: list[int] = []
        self._waiting: list[int] = []
        self._run: _ByteRun | None = None
        self._prompt_comes = True
        self.text = ""
        self._tell(self._decode(tokens)[hidden:])
        self._keep([token for token in tokens if token not in self._control])

    def put(self, value: Any) -> None:
        """Take a tensor of tokens; the first call's are known already."""
        if self._prompt_comes:
            self._prompt_comes = False
            return
        self.add(value.flatten().tolist())

    def add(self, tokens: Sequence[int]) -> None:
        """Print what tokens add, but for a character of which a part is missing."""
        for token in tokens:
            if token in self._control:
                continue
            if token in self._bytes:
                self._add_byte(token)
            else:
                self._add_piece(token)

    def end(self) -> None:
        """Print what was not whole, and a line's end."""
        self._end_run()
        self._end_pieces()
        self._context = []
        print(flush=True)

    def _add_byte(self, token: int) -> None:
        if self._run is None:
            self._end_pieces()
            self._run = _ByteRun()
        text = self._run.add(self._bytes[token])
        if text == " " and not self._context:
            text = self._decode([token])  # the first space of a text may be dropped
        self._tell(text)
        self._keep([token])

    def _add_piece(self, token: int) -> None:
        self._end_run()
        self._waiting.append(token)
        text = self._text_behind_context(self._waiting)
        if self._bytes or not text.endswith(_UNFINISHED):  # with byte tokens, pieces are whole
            self._end_pieces()
        elif len(self._waiting) == _BYTES:
            # characters begun in the first token are whole; each took one place before, too
            first = self._waiting.pop(0)
            self._tell(text[: len(self._text_behind_context([first]))])
            self._keep([first])

    def _end_run(self) -> None:
        if self._run is not None:
            self._tell(self._run.end())
        self._run = None

    def _end_pieces(self) -> None:
        if self._waiting:
            self._tell(self._text_behind_context(self._waiting))
            self._keep(self._waiting)
        self._waiting = []

    def _text_behind_context(self, tokens: Sequence[int]) -> str:
        return self._decode([*self._context, *tokens])[len(self._decode(self._context)) :]

    def _tell(self, text: str) -> None:
        self.text += text
        if text:
            print(text, end="", flush=True)

    def _keep(self, tokens: Sequence[int]) -> None:
        """Remember as context what the next tokens' text depends on."""
        self._context = [*self._context, *tokens][-_KEPT:]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _byte_tokens(self) -> dict[int, int]:
        """Token to byte, of a tokenizer that spells with bytes what it has no piece for."""
        pieces = list(BYTE_PIECES)
        ids = self._tokenizer.convert_tokens_to_ids(pieces)
        if None in ids or self._tokenizer.convert_ids_to_tokens(ids) != pieces:
            return {}
        spelt = self._decode([ids[ord("A")]]) == "A"
        return {token: value for value, token in enumerate(ids)} if spelt else {}


class _ByteRun:
    """Bytes side by side: UTF-8, until one of them fits nowhere; from there on none is text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._waiting = 0
        self._broken = False

    def add(self, value: int) -> str:
        """What a byte makes certain."""
        self._waiting += 1
        text = ""
        if not self._broken:
            try:
                text = self._decoder.decode(bytes([value]))
            except UnicodeDecodeError:
                self._broken = True
        text = self.end() if self._broken else text
        self._waiting = 0 if text else self._waiting
        return text

    def end(self) -> str:
        """A replacement for each byte of a character that is not whole."""
        return _UNFINISHED * self._waiting
