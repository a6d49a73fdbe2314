import pytest


@pytest.fixture(params=["reference", "chunked"])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs on any machine."""
    return request.param
