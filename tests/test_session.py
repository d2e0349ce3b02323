"""Which Ray a command uses, and what it says of others. Nothing is started."""

import socket
from pathlib import Path

import pytest

from deltaray.recipe.recipe import Cluster
from deltaray.runtime import session
from deltaray.runtime.session import Capacity, address_of, declared_capacity, init_ray, joins_cluster, which_ray


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No other Ray is named; where the address of one would stand."""
    for name in ("RAY_ADDRESS", session.JOB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def arguments(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> dict[str, object]:
    """What Ray is started with."""
    import ray

    given: dict[str, object] = {}
    monkeypatch.setattr(ray, "init", lambda **named: given.update(named))
    init_ray(session._init_arguments(cluster))
    return given


def test_a_study_has_a_ray_of_its_own_whatever_is_named_here(
    monkeypatch: pytest.MonkeyPatch, nothing_here: Path
) -> None:
    nothing_here.write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    cluster = Cluster(cpus=4)
    assert not joins_cluster(cluster) and declared_capacity(cluster).cpus == 4
    given = arguments(monkeypatch, cluster)
    assert given["address"] == "local" and given["num_cpus"] == 4


def test_an_address_is_joined_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    given = arguments(monkeypatch, Cluster(address="10.0.0.1:6379", cpus=4))
    assert given["address"] == "10.0.0.1:6379" and "num_cpus" not in given
    assert which_ray(Cluster(address="auto"), Capacity(64, 8)) == "uses the Ray cluster at auto (64 CPUs, 8 GPUs)"


def test_inside_a_ray_job_the_cluster_of_the_job_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(session.JOB_VARIABLE, "{}")
    assert address_of(Cluster()) == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    assert arguments(monkeypatch, Cluster())["address"] == "10.9.8.7:6379"


def test_it_is_said_which_ray_is_used_and_how_to_join_another(
    monkeypatch: pytest.MonkeyPatch, nothing_here: Path
) -> None:
    own = "uses its own Ray on this machine (8 CPUs)"
    assert which_ray(Cluster(), Capacity(8, 0)) == own
    nothing_here.write_text("127.0.0.1:1\n")
    assert which_ray(Cluster(), Capacity(8, 0)) == f"{own}; 127.0.0.1:1, which {nothing_here} names, does not answer"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        line = which_ray(Cluster(), Capacity(8, 0))
    assert f"another Ray runs at {address}: set cluster.address to join it" in line and "127.0.0.1:1," in line


def test_a_cluster_that_cannot_be_joined_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from deltaray.errors import UserError

    def away(**_: object) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(ray, "init", away)
    with pytest.raises(
        UserError, match=r"cluster.address: the Ray at 10.0.0.1:1 cannot be joined: ConnectionError: nob"
    ):
        session._join_or_start(Cluster(address="10.0.0.1:1"))
    with pytest.raises(ConnectionError):
        session._join_or_start(Cluster())
