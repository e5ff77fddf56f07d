"""Training on several processes, as `accelerate launch` starts them; without it one process does all.

Sampling runs are spread over the processes and their results gathered, so that every process goes on with the same numbers
as a single one would have.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, MissingExtraError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Group:
    """The processes that train together.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local: how many of them share this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 1

    @staticmethod
    def find() -> Group:
        """The processes that this one was started with.

        Raises:
            MissingExtraError: there are several and accelerate is not installed.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size < 2 or "LOCAL_RANK" not in os.environ:
            return Group()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "train", "training on several processes") from error
        # Without an accelerator it has to be told so, or it takes each process for the only one.
        on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if not torch.distributed.is_initialized():
            atexit.register(_leave)
        state: Any = PartialState(cpu=on_cpu)
        return Group(state.process_index, state.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def map(self, work: Sequence[Callable[[], _T]]) -> list[_T]:
        """The results of some pieces of work, in their order; each is done by one process. They must be picklable.

        Raises:
            LazyCompressError: a piece of work failed, here or in another process. Every process raises.
        """
        if self.size == 1:
            return [piece() for piece in work]
        done: list[tuple[int, _T]] = []
        failed: BaseException | None = None
        try:
            for k in range(self.rank, len(work), self.size):
                done.append((k, work[k]()))
        except Exception as error:  # the others wait for this process: they have to hear of it
            failed = error
        from accelerate.utils import gather_object

        of_all: list[tuple[list[tuple[int, _T]], str]] = gather_object([(done, str(failed) if failed else "")])
        if failed is not None:
            raise failed
        for rank, (_, message) in enumerate(of_all):
            if message:
                raise InputError(f"process {rank} of {self.size}: {message}")
        found = dict(pair for pairs, _ in of_all for pair in pairs)
        return [found[k] for k in range(len(work))]

    def same(self, value: _T) -> _T:
        """The value that the main process has."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held: list[_T] = [value]
        broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        """Until all processes are here."""
        _ = self.same(None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce

        mean: Tensor = reduce(value.detach().clone(), "mean")
        return mean


def _leave() -> None:
    """Ends the connection between the processes: those that end with it open are aborted."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
