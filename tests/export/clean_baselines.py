"""What users of exported baselines do: clean_checks, but for what is otherwise with them."""

from functools import cached_property
from pathlib import Path

import clean_checks
import torch
import transformers
from clean_checks import logits, same

RELEASE = int(transformers.__version__.split(".")[0])
CHECKS = clean_checks.Checks(clean_checks.CHECKS)
for name in (
    "the logits are those of training bit by bit",
    "hidden states and tuples are given on request",
):
    del CHECKS[name]
clean_checks.TOLERANCES[torch.float64] = 1e-5  # recurrences are computed in float32


class Subject(clean_checks.Subject):
    """An exported baseline; its maker's logits are ``trained``, this release's ``logits``."""

    def __init__(self, directory: Path, reference: Path) -> None:
        super().__init__(directory, reference)
        self.trained, self.logits = self.logits, logits(self.model, self.ids)

    @cached_property
    def is_computed_otherwise(self) -> bool:
        """Whether this release sums in another order than the newest: Mamba2 of transformers 4."""
        return RELEASE < 5 and "mamba2" in self.model.config.mixers


@CHECKS.add
def the_logits_are_those_of_training(it: Subject) -> None:
    if it.is_computed_otherwise:
        same(it.logits, it.trained)
    else:
        assert torch.equal(it.logits, it.trained)


@CHECKS.add
def tuples_are_given_on_request(it: Subject) -> None:
    with torch.no_grad():
        found, *_ = it.model(it.ids, use_cache=False, return_dict=False)
    assert torch.equal(found, it.logits)


@CHECKS.add
def hidden_states_are_refused(it: Subject) -> None:
    told = ""
    try:
        it.model(it.ids, output_hidden_states=True)
    except TypeError as error:
        told = str(error)
    assert "does not take output_hidden_states" in told, told
