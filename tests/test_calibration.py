"""Fitted few-step samplers: better than what they start from, judged apart, and bound to their network."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from small import make_folder

import fastdiff
from fastdiff.calibration import Calibration, calibrate, classical, fit, run
from fastdiff.calibration.fit import Progress, columns
from fastdiff.calibration.parameters import Parameters, names
from fastdiff.calibration.run import Settings
from fastdiff.calibration.teacher import follow
from fastdiff.calibration.walking import Family, Goal
from fastdiff.cli import main
from fastdiff.engine import engine
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.sampling.analytic import Mixture, network
from fastdiff.sampling.parts import initial_scale, make_solver
from fastdiff.sampling.path import PATHS, RectifiedFlow
from fastdiff.sampling.prediction import PREDICTIONS, Velocity
from fastdiff.sampling.solvers import non_stationary

LITTLE = Settings(samples=64, held_out=64, batch_size=32, teacher_steps=64, iterations=4, share=64)
SHAPE = (1, 2, 3)


@pytest.fixture(autouse=True)
def _few_grids(monkeypatch):
    """The whole list of classical samplers takes seconds to go through."""
    kept = ("uniform", "karras", "trailing", "shifted", "log_snr")
    monkeypatch.setattr(classical, "grids", lambda family: {name: classical.GRIDS[name] for name in kept})


@functools.cache
def data() -> Mixture:
    draw = torch.Generator().manual_seed(1)
    return Mixture(torch.randn(4, *SHAPE, generator=draw), 0.6, torch.tensor([0.4, 0.3, 0.2, 0.1]))


def function(path="straight", prediction="velocity"):
    return network(data(), PATHS[path](), PREDICTIONS[prediction])


@functools.cache
def straight(**changes) -> Calibration:
    return calibrate(function(), SHAPE, steps=(3, 5), settings=LITTLE._replace(**changes))


@pytest.mark.parametrize(("path", "prediction"), [("straight", "velocity"), ("linear", "eps"), ("edm", "edm")])
def test_it_beats_the_classical_samplers_on_other_noise(path, prediction):
    fn = function(path, prediction)
    found = calibrate(fn, SHAPE, steps=(4,), path=path, prediction=prediction, settings=LITTLE)
    given = {"path": path, "prediction": prediction}
    sampler = found.sampler(PATHS[path](), PREDICTIONS[prediction])

    def error(first: int, count: int, **options) -> float:
        seeds, shape = list(range(first, first + count)), (count, *SHAPE)
        truth = fastdiff.sample(fn, shape, num_inference_steps=400, sampler="dpmpp_3m", seed=seeds, **given)
        x = fastdiff.sample(fn, shape, num_inference_steps=4, seed=seeds, **options)
        return float((x - truth).square().mean().sqrt() / truth.square().mean().sqrt())

    theirs = min(error(10**6, 128, sampler=name, **given) for name in ("dpmpp_2m", "unipc", "ddim"))
    assert found.fitted[4].calibrated and error(10**6, 128, sampler=sampler) < 0.7 * theirs
    # what the file says is what others see on the same noise
    assert error(run.HELD_OUT, 64, sampler=sampler) == pytest.approx(found.fitted[4].error, rel=0.1)


def test_a_fit_starts_at_the_classical_sampler():
    family = Family(RectifiedFlow(), Velocity())
    solver, times = make_solver("unipc", {}), (1.0, 0.7, 0.45, 0.2, 0.0)
    walk = classical.non_stationary(solver.rows(family.path, times), times)
    start = Parameters.of(family.path, solver, walk)
    assert start.walk().times == pytest.approx(times, rel=1e-12)
    assert start.corrections == pytest.approx(0, abs=1e-12)
    for mine, theirs in zip(start.walk().weights, walk.weights, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)


def test_the_columns_are_derivatives(monkeypatch):
    """Against differences of the end itself, at some weights, the scale and each time."""
    monkeypatch.setattr(fit, "TIME_NUDGE", 1e-2)  # a fit takes more, as networks are rough in time
    family, begin = Family(RectifiedFlow(), Velocity()), run._begin(function(), SHAPE, None, [1, 2], {})
    solver, times = make_solver("dpmpp_2m", {}), (1.0, 0.7, 0.45, 0.2, 0.0)
    at = Parameters.of(family.path, solver, classical.non_stationary(solver.rows(family.path, times), times))
    truth = follow([begin], family, 64, 0, lambda calls: None)[0].end
    goal = Goal([begin], [truth], family)
    rises, lack = columns(goal, 0, at, 1e-3)
    end = (truth.flatten(1) - lack.view_as(truth).flatten(1)).flatten()
    weights = len(names(4))
    assert rises.shape == (12, weights + 1 + 4)

    def after(change, size: float) -> torch.Tensor:
        moved = columns(goal, 0, change, 1e-3)[1]
        return ((truth.flatten() - moved).flatten() - end) / size

    for index in (0, 3, weights - 1, weights):  # weights of the first and last row, and the scale
        step = np.zeros(weights + 1 + 4)
        step[index] = 1e-3
        expected = after(at.moved(step), 1e-3)
        assert (expected - rises[:, index]).abs().max() < 0.02 * rises[:, index].abs().max() + 1e-3
    for k in range(4):  # times alone, the weights staying as they are
        angles = at.angles - 1e-3 * np.eye(4)[k]
        moved = dataclasses.replace(
            at, angles=angles, corrections=at.corrections + at.theory(at.angles) - at.theory(angles)
        )
        column = rises[:, weights + 1 + k]
        assert (after(moved, -1e-3) - column).abs().max() < 0.02 * column.abs().max() + 1e-3


def test_features_count_beside_the_images():
    """Where the first value alone is a feature, the fit is drawn towards it."""
    plain = straight().fitted[3]
    told = calibrate(function(), SHAPE, steps=(3,), settings=LITTLE, features=lambda x: x[:, :, :1, :1]).fitted[3]
    assert told.times != plain.times
    seeds, shape = list(range(64)), (64, *SHAPE)  # those that were fitted
    truth = fastdiff.sample(function(), shape, num_inference_steps=400, sampler="dpmpp_3m", seed=seeds)

    def wrong(fitted) -> float:
        found = dataclasses.replace(straight(), fitted={3: fitted}).sampler(RectifiedFlow(), Velocity())
        x = fastdiff.sample(function(), shape, sampler=found, num_inference_steps=3, seed=seeds)
        return float((x - truth)[:, :, 0, 0].square().mean())

    assert wrong(told) < wrong(plain)


def test_the_same_seed_gives_the_same_file(tmp_path):
    again = calibrate(function(), SHAPE, steps=(3, 5), settings=LITTLE)
    straight().save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Calibration.load(tmp_path / "a.json") == again


def test_what_does_not_beat_the_classical_sampler_is_thrown_away(monkeypatch):
    def spoiled(goal, start, **options):
        yield Progress(dataclasses.replace(start, corrections=start.corrections + 0.3), 0.0, 1.0, 1)

    monkeypatch.setattr(run, "fit", spoiled)
    one = calibrate(function(), SHAPE, steps=(4,), settings=LITTLE).fitted[4]
    assert not one.calibrated and one.error == one.classical_error < one.fitted_error


def test_a_fit_that_gets_nowhere_begins_at_another_sampler(monkeypatch):
    """And one that gets somewhere ends the search."""
    real, begun = fit.fit, []

    def first_fails(goal, start, **options):
        begun.append(start)
        if len(begun) > 1:
            yield from real(goal, start, **options)

    monkeypatch.setattr(run, "fit", first_fails)
    one = calibrate(function(), SHAPE, steps=(4,), settings=LITTLE).fitted[4]
    assert len(begun) == 2 and one.calibrated and one.error < one.classical_error
    assert begun[0].walk() != begun[1].walk()


def test_an_interrupted_calibration_goes_on(tmp_path):
    file = tmp_path / "c.json"

    def stop(share, what):
        if what.startswith("5 steps: classical"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(function(), SHAPE, steps=(3, 5), settings=LITTLE, out=file, report=stop)
    assert sorted(Calibration.load(file).fitted) == [3]
    calibrate(function(), SHAPE, steps=(3, 5), settings=LITTLE, out=file)
    assert Calibration.load(file) == straight()
    with pytest.raises(ArtifactError, match="other settings"):
        calibrate(function(), SHAPE, steps=(3, 5), settings=LITTLE._replace(seed=1), out=file)


def test_the_number_of_steps_is_chosen_by_a_tolerance():
    found = straight()
    three, five = found.fitted[3].error, found.fitted[5].error
    assert five < three
    assert found.steps(None) == 5 and found.steps(3) == 3
    assert found.steps("auto", three * 1.01) == 3 and found.steps("auto", five * 1.01) == 5
    for asked, tolerance, said in ((4, None, "has 3, 5"), ("auto", None, "tolerance"), ("auto", five / 2, "errors by")):
        with pytest.raises(PlanError, match=said):
            found.steps(asked, tolerance)


def test_other_paths_and_predictions_are_refused():
    with pytest.raises(PlanError, match="RectifiedFlow"):
        straight().sampler(PATHS["linear"](), Velocity())
    with pytest.raises(PlanError, match="'velocity'"):
        straight().sampler(RectifiedFlow(), PREDICTIONS["x0"])
    sampler = straight().sampler(RectifiedFlow(), Velocity())
    with pytest.raises(PlanError, match="takes no timesteps"):
        fastdiff.sample(function(), (1, *SHAPE), sampler=sampler, num_inference_steps=3, timesteps=[3, 2])
    with pytest.raises(PlanError, match="whole"):
        fastdiff.sample(
            function(), (1, *SHAPE), sampler=sampler, num_inference_steps=3, image=torch.zeros(1, *SHAPE), strength=0.6
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 1"),
        ({"samples": None, "more": 1}, "damaged"),
        ({"prediction": "magic"}, "damaged"),
        ({"guidance_scale": [2, 1]}, "damaged"),
        ({"fitted": {"3": {}}}, "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, said):
    file = tmp_path / "c.json"
    straight().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ArtifactError, match=said):
        Calibration.load(file)


@pytest.mark.parametrize("spoil", ["nan", "register", "rises", "short", "scale"])
def test_damaged_entries_are_refused(tmp_path, spoil):
    file = tmp_path / "c.json"
    straight().save(file)
    values = json.loads(file.read_text())
    entry = values["fitted"]["3"]
    if spoil == "nan":
        entry["weights"][1]["denoised"] = math.inf
    elif spoil == "register":
        entry["weights"][0]["h3"] = 1.0
    elif spoil == "rises":
        entry["times"][1] = 2.0
    elif spoil == "scale":
        entry["scale"] = -1.0
    else:
        entry["times"] = entry["times"][1:]
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="damaged"):
        Calibration.load(file)


def test_a_file_without_scales_starts_at_the_paths_own(tmp_path):
    file = tmp_path / "c.json"
    straight().save(file)
    values = json.loads(file.read_text())
    for entry in values["fitted"].values():
        del entry["scale"]
    file.write_text(json.dumps(values))
    assert [one.scale for one in Calibration.load(file).fitted.values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": (1,)}, "steps are"),
        ({"settings": LITTLE._replace(teacher_steps=8)}, "teacher_steps is 8"),
        ({"settings": LITTLE._replace(samples=3)}, "samples and held_out are 3"),
        ({"guidance_scale": (3.0, 1.0)}, "least and the largest"),
        ({"settings": LITTLE._replace(iterations=0)}, "iterations is 0"),
    ],
)
def test_settings_that_make_no_calibration_are_refused(given, said):
    with pytest.raises(PlanError, match=said):
        calibrate(function(), SHAPE, **{"steps": (3,), "settings": LITTLE} | given)


def test_a_network_needs_a_shape():
    with pytest.raises(PlanError, match="shape is None"):
        calibrate(function(), settings=LITTLE)


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small class-conditional model with its calibration beside it, guided by 1 to 2."""
    folder = make_folder(tmp_path_factory.mktemp("calibrated") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classical, "grids", lambda family: {name: classical.GRIDS[name] for name in ("uniform",)})
        few = Settings(samples=16, held_out=16, batch_size=8, teacher_steps=32, iterations=1, share=8)
        pipe = fastdiff.Pipeline.from_pretrained(folder)
        calibrate(pipe, steps=(3, 4), guidance_scale=(1.0, 2.0), settings=few, out=folder / "calibration.json")
    return folder


def test_by_name_it_is_what_lies_in_the_folder(model):
    pipe = fastdiff.Pipeline.from_pretrained(model)
    seen = []
    given = {"seed": 3, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe([0, 2], sampler="calibrated", callback_on_step_end=lambda *a: seen.append(a[1]), **given).images
    found = Calibration.load(model / "calibration.json")
    assert len(seen) == 4  # the most accurate unless told otherwise
    sampler = found.sampler(*pipe.trained())
    assert torch.equal(images, pipe([0, 2], sampler=sampler, num_inference_steps=4, **given).images)
    alone = pipe(2, sampler="calibrated", **given | {"seed": 4}).images
    assert torch.allclose(alone[0], images[1], atol=1e-5)
    with pytest.raises(PlanError, match="made for 1 to 2"):
        pipe(0, sampler="calibrated", guidance_scale=2.5)


def test_the_starting_noise_has_the_fitted_scale(model, tmp_path):
    """In a pipeline and in an engine alike."""
    file, louder = model / "calibration.json", tmp_path / "louder.json"
    values = json.loads(file.read_text())
    values["fitted"]["3"]["scale"] = 1.25
    louder.write_text(json.dumps(values))
    pipe = fastdiff.Pipeline.from_pretrained(model)
    sampler, given = pipe.load_calibration(louder), {"num_inference_steps": 3, "output_type": "pt"}
    drawn = pipe(1, sampler=sampler, seed=5, **given).images
    family = Family(*pipe.trained())
    usual = pipe.ready([1], sampler="ddim", seed=[5], num_inference_steps=3).state.x  # of deviation 1 here
    scale = 1.25 * initial_scale(family.path, sampler.plan(3).times[0])
    same = pipe(1, sampler=sampler, latents=usual * scale, **given).images
    assert torch.allclose(drawn, same, atol=1e-6)
    with fastdiff.Engine(pipe) as running:
        served = running.submit(1, sampler=sampler, seed=5, num_inference_steps=3).result()
    crop = pipe.model.info.crop
    picture = (served.clamp(-1, 1) / 2 + 0.5)[..., crop : served.shape[-2] - crop, crop : served.shape[-1] - crop]
    assert torch.allclose(picture, drawn[0], atol=1e-5)


def test_another_network_is_refused_unless_forced(model, tmp_path):
    other = fastdiff.Pipeline.from_pretrained(make_folder(tmp_path / "other", seed=1))
    with pytest.raises(ArtifactError, match="calibration is of the network .* the network here is"):
        other.load_calibration(model / "calibration.json")
    with pytest.raises(ArtifactError, match="no such file"):
        other(0, sampler="calibrated")
    other.load_calibration(model / "calibration.json", force=True)
    assert other(0, sampler="calibrated", num_inference_steps=3, output_type="pt").images.isfinite().all()


def test_an_engine_has_as_many_registers_as_the_longest_calibrated_walk_reads():
    assert non_stationary.MAX_HISTORY <= engine.MAX_HISTORY


def test_the_engine_runs_it_beside_others(model):
    pipe = fastdiff.Pipeline.from_pretrained(model)
    with fastdiff.Engine(pipe) as running:
        tickets = [running.submit(i % 3, sampler=name, seed=i, num_inference_steps=4)
                   for i, name in enumerate(("calibrated", "unipc", "calibrated", "ddim"))]  # fmt: skip
        together = [ticket.result() for ticket in tickets]
        alone = running.submit(2, sampler="calibrated", seed=2, num_inference_steps=4).result()
    assert torch.equal(together[2], alone)


def test_it_is_exported_fused(model, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    file = tmp_path / "fused.onnx"
    arguments = ["--model", str(model), "--fuse-sampler", "3", "--sampler", "calibrated", "--out", str(file)]
    assert main(["export", *arguments]) == 0
    session = ort.InferenceSession(str(file))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    name = next(given.name for given in session.get_inputs() if given.name != "noise")
    found = session.run(None, {"noise": noise.numpy(), name: labels.numpy()})[0]
    pipe = fastdiff.Pipeline.from_pretrained(model)
    scale = pipe.load_calibration().plan(3).initial_scale
    images = pipe([0, 2], sampler="calibrated", num_inference_steps=3, latents=noise * scale, output_type="pt").images
    assert (torch.from_numpy(found).clamp(-1, 1) / 2 + 0.5 - images).abs().max() < 1e-4


def test_the_command_writes_a_file_and_draws_by_it(model, tmp_path, capsys):
    out = tmp_path / "c.json"
    small = ["--samples", "8", "--held-out", "8", "--batch-size", "8", "--teacher-steps", "16", "--iterations", "1"]
    assert main(["calibrate", "--model", str(model), "--steps", "3", "--out", str(out), *small, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    found = Calibration.load(out)
    assert facts["steps"]["3"]["error"] == found.fitted[3].error and found.guidance_scale == (1.0, 1.0)
    asked = ["--sampler", "calibrated", "--calibration", str(out), "--steps", "3", "--class-labels", "1"]
    assert main(["generate", "--model", str(model), *asked, "--out", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    capsys.readouterr()
    assert main(["calibrate", "--model", str(model), "--steps", "3,x", "--out", str(out)]) == 2
    assert "--steps is '3,x'" in capsys.readouterr().err


def test_its_times_go_into_diffusers(model):
    diffusers = pytest.importorskip("diffusers")
    sampler = fastdiff.Pipeline.from_pretrained(model).load_calibration()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sampler.sigmas(4))
    assert scheduler.timesteps.tolist() == pytest.approx(sampler.timesteps(4), rel=1e-5)
    assert dataclasses.asdict(sampler.calibration.fitted[4])["times"][0] == pytest.approx(sampler.sigmas(4)[0])
