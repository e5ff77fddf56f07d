"""Methods of pruning: the package's own, `structured` and `magnitude`, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn

from .. import kinds
from ..errors import ComposeError
from ..graph.branch import Branch
from ..recipe import Prune
from ..sampling import Sampler


class Pruner(Protocol):
    """One method; a module, or an object."""

    def need(self, options: Prune) -> Any:
        """Whether the method can do what the options ask for. Asked before any work.

        Raises:
            ComposeError: they ask for nothing, or for what it does not do; `options.options` is the method's own to check.
            MissingExtraError: what it needs is not installed.
        """
        ...

    def prune(
        self,
        model: nn.Module,
        sampler: Sampler,
        options: Prune,
        branches: Sequence[Branch],
        linears: Mapping[fx.Node, str],
        seed: int,
        progress: bool,
    ) -> tuple[nn.Module, set[str]]:
        """Prune a copy of a model.

        Args:
            model: the dense model, to be left as it is.
            sampler: runs one denoising loop with the model it is given; see `distill.record` and `distill.finetune`.
            options: the recipe's section.
            branches: that were located in a graph of the model.
            linears: of the nodes of that graph those that are linear layers of the model, with the layers' names.
            seed: of what is drawn.
            progress: show a bar.

        Returns:
            The copy, in evaluation mode, with the inputs and outputs of the model; and the names of the layers that were
            changed.

        Raises:
            ComposeError: nothing of the model can be pruned so.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A pruner that is made of two functions."""

    need: Callable[[Prune], Any]
    prune: Callable[..., tuple[nn.Module, set[str]]]


def pruner_of(options: Prune) -> Pruner:
    """The pruner that a recipe names.

    Raises:
        ComposeError: there is none of that name; says which there are.
    """
    found: Pruner = kinds.find("pruners", options.method, ComposeError)
    missing = [name for name in ("need", "prune") if not callable(getattr(found, name, None))]
    if missing:
        raise ComposeError(f"the pruning method {options.method!r} lacks {', '.join(missing)}")
    return found
