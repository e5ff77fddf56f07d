"""What `locate` gives: the branches of a model as a list that prints as a table and draws itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from .branch import Branch
from .capture import Capture
from .draw import branches_html, branches_svg, branches_table
from .locate import locate_branches


class Branches(list[Branch]):
    """Branches in the order in which they run; `print` shows them as a table, a notebook as a drawing.

    Attributes:
        title: the model's class.
        dense_macs: multiply-accumulates of the whole model per sample.
        notes: what capture had to fix.
    """

    def __init__(self, branches: Iterable[Branch], title: str, dense_macs: int, notes: Sequence[str] = ()) -> None:
        super().__init__(branches)
        self.title = title
        self.dense_macs = dense_macs
        self.notes = list(notes)

    def __str__(self) -> str:
        return branches_table(self, self.dense_macs).rstrip("\n") + "".join(f"\nnote: {note}" for note in self.notes)

    def svg(self) -> str:
        """The model as a column of blocks with its branches marked, self-contained."""
        return branches_svg(self, self.title, self.dense_macs)

    def html(self) -> str:
        """A page with the drawing, the table and the notes, self-contained."""
        return branches_html(self, self.title, self.dense_macs, self.notes)

    def _repr_html_(self) -> str:
        return self.svg()


def located(model: nn.Module, captured: Capture) -> Branches:
    """The branches of a captured model.

    Raises:
        LocateError: no residual branch with attention was found.
    """
    branches = locate_branches(captured.graph_module.graph, captured.batch)
    return Branches(branches, type(model).__name__, captured.dense_macs, captured.notes)
