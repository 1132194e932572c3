"""The documentation's site, built once for the tests that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.site import build_site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, into which no warning went."""
    target = tmp_path_factory.mktemp("site")
    build_site(target)
    return target
