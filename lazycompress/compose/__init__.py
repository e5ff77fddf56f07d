"""Stage 5, compose: quantization, weight compression and pruning of a lazy model, with NNCF on the flat graph."""

from __future__ import annotations
