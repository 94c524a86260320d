"""Recorded functions, networks and loops, with a recorder of torch's calls in the place of CUDA graphs."""

from __future__ import annotations

import threading

import pytest
import torch
from narrow_unets import error, inputs, network
from recorded import Recorder

import fastdiff
from fastdiff import graph
from fastdiff.backends.eager import UNetNetwork
from fastdiff.backends.flat import FlatNetwork, FlatTrunk, LoopNetwork
from fastdiff.graph import Captured
from fastdiff.sampling.denoiser import Cond


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(graph, "CUDA", made)
    return made


def test_elsewhere_it_is_the_function():
    a = torch.arange(3.0)
    assert torch.equal(Captured(lambda pair, scale: {"sum": sum(pair) * scale})((a, a), 2.0)["sum"], 4 * a)


def test_replays_read_new_tensors_and_results_may_be_kept(recorder):
    captured = Captured(lambda pair, scale: (pair["a"] * scale + pair["b"], pair["a"].sum()))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    first = captured({"a": a, "b": b}, 2.0)
    second = captured({"a": b, "b": a}, 2.0)
    assert len(recorder.graphs) == 1
    assert torch.equal(first[0], a * 2 + b) and torch.equal(second[0], b * 2 + a) and torch.equal(second[1], b.sum())
    captured({"a": a, "b": b}, 3.0)
    captured({"a": a[:1], "b": b[:1]}, 2.0)
    assert len(recorder.graphs) == 3, "another number and another shape are graphs of their own"


def test_what_changed_in_place_is_copied_and_what_did_not_is_not(recorder, monkeypatch):
    captured = Captured(lambda x: x + 1)
    x = torch.zeros(3)
    captured(x)
    copies = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copies.append(1) or original(self, other))
    captured(x)
    unchanged = len(copies)
    x.add_(5)
    assert torch.equal(captured(x), torch.full((3,), 6.0))
    assert len(copies) - unchanged == unchanged + 1  # the replay's own copies, and that of x
    with torch.inference_mode():
        y = torch.ones(3)
        captured(y)
        y.add_(1)
        assert torch.equal(captured(y), torch.full((3,), 3.0)), "inference tensors count no changes"


def test_a_question_to_the_device_is_not_recorded(recorder):
    with pytest.raises(RuntimeError, match="asks the device"):
        Captured(lambda x: x * x.sum().item())(torch.ones(3))


def test_only_so_many_graphs_are_kept(recorder):
    captured = Captured(lambda x: x * 2)
    for size in range(1, graph.GRAPHS + 3):
        captured(torch.ones(size))
    assert len(captured._graphs) == graph.GRAPHS
    captured.forget()
    assert not captured._graphs


def test_threads_take_turns(recorder):
    captured = Captured(lambda x: (x * 2).sum())
    wrong = []

    def run(k: int) -> None:
        for i in range(50):
            if float(captured(torch.full((4,), float(k + i)))) != 8.0 * (k + i):
                wrong.append((k, i))

    threads = [threading.Thread(target=run, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", ["SD 1.5", "SDXL", "DDPM CIFAR-10", "ADM"])
def test_a_captured_trunk_follows_its_inputs(layout, recorder):
    unet = network(layout)
    trunk = FlatTrunk(unet)
    for _ in range(3):
        given = inputs(unet, 2, 16, 16)
        assert error(trunk(*given), unet.trunk(*given)) < 1e-6
    assert len(recorder.graphs) == 1


def test_a_changed_weight_needs_no_new_recording(recorder):
    unet = network()
    flat, given = FlatNetwork(unet), inputs(unet, 1, 16, 16)
    cond = Cond(extra={"encoder_hidden_states": torch.randn(1, 7, unet.config.cross_attention_dim)})
    flat.prepare(cond, torch.tensor([[[500.0, 500.0]]]))
    before = flat.trunk(*given)
    for name, parameter in unet.named_parameters():
        if "attn1.to_v" in name or "conv1.weight" in name:
            parameter.mul_(1.5)
    flat.prepare(cond, torch.tensor([[[500.0, 500.0]]]))
    after = flat.trunk(*given)
    assert error(after, unet.trunk(*given)) < 1e-6 < error(after, before)
    assert len(recorder.graphs) == 1


@pytest.mark.parametrize("sampler, steps", [("flow_map", 4), ("dpmpp_2m", 5), ("ddpm", 4), ("unipc", 5)])
def test_a_whole_loop_is_one_graph(sampler, steps, recorder):
    eager = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    looped = fastdiff.Pipeline.from_pretrained("digits", backend="captured_loop")
    assert isinstance(looped.network, LoopNetwork)
    options = {"num_inference_steps": steps, "sampler": sampler, "output_type": "pt"}
    for labels, seed in (([3, 5], 0), ([7, 1], 9)):
        got, wanted = (pipe(labels, seed=seed, **options).images for pipe in (looped, eager))
        assert (got - wanted).abs().max() < 1e-4
    assert len(recorder.graphs) == 1, "other labels and other noise are copies"
    looped([3, 5], seed=0, **{**options, "num_inference_steps": steps + 1})
    assert len(recorder.graphs) == 2


def test_another_schedule_of_one_structure_is_a_copy(recorder):
    eager = fastdiff.Pipeline.from_pretrained("digits", backend="eager")
    looped = fastdiff.Pipeline.from_pretrained("digits", backend="captured_loop")
    for timesteps in ([900.0, 500.0, 100.0], [800.0, 600.0, 300.0]):
        got, wanted = (
            pipe(3, seed=0, timesteps=timesteps, sampler="ddim", output_type="pt").images for pipe in (looped, eager)
        )
        assert (got - wanted).abs().max() < 1e-4
    assert len(recorder.graphs) == 1


def test_a_weight_that_lies_elsewhere_is_recorded_anew(recorder):
    looped = fastdiff.Pipeline.from_pretrained("digits", backend="captured_loop")
    before = looped(3, seed=0, output_type="pt").images
    weight = looped.network.unet.conv_in.weight
    weight.data = 1.5 * weight.data
    plain = fastdiff.Pipeline(looped.model, UNetNetwork(looped.network.unet), looped.device)
    got, wanted = (pipe(3, seed=0, output_type="pt").images for pipe in (looped, plain))
    assert (got - wanted).abs().max() < 1e-4 < (before - wanted).abs().max()


def test_previews_walk_step_by_step(recorder):
    looped = fastdiff.Pipeline.from_pretrained("digits", backend="captured_loop")
    seen = []
    looped(3, seed=0, callback_on_step_end=lambda *a: seen.append(a[1]))
    assert seen == [0, 1, 2, 3]
    assert len(recorder.graphs) == 1, "the network alone is recorded then"
