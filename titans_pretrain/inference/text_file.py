"""A text file's characters, part by part."""

import codecs

from titans_pretrain.errors import UserError


class Decoder:
    """UTF-8 in blocks of any size.

    Args:
        where: the file's name.
        read: bytes of it that came before.

    Attributes:
        read: bytes that have come.
        waiting: of these the last, which make no whole character yet.
    """

    def __init__(self, where: str, read: int = 0) -> None:
        self._where, self.read, self.waiting = where, read, b""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def text(self, block: bytes, *, final: bool = False) -> str:
        """The characters that a block completes.

        Raises:
            UserError: it is not UTF-8.
        """
        try:
            text = self._decoder.decode(block, final=final)
        except UnicodeDecodeError as error:
            at = self.read - len(self.waiting) + error.start
            raise UserError(
                f"the text is not UTF-8: byte {at:,} is {error.object[error.start]:#04x}",
                where=self._where,
                fix="convert it to UTF-8",
            ) from None
        self.read += len(block)
        self.waiting, _ = self._decoder.getstate()
        return text
