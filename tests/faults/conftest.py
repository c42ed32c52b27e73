"""Fixtures of the fault tests."""

from collections.abc import Iterator

import pytest

from tests.support.jobs import JobServer


@pytest.fixture(scope="session")
def server() -> Iterator[JobServer]:
    """Starts jobs cheaply; one for all tests."""
    with JobServer() as started:
        yield started
