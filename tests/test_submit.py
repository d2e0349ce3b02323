"""Verbs as Ray jobs: what travels, what is refused before anything is sent, and a real cluster that does the work."""

import json
import os
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import grpc
import psutil
import pytest
from completions_server import KEY, completion, serving
from conftest import ROOT, Finished
from job_server import JobServer, job_server
from ray._private.authentication.http_token_authentication import format_authentication_http_error
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobType
from ruamel.yaml import YAML

from deltaray import cli
from deltaray.cli.submit.client import in_our_words
from deltaray.cli.submit.command import asked_job
from deltaray.cli.submit.job import running_job
from deltaray.cli.submit.working_dir import MAX_MIB, named_files, pack
from deltaray.data.contracts import RESPONSES
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe import load_recipe, shipped_recipe
from deltaray.report import write_report
from deltaray.study.pipeline import STAGES
from deltaray.study.status import open_study

SECRET = "planted-variable-1c9e"


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server() as started:
        yield started


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In a folder of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/prompts.jsonl").write_text("".join(f'{{"prompt": "{n} + 1 ="}}\n' for n in range(40)))
    endpoint = {"url": "http://127.0.0.1:9/v1", "key_variable": "TEACHER_KEY"}
    return {
        "name": "remote",
        "out": str(tmp_path / "out"),
        "unit_size": 8,
        "prompts": {"path": "data/prompts.jsonl"},
        "teachers": {"hosted": {"model": "some/model/behind", "endpoint": endpoint}},
    }


def write(recipe: dict[str, Any]) -> str:
    YAML(typ="safe").dump(recipe, Path("study.yaml"))
    return "study.yaml"


@pytest.fixture
def token(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process speaks to that cluster; Ray reads its variables again before and after."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(server.token))
    with monkeypatch.context() as inside:
        inside.setenv("RAY_AUTH_MODE", "token")
        reset_auth_token_state()
        yield
    reset_auth_token_state()


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`deltaray submit` in this process: importing Ray takes seconds."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # the command sets it

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["deltaray", "submit", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Finished(int(str(stop.value.code)), *capfd.readouterr())

    return run


@pytest.mark.usefixtures("token")
def test_a_study_on_a_real_cluster(
    server: JobServer,
    recipe: dict[str, Any],
    submit: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sent, detached, stopped while it waits for its teacher, resumed by the same command, followed to its end."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("PLANTED", SECRET)
    at = ("--address", server.address)
    assert (server.status({}), server.status({"Authorization": "Bearer wrong"})) == (401, 403)

    asked, go_on = threading.Event(), threading.Event()

    def teacher(request: dict[str, Any], attempt: int) -> Any:
        if len(served.served) >= 16:
            asked.set()
            go_on.wait(300)
        return completion("an answer")

    with serving(teacher) as (served, url):
        recipe["teachers"]["hosted"]["endpoint"] |= {"url": url, "in_flight": 8}
        study = (write(recipe), "--verb", "generate", "--env", "TEACHER_KEY", "--env", "PLANTED")
        sent = submit(*study, "--detach", *at)
        assert sent.code == 0, sent.stderr
        job = sent.stdout.strip()
        assert asked.wait(300)
        wait_for(lambda: list(tmp_path.glob("out/.deltaray/units/**/*.parquet")))
        stopped = submit("--stop", job, *at)
        assert stopped.code == 0 and f"job {job}: stopped" in stopped.stderr
        go_on.set()
        done = submit(*study, *at)
    assert done.code == 0, done.stderr
    assert "responses to do" in done.stderr and f"job {done.stdout.strip()}: succeeded" in done.stderr
    responses = Store(str(tmp_path / "out")).read_tables(Store.responses("hosted"), RESPONSES)
    assert len(set(responses["prompt_id"].to_pylist())) == responses.num_rows == 40
    assert set(responses["text"].to_pylist()) == {"an answer"}
    assert len(served.requests) <= 40 + 16 + 8 - 8  # of 16 answers and 8 in flight a unit of 8 was kept at least

    listed = json.loads(submit("--list", "--json", *at).stdout)
    assert [(row["study"], row["verb"], row["status"]) for row in listed] == [
        ("remote", "generate", "stopped"), ("remote", "generate", "succeeded"),
    ]  # fmt: skip

    recipe["prompts"]["path"] = str(tmp_path / "nowhere.jsonl")  # absolute: only the cluster can tell
    mistaken = submit(write(recipe), "--verb", "generate", "--set", f"out={tmp_path / 'other'}", *at)
    assert mistaken.code == 2 and "prompts.path: there is no file" in mistaken.stderr, mistaken.stderr
    assert "Traceback" not in mistaken.stderr

    write_report(open_study(str(tmp_path / "out")))
    _nowhere([KEY, SECRET], [server.folder, tmp_path / "out"])
    shown = "".join(run.stdout + run.stderr for run in (sent, stopped, done, mistaken)) + json.dumps(listed)
    assert not [secret for secret in (KEY, SECRET) if secret in shown]


METHODS = {
    "gcs_server": ("NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys"),
    "raylet": (
        "NodeManagerService/RequestWorkerLease",
        "NodeManagerService/ShutdownRaylet",
        "ObjectManagerService/Pull",
    ),
    "ray::DashboardAgent": ("ReporterService/GetTraceback", "LogService/ListLogs"),
}
"""What would do harm, by the process that offers it, on one of its ports."""


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_no_process_of_a_cluster_obeys_without_its_token(server: JobServer, token: str | None) -> None:
    started = [it for it in psutil.process_iter(["name", "cmdline"]) if it.info["name"] in METHODS]
    mine = {it.pid: it.info["name"] for it in started if str(server.folder) in " ".join(_told(it))}
    heard: dict[str, set[str]] = {}
    for it in psutil.net_connections("tcp"):
        if it.status == psutil.CONN_LISTEN and it.pid in mine:
            for method in METHODS[mine[it.pid]]:
                heard.setdefault(method, set()).add(_asked(it.laddr.port, method, token))
    assert heard.keys() == {method for methods in METHODS.values() for method in methods}
    for method, said in heard.items():
        assert "UNAUTHENTICATED" in said and said <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, (method, said)


def _told(process: psutil.Process) -> list[str]:
    """Its command line, and the agents' working folder of logs, which their title hides."""
    with suppress(psutil.Error):
        return [*process.info["cmdline"], *(file.path for file in process.open_files())]
    return []


def _asked(port: int, method: str, token: str | None) -> str:
    """The status of a call; UNAVAILABLE of a port that speaks HTTP, UNIMPLEMENTED of one with other methods."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert what()


def _nowhere(secrets: list[str], folders: list[Path]) -> None:
    """No file holds a secret; Ray's own hold no variable that travelled with a job."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], file


def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What is refused without a cluster: nothing listens on port 9."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("deltaray.cli.submit.command.connect", _Reached)
    monkeypatch.setattr(sys, "argv", ["deltaray", "submit", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    stderr = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in stderr, stderr
    return stderr


class _Reached:
    """A job server that has these jobs and must get none."""

    jobs: ClassVar[list[JobDetails]] = []

    def __init__(self, address: str | None) -> None:
        pass

    def get_address(self) -> str:
        return "http://127.0.0.1:9"

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs


def test_one_job_at_a_time_works_in_an_out(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe)
    pair = asked_job(Path(path), "pair", [], False, [])
    details = {"type": JobType.SUBMISSION, "entrypoint": pair.entrypoint(), "metadata": pair.metadata()}
    over = JobDetails(submission_id="old", status=JobStatus.STOPPED, **details)
    waiting = JobDetails(submission_id="new", status=JobStatus.PENDING, **details)
    monkeypatch.setattr(_Reached, "jobs", [over, waiting])
    assert running_job(_Reached(None), pair) == "new"
    said = refused(capfd, monkeypatch, path, "--verb", "generate")
    assert f"out: {recipe['out']}: job new works there already (`pair`)" in said
    assert "--stop none: there is no such job" in refused(capfd, monkeypatch, "--stop", "none")
    assert running_job(_Reached(None), asked_job(Path(path), "pair", ["out=/elsewhere"], False, [])) is None
    monkeypatch.setattr(_Reached, "jobs", [over])
    assert running_job(_Reached(None), pair) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [(401, "the cluster asks for a token, and none is set here"), (403, "the cluster refuses this token")],
)
def test_a_missing_and_a_wrong_token(status: int, text: str) -> None:
    said = format_authentication_http_error(status, "…")
    with pytest.raises(UserError, match=f"{text}; write the cluster's token into a file"), in_our_words("http://h"):
        raise AuthenticationError(said)


def test_what_cannot_travel_is_refused_before_anything_is_sent(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe)
    assert "out: runs/x is relative" in refused(capfd, monkeypatch, path, "--set", "out=runs/x")
    assert "prompts.path: there is no data/none.jsonl here" in refused(
        capfd, monkeypatch, path, "--set", "prompts.path=data/none.jsonl"
    )
    outside = refused(capfd, monkeypatch, path, "--set", "prompts.path=data/../../prompts.jsonl")
    assert "prompts.path: data/../../prompts.jsonl lies outside of this folder" in outside
    assert "--env NOT_SET: it is not set here" in refused(capfd, monkeypatch, path, "--env", "NOT_SET")
    by_value = refused(capfd, monkeypatch, path, "--env", f"NAME={SECRET}")
    assert "--env NAME: names only" in by_value and SECRET not in by_value
    assert "--verb report: a job does one of run," in refused(capfd, monkeypatch, path, "--verb", "report")
    assert "--retry-failed: it belongs to" in refused(capfd, monkeypatch, path, "--retry-failed")
    assert "name a RECIPE, or --list or --stop ID" in refused(capfd, monkeypatch)
    with Path("data/large.jsonl").open("wb") as file:
        file.truncate((MAX_MIB + 8) * 2**20)
    large = refused(capfd, monkeypatch, path, "--set", "prompts.path=data/large.jsonl")
    assert f"prompts.path: data/large.jsonl has {MAX_MIB + 8} MiB" in large and "its absolute path" in large


@pytest.mark.parametrize("name", ["file", "chain", "folder", "inside", "deep", "recipe"])
def test_no_link_takes_along_what_lies_outside(
    name: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, here = tmp_path / "outside", tmp_path / "here"
    outside.mkdir()
    (outside / "notes.jsonl").write_text(json.dumps({"prompt": SECRET}))
    shutil.copytree(tmp_path / "data", here / "data")
    monkeypatch.chdir(here)
    model = Path("models/weak")
    (model / "more").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    recipe["teachers"]["weak"] = {"model": str(model)}
    if name in ("file", "chain"):
        Path("a").symlink_to(outside / "notes.jsonl")
        Path("b").symlink_to("a")
        recipe["prompts"]["path"] = "a" if name == "file" else "b"
    elif name == "folder":
        Path("linked").symlink_to(outside)
        recipe["prompts"]["path"] = "linked/notes.jsonl"
    elif name in ("inside", "deep"):
        (model / "notes.jsonl" if name == "inside" else model / "more" / "notes").symlink_to(outside / "notes.jsonl")
    path = Path(write(recipe))
    if name == "recipe":
        path.rename(outside / "study.yaml")
        path.symlink_to(outside / "study.yaml")
    (tmp_path / "parcel").mkdir()
    with pytest.raises(UserError, match=r"^[\w.]+: [\w/.]+ leads out of this folder, to .*/outside/.*cannot travel"):
        pack(path, load_recipe(path), tmp_path / "parcel")
    assert not [file for file in (tmp_path / "parcel").rglob("*") if file.is_file()]


def test_links_within_the_folder_travel_as_what_they_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    Path("blobs").mkdir()
    Path("blobs/1f3c").write_text("{}")
    Path("models/v2/parts").mkdir(parents=True)
    Path("models/v2/config.json").symlink_to("../../blobs/1f3c")
    Path("models/latest").symlink_to("v2")
    recipe["teachers"]["weak"] = {"model": "models/latest"}
    parcel = tmp_path / "parcel"
    parcel.mkdir()
    path = Path(write(recipe))
    pack(path, load_recipe(path), parcel)
    found = {str(file.relative_to(parcel)) for file in parcel.rglob("*") if file.is_file()}
    assert found == {"study.yaml", "data/prompts.jsonl", "models/latest/config.json"}
    assert not any(file.is_symlink() for file in parcel.rglob("*"))
    Path("models/v2/parts/up").symlink_to("..")
    with pytest.raises(UserError, match=r"models/latest/parts/up is a link to a folder that it lies in"):
        pack(path, load_recipe(path), parcel)


def test_keys_and_what_is_no_file_stay_here(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, parcel = Path("models/weak/own"), tmp_path / "parcel"
    model.mkdir(parents=True)
    parcel.mkdir()
    for name in ("config.json", ".env", ".env.production", "id_ed25519", "server.pem", "aws_credentials"):
        (model / name).write_text(SECRET if name != "config.json" else "{}")
    (model / ".ssh").mkdir()
    (model / ".ssh/config").write_text(SECRET)
    recipe["teachers"]["weak"] = {"model": str(model)}
    path = Path(write(recipe))
    pack(path, load_recipe(path), parcel)
    assert not [file for file in parcel.rglob("*") if file.is_file() and SECRET in file.read_text()]
    assert sum("does not travel with the job" in record.message for record in caplog.records) == 6
    recipe["prompts"]["path"] = str(model / ".env")
    with pytest.raises(UserError, match=r"^prompts.path: .*\.env: keys are kept under names such as .env"):
        pack(path, load_recipe(Path(write(recipe))), parcel)
    recipe["prompts"]["path"] = "data/prompts.jsonl"
    os.mkfifo(model / "queue")
    with pytest.raises(UserError, match=r"own/queue is not a file \(a socket, a pipe or a device\)"):
        pack(path, load_recipe(Path(write(recipe))), parcel)


def test_no_job_server_is_one_message(recipe: dict[str, Any], submit: Callable[..., Finished]) -> None:
    run = submit(write(recipe), "--address", "http://127.0.0.1:9")
    assert run.code == 2 and "--address http://127.0.0.1:9: no job server answers there" in run.stderr
    assert "Traceback" not in run.stderr
    assert "give the job server, such as http" in submit(write(recipe), "--address", "localhost:8265").stderr


def test_what_travels_is_what_the_recipe_names_here(recipe: dict[str, Any]) -> None:
    Path("models/weak").mkdir(parents=True)
    Path("template.jinja").write_text("")
    recipe["teachers"] |= {
        "weak": {"model": "models/weak", "chat_template": "template.jinja"},
        "hub": {"model": "owner/name"},
        "there": {"model": "/shared/models/strong"},
    }
    recipe["evaluation"] = {"tasks": {"sums": {"path": "data/prompts.jsonl"}, "other": {"path": "s3://bucket/x.jsonl"}}}
    found = dict(named_files(load_recipe(Path(write(recipe)))))
    assert set(found) == {Path("data/prompts.jsonl"), Path("models/weak"), Path("template.jinja")}


def test_the_miniature_travels_or_is_made_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    miniature = load_recipe(shipped_recipe("miniature"))
    monkeypatch.chdir(tmp_path)
    assert not dict(named_files(miniature))  # made by the job
    Path("runs/miniature-family").mkdir(parents=True)
    Path("runs/miniature-family/prompts.jsonl").write_text("")
    assert list(dict(named_files(miniature))) == [Path("runs/miniature-family/prompts.jsonl")]


@pytest.mark.parametrize("verb", ["run", *(stage for stage in STAGES if stage != "report")])
def test_there_is_a_script_for_every_stage(
    verb: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "jobs" / f"{verb}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "nowhere.yaml"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 2 and "nowhere.yaml: there is no such recipe" in capfd.readouterr().err
    assert str(script.parent) not in sys.path
