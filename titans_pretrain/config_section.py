"""What all groups of configuration keys share. No torch here."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys; unknown ones are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
