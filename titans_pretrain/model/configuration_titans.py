"""The model's configuration as Hugging Face knows it; fields and checks live in ``fields.py``."""

from typing import Any

from transformers import PretrainedConfig

from .fields import TABLE, defaults, misspelt, problems, rotary_factor, separates_documents


class TitansConfig(PretrainedConfig):
    """Configuration of a Titans model or its Transformer++ baseline.

    Every field of ``fields.FIELDS`` is an attribute; any other keyword goes to Hugging Face's
    ``PretrainedConfig``.

    Raises:
        ValueError: a value or a combination of values the model cannot have.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        *,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in TABLE}
        found = problems(given) + [problem for name in kwargs for problem in misspelt(name)]
        if found:
            raise ValueError("TitansConfig: " + "; ".join(str(problem) for problem in found))
        values = defaults() | given
        values["partial_rotary_factor"] = rotary_factor(values)
        values["memory_heads"] = values["memory_heads"] or values["num_attention_heads"]
        for name, value in values.items():
            setattr(self, name, value)
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=values["tie_word_embeddings"],
            **kwargs,
        )

    @property
    def grid(self) -> int:
        """Tokens after which a row's chunk and segment both begin anew."""
        if self.variant == "mac":
            return self.segment_length
        return 1 if self.variant == "transformer" else self.chunk_size

    @property
    def separates_documents(self) -> bool:
        """Whether the model's function depends on where documents begin."""
        return separates_documents(vars(self))
