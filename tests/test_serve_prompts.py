"""Text-to-image models behind the server: prompts, sizes, previews, and what is refused."""

from __future__ import annotations

import json
import threading

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
pytest.importorskip("diffusers", reason="tiny models are made by diffusers (pip install 'fastdiff[test]')")
import tiny_pipelines as tiny
from fastapi.testclient import TestClient
from test_serve import URL, events, pixels

from fastdiff import Engine
from fastdiff.benchmarks.server_process import REAL, server
from fastdiff.cli import main
from fastdiff.errors import BackendError, EngineBusy, PlanError, ShapeError
from fastdiff.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig
from fastdiff.serve import Metrics, Settings, TextConditional, create_app
from fastdiff.serve.run import run
from fastdiff.text_to_image import load_folder

SIZES = ((24, 16), (16, 16))
MIX = [
    {"prompt": "a cat", "num_inference_steps": 4},
    {"prompt": "two dogs", "num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": "red"},
    {"prompt": "", "num_inference_steps": 3, "guidance_scale": 1.0, "sampler": "ddim"},
    {"prompt": "a, b, c, " * 30, "num_inference_steps": 5, "sampler": "dpmpp_2m"},
    {"prompt": "x", "num_inference_steps": 4, "size": "16x16"},
]


def decoder(**sizes):
    """A tiny autoencoder of the tiny models' latent space."""
    torch.manual_seed(3)
    config = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
              "num_decoder_blocks": (1, 1)}  # fmt: skip
    return AutoencoderTiny(AutoencoderTinyConfig.from_dict(config | sizes)).eval().requires_grad_(False)


def saved(make, root):
    make(root).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return saved(tiny.stable_diffusion, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return saved(tiny.stable_diffusion_xl, tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module", params=["sd", "xl"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def pipe(folder):
    return load_folder(folder)


class Served:
    """A server around a model."""

    def __init__(self, pipe, preview=None, **settings):
        self.served = TextConditional(pipe, "tiny", SIZES, preview)
        self.engine, self.metrics = Engine(pipe, max_batch=6, sizes=SIZES), Metrics()
        self.app = create_app(self.engine, self.served, Settings(**settings), self.metrics)
        self.threads = []  # those that its first text encoder ran in
        for encoder in pipe.parts.text_encoders[:1]:
            encoder.model.register_forward_hook(lambda *_: self.threads.append(threading.current_thread().name))


@pytest.fixture
def serve(pipe):
    made = []

    def make(**options):
        served = Served(pipe, **options)
        client = TestClient(served.app, raise_server_exceptions=False)
        client.__enter__()
        made.append(client)
        return served, client

    yield make
    for client in made:
        client.__exit__(None, None, None)
    for encoder in pipe.parts.text_encoders:
        encoder.model._forward_hooks.clear()


def test_prompts_in_company_keep_the_bits_they_have_alone(pipe, serve):
    served, client = serve()
    asked = [options | {"seed": 10 + i} for i, options in enumerate(MIX * 2)]
    alone = [client.post(URL, json=options).json()["data"][0]["b64_json"] for options in asked]
    together = [None] * len(asked)

    def ask(i):
        together[i] = client.post(URL, json=asked[i]).json()["data"][0]["b64_json"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len(set(alone)) == len(alone)
    stats = served.engine.stats()
    assert stats.images > stats.steps, "some ran in company"
    height, width = 24, 16
    given = {name: value for name, value in asked[1].items() if name != "size"}
    (image,) = pipe(**given, height=height, width=width).images
    drawn = pixels(alone[1])
    assert drawn.size == (width, height)
    furthest = max(abs(a - b) for a, b in zip(image.tobytes(), drawn.tobytes(), strict=True))
    assert furthest <= 1, "and it is the pipeline's picture"


def test_images_of_a_request_share_the_encoding_of_its_prompt(pipe, serve):
    served, client = serve()
    body = client.post(URL, json={"prompt": "a fox", "n": 4, "seed": 3, "num_inference_steps": 2}).json()
    encodings = 1 if pipe.parts.zero_empty_prompt else 2  # the empty one too, which it is guided away from
    assert len(served.threads) == encodings and [entry["seed"] for entry in body["data"]] == [3, 4, 5, 6]
    assert all(name.startswith("asyncio") for name in served.threads), "neither the event loop nor the engine waits"
    again = client.post(URL, json={"prompt": "a fox", "seed": 5, "num_inference_steps": 2}).json()
    assert again["data"][0] == body["data"][2] and len(served.threads) == encodings and body["size"] == "16x24"
    text = client.get("/metrics").text
    assert "fastdiff_encode_seconds_count 2.0" in text and "fastdiff_decode_seconds_count 5.0" in text


def test_the_openai_client_draws_prompts(serve):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    _, client = serve()
    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client, max_retries=0)
    extra = {"seed": 1, "num_inference_steps": 4, "negative_prompt": "fog"}
    answer = theirs.images.generate(model="tiny", prompt="a fox", n=2, size="16x16", extra_body=extra)
    assert [pixels(image.b64_json).size for image in answer.data] == [(16, 16)] * 2
    stream = theirs.images.generate(prompt="a fox", size="16x16", stream=True, partial_images=2, extra_body=extra)
    *partial, completed = stream
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert completed.b64_json == answer.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="allowed: 16x24, 16x16, or auto") as refused:
        theirs.images.generate(prompt="a fox", size="1024x1024")
    assert refused.value.param == "size"


def test_previews_come_from_their_own_decoder_and_images_do_not(serve):
    asked = {"prompt": "a fox", "seed": 2, "num_inference_steps": 4, "stream": True, "partial_images": 2}
    found = {}
    for name, preview in {"own": None, "tiny": decoder()}.items():
        _, client = serve(preview=preview)
        found[name] = [event["b64_json"] for _, event in events(client.post(URL, json=asked).text)]
    assert len(found["own"]) == len(found["tiny"]) == 3 and found["own"][2] == found["tiny"][2]
    assert found["own"][0] != found["tiny"][0] and pixels(found["tiny"][0]).size == pixels(found["own"][0]).size


@pytest.mark.parametrize(
    "asked, param, message",
    [
        ({}, "prompt", "prompt is missing; tiny draws what it says"),
        ({"prompt": None, "negative_prompt": "x"}, "prompt", "prompt is missing"),
        ({"prompt": "x", "class_label": 3}, "class_label", "class_label is 3, but tiny is a text-to-image model"),
        ({"prompt": "a" * 32_001}, "prompt", "at most 32000 characters"),
        ({"prompt": ["x"]}, "prompt", "prompt is ['x']"),
        ({"prompt": "x", "size": "16x20"}, "size", "size is 16x20; allowed: 16x24, 16x16, or auto"),
        ({"prompt": "x", "size": "99999x99999"}, "size", "up to 4194304 pixels"),
        ({"prompt": "x", "sampler": "ddim_inversion"}, "sampler", "sampler is 'ddim_inversion'"),
        ({"prompt": "x", "guidance_scale": -1}, "guidance_scale", "guidance_scale is -1"),
        ({"prompt": "x", "sampler": "flow_map"}, None, "FlowMap needs a network that jumps"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model_of_prompts_is_named(asked, param, message, refusing):
    answer = refusing.post(URL, json=asked)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], error


@pytest.fixture(scope="module")
def refusing(pipe):
    with TestClient(Served(pipe).app, raise_server_exceptions=False) as client:
        yield client


def test_a_latent_consistency_model_is_told_its_strength(tmp_path):
    tiny.stable_diffusion(tmp_path, tiny.scheduler("LCMScheduler"), time_cond_proj_dim=8).save_pretrained(
        tmp_path / "lcm"
    )
    with TestClient(Served(load_folder(tmp_path / "lcm")).app, raise_server_exceptions=False) as client:
        asked = {"prompt": "a fox", "seed": 1, "num_inference_steps": 3}
        images = {client.post(URL, json=asked | {"guidance_scale": g}).json()["data"][0]["b64_json"] for g in (1.5, 8)}
    assert len(images) == 2


def test_models_say_that_they_take_prompts(refusing):
    (card,) = refusing.get("/v1/models").json()["data"]
    assert card["prompts"] and card["classes"] == [] and card["sizes"] == ["16x24", "16x16"]
    assert card["size"] == "16x24" and card["num_inference_steps"] == 50 and card["sampler"].endswith("Scheduler")


def test_long_prompts_are_cut_and_none_is_logged(serve, caplog):
    _, client = serve()
    base = {"seed": 1, "num_inference_steps": 2}
    first, second = (client.post(URL, json=base | {"prompt": "secret " * 10 + word}).json() for word in ("a", "b"))
    assert first["data"] == second["data"], "what is beyond the encoder's length changes nothing"
    assert "was cut to 16" in caplog.text and "secret" not in caplog.text


def test_a_full_queue_costs_no_encoding(serve):
    served, client = serve()

    def full():
        raise EngineBusy("1 images wait already", 1.0)

    served.engine.admissible = full
    assert client.post(URL, json={"prompt": "a fox"}).status_code == 503 and not served.threads


def test_failures_of_the_decoder_have_a_status_of_their_own(serve, monkeypatch):
    served, client = serve()

    def short(x):
        raise torch.OutOfMemoryError("out of memory")

    asked = {"prompt": "a fox", "num_inference_steps": 2}
    monkeypatch.setattr(served.served.pipeline, "decode", short)
    assert client.post(URL, json=asked).json()["error"]["code"] == "out_of_memory"
    monkeypatch.setattr(served.served.pipeline, "decode", lambda x: x[:, :3] * torch.nan)
    assert client.post(URL, json=asked).json()["error"]["code"] == "not_finite"


def test_models_that_need_more_than_a_prompt_are_refused(tmp_path):
    painting = tiny.stable_diffusion(tmp_path / "a", in_channels=9)
    painting.save_pretrained(tmp_path / "painting")
    with pytest.raises(BackendError, match="paints into a picture; serve takes prompts alone"):
        TextConditional(load_folder(tmp_path / "painting"), "x")
    plain = tiny.stable_diffusion(tmp_path / "b")
    plain.save_pretrained(tmp_path / "plain")
    tiny.controlnet(plain.unet).save_pretrained(tmp_path / "control")
    with pytest.raises(BackendError, match="has a ControlNet"):
        TextConditional(load_folder(tmp_path / "plain", controlnet=tmp_path / "control"), "x")
    pipe = load_folder(tmp_path / "plain")
    assert TextConditional(pipe, "x", [(16, 24), (16, 16), (16, 24)]).facts()["sizes"] == ["24x16", "16x16"]
    with pytest.raises(ShapeError, match="height is 17; allowed: multiples of 2"):
        TextConditional(pipe, "x", [(17, 16)])
    with pytest.raises(BackendError, match="reads 8 channels and enlarges by 2; needed: 4 and 2"):
        TextConditional(pipe, "x", preview=decoder(latent_channels=8))
    with pytest.raises(PlanError, match="size is 16x16; allowed: up to 100 pixels"):
        run(TextConditional(pipe, "x"), Settings(max_pixels=100), "error", print)


def test_the_command_serves_prompts_and_hostile_ones_break_nothing(sd_folder, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    import diffusers

    from fastdiff.benchmarks.hostile import Attacker, by_document, made, made_up, mutated

    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    diffusers.AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        tmp_path / "preview"
    )
    more = ("--size", "16x24", "16x16", "--preview-decoder", str(tmp_path / "preview"), "--max-images", "2")
    with server(REAL, "--model", str(sd_folder), "--name", "tiny", "--max-steps", "8", *more) as live:
        corpus = made(by_document(json.loads(live.get("/openapi.json"))), 40) + made(made_up(), 60)
        attacker = Attacker(live)
        good = {"prompt": "a fox", "num_inference_steps": 2, "stream": True, "partial_images": 1}
        attacks = [corpus[0]._replace(method="POST", path=URL, headers={"content-type": "application/json"},
                                      body=json.dumps(good | more).encode())
                   for more in ({}, {"prompt": "\0"}, {"prompt": "💥" * 16_000}, {"prompt": "a" * 32_000},
                                {"size": "16x16", "negative_prompt": "\u202e\u0000"})]  # fmt: skip
        for attack in [*attacks, *corpus, *mutated(corpus + attacks, 150)]:
            attacker(attack)
        attacker.close()
        assert attacker.outcome.bad == [] and attacker.outcome.answers[200] >= len(attacks)
        assert "fox" not in live.log.read_text(), "prompts are not logged"
        for line in live.log.read_text().splitlines():
            json.loads(line)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "17x16"], "width is 17; allowed: multiples of 2"),
        (["--preview-decoder", "nowhere"], "nowhere"),
        (["--size", "16x16", "--max-pixels", "10"], "size is 16x16; allowed: up to 10 pixels"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(arguments, message, sd_folder, capsys):
    assert main(["serve", "--model", str(sd_folder), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_options_of_prompts_are_refused_for_other_models(capsys):
    assert main(["serve", "--size", "16x16"]) == 2
    assert "size is for text-to-image models; digits is not one" in capsys.readouterr().err
