"""Requests that nobody means well: made by schemathesis from the OpenAPI document, by hypothesis from nothing."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from fastdiff.benchmarks.server_process import Server

URL = "/v1/images/generations"
BUSY = 503
HUGE = [0, -1, 1, 2, 17, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")]
WORDS = ["", "auto", "28x28", "1x1", "99999x99999", "0x0", "png", "url", "ddim", "rk4", "flow_map", "\0", "\ud800",
         "💥" * 50, "../../etc/passwd", "{}", "null", "a" * 40_000]  # fmt: skip
FIELDS = ["prompt", "negative_prompt", "class_label", "model", "n", "size", "response_format", "output_format", "seed",
          "output_compression", "num_inference_steps", "guidance_scale", "sampler", "stream", "partial_images",
          "quality", "background", "user", "__proto__", "\ud800"]  # fmt: skip
SMALL = {"num_inference_steps": 3, "n": 1}  # where a request is by chance a good one, it is a small one


class Attack(NamedTuple):
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def _values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(HUGE + WORDS))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    )


def _deep(depth: int, opening: str) -> bytes:
    return (opening * depth).encode()


def bodies() -> st.SearchStrategy[bytes]:
    """Bodies: almost requests, arbitrary JSON, deep JSON, arbitrary bytes."""
    almost = st.dictionaries(st.sampled_from(FIELDS), _values(), max_size=5).map(lambda fields: SMALL | fields)
    return st.one_of(
        almost.map(lambda value: json.dumps(value).encode()),
        almost.map(lambda value: json.dumps(value).encode()),
        _values().map(lambda value: json.dumps(value).encode()),
        st.builds(_deep, st.integers(1, 60_000), st.sampled_from(["[", '{"n":', '[{"a":', '"', "9", "-", "\\u"])),
        st.binary(max_size=200),
        st.builds(lambda start, cut: start[:cut], st.just(json.dumps(SMALL).encode()), st.integers(0, 40)),
    )


def made_up() -> st.SearchStrategy[Attack]:
    """Attacks from nothing."""
    kinds = st.sampled_from(
        ["application/json"] * 6 + ["text/plain", "multipart/form-data", "application/x+json", "a", ""]
    )
    word = st.text("abcXYZ0189-_.:;= \t", max_size=30)
    headers = st.builds(
        lambda kind, name, auth: {"content-type": kind, "x-request-id": name.strip(), "authorization": auth.strip()},
        kinds, word, word,
    )  # fmt: skip
    methods = st.sampled_from(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"])
    paths = st.sampled_from([URL, URL + "/", URL + "?a=%00", "/v1/models/%2e%2e%2f", "/v1/models/" + "a" * 5000, "/",
                             "/metrics", "//", "/%ff"])  # fmt: skip
    usual = st.builds(Attack, st.just("POST"), st.just(URL), headers, bodies())
    return st.one_of(*[usual] * 9, st.builds(Attack, methods, paths, headers, bodies()))


def by_document(document: dict[str, Any]) -> st.SearchStrategy[Attack]:
    """Attacks, and good requests, that schemathesis makes from the OpenAPI document."""
    operation = schemathesis.openapi.from_dict(document)[URL]["POST"]

    def attack(case: Any) -> Attack:
        body = case.body
        if not isinstance(body, bytes):
            if isinstance(body, dict):
                body = body | {name: min(v, SMALL[name]) for name, v in body.items()
                               if name in SMALL and isinstance(v, int)}  # fmt: skip
            try:
                body = json.dumps(body).encode()
            except TypeError:  # its mark for "no body at all"
                body = b""
        return Attack("POST", URL, {"content-type": "application/json"}, body)

    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    return st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)).map(attack)


class Outcome(NamedTuple):
    """What came of many requests."""

    answers: Counter[int]  # by status
    bad: list[str]  # what must not happen, the first of each kind


class Attacker:
    """Sends requests over one connection, which it opens again where the server closed it."""

    def __init__(self, server: Server):
        self.server, self.outcome = server, Outcome(Counter(), [])
        self._connection: HTTPConnection | None = None

    def __call__(self, attack: Attack) -> None:
        """Send one, and judge the answer."""
        try:
            status, headers = self._send(attack)
        except (HTTPException, OSError) as error:
            self._connection = None
            self._bad(f"{type(error).__name__}: {error}", attack)
            return
        self.outcome.answers[status] += 1
        if status >= 500 and not (status == BUSY and headers.get("retry-after")):
            self._bad(f"status {status}", attack)

    def _send(self, attack: Attack) -> tuple[int, dict[str, str]]:
        for last in (False, True):
            fresh = self._connection is None
            if self._connection is None:
                self._connection = HTTPConnection(self.server.host, self.server.port, timeout=120)
            try:
                self._connection.request(attack.method, attack.path, attack.body, attack.headers)
                answer = self._connection.getresponse()
                answer.read()
                if answer.will_close:
                    self.close()
                return answer.status, {name.lower(): value for name, value in answer.getheaders()}
            except (HTTPException, OSError):
                self.close()
                if fresh or last:
                    raise  # an idle connection may have been closed in between; a new one may not
        raise AssertionError

    def _bad(self, what: str, attack: Attack) -> None:
        if len(self.outcome.bad) < 20:
            self.outcome.bad.append(f"{what}: {attack.method} {attack.path[:60]} {attack.body[:200]!r}")

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def made(attacks: st.SearchStrategy[Attack], count: int) -> list[Attack]:
    """About ``count`` attacks, always the same ones."""
    found: list[Attack] = []

    @settings(max_examples=count, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(attacks)
    def keep(attack: Attack) -> None:
        found.append(attack)

    keep()
    return found


def mutated(corpus: Sequence[Attack], count: int, seed: int = 0) -> Iterator[Attack]:
    """``count`` attacks that are others put together wrongly: pieces of two bodies, with a few bytes changed."""
    draw = random.Random(seed)
    for _ in range(count):
        attack, other = draw.choice(corpus), draw.choice(corpus).body
        body = bytearray(attack.body)
        if draw.random() < 0.5:
            at = draw.randrange(len(body) + 1)
            start = draw.randrange(len(other) + 1)
            body[at : at + draw.randrange(20)] = other[start : start + draw.randrange(200)]
        for _ in range(draw.randrange(4)):
            if body:
                body[draw.randrange(len(body))] = draw.choice(b'0123456789.-eE"{}[],:\\u\x00\xff null')
        yield attack._replace(body=bytes(body))


def flood(server: Server, path: str, gigabytes: float) -> str:
    """Send one body of zeros, chunked, until the server answers and then to its end; the answer's first line."""
    block, sent = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n", 0.0
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=120) as raw:
        raw.sendall(head.encode())
        while sent < gigabytes * 2**10:
            try:
                raw.sendall(block)
            except OSError:
                break
            sent += 1
        return raw.recv(65536).split(b"\r\n")[0].decode()
