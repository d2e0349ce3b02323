"""Which Ray a command uses, what it says of others, and who can reach it."""

import ipaddress
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from deltaray.recipe.recipe import Cluster
from deltaray.runtime import session
from deltaray.runtime.localhost import keep_token
from deltaray.runtime.session import Capacity, address_of, declared_capacity, init_ray, joins_cluster, which_ray


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No other Ray is named; where the address of one would stand."""
    for name in ("RAY_ADDRESS", session.JOB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
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


# --- who can reach it -------------------------------------------------------------------------------------------
OWN_RAY = """
import json, psutil, ray, subprocess, sys
from deltaray.runtime.session import init_ray

init_ray({"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 128 * 2**20})
ray.get(ray.remote(lambda: 1).remote())
here = {process.pid: process for process in (psutil.Process(), *psutil.Process().children(recursive=True))}
listening = {}
for it in psutil.net_connections("inet"):
    if it.status == psutil.CONN_LISTEN and it.pid in here:
        listening.setdefault(here[it.pid].name(), []).append(it.laddr.ip)
join = "import sys, ray; from deltaray.runtime.session import init_ray; init_ray({'address': sys.argv[1]}); "
join += "print(ray.cluster_resources()['CPU'])"
address = ray.get_runtime_context().gcs_address
joined = subprocess.run([sys.executable, "-c", join, address], capture_output=True, text=True, timeout=60).stdout
print(json.dumps([listening, ray.nodes()[0]["NodeManagerAddress"], address, joined]))
ray.shutdown()
"""


def test_a_ray_of_ones_own_listens_on_localhost_only_and_can_be_joined_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head, node process, agents, workers and the driver."""
    monkeypatch.delenv("RAY_TMPDIR")  # the paths of its sockets may not be long
    done = subprocess.run([sys.executable, "-c", OWN_RAY], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    listening, node, address, joined = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= listening.keys() and len(listening) >= 4, listening
    for name, addresses in listening.items():
        for at in map(ipaddress.ip_address, addresses):
            assert (getattr(at, "ipv4_mapped", None) or at).is_loopback, (name, at)
    assert node == "127.0.0.1" and address.startswith("127.0.0.1:") and joined.strip() == "2.0"


def test_the_token_is_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    kept, path = os.umask(0), tmp_path / ".ray" / "auth_token"
    try:
        keep_token()
    finally:
        os.umask(kept)
    token = path.read_text()
    assert len(token) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)  # as Ray leaves it
    keep_token()
    assert path.read_text() == token and stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    keep_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
