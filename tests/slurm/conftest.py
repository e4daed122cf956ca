"""The test cluster as a fixture; without SLURM or root these tests skip and say so.

Each worker of xdist starts a cluster of its own, on other ports and with other node names.
"""

import os
from collections.abc import Callable, Iterator

import pytest
from slurm_cluster import Cluster, ClusterError, free_cluster, missing

CLUSTERS = pytest.StashKey[list[tuple[Cluster, list[str]]]]()
"""The clusters that a test uses, each with the jobs that it had before."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Adds what the clusters know to the report of a failed test."""
    report = yield
    if report.failed:
        for cluster, before in item.stash.get(CLUSTERS, []):
            report.sections.append((f"cluster {cluster.prefix}", cluster.story(before)))
    return report


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no SLURM to test with: {reason}")
    cluster = free_cluster()
    cluster.start()
    yield cluster
    cluster.stop()


def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Makes the cluster the one that commands and launchers find, as on a login node."""
    request.node.stash.setdefault(CLUSTERS, []).append((cluster, cluster.jobs()))
    for name in set(os.environ) - set(cluster.environment):
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])


@pytest.fixture
def slurm(
    session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """A cluster of 4 idle nodes without jobs; commands of the test find it."""
    use(session_cluster, monkeypatch, request)
    yield session_cluster
    try:
        session_cluster.reset()
    except ClusterError:
        session_cluster.stop()
        session_cluster.start()


@pytest.fixture
def new_cluster(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Cluster]]:
    """Starts further clusters with settings of their own, as `Cluster` takes them.

    Commands of the test find the one started last.
    """
    if reason := missing():
        pytest.skip(f"no SLURM to test with: {reason}")
    started: list[Cluster] = []

    def start(**settings: object) -> Cluster:
        cluster = free_cluster(**settings)
        cluster.start()
        started.append(cluster)
        use(cluster, monkeypatch, request)
        return cluster

    yield start
    for cluster in started:
        cluster.stop()
