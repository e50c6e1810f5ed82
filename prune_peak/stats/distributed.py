"""Several processes that share the calibration of one command: torchrun starts them, torch.distributed joins them.

Every process runs `collect` on its share of the batches, and sums or gathers what it measured with the others, so all
hold the same statistics. Rank 0 alone runs the rest of the command, and broadcasts what to collect
(`collection.run_worker`). Rank 0 reports the errors of any process. If one process dies, all stop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ..errors import LostProcessError, PrunePeakError

TIMEOUT = timedelta(hours=1)  # the longest that rank 0 may solve or verify while the others wait
ERROR_KEY = "error"  # key of the store for the error of a process other than rank 0
Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one command, as one of them sees them; by default this process alone."""

    rank: int = 0
    world_size: int = 1
    _store: Store | None = None

    def share(self, parts: int) -> slice:
        """The contiguous share of this rank; shares differ by one part at most."""
        return slice(parts * self.rank // self.world_size, parts * (self.rank + 1) // self.world_size)

    def broadcast(self, value: Any = None) -> Any:
        """The object of rank 0, on all ranks."""
        values = [value]
        self._communicate(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks in their order, on all ranks."""
        values = [value] * self.world_size
        self._communicate(lambda: dist.all_gather_object(values, value))
        return values

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""
        if self.world_size == 1:
            return tensor
        total = tensor.cpu().contiguous()  # gloo's
        self._communicate(lambda: dist.all_reduce(total))
        return total.to(tensor.device)

    def report(self, error: PrunePeakError) -> None:
        """Leave an error for rank 0 to report."""
        assert self._store is not None
        self._store.set(ERROR_KEY, str(error))

    def _communicate(self, operation: Callable[[], Any]) -> None:
        if self.world_size == 1:
            return
        try:
            operation()
        except RuntimeError as error:  # of torch.distributed: a connection closed, or a timeout
            if self.rank == 0 and self._store is not None and self._store.check([ERROR_KEY]):
                raise PrunePeakError(self._store.get(ERROR_KEY).decode()) from None
            raise LostProcessError(
                f"one of the {self.world_size} processes ended ({str(error).splitlines()[0]}). Run the same "
                "command again; `compress` resumes after its finished blocks."
            ) from None


ALONE = ProcessGroup()
_GROUP = ContextVar("process_group", default=ALONE)
current = _GROUP.get


@contextmanager
def join_processes() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; within the context `current()` is their group."""
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    group = ProcessGroup(rank, world_size, store)
    token = _GROUP.set(group)
    try:
        yield group
    finally:
        _GROUP.reset(token)
        dist.destroy_process_group()
