"""Document starts, from the columns at which documents begin."""

from collections.abc import Sequence

import torch
from torch import Tensor


def starts_of(rows: Sequence[Sequence[int]], time: int) -> Tensor:
    """Document starts (rows, time)."""
    columns = torch.arange(time)
    begins = torch.stack([torch.isin(columns, torch.tensor([0, *row])) for row in rows])
    return torch.where(begins, columns, 0).cummax(1).values


def begins_of(rows: Sequence[Sequence[int]], time: int) -> Tensor:
    """Bool (rows, time), True in the columns given."""
    return torch.stack([torch.isin(torch.arange(time), torch.tensor([-1, *row])) for row in rows])
