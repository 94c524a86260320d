"""Step caching: networks cut at a skip connection, the rows that leave out what lies below, and whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from narrow_unets import error, inputs, network
from native_runtime import runtime_or_skip
from recorded import Recorder

import fastdiff
from fastdiff import graph
from fastdiff.backends.flat import FlatTrunk
from fastdiff.backends.in_memory import network_of
from fastdiff.backends.native import NativeTrunk
from fastdiff.benchmarks import step_cache
from fastdiff.benchmarks.layouts import SD15, scaled
from fastdiff.built.tables import from_json, to_json
from fastdiff.engine import Engine
from fastdiff.errors import ArtifactError, PlanError, ShapeError
from fastdiff.models.files import read_json
from fastdiff.sampling.loop import State
from fastdiff.sampling.run import ready
from fastdiff.sampling.table import merge

STEPS = {"num_inference_steps": 8, "sampler": "dpmpp_2m", "output_type": "pt"}


def native(unet):
    runtime_or_skip()
    return NativeTrunk(unet)


@pytest.mark.parametrize("layout", ["SD 1.5", "SDXL", "SD x4 upscaler", "DDPM CIFAR-10", "ADM"])
def test_a_cut_network_with_its_own_features_is_the_whole_one(layout):
    unet = network(layout).double()
    x, rows, contexts = inputs(unet.float(), 2, 16, 16)
    unet.double()
    given = x.double(), rows.double(), [(k.double(), v.double()) for k, v in contexts]
    whole = unet.trunk(*given)
    for branch in (0, 1, len(unet.skips) // 2, len(unet.skips) - 1):
        for trunk in (unet, FlatTrunk(unet)):
            out, deep = trunk.parted(*given, branch)
            assert error(out, whole) < 1e-13
            assert error(trunk.shallow(*given, branch, deep), whole) < 1e-13


@pytest.mark.parametrize("make", [FlatTrunk, native], ids=["flat", "native"])
def test_plans_read_the_features_that_they_are_given(make):
    unet = network()
    trunk, given = make(unet), inputs(unet, 2, 16, 16)
    for branch in (0, 1, 3, 8, 11):
        (whole, deep), (_, same) = unet.parted(*given, branch), trunk.parted(*given, branch)
        assert error(same, deep) < 1e-5
        other = 10 * torch.randn_like(deep)
        wanted = unet.shallow(*given, branch, other)
        assert error(trunk.shallow(*given, branch, other), wanted) < 1e-5 < error(whole, wanted)
    with pytest.raises(ShapeError, match="deep is"):
        trunk.shallow(*given, 0, deep[:, :-1])


def test_fewer_layers_run_the_shallower_the_cut():
    unet = network()
    given, counts = inputs(unet, 1, 16, 16), []
    for branch in range(len(unet.skips)):
        _, deep = unet.parted(*given, branch)
        ran = []
        hooks = [m.register_forward_hook(lambda *_, ran=ran: ran.append(1)) for m in unet.modules()]
        unet.shallow(*given, branch, deep)
        counts.append(len(ran))
        for hook in hooks:
            hook.remove()
    assert counts == sorted(counts) and counts[0] * 4 < counts[-1]


def rows_of(**options):
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    return [row.deep for row in pipe.ready(3, seed=0, **options).table.structure.rows]


def test_rows_say_when_deep_layers_are_left_out():
    kinds = ["-" if deep is None else "r" if deep.reads else "k" for deep in rows_of(
        num_inference_steps=8, sampler="dpmpp_2m", cache_interval=3)]  # fmt: skip
    assert "".join(kinds) == "krrkrrkr"
    assert rows_of(num_inference_steps=4, cache_interval=1, cache_branch_id=2) == [None] * 4
    # the fourth row would start anew and nothing would read it: it is a plain one
    kinds = rows_of(num_inference_steps=4, sampler="ddim", cache_interval=3)
    assert kinds[-1] is None and [deep.reads for deep in kinds[:3]] == [False, True, True]


def test_the_first_guided_row_runs_whole():
    """What an unguided row kept has no features of the weak half; the other way round the strong half's are read."""
    unet = network("DDPM CIFAR-10")
    taken = network_of(unet, "eager")
    halves = {"cond": fastdiff.Cond(), "uncond": fastdiff.Cond(), "guidance_scale": 2.0, "seed": 0}
    run = ready(taken, (1, 3, 16, 16), num_inference_steps=6, cache_interval=6, guidance_interval=(0.3, 2.0), **halves)
    rows = run.table.structure.rows
    guided = [row.guided is not None for row in rows]
    first = guided.index(True)
    assert not guided[0] and not guided[-1] and 0 < first
    assert [row.deep is None or not row.deep.reads for row in rows] == [i in (0, first) for i in range(len(rows))]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0, 1)}],
                         ids=["unguided", "guided", "interval"])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "captured", "captured_loop"])
def test_every_backend_computes_the_same(backend, options, monkeypatch):
    made = Recorder()
    if backend != "auto":
        monkeypatch.setattr(graph, "CUDA", made)
    pipes = [fastdiff.Pipeline.from_pretrained("digits", backend=name) for name in ("eager", backend)]
    for labels, seed in (([3, 5], 0), ([7, 1], 9)):
        whole, wanted, got = (
            pipe(labels, seed=seed, cache_interval=interval, cache_branch_id=2, **STEPS, **options).images
            for pipe, interval in ((pipes[0], 1), (pipes[0], 2), (pipes[1], 2))
        )
        assert (got - wanted).abs().max() < 1e-4 < (whole - wanted).abs().max()
    if backend == "captured_loop":
        assert len(made.graphs) == 1, "both kinds of rows lie in one graph"


def test_an_image_does_not_depend_on_its_batch():
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    together = pipe([3, 5], seed=[1, 2], cache_interval=3, **STEPS).images
    alone = pipe(5, seed=2, cache_interval=3, **STEPS).images
    assert (together[1:] - alone).abs().max() < 1e-4


def test_a_run_goes_on_from_its_state():
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    told = {"num_inference_steps": 6, "sampler": "ddim", "seed": 1, "cond": fastdiff.Cond(torch.tensor([4])),
            "path": pipe.path, "prediction": pipe.prediction, "cache_interval": 3}  # fmt: skip
    states: list[State] = []
    whole = fastdiff.sample(pipe.network, (1, 1, 32, 32), **told, callback=lambda i, t, s: states.append(s))
    assert states[0].deep is not None and states[-1].deep is not None
    again = fastdiff.sample(pipe.network, (1, 1, 32, 32), **told, resume=(2, states[1]))
    assert torch.equal(whole, again)


def test_what_cannot_leave_layers_out_says_so():
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    for options, message in (
        ({"cache_interval": 0}, "cache_interval is 0; allowed: whole numbers from 1"),
        ({"cache_interval": 2.5}, "cache_interval is 2.5"),
        ({"cache_interval": 2, "cache_branch_id": 8}, "cache_branch_id is 8; allowed for this network: 0 to 7"),
        ({"cache_interval": 2, "guide": pipe, "guidance_scale": 2.0}, "cache_interval and guide"),
    ):
        with pytest.raises(PlanError, match=message):
            pipe(3, seed=0, **options)
    with pytest.raises(PlanError, match="CallableNetwork cannot leave out"):
        fastdiff.sample(lambda x, t: x, (1, 1, 8, 8), cache_interval=2, seed=0)


def test_an_exported_table_has_no_deep_features():
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    for interval in (1, 2):
        table = pipe.ready(3, seed=0, num_inference_steps=4, cache_interval=interval, guidance_scale=1.0).table
        told = json.loads(json.dumps(to_json(table.structure)))
        if interval == 1:
            assert from_json(told, table.values, "a table").structure == table.structure
        else:
            with pytest.raises(ArtifactError, match="a row keeps deep features"):
                from_json(told, table.values, "a table")


def test_images_at_different_steps_cannot_share_what_is_kept():
    pipe = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    rows = pipe.ready(3, seed=0, num_inference_steps=4, cache_interval=2).table.structure.rows
    with pytest.raises(PlanError, match="cannot share an evaluation"):
        merge(rows[:2])
    with Engine(pipe, max_batch=2) as engine, pytest.raises(PlanError, match="step caching"):
        engine.submit(3, seed=0, num_inference_steps=4, cache_interval=2).result()


def test_the_benchmark_counts_and_keeps_what_it_had(tmp_path, monkeypatch):
    shares = list(step_cache.operations(scaled(SD15, 8), 16).values())
    assert shares == sorted(shares) and 0 < shares[0] < 0.2 and shares[-1] < 1
    monkeypatch.setattr(step_cache, "CASES", {("ddim", 3): ((2,), ((2, 0),))})
    monkeypatch.setattr(step_cache, "COUNTED", {})
    monkeypatch.setattr(step_cache, "evaluation", lambda rounds: {})
    monkeypatch.setattr(step_cache, "judged", lambda images, labels: {"samples": len(images)})
    file = tmp_path / "found.json"
    step_cache.main(["--out", str(file), "--rounds", "0", "--samples", "4"])
    step_cache.main(["--out", str(file), "--rounds", "1", "--samples", "0"])
    found = read_json(file)["digits"]
    assert list(found) == ["ddim 3 steps", "ddim 2 steps", "ddim 3 steps, interval 2, branch 0"]
    assert found["ddim 3 steps"]["error"] == 0 < found["ddim 3 steps, interval 2, branch 0"]["error"]
    assert all(figures["samples"] == 4 and figures["ms"] > 0 for figures in found.values())
