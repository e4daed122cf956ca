"""What the first step of a process must show before it counts."""

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices

if TYPE_CHECKING:
    from titans_pretrain.parallel.zero import ZeroEngine

GRADIENT_TOLERANCE = 1e-3
FIX = "use the deepspeed version in pyproject.toml; nothing was saved"
WHERE = "check of the first step"


class FirstStepProbe:
    """Follows a few parameters through the first step of the real engine.

    One that tensor ranks hold alike, and one that they split if there is such. Their reduced
    gradients must be the ranks' own gradients, taken by a hook and reduced by hand: the mean over
    data ranks, summed over sequence ranks. Ranks that hold the same part must have the same bits,
    and the step must take the gradient into Adam's moments and, where it can be seen, change the
    parameter.

    Args:
        engine: the engine.
        fresh: whether it stands at step 0, where Adam's first update can be foretold.
    """

    def __init__(self, engine: "ZeroEngine", *, fresh: bool) -> None:
        self._engine, self.fresh = engine, fresh
        self._followed = [_Followed(engine, name) for name in _names(engine)]

    def remove(self) -> None:
        """Stop following."""
        for followed in self._followed:
            followed.hook.remove()

    def check_gradient(self) -> None:
        """Of the reduced gradients.

        Raises:
            TitansError: on all ranks alike.
        """
        self.remove()
        for followed in self._followed:
            if any(devices.gather_objects(followed.is_reduced_wrong())):
                raise TitansError(
                    f"the reduced gradient of {followed.name} is not the mean over the data ranks "
                    "of the sum over the sequence ranks",
                    where=WHERE,
                    fix=FIX,
                )
        self._check_replicas("gradients")

    def check_update(self, learning_rate: float) -> None:
        """Of parameters and moments after the step.

        Raises:
            TitansError: on all ranks alike.
        """
        for followed in self._followed:
            visible = self.fresh and followed.is_visible(learning_rate)
            found = devices.gather_objects((*followed.changes(), visible, followed.moved > 0))
            changed, taken, visible, moved = (any(column) for column in zip(*found, strict=True))
            if moved and (not taken or (visible and not changed)):
                raise TitansError(
                    f"the optimizer step did not change {followed.name} though it has a gradient",
                    where=WHERE,
                    fix=FIX,
                )
        self._check_replicas("parameters")

    def _check_replicas(self, kind: str) -> None:
        """Ranks that hold the same part of a tensor must hold the same bits."""
        own = [_fingerprint(self._engine.part(kind, one.name)) for one in self._followed]
        for held in zip(*devices.gather_objects(own), strict=True):
            first: dict[Any, tuple[int, str]] = {}
            for rank, (part, digest) in enumerate(held):
                other, expected = first.setdefault(part, (rank, digest))
                if digest != expected:
                    raise TitansError(
                        f"{part[0]} differs between ranks {other} and {rank}, which hold the same "
                        "part of it",
                        where=WHERE,
                        fix=FIX,
                    )


class _Followed:
    """A parameter and what is known of it before its first step."""

    def __init__(self, engine: "ZeroEngine", name: str) -> None:
        self.name, self._engine = name, engine
        parameter = engine._parameters[name]
        self._own = torch.zeros(
            tuple(parameter.ds_shape), dtype=torch.float32, device=engine._device
        )
        self._before = engine.part("parameters", name).tensor.clone()
        self._moment = engine.part("exp_avg", name).tensor.clone()
        self.moved = 0.0
        add: Callable[[torch.Tensor], None] = self._add_own
        self.hook = parameter.register_hook(add)

    def _add_own(self, gradient: torch.Tensor) -> None:
        self._own += gradient.float()

    def is_reduced_wrong(self) -> bool:
        """Whether the gradient differs from that reduced by hand; collective.

        One that is not finite is not judged: no step is taken with it.
        """
        groups = self._engine._groups
        dist.all_reduce(self._own, group=groups.data)
        if groups.mesh.sequence > 1:
            dist.all_reduce(self._own, group=groups.sequence)
        part = self._engine.part("gradients", self.name)
        reduced = self._own / groups.mesh.data
        self.moved = float(reduced.abs().max())
        if not math.isfinite(self.moved):
            return False
        expected = reduced.flatten()[part.start : part.stop].to(part.tensor.device)
        return not bool((part.tensor - expected).abs().le(GRADIENT_TOLERANCE * self.moved).all())

    def changes(self) -> tuple[bool, bool]:
        """Whether this rank's part of the parameter, and of its moment, has changed."""
        weights = self._engine.part("parameters", self.name).tensor
        moment = self._engine.part("exp_avg", self.name).tensor
        return bool((weights != self._before).any()), bool((moment != self._moment).any())

    def is_visible(self, learning_rate: float) -> bool:
        """Whether Adam's first update, about the learning rate, exceeds the weights' spacing."""
        largest = float(self._before.abs().max()) if self._before.numel() else 0.0
        spacing = torch.finfo(torch.float32).eps * largest
        epsilon = self._engine._zero.optimizer.param_groups[0]["eps"]
        return learning_rate > 8 * spacing and self.moved > 1e3 * epsilon


def _names(engine: "ZeroEngine") -> list[str]:
    """The smallest vector (else tensor) that is split over tensor ranks, and that is not."""
    chosen = []
    for split in (False, True):
        sizes = {
            name: (len(parameter.ds_shape) != 1, parameter.ds_numel, name)
            for name, parameter in engine._parameters.items()
            if getattr(parameter, "tensor_model_parallel", False) == split
        }
        if sizes:
            chosen.append(min(sizes, key=lambda name: sizes[name]))
    return chosen


def _fingerprint(part: Any) -> tuple[Any, str]:
    """Which part of which tensor it is, and the digest of its bits."""
    bits = part.tensor.cpu().numpy().tobytes() if part.tensor.isfinite().all() else b"not finite"
    digest = hashlib.sha256(bits).hexdigest()
    return (part.name, part.start, part.stop, part.offsets), digest
