"""A diffusers pipeline after ``fastdiff.optimize``: the same images, callbacks and LoRA calls; what is left alone."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small import scramble
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fastdiff[test]')")
transformers = pytest.importorskip("transformers", reason="pipelines need transformers' text encoders")

import fastdiff  # noqa: E402
from fastdiff.errors import PlanError  # noqa: E402
from fastdiff.integrations.pipelines import Faster  # noqa: E402

CLOSE = 1e-5  # of the largest output, float32: two orders of summation
WIDTH = 16
SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 2,
    "sample_size": 8,
}  # fmt: skip
SD = SIZES | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
}  # fmt: skip
XL = SD | {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH, "cross_attention_dim": 2 * WIDTH,
    "transformer_layers_per_block": (1, 2),
}  # fmt: skip
PLAIN = SIZES | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip


class Tokenizer:
    """Letters to numbers: enough of CLIP's tokenizer for a pipeline, without its files."""

    model_max_length = 7
    added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def __call__(self, text: Any, **_: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        ids = [[0, *(1 + ord(letter) % 28 for letter in one[:5]), *[29] * (6 - len(one[:5]))] for one in texts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})


def text_encoder(kind: type = transformers.CLIPTextModel) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=WIDTH, bos_token_id=0, eos_token_id=29, pad_token_id=29,
    )  # fmt: skip
    return kind(config).eval()


def network(config: dict[str, Any], kind: str = "UNet2DConditionModel") -> Any:
    unet = getattr(diffusers, kind)(**config).eval()
    scramble(unet)
    return unet


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def scheduler() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)


def parts(unet: dict[str, Any] = SD) -> dict[str, Any]:
    return {
        "vae": vae(), "text_encoder": text_encoder(), "tokenizer": Tokenizer(), "unet": network(unet),
        "scheduler": scheduler(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(kind: str = "StableDiffusionPipeline", **more: Any) -> Any:
    return quiet(getattr(diffusers, kind)(**parts(), **more))


def xl() -> Any:
    both = {name: part for name, part in parts(XL).items() if name in ("vae", "text_encoder", "tokenizer", "unet",
            "scheduler")}  # fmt: skip
    second = text_encoder(transformers.CLIPTextModelWithProjection)
    return quiet(diffusers.StableDiffusionXLPipeline(**both, text_encoder_2=second, tokenizer_2=Tokenizer()))


def ddpm() -> Any:
    return quiet(diffusers.DDPMPipeline(network(PLAIN, "UNet2DModel"), diffusers.DDPMScheduler()))


def controlled() -> Any:
    net = diffusers.ControlNetModel.from_unet(network(SD), conditioning_embedding_out_channels=(4, 4)).eval()
    scramble(net)
    return sd("StableDiffusionControlNetPipeline", controlnet=net)


def picture() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


TEXT = {"prompt": "a digit", "height": 16, "width": 16, "num_inference_steps": 3}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "text to image": (sd, TEXT, 3),
    "without guidance": (sd, TEXT | {"guidance_scale": 1.0, "num_images_per_prompt": 2}, 3),
    "SDXL": (xl, TEXT, 3),
    "unconditional": (ddpm, {"num_inference_steps": 3}, 3),
    "image to image": (
        lambda: sd("StableDiffusionImg2ImgPipeline"),
        {"prompt": "a", "image": picture(), "strength": 0.5, "num_inference_steps": 4}, 2,
    ),
    "ControlNet": (controlled, TEXT | {"image": picture()}, 3),
}  # fmt: skip


def images(pipe: Any, told: dict[str, Any], **more: Any) -> np.ndarray:
    given = {**told, **more}
    return np.asarray(pipe(**given, generator=torch.Generator().manual_seed(1), output_type="np").images)


def faster(pipe: Any) -> Faster:
    return pipe.unet.__dict__["forward"]


@pytest.fixture
def given() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw), "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 7, WIDTH, generator=draw),
    }  # fmt: skip


@pytest.fixture
def pipe() -> Any:
    return sd()


def plainly(pipe: Any, given: dict[str, Any]) -> Tensor:
    """What diffusers answers, with the weights as they are."""
    with torch.no_grad():
        return type(pipe.unet).forward(pipe.unet, **given).sample


def ours(pipe: Any, given: dict[str, Any], calls: int = 1) -> Tensor:
    """What our forward answers; it must not leave the call to diffusers."""
    before = faster(pipe).calls
    with torch.no_grad():
        result = pipe.unet(**given).sample
    assert faster(pipe).calls == before + calls, fastdiff.summary(pipe)
    return result


def close(got: Tensor, wanted: Tensor, limit: float = CLOSE) -> bool:
    assert got.shape == wanted.shape and got.is_contiguous()
    return float((got - wanted).abs().max() / wanted.abs().max()) <= limit


@pytest.mark.parametrize("case", CASES)
def test_images_are_the_same_and_come_from_ours(case):
    make, told, steps = CASES[case]
    pipe = make()
    before = images(pipe, told)
    assert fastdiff.optimize(pipe) is pipe
    assert np.abs(images(pipe, told) - before).max() <= CLOSE
    assert (faster(pipe).calls, faster(pipe).fallbacks.total()) == (steps, 0)
    fastdiff.restore(pipe)
    assert "forward" not in pipe.unet.__dict__
    assert np.array_equal(images(pipe, told), before)


def test_the_forward_looks_like_diffusers_own(pipe, given):
    wanted = inspect.signature(pipe.unet.forward)
    fastdiff.optimize(pipe)
    assert inspect.signature(pipe.unet.forward) == wanted
    with torch.no_grad():
        result = pipe.unet(*given.values())
        (sample,) = pipe.unet(*given.values(), return_dict=False)
    assert type(result).__name__ == "UNet2DConditionOutput" and torch.equal(result.sample, sample)
    assert close(sample, plainly(pipe, given))
    assert not set(pipe.unet.state_dict()) ^ set(network(SD).state_dict())


@pytest.mark.parametrize(
    "timestep", [7, 7.5, torch.tensor(7.5), torch.tensor([7]), torch.tensor([7.0, 900.0])], ids=str
)
def test_every_form_of_the_time(pipe, given, timestep):
    fastdiff.optimize(pipe)
    given["timestep"] = timestep
    assert close(ours(pipe, given), plainly(pipe, given))


def test_a_plain_network_truncates_a_float_as_diffusers_does():
    pipe = fastdiff.optimize(ddpm())
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": 7.9}
    assert close(ours(pipe, given), plainly(pipe, given))


def test_callbacks_see_and_steer_the_same(pipe):
    def watched() -> tuple[list[Any], np.ndarray]:
        seen: list[Any] = []

        def callback(owner: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append((step, int(timestep), tensors["latents"].clone()))
            if step == 0:
                tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
            return tensors

        told = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        return seen, images(pipe, TEXT | told)

    (before, image), (after, again) = watched(), (fastdiff.optimize(pipe), watched())[1]
    assert [entry[:2] for entry in before] == [entry[:2] for entry in after]
    assert all(close(b[2].contiguous(), a[2], 1e-4) for b, a in zip(after, before, strict=True))
    assert np.abs(image - again).max() <= CLOSE
    assert faster(pipe).fallbacks.total() == 0


# -- what is kept between calls


def test_keys_and_values_are_computed_once_and_freed(pipe, given):
    fastdiff.optimize(pipe)
    network = faster(pipe)._binding.ours
    made = []
    contexts = network.contexts
    network.contexts = lambda tokens: made.append(1) or contexts(tokens)
    for time in (900, 800, 800, 700):
        ours(pipe, given | {"timestep": torch.tensor(time)})
    assert len(made) == 1
    other = torch.randn(2, 7, WIDTH)
    for time in (600, 500):  # guidance in two calls
        ours(pipe, given | {"timestep": torch.tensor(time)})
        ours(pipe, given | {"timestep": torch.tensor(time), "encoder_hidden_states": other})
    assert len(made) == 2 and len(faster(pipe)._runs) == 2
    kept = weakref.ref(faster(pipe)._runs[-1].contexts[0][0])
    del other
    ours(pipe, given | {"timestep": torch.tensor(400)})
    gc.collect()
    assert len(faster(pipe)._runs) == 1 and kept() is None


def test_changes_are_followed(pipe, given):
    """Each of them feeds what is kept, and the time falls, so that no new run starts."""
    fastdiff.optimize(pipe)
    unet, last = pipe.unet, ours(pipe, given | {"timestep": torch.tensor(900)})
    key = next(module.to_k for name, module in unet.named_modules() if name.endswith("attn2"))
    time = unet.down_blocks[0].resnets[0].time_emb_proj

    def new_parameter() -> None:
        unet.conv_in.weight = nn.Parameter(unet.conv_in.weight * 1.5)

    def new_module() -> None:
        unet.mid_block.attentions[0].proj_in = copy.deepcopy(unet.down_blocks[0].attentions[0].proj_out)

    def other_weights() -> None:
        unet.load_state_dict({name: value * 0.9 for name, value in unet.state_dict().items()})

    changes = [
        lambda: key.weight.mul_(2), lambda: time.bias.add_(1), lambda: given["encoder_hidden_states"].mul_(2),
        lambda: unet.conv_in.weight.data.mul_(2), new_parameter, other_weights,
    ]  # fmt: skip
    for step, change in enumerate(changes):
        with torch.no_grad():
            change()
        given["timestep"] = torch.tensor(800 - step)
        got = ours(pipe, given)
        assert close(got, plainly(pipe, given)), step
        assert not close(got, last, 1e-3), step
        last = got


def test_a_change_that_torch_does_not_count_shows_in_the_next_run(pipe, given):
    fastdiff.optimize(pipe)
    ours(pipe, given)
    for module in pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(1.5)
    given["timestep"] = torch.tensor(990)
    assert close(ours(pipe, given), plainly(pipe, given))


def test_another_type_of_number(pipe, given):
    fastdiff.optimize(pipe)
    ours(pipe, given)
    pipe.to(torch.float64)
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    assert close(ours(pipe, given), plainly(pipe, given), 1e-6)


def test_tensors_of_inference_mode(pipe, given):
    """They have no version counter: nothing is kept for them, and nothing fails."""
    fastdiff.optimize(pipe)
    for factor in (1.0, 2.0):
        with torch.inference_mode():
            told = {**given, "encoder_hidden_states": given["encoder_hidden_states"] * factor}
            got = pipe.unet(**told).sample
            told["encoder_hidden_states"].mul_(3)
            assert close(pipe.unet(**told).sample, plainly(pipe, told))
            assert not close(got, plainly(pipe, told), 1e-3)
    assert faster(pipe).fallbacks.total() == 0


# -- what is left to diffusers


def left(pipe: Any, given: dict[str, Any], reason: str) -> None:
    """The call answers what diffusers answers, and is counted with its reason."""
    count = faster(pipe).fallbacks.total()
    with torch.no_grad():
        assert torch.equal(pipe.unet(**given).sample, plainly(pipe, given))
    assert faster(pipe).fallbacks.total() == count + 1
    assert reason in fastdiff.summary(pipe), fastdiff.summary(pipe)


MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"encoder_attention_mask": MASK}, "encoder_attention_mask"),
        ({"attention_mask": torch.ones(2, 64)}, "attention_mask"),
        ({"cross_attention_kwargs": {"odd": 1}}, "cross_attention_kwargs: odd"),
        ({"mid_block_additional_residual": torch.ones(2, 16, 4, 4)}, "residuals of the way down or of the middle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_are_not_ours(pipe, given, told, reason):
    if "attention_mask" in told:  # it fits the pixels of one resolution alone
        config = SD | {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        pipe.unet = network(config | {"block_out_channels": (8,)})
        told = told | {"encoder_hidden_states": torch.randn(2, 64, WIDTH)}
    fastdiff.optimize(pipe)
    left(pipe, given | told, reason)


def test_what_diffusers_refuses_is_refused(pipe, given):
    fastdiff.optimize(pipe)
    with pytest.raises(RuntimeError), torch.no_grad():
        pipe.unet(**given | {"sample": given["sample"].double()})
    with pytest.raises(TypeError, match="odd"), torch.no_grad():
        pipe.unet(**given, odd=1)
    assert faster(pipe).fallbacks.total() == 2 and faster(pipe).calls == 0


def test_adapters_residuals_go_to_diffusers(pipe, given):
    fastdiff.optimize(pipe)
    extra = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    with torch.no_grad():
        got = pipe.unet(**given, down_intrablock_additional_residuals=[part.clone() for part in extra]).sample
    assert got.is_contiguous()
    assert torch.equal(got, plainly(pipe, given | {"down_intrablock_additional_residuals": extra}))
    assert "T2I-adapter" in fastdiff.summary(pipe)


def hooked(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, result: result * 2)


def patched(unet: Any) -> None:
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2


def processor(unet: Any) -> None:
    class Odd(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().__call__(*args, **kwargs) * 2

    unet.set_attn_processor(Odd())


STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "FreeU": (lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU"),
    "hook": (hooked, "mid_block has hooks"),
    "patch": (patched, "the forward of mid_block was replaced"),
    "processor": (processor, "attention processor Odd"),
    "slicing": (lambda unet: unet.set_attention_slice("max"), "attention processor SlicedAttnProcessor"),
    "chunking": (lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1), "chunk"),
    "strange layer": (lambda unet: setattr(unet, "conv_in", nn.Sequential(unet.conv_in, nn.Tanh())), "conv_in"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_network_that_was_changed_is_left_to_diffusers(pipe, given, state):
    change, reason = STATES[state]
    fastdiff.optimize(pipe)
    ours(pipe, given)
    change(pipe.unet)
    left(pipe, given, reason)
    assert "left alone for now" in fastdiff.summary(pipe)


def test_what_is_switched_off_again_is_ours_again(pipe, given):
    fastdiff.optimize(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    left(pipe, given, "FreeU")
    pipe.disable_freeu()
    assert close(ours(pipe, given), plainly(pipe, given))
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert close(ours(pipe, given), plainly(pipe, given))


def test_gradients_flow_as_before(pipe, given):
    fastdiff.optimize(pipe)
    pipe.unet(**given).sample.sum().backward()
    assert pipe.unet.conv_in.weight.grad is not None
    assert "gradients are on" in fastdiff.summary(pipe)


def test_whatever_goes_wrong_is_left_to_diffusers(pipe, given, monkeypatch):
    fastdiff.optimize(pipe)
    monkeypatch.setattr(faster(pipe), "_trunk", lambda *args: 1 / 0)
    left(pipe, given, "ZeroDivisionError")


def test_offloading_by_accelerate_before_and_after(given):
    accelerate = pytest.importorskip("accelerate")
    late = fastdiff.optimize(sd())
    wanted = plainly(late, given)
    accelerate.hooks.add_hook_to_module(late.unet, accelerate.hooks.ModelHook())
    with torch.no_grad():
        assert close(late.unet(**given).sample, wanted)
    assert "1 calls in fastdiff" in fastdiff.summary(late)
    fastdiff.restore(late)
    with torch.no_grad():
        late.unet(**given)
    accelerate.hooks.remove_hook_from_module(late.unet)
    assert not isinstance(late.unet.forward, Faster)
    early = sd()
    accelerate.hooks.add_hook_to_module(early.unet, accelerate.hooks.ModelHook())
    assert "its forward was replaced before" in fastdiff.summary(fastdiff.optimize(early))


# -- LoRA


@pytest.fixture
def adapted(pipe) -> Iterator[Any]:
    """A pipeline with two LoRA adapters of its network, loaded as diffusers loads them."""
    peft = pytest.importorskip("peft")
    targets = {"style": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], "detail": ["conv1", "proj_in", "to_k"]}
    states = {}
    for seed, (name, modules) in enumerate(targets.items()):
        donor = network(SD)
        donor.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules))
        draw = torch.Generator().manual_seed(seed)
        found = peft.get_peft_model_state_dict(donor)
        states[name] = {f"unet.{key}": 0.3 * torch.randn(value.shape, generator=draw) for key, value in found.items()}
    pipe.states = states
    yield pipe


def load(pipe: Any, *names: str) -> None:
    for name in names:
        pipe.load_lora_weights(dict(pipe.states[name]), adapter_name=name)


@pytest.mark.filterwarnings("ignore")  # peft and torch on each other
def test_the_same_lora_calls_give_the_same(adapted, given):
    pipe = fastdiff.optimize(adapted)
    last = ours(pipe, given)
    steps: list[Callable[[], Any]] = [
        lambda: load(pipe, "style"),
        lambda: load(pipe, "detail"),
        lambda: pipe.set_adapters(["style", "detail"], [0.7, 0.4]),
        lambda: pipe.set_adapters("detail"),
        lambda: given.update(cross_attention_kwargs={"scale": 0.5}),
        lambda: given.pop("cross_attention_kwargs"),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.delete_adapters("detail"),
        lambda: pipe.set_adapters("style", 1.3),
        lambda: pipe.fuse_lora(components=["unet"]),
        lambda: pipe.unfuse_lora(components=["unet"]),
        lambda: pipe.unload_lora_weights(),
    ]
    same = {10, 11}  # merging changes nothing
    for step, act in enumerate(steps):
        act()
        got = ours(pipe, given)
        assert close(got, plainly(pipe, given), 2e-5), step
        assert close(got, last, 1e-4) == (step in same), step
        last = got
    assert "LoRA" not in fastdiff.summary(pipe)


@pytest.mark.filterwarnings("ignore")
def test_images_with_an_adapter(adapted):
    load(adapted, "style")
    before = images(adapted, TEXT, cross_attention_kwargs={"scale": 0.8})
    fastdiff.optimize(adapted)
    assert "merged" not in fastdiff.summary(adapted)
    assert np.abs(images(adapted, TEXT, cross_attention_kwargs={"scale": 0.8}) - before).max() <= CLOSE
    assert "LoRA adapters merged into" in fastdiff.summary(adapted)
    assert faster(adapted).fallbacks.total() == 0
    fastdiff.restore(adapted)
    assert np.array_equal(images(adapted, TEXT, cross_attention_kwargs={"scale": 0.8}), before)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_not_plain_are_left_to_diffusers(pipe, given):
    peft = pytest.importorskip("peft")
    fastdiff.optimize(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    left(pipe, given, "LoRA adapter 'default' is a DoraLinearVariant")


# -- optimize, restore, summary


def test_weights_are_shared_and_restored_bit_for_bit(pipe):
    before = {name: (id(value), value.clone(), value.stride()) for name, value in pipe.unet.named_parameters()}
    fastdiff.optimize(fastdiff.optimize(pipe))
    assert {id(value) for value in faster(pipe)._binding.ours.parameters()} == {one for one, *_ in before.values()}
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    fastdiff.restore(fastdiff.restore(pipe))
    for name, value in pipe.unet.named_parameters():
        same, data, stride = before[name]
        assert id(value) == same and torch.equal(value, data) and value.stride() == stride, name


def test_a_copy_of_the_network_is_diffusers_own(pipe, given):
    fastdiff.optimize(pipe)
    copied = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        copied.conv_out.bias.add_(1)
        assert close(ours(pipe, given) + 1, copied(**given).sample, 1e-4)
    assert faster(pipe).calls == 1 and not isinstance(copied.forward, Faster)


def test_the_network_is_freed_without_the_garbage_collector(pipe, given):
    gc.collect()
    gc.disable()
    try:
        unet = network(SD)
        pipe.unet = unet
        fastdiff.optimize(pipe)
        ours(pipe, given)
        gone = weakref.ref(unet)
        pipe.unet = None
        del unet
        assert gone() is None
    finally:
        gc.enable()


def test_the_summary_speaks_of_every_component(pipe, given):
    text = fastdiff.summary(pipe)
    assert "unet (UNet2DConditionModel): left alone: fastdiff.optimize was not called" in text
    fastdiff.optimize(pipe)
    ours(pipe, given)
    text = fastdiff.summary(pipe)
    assert "unet (UNet2DConditionModel): sped up" in text and "1 calls in fastdiff, 0 left to diffusers" in text
    assert "vae (AutoencoderKL): left alone: only UNet2DModel and UNet2DConditionModel are sped up" in text
    assert "tokenizer (Tokenizer): left alone: not a network" in text


def test_other_networks_and_configs_are_left_alone():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, norm_num_groups=4
    )
    dit = diffusers.DiTPipeline(transformer, vae(), scheduler())
    assert "only UNet2DModel" in fastdiff.summary(fastdiff.optimize(dit))
    assert "forward" not in transformer.__dict__
    odd = sd()
    odd.unet = network(SD | {"act_fn": "gelu"})
    assert "act_fn is 'gelu'" in fastdiff.summary(fastdiff.optimize(odd))
    with pytest.raises(PlanError, match="a diffusers pipeline"):
        fastdiff.optimize(object())


def test_a_compiled_network_is_left_alone(pipe):
    pipe.unet.compile(backend="eager")
    assert "compiled" in fastdiff.summary(fastdiff.optimize(pipe))
    assert "forward" not in pipe.unet.__dict__
