"""Many machines through Ray: what the proxies add, tables, files, and a cluster of this machine whose processes die."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging.handlers
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
if importlib.util.find_spec("ray") is None:  # to import it here would settle what its clusters listen to
    pytest.skip("the extra ray is not installed", allow_module_level=True)

import psutil

from fastdiff import Engine
from fastdiff.benchmarks import killed
from fastdiff.benchmarks.server_process import REAL, server
from fastdiff.cli import main
from fastdiff.errors import ArtifactError, BackendError, PlanError
from fastdiff.images import parts_of, save_png
from fastdiff.serve import Settings
from fastdiff.serve.asgi import Guard
from fastdiff.serve.logs import JsonFormatter
from fastdiff.serve.ray import Row, Scale, Source, cluster, draw, read_table
from fastdiff.serve.ray.cluster import check, fit, last_line
from fastdiff.serve.ray.front import Answers, Whole, middlewares
from fastdiff.serve.ray.painter import Painter, is_made
from fastdiff.serve.ray.run import _deploy

EAGER = Source("digits", backend="eager")
STEPS = {"num_inference_steps": 2}


# --- the proxies ------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What a client of an ASGI application gets."""

    starts: list = field(default_factory=list)
    body: bytes = b""
    ended: bool = False

    @property
    def headers(self):
        (start,) = self.starts
        return [(name.decode(), value.decode()) for name, value in start["headers"]]

    @property
    def error(self):
        return json.loads(self.body)["error"]


def talk(app, *messages, path="/v1/images/generations", headers=()):
    heard, coming = Heard(), list(messages or [{"type": "http.request", "body": b"{}"}])

    async def receive():
        return coming.pop(0) if coming else await asyncio.Future()

    async def send(message):
        assert not heard.ended, "something after the end"
        if message["type"] == "http.response.start":
            heard.starts.append(message)
        else:
            heard.body += message.get("body", b"")
            heard.ended = not message.get("more_body", False)

    asyncio.run(app({"type": "http", "path": path, "headers": list(headers)}, receive, send))
    return heard


def says(status, body=b"", more=False, **headers):
    """An application that gives one answer."""
    listed = [[name.replace("_", "-").strip("-").encode(), value.encode()] for name, value in headers.items()]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": listed})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    return app


async def says_nothing(scope, receive, send):
    """Ray's proxy, when the replica that had the request died."""


async def breaks(scope, receive, send):
    raise ConnectionError("somewhere in the proxy")


@pytest.mark.parametrize(
    "app, code, after",
    [
        (says_nothing, "unavailable", "1"),
        (breaks, "unavailable", "1"),
        (says(500, b"ActorDiedError ...", content_type="text/plain"), "unavailable", "1"),
        (says(503, b"queue", content_type="text/plain; charset=utf-8", retry_after="1"), "busy", "1"),
        (says(503, b"no deployment", content_type="text/plain"), "unavailable", "5"),
        (says(404, b"Path not found", content_type="text/plain"), "unavailable", "5"),
    ],
    ids=["nothing", "exception", "500", "queue", "not there", "no route"],
)
def test_where_no_application_answers_clients_are_told_to_come_again(app, code, after):
    heard = talk(Answers(app), headers=[(b"x-request-id", b"mine")])
    assert heard.starts[0]["status"] == 503 and heard.ended and heard.error["code"] == code
    assert ("retry-after", after) in heard.headers and ("x-request-id", "mine") in heard.headers


def test_an_applications_answer_is_passed_on_with_one_id():
    app = says(500, b"{}", content_type="application/json", x_request_id="of Ray", x_request_id_="again")
    heard = talk(Answers(app), headers=[(b"x-request-id", b"no good\n")])
    assert heard.starts[0]["status"] == 500 and heard.body == b"{}"
    (name,) = [value for header, value in heard.headers if header == "x-request-id"]
    assert len(name) == 32, "an id that is not plain is replaced"
    plain = talk(Answers(says(200, b"# HELP", content_type="text/plain")))
    assert plain.body == b"# HELP" and plain.starts[0]["status"] == 200
    assert talk(Answers(says(404, b"ray's", content_type="text/plain")), path="/-/nothing").body == b"ray's"


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    start = b"event: image_generation.partial_image\ndata: {}\n\n"
    heard = talk(Answers(says(200, start, more=True, content_type="text/event-stream; charset=utf-8")))
    assert heard.ended and heard.body.startswith(start + b"event: error\ndata: {")
    assert b'"code": "unavailable"' in heard.body
    whole = talk(Answers(says(200, start, content_type="text/event-stream")))
    assert whole.body == start


def test_nothing_is_said_to_who_left():
    async def gone(scope, receive, send):
        await receive()

    assert talk(Answers(gone), {"type": "http.disconnect"}).starts == []


def test_a_body_is_read_and_measured_before_the_proxy_sees_the_request():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())
        await says(200, b"ok", content_type="application/json")(scope, receive, send)

    stack = Answers(Guard(Whole(app), Settings(max_body=10)))
    part = {"type": "http.request", "body": b"12345", "more_body": True}
    assert talk(stack, part, part | {"more_body": False}).body == b"ok"
    assert seen == [{"type": "http.request", "body": b"1234512345", "more_body": False}]
    for messages, headers in (((part, part, part), ()), ((part,), [(b"content-length", b"11")])):
        heard = talk(stack, *messages, headers=headers)
        assert heard.starts[0]["status"] == 413 and heard.error["code"] == "body_too_large" and heard.ended
    assert len(seen) == 1


def test_the_proxies_are_given_all_of_it_and_keep_their_logs(monkeypatch):
    """Ray asks a proxy's handlers for their file when it is ready; a closed one has none, and the start fails."""
    files = logging.handlers.MemoryHandler(1, target=logging.NullHandler())
    monkeypatch.setattr(logging.getLogger(), "handlers", [files])
    assert [middleware.cls for middleware in middlewares()] == [Whole, Guard, Answers]
    (ours,) = logging.getLogger().handlers
    assert isinstance(ours.formatter, JsonFormatter) and ours.stream is sys.__stderr__
    assert files.target is not None


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_same_table_in_every_format(tmp_path):
    import pyarrow
    from pyarrow import parquet

    found = [
        {"class_label": 3, "seed": 5, "sampler": "ddim", "name": "three", "guidance_scale": 2.0},
        {"class_label": None, "seed": None, "sampler": None, "name": None, "guidance_scale": None},
    ]
    (tmp_path / "t.csv").write_text("class_label,seed,sampler,name,guidance_scale\n3,5,ddim,three,2\n,,,,\n")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "t.parquet")
    expected = [
        Row("three", 5, {"num_inference_steps": 2, "sampler": "ddim", "class_label": 3, "guidance_scale": 2.0}),
        Row("00000001", 101, {"num_inference_steps": 2, "sampler": "ddpm"}),
    ]
    for ending in ("csv", "jsonl", "parquet"):
        usual = {"num_inference_steps": 2, "sampler": "ddpm"}
        assert read_table(tmp_path / f"t.{ending}", seed=100, usual=usual) == expected, ending


def test_text_of_a_table_is_taken_as_it_stands(tmp_path):
    (tmp_path / "t.csv").write_text('prompt,name\n"two lines,\nand a ""quote""",a\n007,b\ntrue,c\nnull,d\n"",e\n')
    prompts = [row.options["prompt"] for row in read_table(tmp_path / "t.csv")]
    assert prompts == ['two lines,\nand a "quote"', "007", "true", "null", ""]


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("t.txt", "seed\n1\n", PlanError, "a table is .csv, .jsonl, .parquet"),
        ("t.csv", "seed,lable\n1,2\n", PlanError, "column 'lable'; allowed: name, seed, class_label"),
        ("t.csv", "seed\n", PlanError, "no rows"),
        ("t.csv", "seed\n-1\n", PlanError, "row 0: seed is -1; allowed: from 0 on"),
        ("t.csv", "seed,num_inference_steps\n1,0\n", PlanError, "row 0: num_inference_steps is 0; allowed: from 1 on"),
        ("t.csv", "seed,guidance_scale\n1,nan\n", PlanError, "row 0: guidance_scale is nan"),
        ("t.csv", "class_label,prompt\n1,a\n", PlanError, "row 0: class_label and prompt; allowed: one of them"),
        ("t.csv", "seed,name\n1,a\n2,a\n", PlanError, "row 1: name a is that of row 0 too"),
        ("t.csv", "seed,name\n1,../a\n", PlanError, "row 0: name '../a'; allowed"),
        ("t.csv", "seed\nmany\n", ArtifactError, "t.csv: "),
        ("t.csv", "", ArtifactError, "t.csv: "),
        ("t.jsonl", '{"seed": 1', ArtifactError, "t.jsonl: "),
        ("t.parquet", "no parquet", ArtifactError, "t.parquet: "),
    ],
)
def test_a_bad_table_is_refused_in_one_line(name, text, error, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as refused:
        read_table(tmp_path / name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.csv"):
        read_table(tmp_path / "nowhere.csv")


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_a_whole_picture_of_the_same_row_and_model_counts(tmp_path):
    file, facts = tmp_path / "a.png", {"row": "{}", "model": "m"}
    save_png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)), file, facts)
    assert is_made(file, facts) and not is_made(tmp_path / "b.png", facts)
    assert not is_made(file, facts | {"model": "other"}) and not is_made(file, facts | {"row": "[]"})
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-5], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        file.write_bytes(damaged)
        assert not is_made(file, facts)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    picture = Image.new("L", (2, 2))
    with pytest.raises(OSError):
        save_png(picture, tmp_path / "none" / "a.png", {})
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        save_png(picture, tmp_path / "a.png", {})
    assert parts_of(tmp_path) == [] and [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def columns(rows):
    return {
        "name": np.array([row.name for row in rows]),
        "seed": np.array([row.seed for row in rows]),
        "options": np.array([json.dumps(row.options) for row in rows]),
    }


def test_a_worker_draws_what_is_missing_with_the_engines_bits(tmp_path):
    rows = [Row(f"{i}", i, {"class_label": i, **STEPS}) for i in (1, 2)]
    rows += [Row("bad", 3, {"class_label": 77}), Row("odd", 4, {"sampler": "dimm"})]
    worker = Painter(EAGER, "digest", tmp_path, 4, 1)
    first = worker(columns(rows))
    assert first["outcome"] == ["drawn", "drawn", "failed", "failed"] and first["name"] == ["1", "2", "bad", "odd"]
    assert "77" in first["error"][2] and "dimm" in first["error"][3] and first["error"][:2] == ["", ""]
    with Engine(EAGER.load(1)) as engine:
        for i in (1, 2):
            (expected,) = engine.images(engine.submit(i, seed=i, **STEPS).result(), "pil")
            assert Image.open(tmp_path / f"{i}.png").tobytes() == expected.tobytes()
    (tmp_path / "1.png").unlink()
    assert worker(columns(rows[:2]))["outcome"] == ["drawn", "kept"]
    other = Painter(EAGER, "another model", tmp_path, 4, 1)
    assert other(columns(rows[:1]))["outcome"] == ["drawn"], "files of another model do not count"


def test_prompts_are_drawn_too(tmp_path):
    pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
    pytest.importorskip("diffusers", reason="the tiny model is made with diffusers (pip install 'fastdiff[test]')")
    import tiny_pipelines as tiny

    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    rows = [Row(name, 1, {"prompt": name, "negative_prompt": "red", **STEPS}) for name in ("cat", "dog")]
    source = Source(str(tmp_path / "model"), backend="eager")
    worker = Painter(source, source.digest(), tmp_path / "out", 4, 1)
    assert worker(columns([*rows, Row("label", 1, {"class_label": 3})]))["outcome"] == ["drawn", "drawn", "failed"]
    pictures = [Image.open(tmp_path / "out" / f"{name}.png") for name in ("cat", "dog")]
    assert {picture.mode for picture in pictures} == {"RGB"} and pictures[0].tobytes() != pictures[1].tobytes()
    assert json.loads(pictures[0].info["row"])["prompt"] == "cat"


def test_a_model_is_known_by_what_its_files_hold(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Source("digits").located().load(1).model.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    one = Source(str(folder))
    before = one.digest()
    assert one._replace(backend="eager").digest() != before
    config = folder / "fastdiff.json"
    config.write_text(config.read_text() + "\n")
    assert one.digest() != before
    with pytest.raises(ArtifactError, match="nowhere"):
        Source("nowhere").located()


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["serve", "--replicas", "2"], "--replicas and --cpus-per-replica belong to --ray"),
        (["serve", "--ray", "--replicas", "0"], "from 0 to 0 workers; allowed: from 1 on"),
        (["serve", "--ray", "--replicas", "3", "2"], "from 3 to 2 workers"),
        (["serve", "--ray", "--replicas", "1", "2", "3"], "1 2 3: allowed is a number, or the least and the most"),
        (["serve", "--ray", "--cpus-per-replica", "0"], "0 cores for each worker; allowed: 1 or more"),
        (["serve", "--ray", "127.0.0.1:1", "--port", "0"], "--port is 0; allowed on a cluster that runs"),
        (["serve", "--ray", "--model", "nowhere"], "no such model folder"),
        (["batch", "t.csv", "--max-batch", "1"], "--max-batch is 1; allowed: 2 or more"),
        (["batch", "t.csv", "--model", "nowhere"], "no such model folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_commands_refuse_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("arguments", [["serve", "--ray"], ["batch", "t.csv"]], ids=lambda value: value[0])
def test_without_ray_the_commands_say_what_to_install(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments) == 1
    assert capsys.readouterr().err == "fastdiff: this needs ray: pip install 'fastdiff[ray]'\n"


def test_a_ray_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.3")
    with pytest.raises(BackendError, match=r"ray is 2\.9\.3; needed: 2\.60 or newer"), cluster():
        pass


def test_a_cluster_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match=r"^Ray at 127\.0\.0\.1:9: \[Errno \d+\] Connection refused$"):
        with cluster("127.0.0.1:9"):
            pass


def test_what_went_wrong_elsewhere_is_found_in_its_traceback():
    text = 'Traceback ...\n  File "x"\nfastdiff.errors.ArtifactError: a: no such model\nray.exceptions: the actor died'
    assert last_line(RuntimeError(text)) == "a: no such model"
    assert last_line(RuntimeError("one\ntwo\n")) == "two" and last_line(RuntimeError()) == "RuntimeError"


# --- a cluster of this machine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_ray():
    with cluster(cores=2):
        yield


@pytest.fixture
def rows():
    return [Row(f"{i:03d}", i, {"class_label": i % 10, "num_inference_steps": 4}) for i in range(40)]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_cluster_of_ones_own_asks_for_a_token_and_listens_to_nobody_else(on_ray):
    import os

    import ray
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    assert os.environ["RAY_AUTH_MODE"] == "token" and get_auth_headers_if_auth_enabled({})
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), process.cmdline()


def test_its_workers_run_with_our_own_priority(on_ray):
    """Ray's usual 15 starves replicas on a machine that does anything else: requests waited for minutes."""
    import ray

    @ray.remote
    def nice():
        return psutil.Process().nice()

    assert ray.get(nice.remote()) == psutil.Process().nice()


def test_proxies_that_do_not_start_are_told_in_one_line(on_ray, monkeypatch):
    def late(**options):
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr("ray.serve.start", late)
    with pytest.raises(BackendError, match=r"Ray's proxy did not start: HTTP proxies not available after 60s\."):
        _deploy(EAGER.located(), "digits", Settings(), fit(Scale()), "info")


def test_a_scale_is_fitted_to_the_machines(on_ray):
    assert fit(Scale()) == (1, 1, 2, 0) and fit(Scale(cores=1)) == (1, 2, 1, 0) and fit(Scale(1, 9, 1)) == (1, 9, 1, 0)
    for scale in (Scale(3, cores=1), Scale(cores=3), Scale(gpus=1)):
        with pytest.raises(PlanError, match=r"do not fit a cluster of 1 machines with up to 2 cores and 0 GPUs"):
            fit(scale)
    assert fit(Scale(3, cores=1), wait=True) == (3, 3, 1, 0)
    with pytest.raises(PlanError, match="from 2 to 1 workers"):
        check(Scale(2, 1))


def test_a_table_whose_worker_is_killed_is_drawn_once_and_alike(on_ray, rows, tmp_path):
    victims = []

    def kill_once(count):
        if not victims:
            victims.extend(killed.below(psutil.Process().pid, killed.WORKER))
            victims[0].kill()

    one = Scale(1, 1, 1)
    found = draw(EAGER, rows, tmp_path / "killed", one, max_batch=2, progress=kill_once)
    assert victims and found.drawn + found.kept == 40 and not found.failed
    (tmp_path / "whole").mkdir()
    in_one_go = Painter(EAGER, EAGER.digest(), tmp_path / "whole", 4, 1)
    assert set(in_one_go(columns(rows))["outcome"]) == {"drawn"}
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "killed") == whole and len(whole) == 40

    (tmp_path / "killed" / "007.png").unlink()
    (tmp_path / "killed" / "011.png").write_bytes(whole["011.png"][:200])
    (tmp_path / "killed" / ".007.png.0123abcd.part").write_bytes(b"of a process that was killed")
    again = draw(EAGER, [*rows, Row("bad", 0, {"class_label": 10})], tmp_path / "killed", one)
    assert again[:2] == (2, 38) and list(again.failed) == ["bad"] and "10" in again.failed["bad"]
    assert contents(tmp_path / "killed") == whole


def test_the_server_on_ray_from_start_to_end(monkeypatch):
    """Key, bits, a replica killed under load, SIGTERM; then nothing is left."""
    monkeypatch.setenv("A_KEY", "secret")
    options = ("--ray", "--replicas", "1", "--cpus-per-replica", "1", "--backend", "eager", "--api-key-env", "A_KEY")
    bodies = killed.requests()
    with Engine(EAGER.load(1)) as engine:
        expected = killed.pictures(engine, bodies)
    with server(REAL, *options) as running:
        assert '"ready"' in running.get("/ready")
        wrong = asyncio.run(killed.ask(running, bodies[1]))
        assert b"HTTP/1.1 401" in wrong and b'"invalid_api_key"' in wrong
        found = asyncio.run(killed.under_load(running, 1, expected, key="secret"))
        processes = killed.below(running.process.pid)
        assert running.stop() == 0
    assert set(found.outcomes) == {"image", "told"}, found.outcomes
    assert found.finished and max(found.finished.values()) == 1
    assert len(processes) > 4 and killed.still_there(processes) == 0
