"""The server in a process of its own: clients that leave, bodies without end, and how it stops."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import closing
from http.client import HTTPConnection

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastdiff.benchmarks.server_process import REAL, STUB, server
from fastdiff.cli import main

URL = "/v1/images/generations"
LONG = {"num_inference_steps": 200, "n": 16, "guidance_scale": 1.5, "sampler": "rk4"}


@pytest.fixture(scope="module")
def live():
    with server(STUB, "--max-body", "100000") as running:
        yield running


def post(live, body, **headers):
    connection = HTTPConnection(live.host, live.port, timeout=30)
    connection.request("POST", URL, json.dumps(body), {"content-type": "application/json", **headers})
    return connection


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
def test_who_goes_away_gives_the_images_up(stream, live):
    def cancelled():
        return live.metrics().get('fastdiff_images_total{outcome="Cancelled"}', 0.0)

    before = cancelled()
    connection = post(live, LONG | {"stream": stream})
    until(lambda: live.metrics()["fastdiff_running_images"] > 0)
    if stream:
        connection.getresponse().close()
    connection.close()
    until(lambda: live.metrics()["fastdiff_waiting_images"] + live.metrics()["fastdiff_running_images"] == 0)
    assert cancelled() > before
    until(lambda: any(json.loads(line).get("status") == 499 for line in live.log.read_text().splitlines()))


def send_without_end(live, head, megabytes):
    """Send a body until the server answers or all is sent; the first line of the answer."""
    with socket.create_connection((live.host, live.port), timeout=30) as raw:
        raw.sendall(head)
        raw.settimeout(0.01)
        answer = b""
        for _ in range(megabytes):
            try:
                raw.settimeout(30)
                raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n" if b"chunked" in head else b"x" * 0x10000)
                raw.settimeout(0.001)
                answer += raw.recv(65536)
                break
            except TimeoutError:
                continue
        return answer.split(b"\r\n")[0]


def test_bodies_without_end_are_not_held(live):
    begin = f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
    before = live.holding().peak
    for head in (b"content-length: 1000000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
        assert send_without_end(live, begin + head, 4000).startswith(b"HTTP/1.1 413")
    assert live.holding().peak < before + 20 * 2**20


def test_hostile_requests_break_nothing(live):
    """``make check-engine`` sends 100,000 of them."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from fastdiff.benchmarks.hostile import Attacker, by_document, made, made_up, mutated

    corpus = made(by_document(json.loads(live.get("/openapi.json"))), 60) + made(made_up(), 120)
    attacker = Attacker(live)
    for attack in [*corpus, *mutated(corpus, 300)]:
        attacker(attack)
    attacker.close()
    assert attacker.outcome.bad == [] and {200, 400, 404, 405} <= set(attacker.outcome.answers)


def test_a_body_that_does_not_come_is_not_waited_for():
    with server(STUB, FASTDIFF_SERVE_BODY_TIMEOUT="0.3") as live:
        with socket.create_connection((live.host, live.port), timeout=30) as raw:
            raw.sendall(f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n".encode())
            raw.sendall(b"content-type: application/json\r\n\r\n{")
            answer = b"".join(iter(lambda: raw.recv(65536), b""))  # until the server hangs up
        assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer
        assert live.stop() == 0


def test_requests_in_flight_are_finished_before_the_end():
    with server(REAL, "--backend", "eager", FASTDIFF_MEASURE="0") as live:
        answers = []

        def ask(stream):
            asked = {"num_inference_steps": 20, "n": 2, "sampler": "ddim", "stream": stream}
            with closing(post(live, asked)) as connection, connection.getresponse() as answer:
                answers.append((answer.status, answer.read()))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        until(lambda: live.metrics()["fastdiff_running_images"] > 0)
        assert live.stop() == 0
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200, 200]
        assert {body.count(b"b64_json") for _, body in answers} == {2}
        assert b"image_generation.completed" in answers[0][1] + answers[1][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "70000"], "--port is 70000; input should be less than or equal to 65535"),
        (["--api-key-env", "NOT_THERE"], "--api-key-env is NOT_THERE; that variable is not set"),
        (["--model", "nowhere"], "no such model folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_port_that_is_taken_is_an_error(live, capsys):
    assert main(["serve", "--port", str(live.port), "--backend", "eager"]) == 1
    assert "in use" in capsys.readouterr().err
