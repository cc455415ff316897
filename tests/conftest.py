"""What every test can count on: an API server, Hypothesis profiles, and one printed seed for whatever it samples.

`make test` is the same run each time: Hypothesis derives its examples from the test itself and the seed is 0 unless
told otherwise. `make test-all` draws a seed; `--seed` repeats it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.api_server import ApiServer

# No deadlines: machines are shared and nothing here is timed. No database: a run leaves nothing behind.
settings.register_profile("sample", derandomize=True, deadline=None, database=None, max_examples=100)
settings.register_profile(
    "exhaustive",
    deadline=None,
    database=None,
    max_examples=2_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sample")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allow-writes", action="store_true", help="let tests marked hardware change GPUs that are empty")
    parser.addoption("--seed", default="0", help="seed of sampled tests: a number, or `random` to draw one")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Settled here, before xdist copies the options to its workers and before Hypothesis reads its own.
    if config.option.seed == "random":
        config.option.seed = str(random.SystemRandom().randrange(1, 2**31))
    if config.option.seed != "0" and not config.option.hypothesis_seed:
        config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (repeat this run with --seed={config.option.seed})"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed: tests that try a sample of a long list choose it with this."""
    return int(request.config.option.seed)


@pytest.fixture(scope="session")
def control_plane_api() -> Iterator[ApiServer]:
    """etcd and kube-apiserver with the project's kinds; one per worker, so tests keep to their own names."""
    with ApiServer() as server:
        yield server
