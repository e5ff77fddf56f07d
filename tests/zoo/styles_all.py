"""Every hand-written style, and the models that are no diffusion transformers."""

from __future__ import annotations

from . import styles_joint, styles_llama, styles_mlp, styles_spelling, styles_tokens, styles_vit
from .specimen import Specimen
from .styles_negative import NOT_DITS

SPECIMENS: list[Specimen] = [
    *styles_vit.SPECIMENS,
    *styles_mlp.SPECIMENS,
    *styles_llama.SPECIMENS,
    *styles_spelling.SPECIMENS,
    *styles_joint.SPECIMENS,
    *styles_tokens.SPECIMENS,
]

__all__ = ["NOT_DITS", "SPECIMENS"]
