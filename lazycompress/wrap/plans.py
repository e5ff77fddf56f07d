"""Plans as files: `plan.json` as `lazycompress.save` writes it, or `{"timesteps": [...], "computes": [...], "order": 2}`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError
from ..files import checked, read_object
from ..gates_file import Finite
from ..lazy.store import CALLS, Weights
from ..plan.plan import Plan, stream_of

_Streams = list[Annotated[int, Field(ge=0, le=64)]]


class _File(BaseModel):
    """What a file of a plan needs to hold; whatever else `save` writes is not for files."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    timesteps: list[Finite] = Field(min_length=1, max_length=CALLS)
    computes: list[bool]
    order: int = 2
    streams: _Streams = Field(default_factory=list)
    fitted: Weights = Field(default_factory=list, max_length=CALLS)


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        InputError: there is none that can be followed.
    """
    file = checked(read_object(path, InputError), _File, path, InputError)
    return Plan(
        tuple(file.timesteps), tuple(file.computes), file.order, tuple(file.streams), tuple(map(tuple, file.fitted))
    )


def of_all_passes(plan: Plan) -> Plan:
    """The plan of each pass of guidance in calls of their own, which a file follows for every pass alike.

    Raises:
        InputError: the passes have plans that differ.
    """
    passes = [stream_of(plan, stream) for stream in sorted(set(plan.streams))]
    if any(other != passes[0] for other in passes[1:]):
        raise InputError(
            f"a file follows one plan for all passes of guidance, and the {len(passes)} passes of this one have plans of "
            "their own: learn with guidance in one batch, or make a plan of one of them"
        )
    return passes[0]


__all__ = ["of_all_passes", "read_plan"]
