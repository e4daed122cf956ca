"""Where a rank stands at this moment, for whoever finds that a step takes too long. No torch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Place:
    """What a rank is doing.

    Attributes:
        phase: such as ``"starting"``, ``"forward"``, ``"backward"``, ``"saving"``.
        step: the optimizer step under way, from 1; 0 before the first.
        micro_batch: its micro-batch, None outside forward and backward.
        layer: the block it is in, or the place in the model it waits at; empty outside forward.
        waiting_on: the rank it waits for, None when it does not.
        since: ``time.monotonic`` of the last change.
    """

    phase: str = "starting"
    step: int = 0
    micro_batch: int | None = None
    layer: str = ""
    waiting_on: int | None = None
    since: float = 0.0

    def __str__(self) -> str:
        told = f"{self.phase}, step {self.step}"
        if self.micro_batch is not None:
            told += f", micro-batch {self.micro_batch}"
        if self.waiting_on is not None:
            return f"{told}, waits for rank {self.waiting_on} at {self.layer}"
        return f"{told}, {self.layer}" if self.layer else told

    def as_json(self) -> dict[str, object]:
        """All fields but the clock's."""
        return {name: value for name, value in asdict(self).items() if name != "since"}


class Whereabouts:
    """The current place; written by the rank's main thread, read by its watch.

    Attributes:
        awaited: the message a device waits for while its host goes on, and its sender; or None.
    """

    def __init__(self) -> None:
        self._place = Place(since=time.monotonic())
        self.awaited: Callable[[], tuple[str, int] | None] = lambda: None

    @property
    def place(self) -> Place:
        """The newest one; replaced whole, so that a reader needs no lock."""
        place = self._place
        message = self.awaited() if place.waiting_on is None else None
        if message is None:
            return place
        return replace(place, layer=message[0], waiting_on=message[1])

    def enter(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        """Begin a phase."""
        step = self._place.step if step is None else step
        self._place = Place(phase, step, micro_batch, since=time.monotonic())

    def at(self, layer: str) -> None:
        """The rank begins a block, in the phase it is in."""
        self._place = replace(self._place, layer=layer, since=time.monotonic())

    @contextlib.contextmanager
    def waiting(self, layer: str, rank: int) -> Iterator[None]:
        """While a message of another rank is awaited."""
        before = self._place
        self._place = replace(before, layer=layer, waiting_on=rank, since=time.monotonic())
        yield
        self._place = replace(before, since=time.monotonic())
