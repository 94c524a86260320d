"""The CPU runtime as a backend: whole networks, what it chooses, what it keeps on disk, and what happens without it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from narrow_unets import error, first, inputs, network
from native_runtime import runtime_or_skip

import fastdiff
from fastdiff.backends.in_memory import network_of
from fastdiff.backends.lower import Shape, lower
from fastdiff.backends.native import NativeNetwork, NativeTrunk
from fastdiff.backends.native.choose import Choice, Layer, by_rule, choose
from fastdiff.backends.times import add_times, read_times
from fastdiff.benchmarks.layouts import LAYOUTS
from fastdiff.errors import BackendError, ShapeError
from fastdiff.kernels.native import Runtime, Unavailable, build


@pytest.fixture(autouse=True)
def _runtime() -> None:
    runtime_or_skip()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_published_layout(layout):
    unet = network(layout)
    trunk = NativeTrunk(unet)
    given = inputs(unet, 2, 32, 32)
    got = trunk(*given)
    plain = unet.trunk(*given)
    exact = unet.double().trunk(given[0].double(), given[1].double(), [(k.double(), v.double()) for k, v in given[2]])
    assert error(got, exact) < 1e-5
    assert error(plain, exact) < 1e-5


@pytest.mark.parametrize("size", [(8, 8), (40, 24), (16, 72)], ids=str)
def test_any_size_and_an_image_does_not_depend_on_its_company(size):
    unet = network()
    trunk, given = NativeTrunk(unet), inputs(unet, 3, *size)
    got = trunk(*given)
    assert error(got, unet.trunk(*given)) < 1e-5
    assert torch.equal(got[:1], trunk(*first(given)))
    assert torch.equal(got[:2], trunk(*first(given, 2)))


def test_the_number_of_threads_changes_no_bit():
    unet = network("DDPM CIFAR-10")
    trunk, given, threads = NativeTrunk(unet), inputs(unet, 1, 32, 32), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(trunk(*given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_residuals_of_a_controlnet():
    unet = network()
    trunk, given = NativeTrunk(unet), inputs(unet, 2, 16, 16)
    _, skips = unet.encode(unet.conv_in(given[0]), unet.split_rows(given[1]), iter(given[2]))
    shapes = [skip.shape for skip in skips] + [skips[-1].shape]
    control = [0.1 * torch.randn(shape) for shape in shapes]
    assert error(trunk(*given, control), unet.trunk(*given, control)) < 1e-5
    with pytest.raises(ShapeError, match="control is 2; needed"):
        trunk(*given, control[:2])
    with pytest.raises(ShapeError, match="control 0 is"):
        trunk(*given, [control[0][:, :1], *control[1:]])


def test_what_does_not_fit_is_refused_before_memory_is_read():
    unet = network()
    trunk, (x, rows, contexts) = NativeTrunk(unet), inputs(unet, 2, 16, 16)
    for wrong, message in (
        ((x[:, :1], rows, contexts), r"x is \(2, 1, 16, 16\); needed: \(2, 4, 16, 16\)"),
        ((x, rows[:, :-1], contexts), "time_rows is"),
        ((x, rows[:1], contexts), "time_rows is"),
        ((x, rows, contexts[1:]), "number of contexts is 15; needed: 16"),
        ((x, rows, [(k[:1], v[:1]) for k, v in contexts]), "context 0: batch, heads and width"),
        ((x, rows, [(k[..., :-1], v[..., :-1]) for k, v in contexts]), "context 0: batch, heads and width"),
    ):
        with pytest.raises(ShapeError, match=message):
            trunk(*wrong)


def test_sizes_that_do_not_meet_again_are_refused():
    """Twice halved and doubled again, 10 pixels are 8; torch refuses to join them too."""
    unet = network("ADM")
    given = inputs(unet, 1, 20, 20)
    with pytest.raises(ShapeError, match="size of what is joined .* is .4, 4.; needed: .5, 5."):
        NativeTrunk(unet)(*given)


def test_weights_that_change_are_followed():
    unet = network("DDPM CIFAR-10")
    trunk, given = NativeTrunk(unet), inputs(unet, 1, 16, 16)
    trunk(*given)
    for parameter in unet.parameters():
        parameter.mul_(1.1)
    trunk.refresh()
    assert error(trunk(*given), unet.trunk(*given)) < 1e-5
    for parameter in unet.parameters():
        parameter.data.mul_(0.9)  # not counted by torch
    trunk.refresh(always=True)
    assert error(trunk(*given), unet.trunk(*given)) < 1e-5
    unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    unet.to(memory_format=torch.channels_last)
    trunk.refresh()
    assert error(trunk(*given), unet.trunk(*given)) < 1e-5


def test_gradients_and_other_types_go_the_plain_way():
    unet = network("DDPM CIFAR-10")
    trunk, (x, rows, contexts) = NativeTrunk(unet), inputs(unet, 1, 16, 16)
    x.requires_grad_(True)
    trunk(x, rows, contexts).sum().backward()
    assert x.grad is not None
    unet.double()
    assert trunk(x.detach().double(), rows.double(), contexts).dtype == torch.float64


def test_pipelines_take_it_by_default_and_agree_with_plain_torch():
    images = {}
    for backend in ("auto", "native", "eager"):
        pipe = fastdiff.Pipeline.from_pretrained("digits", backend=backend)
        assert isinstance(pipe.network, NativeNetwork) == (backend != "eager")
        images[backend] = pipe([3, 8], num_inference_steps=4, seed=0, output_type="pt").images
    assert torch.equal(images["auto"], images["native"])
    assert (images["native"] - images["eager"]).abs().max() < 1e-4


def test_a_profile_has_a_time_for_every_op():
    unet = network("DDPM CIFAR-10", 16)
    trunk, given = NativeTrunk(unet), inputs(unet, 1, 8, 8)
    ops, seconds = trunk.profile(*given, rounds=2)
    assert len(ops) == len(seconds) > 100
    assert all(len(times) == 2 and min(times) >= 0 for times in seconds)


def test_threads_may_share_one():
    from concurrent.futures import ThreadPoolExecutor

    unet = network("DDPM CIFAR-10")
    trunk, given = NativeTrunk(unet), [inputs(unet, 1 + i % 2, 16, 16) for i in range(6)]
    alone = [trunk(*each) for each in given]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda each: trunk(*each), given * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together, strict=True))


# --- what is chosen ---------------------------------------------------------------------------------------------------

DIRECT, DIRECT_PACKED, W2, W2_PACKED, W4, W4_PACKED = (Choice(a, p) for a in (0, 2, 4) for p in (False, True))


def layer(name: str, size: int, winograd: bool = True) -> Layer:
    sizes = {DIRECT: 0, DIRECT_PACKED: 9 * size}
    if winograd:
        sizes |= {W2: 0, W2_PACKED: 16 * size, W4: 0, W4_PACKED: 36 * size}
    return Layer(name, sizes)


def test_the_plan_for_a_table_of_times():
    """A fixed table and what must follow from it: a change of the rule shows here."""
    layers = [layer("wide", 10), layer("deep", 1000), layer("linear", 100, winograd=False), layer("new", 1)]
    times = {
        "wide": {"direct": 9.0, "direct packed": 8.0, "winograd2": 5.0, "winograd2 packed": 4.5, "winograd4": 3.0,
                 "winograd4 packed": 2.0},
        "deep": {"direct": 3.0, "direct packed": 2.0, "winograd2": 4.0, "winograd2 packed": 1.5, "winograd4": 5.0,
                 "winograd4 packed": 4.0},
        "linear": {"direct": 1.0, "direct packed": 0.5, "winograd4": 0.1},
    }  # fmt: skip
    assert choose(layers, times, 0) == [W4, DIRECT, DIRECT, DIRECT]
    assert choose(layers, times, 400) == [W4_PACKED, DIRECT, DIRECT, DIRECT]
    assert choose(layers, times, 1300) == [W4_PACKED, DIRECT, DIRECT_PACKED, DIRECT]
    assert choose(layers, times, 11000) == [W4_PACKED, DIRECT_PACKED, DIRECT_PACKED, DIRECT]
    assert choose(layers, times, 10**6) == [W4_PACKED, W2_PACKED, DIRECT_PACKED, DIRECT]


def test_layers_of_one_kind_share_a_budget():
    layers, times = [layer("same", 10)] * 3, {"same": {"direct": 2.0, "direct packed": 1.0}}
    assert choose(layers, times, 200) == [DIRECT_PACKED, DIRECT_PACKED, DIRECT]


def test_what_is_prepared_stays_within_its_budget(tmp_path, monkeypatch):
    """Measured for real, with a budget that allows some layers only."""
    from fastdiff.backends.native import trunk as module

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTDIFF_MEASURE", "1")
    monkeypatch.setattr(module, "LEAST_BUDGET", 20_000)
    monkeypatch.setattr(module, "SHARE", 0.0)
    monkeypatch.setattr("fastdiff.backends.native.measured.ROUNDS", 1)
    (tmp_path).chmod(0o700)
    unet = network("DDPM CIFAR-10", 16)
    trunk = NativeTrunk(unet, never_slower=True)
    given = inputs(unet, 2, 8, 8)
    assert error(trunk(*given), unet.trunk(*given)) < 1e-5
    held = sum(made.numel() * 4 for (kind, *_), (_, made) in trunk._weights.items() if kind >= 0)
    assert held <= 20_000
    (file,) = tmp_path.glob("times-*.json")
    table = json.loads(file.read_text())
    whole = [name for name in table if name.startswith("whole")]
    assert len(whole) == 1 and set(table[whole[0]]) == {"native", "eager"}
    again = NativeTrunk(unet, never_slower=True)
    monkeypatch.setattr(module, "time_op", lambda *_: pytest.fail("measured again"))
    assert torch.equal(again(*given), trunk(*given))


def test_plain_torch_is_used_where_it_is_faster(tmp_path, monkeypatch):
    from fastdiff.backends.native import trunk as module

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTDIFF_MEASURE", "1")
    tmp_path.chmod(0o700)
    monkeypatch.setattr(module, "time_op", lambda *_: 1.0)
    monkeypatch.setattr(NativeTrunk, "_whole", lambda *_: {"native": 2.0, "eager": 1.0})
    unet = network("DDPM CIFAR-10", 16)
    trunk, given = NativeTrunk(unet, never_slower=True), inputs(unet, 1, 8, 8)
    assert torch.equal(trunk(*given), unet.trunk(*given))
    assert "plain torch" in str(trunk.chosen())


def test_the_rule_without_measurement():
    assert by_rule(layer("x", 1), 8, 8) == W4
    assert by_rule(layer("x", 1), 4, 4) == DIRECT
    assert by_rule(layer("x", 1, winograd=False), 64, 64) == DIRECT


def test_the_arena_is_shared_by_what_is_not_alive_at_once():
    program = lower(network("DDPM CIFAR-10"), Shape((1, 3, 32, 32), (1, 624)))
    starts, floats = program.layout()
    assert floats < sum(program.floats.values()) / 3
    spans = {}
    for index, op in enumerate(program.ops):
        for name in ("src0", "src1", "stats", "row", "residual", "out", "weight"):
            slot, _ = program.resolved(getattr(op, name))
            if slot in starts:
                spans.setdefault(slot, [index, index])[1] = index
    for a in starts:
        for b in starts:
            if a < b and spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                apart = starts[a] + program.floats[a] <= starts[b] or starts[b] + program.floats[b] <= starts[a]
                assert apart, (a, b)


# --- what is kept on disk ---------------------------------------------------------------------------------------------


def test_writers_of_the_table_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fastdiff.backends.times import add_times\n"
        "for i in range(20): add_times(Path(sys.argv[1]), {f'{sys.argv[2]}-{i}': {'direct': 1.0 + i}})"
    )
    file = tmp_path / "times.json"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), str(k)]) for k in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert len(read_times(file)) == 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["times.json", "times.lock"]


def test_who_measured_first_is_believed_by_all(tmp_path):
    """Processes that start together with an empty table have to choose alike: a choice decides the bits."""
    file = tmp_path / "times.json"
    assert add_times(file, {"layer": {"direct": 1.0, "winograd2": 2.0}}) == read_times(file)
    late = add_times(file, {"layer": {"direct": 2.0, "winograd4": 0.5}, "other": {"direct": 3.0}})
    first = {"direct": 1.0, "winograd2": 2.0, "winograd4": 0.5}
    assert late == read_times(file) == {"layer": first, "other": {"direct": 3.0}}
    assert add_times(tmp_path / "nowhere" / "times.json", {"layer": {"direct": 2.0}}) == {"layer": {"direct": 2.0}}


def test_a_killed_writer_leaves_the_table_whole(tmp_path):
    file = tmp_path / "times.json"
    add_times(file, {"old": {"direct": 1.0}})
    code = (
        "import sys; from pathlib import Path; from fastdiff.backends.times import add_times\n"
        "print('go', flush=True)\n"
        "while True: add_times(Path(sys.argv[1]), {'new' + str(i): {'direct': 2.0} for i in range(2000)})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.3)
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    writer.stdout.close()
    assert read_times(file)["old"] == {"direct": 1.0}
    json.loads(file.read_text())
    add_times(file, {"after": {"direct": 3.0}})
    assert "after" in read_times(file)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"direct": "x"}}', '{"a": {"direct": -1}}'])
def test_a_damaged_table_counts_as_not_measured(tmp_path, text):
    file = tmp_path / "times.json"
    file.write_text(text)
    assert all(not times for times in read_times(file).values())
    add_times(file, {"new": {"direct": 1.0}})
    assert read_times(file)["new"] == {"direct": 1.0}


# --- without it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    build.load.cache_clear()
    yield tmp_path / "cache"
    build.load.cache_clear()


def test_without_a_compiler_plain_torch_runs(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    pipe = fastdiff.Pipeline.from_pretrained("digits")
    assert not isinstance(pipe.network, NativeNetwork)
    assert pipe([1], num_inference_steps=1, seed=0).images
    with pytest.raises(BackendError, match="'native' cannot run here: .* needs a C.. compiler: install g"):
        fastdiff.Pipeline.from_pretrained("digits", backend="native")


def test_a_compiler_that_fails_is_told_in_one_line(fresh, monkeypatch, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'internal error: tired' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(Unavailable, match="internal error: tired"):
        Runtime()
    assert not list(fresh.glob("*.so"))


def test_the_library_is_compiled_once_and_only_into_a_private_folder(fresh):
    Runtime()
    (library,) = fresh.glob("native-*.so")
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    made = library.stat().st_mtime_ns
    build.load.cache_clear()
    Runtime()
    assert library.stat().st_mtime_ns == made
    fresh.chmod(0o777)
    build.load.cache_clear()
    with pytest.raises(Unavailable, match="others may write"):
        Runtime()


def test_processes_that_compile_at_once_do_not_disturb_each_other(fresh):
    code = "from fastdiff.kernels.native import Runtime; Runtime()"
    runs = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(3)]
    assert [run.wait(180) for run in runs] == [0, 0, 0]
    assert [file.suffix for file in fresh.iterdir()] == [".so"]


@pytest.mark.parametrize("backend", ["fast", "onnxruntime"])
def test_an_unknown_backend_for_a_network_in_memory(backend):
    with pytest.raises(BackendError, match=f"backend is '{backend}'; allowed for this model: auto, eager, native"):
        network_of(network("DDPM CIFAR-10", 16), backend)


def test_half_precision_is_not_its_own():
    with pytest.raises(BackendError, match="'native' runs float32 on a CPU; this is torch.bfloat16 on cpu"):
        network_of(network("DDPM CIFAR-10", 16).bfloat16(), "native")
    assert not isinstance(network_of(network("DDPM CIFAR-10", 16).bfloat16()), NativeNetwork)
