"""What, besides inputs, tokenizer and tasks, decides every byte of prepared data."""

from dataclasses import dataclass
from typing import Literal

from data_prep.sources import Columns
from data_prep.tar import MEMBER_TOKENS
from titans_pretrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything besides inputs, tokenizer and tasks that the output's bytes depend on.

    Dotted column names reach into structs and nested objects.

    Raises:
        UserError: a value out of range.
    """

    text_column: str = "text"
    """Column of the document's text."""
    id_column: str = "id"
    """Column of its identifier; may be missing."""
    prompt_column: str | None = None
    """Column of text put before the document's, on which there is no loss."""
    score_column: str = "score"
    """Column that ``min_score`` looks at."""
    language_column: str = "language"
    """Column that ``language`` looks at."""
    url_column: str = "url"
    """Column of the document's address; may be missing."""
    dump_column: str = "dump"
    """Column of the crawl it is from; may be missing."""
    min_score: float | None = None
    """Keep rows whose score is at least this."""
    language: str | None = None
    """Keep rows of this language."""
    min_characters: int | None = None
    """Keep texts of at least this many characters."""
    max_characters: int | None = None
    """Keep texts of at most this many characters."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What a row that cannot be read does: end the task, or be counted and left out."""
    held_out: float = 0.0
    """Share of the documents, by hash of the text, put into shards of their own."""
    bos: bool = False
    """Whether BOS begins every document (EOS always ends it)."""
    seed: int = 0
    """Seed of the order of units and documents."""
    shard_bytes: int = 2**29
    """A shard ends with the batch of rows that reaches this many bytes in memory.

    These are tokens, masks and what is noted of each document.
    """
    member_tokens: int = MEMBER_TOKENS
    """Tokens per tar member."""

    def __post_init__(self) -> None:
        if self.bad_rows not in ("stop", "skip"):
            raise UserError(
                f"bad_rows is {self.bad_rows!r}", where="--bad-rows", fix="use stop or skip"
            )
        if not 0 <= self.held_out < 1:
            raise UserError(
                f"a share of {self.held_out} cannot be held out",
                where="--held-out",
                fix="use a number from 0 to below 1, e.g. 0.001",
            )
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise UserError(
                f"no text has at least {low} and at most {high} characters",
                where="--min-characters",
                fix="make it at most --max-characters",
            )

    def columns(self) -> Columns:
        """The columns to read."""
        filters = {self.score_column: self.min_score, self.language_column: self.language}
        needed = tuple(name for name, value in filters.items() if value is not None)
        return Columns(
            text=self.text_column,
            id=self.id_column,
            prompt=self.prompt_column,
            needed=needed,
            score=self.score_column,
            language=self.language_column,
            url=self.url_column,
            dump=self.dump_column,
            bad_rows=self.bad_rows,
        )
