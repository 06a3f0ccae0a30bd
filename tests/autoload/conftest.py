from __future__ import annotations

import pytest
from environments import VERSIONS, Environment, installed, python


@pytest.fixture(params=VERSIONS)
def environment(request: pytest.FixtureRequest) -> Environment:
    return installed(request.param)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    python(request.param)
    return request.param
