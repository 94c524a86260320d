"""The server: the API that clients speak, every refusal, streams, limits, metrics, logs."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from fastdiff import Engine
from fastdiff.benchmarks.stub import stub_pipeline
from fastdiff.errors import Cancelled, DeadlineExceeded, EngineClosed, NotFinite, OutOfMemory
from fastdiff.serve import ClassConditional, Metrics, Settings, create_app
from fastdiff.serve.errors import failure
from fastdiff.serve.logs import JsonFormatter
from fastdiff.serve.run import listen, loopback, url_of

URL = "/v1/images/generations"
JSON = {"content-type": "application/json"}


class Served:
    def __init__(self, **settings):
        self.pipe, self.stub = stub_pipeline()
        self.settings, self.metrics = Settings(**settings), Metrics()
        self.engine = Engine(self.pipe, max_batch=4, max_queue=self.settings.max_queue, watch=self.metrics.turn)
        self.app = create_app(self.engine, ClassConditional(self.pipe, "digits"), self.settings, self.metrics)


@pytest.fixture
def serve():
    made = []

    def make(**settings):
        served = Served(**settings)
        client = TestClient(served.app, raise_server_exceptions=False)
        client.__enter__()
        made.append((served, client))
        return served, client

    yield make
    for served, client in made:
        if served.stub.gate is not None:
            served.stub.gate.release(10_000)
        client.__exit__(None, None, None)
        assert not served.engine.alive(), "the end of the application is the end of its engine"


@pytest.fixture
def client(serve):
    return serve()[1]


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def pixels(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def events(text):
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_come_with_their_seeds_and_are_the_engines(serve):
    served, client = serve()
    answer = client.post(URL, json={"class_label": 3, "seed": 7, "n": 3, "sampler": "ddim", "num_inference_steps": 5})
    assert answer.status_code == 200 and answer.headers["x-request-id"]
    body = answer.json()
    assert [entry["seed"] for entry in body["data"]] == [7, 8, 9]
    assert body["size"] == "28x28" and body["output_format"] == "png" and body["created"] > 10**9
    for entry in body["data"]:
        ticket = served.engine.submit(3, seed=entry["seed"], sampler="ddim", num_inference_steps=5)
        (image,) = served.engine.images(ticket.result(), "pil")
        assert pixels(entry["b64_json"]).tobytes() == image.tobytes()
    again = client.post(URL, json={"class_label": 3, "seed": 8, "sampler": "ddim", "num_inference_steps": 5}).json()
    assert again["data"][0] == body["data"][1], "the same seed is the same image, alone or as one of many"


def test_without_a_seed_one_is_drawn_and_told(client):
    seeds = {client.post(URL, json={"class_label": 1}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("encoding, kind", [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(encoding, kind, client):
    body = client.post(URL, json={"output_format": encoding, "response_format": "url"}).json()
    head, _, text = body["data"][0]["url"].partition(",")
    assert head == f"data:image/{encoding};base64" and "b64_json" not in body["data"][0]
    assert pixels(text).format == kind and pixels(text).size == (28, 28)


def test_quality_is_taken(client):
    sizes = [
        len(client.post(URL, json={"seed": 1, "output_format": "jpeg", "output_compression": q}).text) for q in (5, 95)
    ]
    assert sizes[0] < sizes[1]


def test_null_means_absent_and_an_empty_prompt_asks_for_nothing(client):
    nothing = dict.fromkeys(("prompt", "n", "size", "seed", "stream", "sampler", "model", "user"))
    assert client.post(URL, json=nothing | {"prompt": ""}).status_code == 200


def test_the_openai_client_is_understood(client):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client, max_retries=0)
    assert theirs.models.list().data[0].id == "digits"
    answer = theirs.images.generate(model="digits", prompt="", n=2, size="28x28", extra_body={"class_label": 3})
    assert pixels(answer.data[0].b64_json).size == (28, 28) and len(answer.data) == 2
    stream = theirs.images.generate(
        prompt="", stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 6}
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    with pytest.raises(openai.BadRequestError, match="give class_label, 0 to 9") as refused:
        theirs.images.generate(prompt="a fox")
    assert refused.value.param == "prompt" and refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="allowed: digits"):
        theirs.images.generate(model="dall-e-3", prompt="")


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_brings_previews_then_images(client):
    asked = {"seed": 4, "n": 2, "stream": True, "partial_images": 2, "num_inference_steps": 6}
    answer = client.post(URL, json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    for i in range(2):
        mine = [(name, event) for name, event in events(answer.text) if event["image_index"] == i]
        assert [name for name, _ in mine] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [event.get("partial_image_index") for _, event in mine] == [0, 1, None]
        assert all(event["type"] == name and event["seed"] == 4 + i for name, event in mine)
        whole = client.post(URL, json={"seed": 4 + i, "num_inference_steps": 6}).json()["data"][0]
        assert mine[-1][1]["b64_json"] == whole["b64_json"] and mine[-1][1]["usage"]["total_tokens"] == 0


def test_a_stream_that_fails_ends_with_an_error(serve):
    served, client = serve()
    served.stub.nan = 7
    answer = client.post(URL, json={"class_label": 7, "stream": True, "seed": 0})
    ((name, event),) = events(answer.text)
    assert answer.status_code == 200 and name == "error" and event["error"]["code"] == "not_finite"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, param, message",
    [
        ({"prompt": "a fox"}, "prompt", "not a text-to-image model: give class_label, 0 to 9"),
        ({"negative_prompt": "blur"}, "negative_prompt", "not a text-to-image model"),
        ({"class_label": 10}, "class_label", "class_label is 10; allowed: 0 to 9"),
        ({"class_label": -1}, "class_label", "class_label is -1"),
        ({"class_label": "3"}, "class_label", "class_label is '3'"),
        ({"class_label": True}, "class_label", "class_label is True"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": 17}, "n", "n is 17; input should be less than or equal to 16"),
        ({"n": 10**4000}, "n", "n is 1000"),
        ({"num_inference_steps": 201}, "num_inference_steps", "less than or equal to 200"),
        ({"size": "512x512"}, "size", "size is 512x512; allowed: 28x28, or auto"),
        ({"size": "99999x99999"}, "size", "up to 4194304 pixels"),
        ({"size": "-1x5"}, "size", "size is '-1x5'"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "seed + n - 1 up to"),
        ({"sampler": "magic"}, "sampler", "sampler is 'magic'"),
        ({"guidance_scale": 1e30}, "guidance_scale", "less than or equal to 100"),
        ({"partial_images": 2}, "partial_images", "give stream: true"),
        ({"stream": True, "response_format": "url"}, "response_format", "allowed: b64_json"),
        ({"output_compression": 3}, "output_compression", "png loses nothing"),
        ({"model": "dall-e-3"}, "model", "model dall-e-3 is not served here; allowed: digits"),
        ({"colour": "red"}, "colour", "unknown parameter colour"),
        ({"a\nb": 1}, "a\\nb", "unknown parameter"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(asked, param, message, client):
    answer = client.post(URL, json=asked)
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"\xff\xfe", b"[]", b"null", b'"x"', b"[" * 60_000, b'{"n":' + b"9" * 60_000 + b"}",
     b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b'{"guidance_scale": NaN}', b'{"guidance_scale": -Infinity}',
     b'{"guidance_scale": 1e999}', b'{"user": "\\ud800"}', b'{"\\ud800": 1}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_bodies_that_are_no_request(body, client):
    answer = client.post(URL, content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_a_page_elsewhere_cannot_post_what_browsers_send_without_asking(client):
    answer = client.post(URL, content=b'{"seed": 1}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_large_bodies_are_refused_whether_announced_or_not(serve):
    _, client = serve(max_body=1000)
    assert client.post(URL, content=b"x" * 1001, headers=JSON).status_code == 413
    chunked = client.post(URL, content=iter([b"x" * 600, b"x" * 600]), headers=JSON)
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
    assert client.post(URL, content=b"{}", headers=JSON | {"content-length": "9" * 30}).status_code == 413
    assert client.post(URL, content=b"{}".ljust(1000), headers=JSON).status_code == 200


def test_the_key_is_wanted_and_compared_whole(serve):
    _, client = serve(api_key="secret")
    for header in (None, "secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer s\xe9cret"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        answer = client.post(URL, json={}, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", header
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models").status_code == 401
    assert client.post(URL, json={}, headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_more_than_can_wait_is_told_when_to_come_again(serve):
    served, client = serve(max_queue=2)
    served.stub.gate = threading.Semaphore(0)
    answer = client.post(URL, json={"n": 12, "guidance_scale": 1.0})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"] | {"message": ""} == {
        "message": "", "type": "server_error", "param": None, "code": "busy",
    }  # fmt: skip
    served.stub.gate.release(10_000)
    until(lambda: served.engine.stats().waiting + served.engine.stats().running == 0)
    assert "done" not in served.engine.stats().answered, "what was taken of it is given up"
    served, client = serve(max_requests=1)
    served.stub.gate = threading.Semaphore(0)
    first = threading.Thread(target=client.post, args=(URL,), kwargs={"json": {}})
    first.start()
    until(lambda: served.engine.stats().running == 1)
    busy = client.post(URL, json={})
    assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
    served.stub.gate.release(10_000)
    first.join()


def test_failures_of_the_engine_have_a_status_that_says_whether_to_try_again(serve, caplog):
    served, client = serve()
    served.stub.nan = 7
    answer = client.post(URL, json={"class_label": 7})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "not_finite"
    served.stub.fail = lambda labels: 1 / 0
    answer = client.post(URL, json={"class_label": 1})
    assert answer.status_code == 500 and "division" not in answer.text, "what went wrong inside is for the log"
    assert "ZeroDivisionError" in caplog.text
    expected = {OutOfMemory("x"): 503, DeadlineExceeded("x"): 503, EngineClosed("x"): 503, Cancelled("x"): 499,
                NotFinite("x"): 422}  # fmt: skip
    for error, status in expected.items():
        assert failure(error).status == status
        assert (failure(error).retry_after is not None) == (status == 503)
    served.stub.fail = None
    served.engine.close()
    assert client.post(URL, json={}).status_code == 503
    assert client.get("/ready").status_code == client.get("/health").status_code == 503


def test_requests_that_take_too_long_are_given_up(serve):
    served, client = serve(timeout=0.2)
    served.stub.slow = 0.05
    answer = client.post(URL, json={"num_inference_steps": 100})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"


# --- operations -----------------------------------------------------------------------------------------------------


def test_models_health_and_openapi(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "digits" and len(card["classes"]) == 10 and card["size"] == "28x28"
    assert "ddim" in card["samplers"] and "ddim_inversion" not in card["samplers"]
    assert client.get("/v1/models/digits").json() == card
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get(URL).json()["error"]["code"] == "method_not_allowed"
    assert client.post(URL + "/", json={}, follow_redirects=False).status_code == 404
    document = client.get("/openapi.json").json()
    body = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert body["n"]["anyOf"][0]["maximum"] == 16 and body["num_inference_steps"]["anyOf"][0]["maximum"] == 200
    assert {"200", "400", "401", "413", "422", "503"} <= set(document["paths"][URL]["post"]["responses"])
    assert client.get("/docs").status_code == 200


def test_metrics_count_what_happened(client):
    client.post(URL, json={"n": 3, "num_inference_steps": 4, "sampler": "ddim", "guidance_scale": 1.0})
    client.post(URL, json={"n": 0})
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values["fastdiff_queue_seconds_count"] == values["fastdiff_decode_seconds_count"] == "3.0"
    assert float(values["fastdiff_step_seconds_count"]) >= 4 == float(values["fastdiff_image_steps_total"]) / 3
    assert values["fastdiff_step_seconds_count"] == values["fastdiff_batch_occupancy_count"]
    assert values['fastdiff_images_total{outcome="done"}'] == "3.0"
    for status in ("200", "400"):
        assert values[f'fastdiff_request_seconds_count{{route="{URL}",status="{status}"}}'] == "1.0"
    assert values["fastdiff_waiting_images"] == values["fastdiff_running_images"] == "0.0"
    assert "process_resident_memory_bytes" in values


def test_paths_that_anybody_may_invent_do_not_grow_the_metrics(client):
    for i in range(20):
        client.get(f"/invented/{i}")
    assert "invented" not in client.get("/metrics").text


def test_every_request_is_one_line_of_json_with_its_id(client, caplog):
    caplog.set_level(logging.INFO, "fastdiff.serve")
    given = client.post(URL, json={"seed": 5, "n": 2}, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = client.get("/x%0A{}", headers={"x-request-id": "not allowed"}).headers["x-request-id"]
    assert made != "not allowed" and len(made) == 32
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    first, second = (line for line in lines if line["message"] == "request")
    assert first["request_id"] == "mine-1" and first["status"] == 200 and first["seconds"] > 0
    assert first["images"] == 2 and first["seed"] == 5 and second["status"] == 404
    assert all("\n" not in JsonFormatter().format(record) for record in caplog.records)


def test_settings_come_from_the_environment_and_are_checked(monkeypatch):
    monkeypatch.setenv("FASTDIFF_SERVE_MAX_STEPS", "7")
    monkeypatch.setenv("FASTDIFF_SERVE_API_KEY", "hidden")
    settings = Settings(port=1)
    assert settings.max_steps == 7 and settings.port == 1 and "hidden" not in repr(settings)
    for wrong in ({"port": 70_000}, {"max_queue": 0}, {"timeout": float("nan")}, {"nonsense": 1}):
        with pytest.raises(ValueError):
            Settings(**wrong)


def test_only_loopback_is_called_so():
    assert loopback("127.0.0.1") and loopback("::1") and loopback("localhost")
    assert not any(map(loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    with listen(Settings(port=0)) as listening:
        assert url_of(listening).startswith("http://127.0.0.1:")
        assert listening.proto == socket.IPPROTO_TCP, "else every answer waits for the client's delayed acknowledgement"
        assert not url_of(listening).endswith(":0")
