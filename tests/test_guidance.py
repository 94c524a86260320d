"""Each rule of guidance is its published formula, costs the evaluations it must, and shares a batch with the others."""

from __future__ import annotations

import math

import pytest
import torch
from small import make_model
from tolerances import assert_no_worse_than
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import cli
from fastdiff.backends.eager import UNetNetwork
from fastdiff.errors import PlanError, ShapeError
from fastdiff.pipeline import Pipeline
from fastdiff.sampling import APG, CFG, CFGPlusPlus, CFGZeroStar, Cond, DynamicThreshold, sample
from fastdiff.sampling.denoiser import CallableNetwork, NetworkDenoiser
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.loop import State, advance, iterate
from fastdiff.sampling.loop import sample as walk
from fastdiff.sampling.parts import plan
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.prediction import PREDICTIONS, X0, Velocity
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.table import build, merge

PATH, SHAPE, SCALE = RectifiedFlow(), (3, 2, 5, 3), 3.5
ASKED, NOTHING = torch.tensor([1, 2, 4]), torch.zeros(3, dtype=torch.int64)
COND, UNCOND = Cond(ASKED), Cond(NOTHING)
KEEP = DDIM(keep_noise=True)
RULES = {
    "cfg": (CFG(), DDIM(), 0.0),
    "cfg, rescaled": (CFG(), DDIM(), 0.7),
    "cfg++": (CFGPlusPlus(), KEEP, 0.0),
    "apg": (APG(momentum=-0.5, norm_threshold=2.0, eta=0.3), DDIM(), 0.0),
    "cfg-zero*": (CFGZeroStar(zero_init_steps=1), DDIM(), 0.4),
}


def network(x, timestep, class_labels):
    """A smooth stand-in for a trained network; its label moves and bends what it says."""
    label = class_labels.to(x.dtype)[:, None, None, None]
    return torch.tanh(0.7 * x + 0.3 * label) * (0.4 + 0.2 * label) - 0.1 * label


def start(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def ours(rule, solver, rescale, prediction, dtype, steps=4, scale=SCALE):
    options = {"guidance": scale, "rule": rule, "rescale": rescale, "dtype": dtype}
    table = build(PATH, prediction, solver, uniform(PATH, steps), **options)
    denoiser, prepared = plan(CallableNetwork(network), COND, UNCOND, table)
    return walk(denoiser, start(dtype), table, None, prepared)


# Parity with diffusers

GUIDERS = {
    "cfg": (CFG(), 0.0, X0(), "ClassifierFreeGuidance", {}),
    "cfg on the velocity, rescaled": (CFG(), 0.7, Velocity(), "ClassifierFreeGuidance", {"guidance_rescale": 0.7}),
    "apg": (
        APG(-0.5, 2.0, 0.3), 0.0, X0(), "AdaptiveProjectedGuidance",
        {"adaptive_projected_guidance_rescale": 2.0, "eta": 0.3},
    ),
    "apg without a bound": (
        APG(0.6, None, 0.0), 0.0, X0(), "AdaptiveProjectedGuidance",
        {"adaptive_projected_guidance_rescale": 0.0, "eta": 0.0},
    ),
    "cfg-zero*": (
        CFGZeroStar(zero_init_steps=2), 0.0, Velocity(), "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2},
    ),
    "cfg-zero*, rescaled": (
        CFGZeroStar(zero_init_steps=0), 0.4, X0(), "ClassifierFreeZeroStarGuidance",
        {"zero_init_steps": 0, "guidance_rescale": 0.4},
    ),
}  # fmt: skip


def theirs(name, rule, prediction, options, dtype, steps=4):
    """Euler's method on the straight path, guided by an object of diffusers."""
    guiders = pytest.importorskip("diffusers.guiders", reason="parity needs diffusers")
    if isinstance(rule, APG):  # its other form mixes from the unconditional estimate, which is not the paper's
        guider = guiders.AdaptiveProjectedGuidance(SCALE - 1, use_original_formulation=True, **options)
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

        guider.momentum_buffer = MomentumBuffer(rule.momentum)
    else:
        guider = getattr(guiders, name)(SCALE, **options)
    x, times = start(dtype), uniform(PATH, steps)
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        guider.set_state(i, steps, torch.tensor(t))
        conditional, unconditional = (network(x, None, label) for label in (ASKED, NOTHING))
        output = guider.forward(conditional, unconditional).pred
        velocity = output if isinstance(prediction, Velocity) else (x - output) / t
        x = x + (s - t) * velocity
    return x


@pytest.mark.parametrize("case", GUIDERS)
def test_guidance_is_that_of_diffusers(case):
    rule, rescale, prediction, name, options = GUIDERS[case]
    truth = ours(rule, DDIM(), rescale, prediction, torch.float64)
    reference = theirs(name, rule, prediction, options, torch.float64)
    # the scale of CFG-Zero* is float32 there whatever it is given
    assert torch.allclose(truth, reference, rtol=0, atol=1e-6 if isinstance(rule, CFGZeroStar) else 1e-12)
    plain = ours(CFG(), DDIM(), 0.0, prediction, torch.float64)
    assert case == "cfg" or (truth - plain).abs().max() > 0.01  # the rule does something here
    single = ours(rule, DDIM(), rescale, prediction, torch.float32)
    assert_no_worse_than(single, theirs(name, rule, prediction, options, torch.float32), truth)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("most", [1.0, 1.5, math.inf])
def test_dynamic_thresholding_is_that_of_diffusers(ratio, most):
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=min(most, 1e9)
    )
    x = 3 * start(torch.float32) * torch.tensor([0.1, 1.0, 2.0])[:, None, None, None]  # the first needs no threshold
    got = sample(
        lambda x, timestep: x, SHAPE, latents=x, num_inference_steps=1, sampler="ddim", prediction="x0",
        clip=DynamicThreshold(ratio, most),
    )  # fmt: skip
    assert_no_worse_than(got, scheduler._threshold_sample(x), scheduler._threshold_sample(x.double()))
    assert torch.equal(got[0], x[0]) and not torch.equal(got[1], x[1])


# What has no counterpart there


def test_cfg_plus_plus_takes_the_noise_from_the_unconditional_estimate():
    x = start()
    times = uniform(PATH, 4)
    for t, s in zip(times, times[1:], strict=False):
        conditional, unconditional = (network(x, None, label) for label in (ASKED, NOTHING))
        noise = (x - (1 - t) * unconditional) / t
        x = (1 - s) * (unconditional + 0.6 * (conditional - unconditional)) + s * noise
    got = ours(CFGPlusPlus(), KEEP, 0.0, X0(), torch.float64, scale=0.6)
    assert torch.allclose(got, x, rtol=0, atol=1e-13)
    assert (got - ours(CFG(), DDIM(), 0.0, X0(), torch.float64, scale=0.6)).abs().max() > 0.01


def test_a_weaker_network_takes_the_place_of_the_unconditional_one():
    calls = []

    def weak(x, timestep, class_labels):
        calls.append((x.shape[0], class_labels.tolist()))
        return 0.5 * x

    x = start(torch.float32)
    got = sample(
        network, SHAPE, latents=x, num_inference_steps=1, sampler="ddim", prediction="x0", cond=COND, guide=weak,
        guidance_scale=2.0,
    )  # fmt: skip
    assert torch.allclose(got, 0.5 * x + 2 * (network(x, None, ASKED) - 0.5 * x), atol=1e-5)
    assert calls == [(3, ASKED.tolist())]  # it is told the same


def test_a_negative_conditioning_is_what_uncond_is():
    def spoken(x, timestep, prompt, class_labels):
        return network(x, timestep, class_labels) + prompt[:, None, None, None]

    good, bad = Cond(ASKED, {"prompt": torch.tensor([1.0, 2.0, 3.0])}), Cond(NOTHING + 9, {"prompt": -torch.ones(3)})
    x = start(torch.float32)
    options = {"latents": x, "num_inference_steps": 1, "sampler": "ddim", "prediction": "x0"}
    got = sample(spoken, SHAPE, cond=good, uncond=bad, guidance_scale=2.0, **options)
    wanted, unwanted = (
        network(x, None, ASKED) + good.extra["prompt"][:, None, None, None],
        network(x, None, bad.label) - 1,
    )
    assert torch.allclose(got, unwanted + 2 * (wanted - unwanted), atol=1e-5)


def test_a_constant_or_empty_output_makes_no_nan():
    for case, (rule, solver, rescale) in RULES.items():
        table = build(PATH, Velocity(), solver, uniform(PATH, 3), guidance=SCALE, rule=rule, rescale=rescale)
        denoiser, prepared = plan(CallableNetwork(lambda x, timestep: torch.zeros_like(x)), Cond(), Cond(), table)
        assert torch.isfinite(walk(denoiser, torch.zeros(SHAPE), table, None, prepared)).all(), case


# Cost


def counted(sizes, **options):
    def counting(x, timestep, class_labels):
        sizes.append(x.shape[0])
        return network(x, timestep, class_labels)

    options = {"num_inference_steps": 4, "sampler": "ddim", "seed": 0, "cond": COND, "uncond": UNCOND} | options
    return sample(counting, SHAPE, **options)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"guidance_scale": 1.0}, [3, 3, 3, 3]),
        ({"guidance_scale": 2.0}, [6, 6, 6, 6]),
        # the levels are t / (1 - t): infinity, 3, 1, 1/3; the upper bound belongs to the interval
        ({"guidance_scale": 2.0, "guidance_interval": (0.5, 3.0)}, [3, 6, 6, 3]),
        ({"guidance_scale": 2.0, "guidance_interval": (1.0, math.inf)}, [6, 6, 3, 3]),
        ({"guidance_scale": [1.0, 1.0, 2.0], "guidance_interval": (0.5, 3.0)}, [3, 6, 6, 3]),
        ({"guidance_scale": [1.0, 1.0, lambda t: 2.0 if t > 0.6 else 1.0]}, [6, 6, 3, 3]),
        ({"guidance_scale": 2.0, "guidance": CFGZeroStar(zero_init_steps=2)}, [6, 6]),
        ({"guidance_scale": 1.0, "guidance": "cfg_pp", "sampler": KEEP, "prediction": "x0"}, [6, 6, 6, 6]),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # an address is another in every worker
)
def test_the_network_runs_no_row_more_than_it_must(options, rows):
    sizes = []
    counted(sizes, **options)
    assert sizes == rows


def test_rows_outside_the_interval_are_not_guided():
    inside, outside = (counted([], guidance_scale=2.0, guidance_interval=i) for i in ((0.5, 3.0), (0.0, math.inf)))
    by_time = counted([], guidance_scale=lambda t: 2.0 if 0.4 < t < 0.8 else 1.0)
    assert torch.equal(inside, by_time) and not torch.equal(inside, outside)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.calls += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 19), (2.0, 26)], ids=["plain", "guided"])
def test_a_row_costs_the_host_no_more_calls_than_its_arithmetic(scale, calls):
    """Four for the estimate and fifteen for the two terms of DDIM's sum; guided, seven more to join, part and mix."""

    class Silent:
        def __call__(self, x, row_index, prepared):
            return x

    counts = []
    for steps in (4, 5):
        table = build(PATH, Velocity(), DDIM(), uniform(PATH, steps), guidance=scale)
        x = torch.zeros(1, 1, 4, 4)
        with Count() as count:
            walk(NetworkDenoiser(Silent()), x, table, None, None)
        counts.append(count.calls)
    assert counts[1] - counts[0] <= calls


# Batches


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("interval", [None, (0.3, 2.0)], ids=["everywhere", "interval"])
def test_mixed_strengths_equal_each_image_alone_in_any_order(case, interval):
    rule, solver, rescale = RULES[case]
    strengths = [1.0, 2.5, lambda t: 1.0 if t > 0.6 else 4.0]
    x = start(torch.float32)
    options = {"num_inference_steps": 5, "sampler": solver, "guidance": rule, "guidance_rescale": rescale}
    options["guidance_interval"] = interval

    def run(order):
        return sample(
            network, (len(order), *SHAPE[1:]), latents=x[order], cond=Cond(ASKED[order]), uncond=Cond(NOTHING[order]),
            guidance_scale=[strengths[i] for i in order], **options,
        )  # fmt: skip

    together = run([0, 1, 2])
    assert torch.equal(run([2, 0, 1]), together[[2, 0, 1]])
    for i in (1, 2):  # the first alone would be guided nowhere, and is told so
        assert torch.allclose(run([i]), together[i : i + 1], rtol=0, atol=1e-6)
    unguided = sample(
        network, (1, *SHAPE[1:]), latents=x[:1], cond=Cond(ASKED[:1]), num_inference_steps=5, sampler=solver
    )
    if not isinstance(rule, CFGPlusPlus | CFGZeroStar):
        assert torch.equal(unguided, together[:1])


MIXTURE = {
    "none": {},
    "cfg": {"guidance": 3.0},
    "cfg in an interval": {"guidance": 3.0, "interval": (0.5, 2.0), "clip": 0.6},
    "cfg, rescaled": {"guidance": 4.0, "rescale": 0.7, "clip": DynamicThreshold(0.8)},
    "cfg++": {"guidance": 0.6, "rule": CFGPlusPlus(), "clip": DynamicThreshold(0.5, 1.1)},
    "apg": {"guidance": 4.0, "rule": APG(-0.5, 1.0), "interval": (0.2, 3.0)},
    "apg without momentum": {"guidance": 4.0, "rule": APG(0.0, None, 0.5)},
    "cfg-zero*": {"guidance": 4.0, "rule": CFGZeroStar(2)},
}


def test_every_rule_shares_a_batch_with_every_other():
    """One row of another table for each image, as a server would call it, against each image's own run."""
    count = len(MIXTURE)
    x = torch.randn(count, 2, 4, 3, dtype=torch.float64)
    tables = [
        build(PATH, Velocity(), KEEP, uniform(PATH, 5), dtype=torch.float64, **options) for options in MIXTURE.values()
    ]
    asked, nothing, raw = Cond(torch.arange(count) + 1), Cond(torch.zeros(count)), CallableNetwork(network)
    prepared = raw.prepare(asked.joined(nothing), tables[0].times[None])
    state = State.start(x, 0, momentum=True)
    for i in range(5):
        rows = torch.stack([table.values[i] for table in tables])
        merged = merge([table.structure.rows[i] for table in tables])
        state = advance(NetworkDenoiser(raw), state, rows, torch.full((count,), i), merged, None, prepared)
    for i, (name, table) in enumerate(zip(MIXTURE, tables, strict=True)):
        here = slice(i, i + 1)
        denoiser, own = plan(raw, Cond(asked.label[here]), Cond(nothing.label[here]), table)
        alone = walk(denoiser, x[here], table, None, own)
        assert torch.allclose(state.x[here], alone, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("clip", [None, 1.0, DynamicThreshold()], ids=str)
@pytest.mark.parametrize("scale", [2.0, [1.0, 2.0, 3.0]], ids=str)
def test_guidance_asks_the_device_nothing(case, clip, scale):
    rule, solver, rescale = RULES[case]
    options = {"guidance": scale, "rule": rule, "rescale": rescale, "clip": clip, "device": "meta"}
    table = build(PATH, Velocity(), solver, uniform(PATH, 4), **options)
    label = Cond(torch.zeros(3, dtype=torch.int64, device="meta"))
    denoiser, prepared = plan(CallableNetwork(network), label, label, table)
    states = list(iterate(denoiser, torch.empty(SHAPE, device="meta"), table, None, prepared))
    assert states[-1].x.is_meta and states[-1].x.shape == SHAPE


# Wrong usage

BAD = [
    ({"guidance": "cgf"}, PlanError, "unknown guidance 'cgf'; allowed: apg, cfg, cfg_pp, cfg_zero_star"),
    ({"guidance": "cfg_pp"}, PlanError, r"use DDIM\(keep_noise=True\)"),
    ({"guidance": "apg", "guidance_rescale": 0.5}, PlanError, "norm_threshold, or guidance 'cfg'"),
    ({"guidance": "cfg_zero_star", "prediction": "x0"}, PlanError, r"use CFGZeroStar\(zero_init_steps=0\)"),
    ({"guidance": CFGZeroStar(4)}, PlanError, "4 of 4 steps"),
    ({"guidance": "apg", "guidance_scale": 1.0}, PlanError, "guides no row"),
    ({"guidance_interval": (500, 900)}, PlanError, "noise levels of the rows are inf to 0.333"),
    ({"guidance_interval": (2.0, 1.0)}, PlanError, "guidance_interval is"),
    ({"guidance_interval": "ab"}, PlanError, "guidance_interval is 'ab'"),
    ({"guidance_rescale": 1.5}, PlanError, "guidance_rescale is 1.5; allowed: 0 to 1"),
    ({"guidance_scale": "7"}, PlanError, "guidance_scale is '7'"),
    ({"guidance_scale": lambda t: math.nan}, PlanError, "guidance_scale is nan at t="),
    ({"guidance_scale": []}, ShapeError, "0 strengths for a batch of 3"),
    ({"guidance_scale": [2.0, 3.0]}, ShapeError, "2 strengths for a batch of 3"),
    ({"uncond": None}, PlanError, "give uncond"),
    ({"guide": network, "guidance_scale": 1.0}, PlanError, "no row is guided"),
    ({"uncond": Cond(NOTHING[:1])}, ShapeError, r"uncond: label is \(1,\); needed: 3 images"),
    ({"uncond": Cond(NOTHING, {"mask": NOTHING})}, PlanError, "only one of them has mask"),
    ({"clip": True}, PlanError, "clip is True"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        counted([], **({"guidance_scale": 2.0} | options))


@pytest.mark.parametrize(
    "make",
    [
        lambda: APG(momentum=1.0),
        lambda: APG(norm_threshold=0.0),
        lambda: APG(eta=math.nan),
        lambda: CFGZeroStar(-1),
        lambda: CFGZeroStar(1.5),
        lambda: DynamicThreshold(0.0),
        lambda: DynamicThreshold(1.5),
        lambda: DynamicThreshold(0.9, 0.5),
    ],
)
def test_bad_options_are_refused_when_they_are_made(make):
    with pytest.raises(PlanError, match="allowed"):
        make()


# The public face


@pytest.fixture(scope="module")
def pipe():
    model = make_model()
    return Pipeline(model, UNetNetwork(model.network), torch.device("cpu"))


def test_a_pipeline_takes_a_strength_for_each_image(pipe):
    options = {"num_inference_steps": 3, "output_type": "pt", "guidance": "apg"}
    together = pipe([0, 1, 2], guidance_scale=[1.0, 2.0, 6.0], seed=5, **options).images
    for i, scale in ((1, 2.0), (2, 6.0)):
        alone = pipe([i], guidance_scale=scale, seed=5 + i, **options).images
        assert torch.allclose(alone, together[i : i + 1], atol=1e-5)


def test_a_pipeline_is_guided_by_another(pipe):
    other = make_model(seed=1)
    weaker = Pipeline(other, UNetNetwork(other.network), torch.device("cpu"))
    options = {"num_inference_steps": 3, "output_type": "pt", "seed": 0, "guidance_scale": 2.0, "clip": 1.0}
    guided, own = pipe([0], guide=weaker, **options).images, pipe([0], guide=pipe, **options).images
    plain = pipe([0], **{**options, "guidance_scale": 1.0}).images
    assert torch.allclose(own, plain, atol=1e-5) and (guided - plain).abs().max() > 1e-3
    stranger = make_model(two_time=True)
    with pytest.raises(PlanError, match="the guide's prediction is 'mean_velocity'; needed: 'velocity'"):
        pipe([0], guide=Pipeline(stranger, UNetNetwork(stranger.network), torch.device("cpu")), **options)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--guidance", "apg", "--guidance-scale", "2"], 0),
        (["--guidance-rescale", "0.7", "--guidance-interval", "0.3", "5", "--guidance-scale", "2", "--clip", "1"], 0),
        (["--guidance", "cfg_pp", "--guidance-scale", "0.6"], 2),
    ],
    ids=str,
)
def test_the_command_line_takes_the_same_names(tmp_path, options, code):
    arguments = ["generate", "--class-labels", "3", "--steps", "2", "--sampler", "dpmpp_2m", "--out", str(tmp_path)]
    assert cli.main([*arguments, *options]) == code
    assert len(list(tmp_path.glob("*.png"))) == (code == 0)


def test_a_guided_sampler_fits_into_one_onnx_file(tmp_path):
    """The exporter runs the same loop; its file serves every batch."""
    pytest.importorskip("onnx", reason="export needs onnx")
    runtime = pytest.importorskip("onnxruntime", reason="running the file needs onnxruntime")
    from fastdiff.export.sampler import Walk, eagerly, sampler_graph
    from fastdiff.export.targets import target_of
    from fastdiff.export.write import check, write_graph

    model = make_model()
    options = {"guidance": 3.0, "rule": APG(-0.5, 2.0), "clip": DynamicThreshold(0.9)}
    walk = Walk(build(PATH, Velocity(), DDIM(), uniform(PATH, 2), **options), 1.0, 3, 1)
    file = tmp_path / "guided.onnx"
    write_graph(sampler_graph(model.network, walk, target_of("onnxruntime"), torch.float32, (8, 8)), file, file)
    check(file)
    session = runtime.InferenceSession(tmp_path / "guided.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        noise, labels = torch.randn(batch, 1, 8, 8), torch.arange(batch) % 3
        got = session.run(None, {"noise": noise.numpy(), "class_labels": labels.numpy()})[0]
        wanted = eagerly(model.network, walk)({"noise": noise, "class_labels": labels})["images"]
        assert (torch.from_numpy(got) - wanted).abs().max() < 1e-4


def test_every_prediction_is_guided_alike():
    """CFG is affine in what the network predicts, so it may be done on any output; the results agree."""
    results = []
    for name in ("x0", "velocity", "v"):
        prediction = PREDICTIONS[name]

        def outputs(x, timestep, class_labels, prediction=prediction):
            t = float(timestep[0]) / 1000 if timestep[0] > 1 else float(timestep[0])
            c = prediction.coefficients(PATH, t, t)
            return (network(x, timestep, class_labels) - c.c_skip * x) / c.c_out

        table = build(PATH, prediction, DDIM(), uniform(PATH, 4), guidance=SCALE, dtype=torch.float64)
        denoiser, prepared = plan(CallableNetwork(outputs), COND, UNCOND, table)
        results.append(walk(denoiser, start(), table, None, prepared))
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-12)
    assert torch.allclose(results[0], results[2], rtol=0, atol=1e-12)
