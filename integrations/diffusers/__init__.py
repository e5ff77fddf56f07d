"""diffusers: loading models from folders."""

from __future__ import annotations

from .loading import load_denoiser

__all__ = ["load_denoiser"]
