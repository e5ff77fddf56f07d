"""The call of a pipeline is a scope, and its scheduler tells the timesteps.

Which pipeline calls, the stack says: so a denoiser may belong to many pipelines, made before or after it became lazy, each with
its own scheduler, in as many threads as there are.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...scopes import Scope

#: Runs that are remembered; more are seldom under way at once.
_MOST = 64


class PipelineCalls:
    """Finds the run of a pipeline that a call of a denoiser is made in; remembers those that are under way."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[weakref.ref[Tensor], Scope]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PipelineCalls], tuple[()]]:
        return PipelineCalls, ()

    def __call__(self, module: nn.Module) -> Scope | None:
        """The scope of the innermost call of a pipeline on the stack, or None."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            # Only the frames of such calls are looked into: looking keeps a frame's values alive for longer.
            if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
                pipeline = frame.f_locals.get("self")
                if isinstance(pipeline, DiffusionPipeline):
                    timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
                    if isinstance(timesteps, Tensor) and timesteps.numel() > 0:
                        return self._run(id(frame), timesteps)
                    return None
            frame = frame.f_back
        return None

    def _run(self, frame: int, timesteps: Tensor) -> Scope:
        with self._lock:
            known = self._runs.pop(frame, None)
            if known is None or known[0]() is not timesteps:
                # A scheduler makes new timesteps for every run: another tensor is another run, in a frame of the same address.
                known = weakref.ref(timesteps), Scope(tuple(timesteps.detach().flatten().tolist()), in_place=True)
            self._runs[frame] = known
            while len(self._runs) > _MOST:
                del self._runs[next(iter(self._runs))]
            return known[1]


def enabled_cache(module: Any) -> bool:
    """Whether one of diffusers' own caches is enabled on a module."""
    return bool(getattr(module, "is_cache_enabled", False))
