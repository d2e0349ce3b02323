"""The store on a real S3 server, which the tests start themselves: what is visible there, and when."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from s3_server import Server, serve
from test_store import (  # noqa: F401 (the promises of every store, here with this file's fixture)
    test_a_failed_write_leaves_what_was_there,
    test_a_folder_appears_complete_and_replaces_the_one_before,
    test_a_folder_is_deleted_with_its_hidden_files,
    test_a_log_grows_by_whole_lines,
    test_definitions_do_not_mix_and_nothing_is_written_when_refused,
    test_deleting_and_moving,
    test_listings_know_sizes_and_times,
    test_reading_names_a_foreign_or_damaged_file,
    test_tables_come_back_with_the_contract_schema,
    test_unfinished_files_are_invisible,
)
from tiny_model import save_tiny

from deltaray import cli
from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import read_prompts, store_prompts
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe import dump_recipe, load_recipe

PART = 10 << 20
"""Bytes from which on pyarrow sends an object in parts."""
BIG = 2 * PART + 1000
WRITER = """
import sys
from deltaray.data.store import Store
Store(sys.argv[1]).write_bytes(sys.argv[2], bytes([int(sys.argv[3])]) * int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, serve() as running:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "word")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield running


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    server.ask("PUT", name)
    return name


@pytest.fixture
def store(server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("HOME", str(tmp_path))
    return pickle.loads(pickle.dumps(Store(server.out(bucket))))


def keys_below(server: Server, bucket: str) -> list[str]:
    return [key.removeprefix("studies/one/") for key in server.keys(bucket)]


def writer(store: Store, path: str, value: int, size: int) -> subprocess.Popen[bytes]:
    """A process that puts one object."""
    command = [sys.executable, "-c", WRITER, store.out, path, str(value), str(size)]
    interruptible = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=interruptible)


# --- atomic visibility ------------------------------------------------------------------------------------------
def test_exactly_what_is_written_is_there_and_no_folders(
    server: Server, bucket: str, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "config.json").write_text("{}")
    store.write_bytes("responses/teacher=a/part-00000.parquet", b"x")
    store.write_json("recipe.json", {})
    store.put_folder(tmp_path / "model", "students/delta")
    assert keys_below(server, bucket) == [
        "recipe.json",
        "responses/teacher=a/part-00000.parquet",
        "students/delta/.complete",
        "students/delta/sub/config.json",
    ]


@pytest.mark.parametrize("moment", ["partNumber=1", "partNumber=2", r"^POST .*/x\.parquet\?uploadId="])
def test_a_writer_killed_in_mid_put_leaves_nothing_to_see(
    server: Server, bucket: str, store: Store, moment: str
) -> None:
    store.write_bytes("pairs/x.parquet", b"before")
    with server.gate.holding(moment) as reached, writer(store, "pairs/x.parquet", 1, BIG) as process:
        assert reached.wait(60)
        process.kill()
        process.wait()
        assert store.read_bytes("pairs/x.parquet") == b"before"
        assert list(store.listing("pairs")) == ["pairs/x.parquet"]
        assert server.uploads(bucket) == ["studies/one/pairs/x.parquet"]  # a life-cycle rule's business
    deadline = time.monotonic() + (10 if "POST" in moment else 0)
    while server.uploads(bucket) and time.monotonic() < deadline:  # the dead writer's last word may still be heard
        time.sleep(0.1)
    store.write_bytes("pairs/x.parquet", b"after")
    assert store.read_bytes("pairs/x.parquet") == b"after" and keys_below(server, bucket) == ["pairs/x.parquet"]


@pytest.mark.parametrize("moment", [r"^POST .*\?uploads", "partNumber=1"])
def test_an_interrupted_writer_never_shows_a_part(server: Server, bucket: str, store: Store, moment: str) -> None:
    """pyarrow would complete an object when an exception ends the block that writes it."""
    with server.gate.holding(moment) as reached, writer(store, "pairs/x.parquet", 1, BIG) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.gate.release.set()
        assert process.wait(60) != 0
    assert keys_below(server, bucket) in ([], ["pairs/x.parquet"])
    assert not store.exists("pairs/x.parquet") or store.read_bytes("pairs/x.parquet") == b"\1" * BIG


@pytest.mark.parametrize("request_", [r"\?uploads", "partNumber=2", r"^POST .*\?uploadId="])
def test_a_refused_part_fails_the_put(server: Server, bucket: str, store: Store, request_: str) -> None:
    with server.gate.refusing(request_), pytest.raises(OSError, match=r"pairs/x\.parquet"):
        store.write_bytes("pairs/x.parquet", bytes(BIG))
    assert keys_below(server, bucket) == []


def test_readers_see_one_version_or_the_other(store: Store) -> None:
    store.write_bytes("pairs/x.parquet", bytes(PART))
    stop, seen = threading.Event(), set[bytes]()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.read_bytes("pairs/x.parquet"))

    reader = threading.Thread(target=read)
    reader.start()
    for value in (1, 2, 3):
        store.write_bytes("pairs/x.parquet", bytes([value]) * PART)
    stop.set()
    reader.join()
    assert seen <= {bytes([value]) * PART for value in range(4)}


def test_a_student_put_by_halves_does_not_count(server: Server, store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("1")
    store.put_folder(tmp_path / "model", "students/delta")
    with server.gate.refusing(r"students/delta/b\?"), pytest.raises(OSError):
        store.put_folder(tmp_path / "model", "students/delta")
    assert not store.trained("delta")
    store.put_folder(tmp_path / "model", "students/delta")
    assert store.trained("delta")


# --- many objects -----------------------------------------------------------------------------------------------
def test_thousands_of_objects_are_all_listed(server: Server, bucket: str, store: Store) -> None:
    from moto.s3.models import s3_backends

    [backend] = [region for account in s3_backends.values() for region in account.values() if bucket in region.buckets]
    names = {f"units/teacher=a=b/{shard}/{number:05d}.parquet" for shard in (0, 1) for number in range(1200)}
    for name in names:
        backend.put_object(bucket, f"studies/one/{name}", b"1")
    assert store.listing("units").keys() == names
    assert store.committed("units/teacher=a=b/1") == sorted(name for name in names if "/1/" in name)
    store.delete(sorted(names)[:20])
    assert store.listing("units").keys() == names - set(sorted(names)[:20])


# --- addresses and mistakes -------------------------------------------------------------------------------------
def test_the_endpoint_may_come_from_the_environment(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    store = Store(f"s3://{bucket}/studies/one")
    store.write_bytes("x", b"1")
    assert keys_below(server, bucket) == ["x"] and store.address("x") == f"s3://{bucket}/studies/one/x"


def test_a_missing_bucket_is_refused_and_never_made(server: Server) -> None:
    store = Store(server.out("nowhere"))
    with pytest.raises(UserError, match="there is no bucket nowhere; create it first"):
        store.check_access()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        store.write_bytes("x", b"1")
    assert "nowhere" not in server.buckets()


def test_a_server_that_does_not_answer_or_refuses(server: Server, bucket: str) -> None:
    with server.gate.refusing("HEAD"), pytest.raises(UserError, match=r"cannot be reached: .*ACCESS_DENIED"):
        Store(server.out(bucket)).check_access()
    with pytest.raises(UserError, match="cannot be reached"):
        Store("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http").check_access()


def test_a_slow_server_is_waited_for(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than the 3 s after which the AWS SDK asks again by itself, again and again."""
    store = Store(server.out(bucket))
    store.write_bytes("x", b"1")
    monkeypatch.setattr(server.gate, "delay", 4.0)
    assert store.exists("x")


def test_what_ray_train_gets_outlasts_a_server_that_refuses_also_in_its_workers(server: Server, bucket: str) -> None:
    """As they get it: pickled. Arrow's own file system gives up after three attempts then."""
    folder, storage = pickle.loads(pickle.dumps(Store(server.out(bucket)).place(".deltaray/train")))
    server.gate.away = 3
    storage.create_dir(folder)
    assert server.gate.away == 0


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://key:secret@bucket/x", r"s3://…@bucket/x holds credentials; give them in the environment"),
        ("s3://bucket/x?nonsense=1", "neither a folder nor the address of an object store"),
    ],
)
def test_addresses_that_are_refused(out: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        Store(out)
    assert "secret" not in str(told.value)


# --- a study ----------------------------------------------------------------------------------------------------
RECIPE = """\
name: remote
out: {out}
shard_size: 4
prompts: {{path: {folder}/prompts.jsonl}}
teachers:
  strong: {{model: {model}, sampling: {{samples: 2}}}}
  weak: {{model: {model}, sampling: {{temperature: 0.5}}}}
pairings:
  delta: {{chosen: strong, rejected: weak}}
student: {{model: {model}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(request: pytest.FixtureRequest, server: Server, bucket: str, tmp_path: Path) -> str:
    return str(tmp_path / "out") if getattr(request, "param", "bucket") == "folder" else server.out(bucket)


@pytest.fixture
def recipe(place: str, tmp_path: Path, model: str) -> Path:
    lines = [json.dumps({"id": str(n), "prompt": f"{n}+{n}="}) for n in range(10)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(out=place, folder=tmp_path, model=model))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command of deltaray that ends well; returns what it writes to stdout."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["deltaray", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        stdout, stderr = capfd.readouterr()
        assert not stop.value.code, stderr
        return stdout

    return run


def responses(teacher: str, ids: Iterable[int], error: str | None = None) -> pa.Table:
    row = {"sample": 0, "teacher": teacher, "text": "x", "tokens": 0, "finish_reason": "stop", "error": error}
    rows = [row | {"prompt_id": str(n), "prompt_token_ids": [], "token_ids": [], "reasoning": None} for n in ids]
    return pa.Table.from_pylist(rows, schema=RESPONSES)


@pytest.mark.parametrize("place", ["folder", "bucket"], indirect=True)
def test_status_counts_what_is_published_and_what_waits(recipe: Path, command: Callable[..., str]) -> None:
    loaded = load_recipe(recipe)
    store = Store(loaded.out)
    store.write_bytes("recipe.yaml", dump_recipe(loaded).encode())
    store_prompts(store, read_prompts(str(recipe.parent / "prompts.jsonl"), "prompts.path"), 4)
    published, waiting = Store.responses("strong"), f"{Store.units}/{Store.responses('strong')}/0123456789ab/part-00001"
    empty, broken = responses("strong", [0], "empty answer"), responses("strong", [1], "engine error: a: b")
    store.write_table(f"{published}/part-00000-a.parquet", responses("strong", [2, 3]), RESPONSES)
    store.write_table(f"{published}/part-00000-b.parquet", pa.concat_tables([empty, broken]), RESPONSES)
    store.write_table(f"{waiting}/0000000-a.parquet", responses("strong", [4]), RESPONSES)
    store.write_table(f"{waiting}/0000001-b.parquet", responses("strong", [5, 6], "empty answer"), RESPONSES)
    status = json.loads(command("status", loaded.out, "--json"))
    strong, weak = status["teachers"]
    assert (strong["teacher"], strong["done"], strong["total"]) == ("strong", 7, 20)
    assert strong["failed"] == {"empty answer": 3, "engine error": 1} and weak["failed"] == {}
    assert strong["rate"] > 0 and strong["seconds_left"] == round(13 / strong["rate"])
    assert (weak["done"], weak["rate"], weak["seconds_left"]) == (0, None, None)
    [generate] = [row for row in status["stages"] if row["stage"] == "generate"]
    assert (generate["done"], generate["total"], generate["finished"]) == (7, 30, False)
    text = command("status", loaded.out)
    assert "3 empty answer, 1 engine error" in text and "strong" in text


def test_status_and_report_refuse_what_is_no_study(server: Server, bucket: str) -> None:
    for verb in ("status", "report"):
        done = subprocess.run(
            [sys.executable, "-m", "deltaray", verb, server.out(bucket)], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("error: s3://") and "no recipe.yaml" in done.stderr


def test_a_study_lives_on_s3(recipe: Path, command: Callable[..., str]) -> None:
    """Generation (a fake engine) and pairs, then plan, status and report, on one bucket."""
    fake = [sys.executable, str(Path(__file__).parent / "fake_engine.py"), "run", str(recipe)]
    done = subprocess.run(fake, capture_output=True, text=True, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    store = Store(load_recipe(recipe).out)
    keys = store.read_tables(Store.responses("strong"), RESPONSES, ["prompt_id", "sample"]).to_pylist()
    assert sorted((row["prompt_id"], row["sample"]) for row in keys) == [(str(n), s) for n in range(10) for s in (0, 1)]
    assert not store.listing(Store.units) and len(store.committed(Store.pairs("delta"))) == 3
    assert command("report", store.out).strip() == store.address("report.html")
    assert b"remote" in store.read_bytes("report.html")
    for words in (("plan", str(recipe)), ("status", store.out)):
        finished = {row["stage"]: row["finished"] for row in json.loads(command(*words, "--json"))["stages"]}
        assert finished == {"generate": True, "pair": True, "report": True}
