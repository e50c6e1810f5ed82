"""Several processes that do one command together: torchrun starts them, torch.distributed joins them.

The first one runs the command. The others wait for what it asks them to take a share in (`calibration.assist`). What
one of them refuses the first one tells; a process that is gone ends them all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from .errors import LostProcessError, PrunePeakError

TIMEOUT = timedelta(hours=1)  # the others wait so long for the first one to solve, or to verify
REFUSAL = "refusal"  # the key of the store that tells the first process what another one refused

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of one command, by its number; alone it is the first of one."""

    number: int = 0
    count: int = 1
    _store: Store | None = None

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, parts: int) -> slice:
        """Which of so many parts are this process's: as many as the others', or one more, side by side."""
        return slice(parts * self.number // self.count, parts * (self.number + 1) // self.count)

    def tell(self, value: Any = None) -> Any:
        """What the first process says, to all; what others say is not heard."""
        values = [value]
        self._together(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """What every process says, in their order, to all."""
        values = [value] * self.count
        self._together(lambda: dist.all_gather_object(values, value))
        return values

    def agree(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, for all."""
        same = tensor.contiguous()
        self._together(lambda: dist.broadcast(same, src=0))
        return same

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, for the first one; nothing of use for the others."""
        total = tensor.contiguous()
        self._together(lambda: dist.reduce(total, dst=0))
        return total

    def _together(self, work: Callable[[], Any]) -> None:
        if self.count == 1:
            return
        try:
            work()
        except RuntimeError as error:  # what torch.distributed raises where a connection closes, or time is up
            if self.is_first and self._store is not None and self._store.check([REFUSAL]):
                raise PrunePeakError(self._store.get(REFUSAL).decode()) from None
            raise LostProcessError(
                f"one of the {self.count} processes is gone ({str(error).splitlines()[0]}). Whatever was finished is "
                "kept: the same command goes on from there."
            ) from None

    def refuse(self, error: PrunePeakError) -> None:
        """Leave it to the first process to tell an error."""
        assert self._store is not None
        self._store.set(REFUSAL, str(error))


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """This process among those that were joined."""
    return _current


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun has started."""
    global _current
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=TIMEOUT)
    _current = Ranks(number, count, store)
    try:
        yield _current
    finally:
        _current = ALONE
        dist.destroy_process_group()
