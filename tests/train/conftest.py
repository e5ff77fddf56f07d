"""One training that several modules compare with."""

from __future__ import annotations

import pytest

from lazycompress.integrations.digits.model import load_bundled
from lazycompress.runtime import LazyModel

from .quick import QUICK, learn


@pytest.fixture(scope="module")
def whole() -> LazyModel:
    """Learned in one go, by one process, in full precision."""
    return learn(load_bundled(), QUICK)
