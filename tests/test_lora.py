"""Adapters: equal to peft and to the formula from every layout, bit-exact when removed, whole or not at all."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from tolerances import assert_no_worse_than
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.models import lora as lora_module
from fastdiff.models.lora import Factors, Lora, LoraSet, read_lora

pytestmark = pytest.mark.fast

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SMALL = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4, transformer_layers_per_block=(1, 1, 2),
)  # fmt: skip


def small_unet(**changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**SMALL, **changes}).eval()


def small_text(projected: bool = False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
        projection_dim=8,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


ATTENTION = r"attentions.*(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)$"
EVERYTHING = r"."  # of what is a layer: convolutions of 1x1 and 3x3, strided ones, time and attention projections


def layers(module: nn.Module, pattern: str = EVERYTHING) -> dict[str, nn.Module]:
    found = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: layer for name, layer in found.items() if re.search(pattern, name)}


def factors_of(module: nn.Module, rank: int, seed: int, pattern: str = ATTENTION) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for each layer that fits, as training would make them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in layers(module, pattern).items():
        out, inputs, *kernel = layer.weight.shape
        down = torch.randn(rank, inputs, *kernel, generator=generator) / 4
        made[name] = down, torch.randn(out, rank, *[1] * len(kernel), generator=generator) / 4
    return made


def kohya(made, alpha=None, start="lora_unet_", rename=lambda flat: flat) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in made.items():
        head = start + rename(name.replace(".", "_"))
        tensors |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{head}.alpha"] = torch.tensor(float(alpha))
    return tensors


def dotted(made, ends=("lora_A", "lora_B"), start="unet.") -> dict[str, Tensor]:
    down_up = {f"{start}{name}.{ends[i]}.weight": pair[i] for name, pair in made.items() for i in (0, 1)}
    return dict(down_up)


def weights_of(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone(memory_format=torch.preserve_format) for m in modules for p in m.parameters()]


def same_bits(module: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def truth_of(weight: Tensor, *parts: tuple[Tensor, Tensor, float]) -> Tensor:
    """The formula, in float64."""
    total = weight.double()
    for down, up, scale in parts:
        total = total + scale * (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
    return total


def merged(module: nn.Module, tensors, metadata=None, strength: float = 1.0, part: str = "unet") -> LoraSet:
    loras = LoraSet({part: module})
    loras.load("a", read_lora(tensors, metadata))
    loras.set({"a": strength})
    return loras


# --- the numbers ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_merged_weights_are_the_formula_rounded_once(dtype, pattern, monkeypatch):
    monkeypatch.setattr(lora_module, "_BLOCK", 100)  # weights in many pieces, the last one ragged
    net = small_unet().to(dtype).to(memory_format=torch.channels_last)
    before = {name: layer.weight.detach().clone() for name, layer in layers(net).items()}
    one, two = factors_of(net, 4, 1, pattern), factors_of(net, 3, 2, ATTENTION)
    loras = LoraSet({"unet": net})
    loras.load("one", read_lora(kohya(one, alpha=2)))
    loras.load("two", read_lora(dotted(two)))
    loras.set({"one": 0.7, "two": -1.3})
    for name, layer in layers(net).items():
        parts = [(*one[name], 0.7 * 2 / 4)] if name in one else []
        parts += [(*two[name], -1.3)] if name in two else []
        truth = truth_of(before[name], *parts)
        plain = before[name].float()
        for down, up, scale in parts:
            plain = plain + scale * (up.flatten(1) @ down.flatten(1)).view(plain.shape)
        assert_no_worse_than(layer.weight.detach(), plain.to(dtype), truth)
        assert parts or torch.equal(layer.weight, before[name])


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_network_does_what_peft_does(strength):
    pytest.importorskip("peft")
    ours, theirs = small_unet(), small_unet()
    made = factors_of(ours, 4, 3, EVERYTHING)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        plain = ours(x, 7, context).sample
        merged(ours, dotted(made), strength=strength)
        theirs.load_lora_adapter(dotted(made), prefix="unet", adapter_name="a")
        theirs.set_adapters("a", strength)
        beside = theirs(x, 7, context).sample
        theirs.fuse_lora()
        theirs.unload_lora()
        fused, got = theirs(x, 7, context).sample, ours(x, 7, context).sample
    size = beside.abs().max()
    assert (got - beside).abs().max() <= 1e-5 * size and (got - fused).abs().max() <= 1e-5 * size
    assert (got - plain).abs().max() > 0.01 * size
    for (name, mine), other in zip(layers(ours).items(), layers(theirs).values(), strict=True):
        assert (mine.weight - other.weight).abs().max() <= 2e-6 * other.weight.abs().max(), name


# --- layouts ---


def sgm(flat: str) -> str:
    """diffusers' flat name of a layer as kohya's SDXL files write it, apart from the tables under test."""
    inner = [("norm1", "in_layers_0"), ("conv1", "in_layers_2"), ("time_emb_proj", "emb_layers_1"),
             ("conv2", "out_layers_3"), ("conv_shortcut", "skip_connection")]  # fmt: skip
    ends = {"conv_in": "input_blocks_0_0", "conv_out": "out_2",
            "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2"}  # fmt: skip
    if flat in ends:
        return ends[flat]
    if found := re.match(r"(down|up|mid)_blocks?_?(\d)?_(resnets|attentions)_(\d)_(.+)", flat):
        way, level, kind, i, rest = found.groups()
        if kind == "resnets":
            rest = next(rest.replace(new, old) for new, old in inner if rest.startswith(new))
        if way == "mid":
            return f"middle_block_{1 if kind == 'attentions' else 2 * int(i)}_{rest}"
        number, child = 3 * int(level) + int(i) + (way == "down"), int(kind == "attentions")
        return f"{'input' if way == 'down' else 'output'}_blocks_{number}_{child}_{rest}"
    if found := re.match(r"down_blocks_(\d)_downsamplers_0_conv", flat):
        return f"input_blocks_{3 * int(found[1]) + 3}_0_op"
    level = int(re.match(r"up_blocks_(\d)_upsamplers_0_conv", flat)[1])
    return f"output_blocks_{3 * level + 2}_2_conv"


def processors(made, start="unet.") -> dict[str, Tensor]:
    """diffusers before peft: projections belong to a processor, other layers have a `lora` child."""
    tensors = {}
    for name, pair in made.items():
        for tensor, way in zip(pair, ("down", "up"), strict=True):
            head, _, last = name.removesuffix(".0").rpartition(".")
            own = f"{head}.processor.{last}_lora" if last.startswith("to_") else f"{name}.lora"
            tensors[f"{start}{own}.{way}.weight"] = tensor
    return tensors


LAYOUTS = {
    "kohya without alpha": kohya,
    "kohya with alpha = rank": lambda made: kohya(made, alpha=4),
    "kohya, sgm names": lambda made: kohya(made, alpha=4, rename=sgm),
    "peft": dotted,
    "peft, adapter's name": lambda made: dotted(made, ("lora_A.default", "lora_B.default")),
    "peft, bare": lambda made: dotted(made, start=""),
    "peft, its own prefix": lambda made: dotted(made, start="base_model.model."),
    "original names, peft's ends": lambda made: dotted(made, start="diffusion_model."),
    "diffusers, lora children": lambda made: dotted(made, ("lora.down", "lora.up")),
    "diffusers, processors": processors,
    "diffusers, bare processors": lambda made: processors(made, start=""),
}


@pytest.mark.parametrize("pattern", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_read_the_same(layout, pattern):
    net = small_unet()
    made = factors_of(net, 4, 5, pattern)
    wanted, got = read_lora(kohya(made)), read_lora(LAYOUTS[layout](made))
    assert got.targets.keys() == wanted.targets.keys() and got.parts == ("unet",)
    for key, mine in got.targets.items():
        other = wanted.targets[key]
        assert torch.equal(mine.down, other.down) and torch.equal(mine.up, other.up) and mine.scale == other.scale == 1
    LoraSet({"unet": net}).load("a", got)


def test_a_linear_factor_fits_a_1x1_convolution_and_the_other_way_round():
    net = small_unet()
    made = factors_of(net, 2, 6)
    flat = {name: (down.flatten(1), up.flatten(1)) for name, (down, up) in made.items()}
    assert any(down.ndim == 4 for down, _ in made.values())
    deep = {name: (down[:, :, None, None], up[:, :, None, None]) for name, (down, up) in flat.items()}
    results = []
    for tensors in (kohya(made), kohya(flat), kohya(deep)):
        fresh = small_unet()
        merged(fresh, tensors)
        results.append(weights_of(fresh))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_a_convolution_in_three_factors():
    net = small_unet()
    name, layer = next((n, m) for n, m in layers(net).items() if getattr(m, "kernel_size", None) == (3, 3))
    out, inputs = layer.weight.shape[:2]
    up, middle, down = torch.randn(out, 3, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(3, inputs, 1, 1)
    head = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{head}.lora_up.weight": up, f"{head}.lora_mid.weight": middle, f"{head}.lora_down.weight": down}
    x = torch.randn(1, inputs, 6, 6, dtype=torch.float64)
    chain = nn.functional.conv2d(nn.functional.conv2d(x, down.double()), middle.double())
    wanted = nn.functional.conv2d(x, layer.weight.double()) + nn.functional.conv2d(chain, up.double())
    merged(net, tensors)
    got = nn.functional.conv2d(x, layer.weight.double())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with pytest.raises(ArtifactError, match=r"lora_mid.weight' is \[3, 4, 3, 3\]"):
        read_lora(tensors | {f"{head}.lora_mid.weight": torch.randn(3, 4, 3, 3)})


TEXT = [
    ("text_encoder", "kohya", lambda made: kohya(made, 4, "lora_te_text_model_")),
    ("text_encoder", "kohya, first of two", lambda made: kohya(made, 4, "lora_te1_text_model_")),
    ("text_encoder_2", "kohya, second", lambda made: kohya(made, 4, "lora_te2_text_model_")),
    ("text_encoder", "peft", lambda made: dotted(made, start="text_encoder.text_model.")),
    ("text_encoder", "peft, flat", lambda made: dotted(made, start="text_encoder.")),
    ("text_encoder_2", "peft, second", lambda made: dotted(made, start="text_encoder_2.text_model.")),
    ("text_encoder", "diffusers", lambda made: dotted(
        made, ("lora_linear_layer.down", "lora_linear_layer.up"), "text_encoder.text_model.")),
    ("text_encoder", "diffusers, oldest", lambda made: {
        re.sub(r"(\w+)_proj\.lora\.", lambda m: f"to_{m[1]}_lora.", name): tensor
        for name, tensor in dotted(made, ("lora.down", "lora.up"), "text_encoder.text_model.").items()}),
]  # fmt: skip


@pytest.mark.parametrize("part, layout, write", TEXT, ids=[f"{part}, {layout}" for part, layout, _ in TEXT])
@pytest.mark.parametrize("projected", [False, True])  # transformers names the layers of the two differently
def test_text_encoders(part, layout, write, projected):
    encoder = small_text(projected)
    inside = encoder.text_model if hasattr(encoder, "text_model") else encoder
    made = factors_of(inside, 4, 7, r"_proj$")
    before = {name: layer.weight.detach().clone() for name, layer in layers(inside).items()}
    loras = merged(encoder, write(made), part=part)
    for name, (down, up) in made.items():
        truth = truth_of(before[name], (down, up, 1.0))
        assert_no_worse_than(layers(inside)[name].weight.detach(), before[name] + up @ down, truth)
    loras.clear()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(inside).items())


def test_the_projection_of_a_text_encoder():
    encoder = small_text(projected=True)
    made = factors_of(encoder, 2, 8, "^text_projection$")
    merged(encoder, kohya(made, 2, "lora_te2_"), part="text_encoder_2")
    assert not same_bits(encoder, weights_of(small_text(projected=True)))


# --- alpha ---


def scale_of(tensors, facts=None) -> float:
    metadata = None if facts is None else {"lora_adapter_metadata": json.dumps(facts)}
    lora = read_lora(tensors, metadata)
    return next(iter(lora.targets.values())).scale


def test_where_alpha_comes_from():
    made = {"mid_block.attentions.0.proj_in": (torch.ones(4, 16), torch.ones(16, 4))}
    peft, bare = dotted(made), dotted(made, start="")
    assert scale_of(kohya(made, alpha=1)) == 0.25
    assert scale_of(kohya(made)) == scale_of(peft) == 1
    assert scale_of(peft, {"unet.lora_alpha": 2, "unet.r": 4}) == 0.5
    assert scale_of(bare, {"lora_alpha": 2}) == 0.5
    assert scale_of(peft, {"text_encoder.lora_alpha": 2}) == 1
    assert scale_of(peft, {"unet.lora_alpha": 2, "unet.use_rslora": True}) == 2 / math.sqrt(4)
    for pattern, scale in [("attentions.0.proj_in", 3), ("mid_block.attentions.0.proj_in", 3), ("_in", 0.5)]:
        assert scale_of(peft, {"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 12}}) == scale
    assert scale_of(kohya(made, alpha=1), {"unet.lora_alpha": 2}) == 0.25  # the tensor wins


def test_a_file_that_diffusers_saves_reads_back(tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs, plain = small_unet(), small_unet(), layers(small_unet())
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "proj_in"]))
    torch.manual_seed(9)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    theirs.save_lora_adapter(tmp_path)
    theirs.fuse_lora()
    theirs.unload_lora()
    loras = LoraSet({"unet": ours})
    loras.load("a", read_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    loras.set({"a": 1.0})
    changed = 0
    for (name, mine), other in zip(layers(ours).items(), layers(theirs).values(), strict=True):
        assert (mine.weight - other.weight).abs().max() <= 2e-6 * other.weight.abs().max(), name
        changed += not torch.equal(mine.weight, plain[name].weight)
    assert changed > 20


# --- swapping ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_order_of_swaps_ends_at_the_same_bits_and_addresses(dtype, channels_last):
    net = small_unet().to(dtype)
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    before = weights_of(net)
    places = [(p.data_ptr(), p.stride()) for p in net.parameters()]
    made = {name: factors_of(net, 2 + i, i, [ATTENTION, EVERYTHING, "conv"][i]) for i, name in enumerate("abc")}

    def fresh():
        loras = LoraSet({"unet": net})
        for name, factors in made.items():
            loras.load(name, read_lora(kohya(factors, alpha=1.5)))
        return loras

    goal = {"a": 0.5, "c": 1.1}
    loras = fresh()
    loras.set(goal)
    wanted = weights_of(net)
    loras.clear()
    assert same_bits(net, before)
    paths = [[{"b": 1}], [{"c": 2}, {"a": 1, "b": 3}], [{}, {"a": 0.0}], [{"a": 1, "b": 1, "c": 1}, {}, {"b": 9}]]
    for path in paths:
        loras = fresh()
        for strengths in path:
            loras.set(strengths)
        loras.set(dict(reversed(goal.items())))
        assert same_bits(net, wanted) and loras.active == goal
        assert [(p.data_ptr(), p.stride()) for p in net.parameters()] == places
        for name in ("b", "c", "a"):
            loras.remove(name)
        assert same_bits(net, before) and loras.names == () and not loras._originals


def test_removing_one_leaves_what_the_others_make():
    net, alone = small_unet(), small_unet()
    before = weights_of(net)
    one, two = read_lora(kohya(factors_of(net, 2, 1))), read_lora(kohya(factors_of(net, 3, 2, EVERYTHING)))
    for first, second in itertools.permutations([("one", one), ("two", two)]):
        loras = LoraSet({"unet": net})
        loras.load(*first)
        loras.load(*second)
        loras.set({"one": 0.3, "two": 0.6})
        loras.remove("two")
        single = LoraSet({"unet": alone})
        single.load("one", one)
        single.set({"one": 0.3})
        assert same_bits(net, weights_of(alone)) and loras.active == {"one": 0.3} and loras.names == ("one",)
        assert len(loras._originals) == len(one.targets)  # no copy is kept of a layer that nothing changes
        loras.clear()
        single.clear()
    assert same_bits(net, before)


def test_a_zero_strength_gives_the_original_bits():
    net = small_unet().half()
    before = weights_of(net)
    loras = merged(net, kohya(factors_of(net, 2, 1)))
    assert not same_bits(net, before)
    loras.set({"a": 0})
    assert same_bits(net, before) and loras.active == {} and loras.names == ("a",)


def test_a_module_that_changes_its_format_while_merged():
    net = small_unet()
    before = weights_of(net)
    made = factors_of(net, 2, 1, EVERYTHING)
    loras = merged(net, kohya(made), strength=0.5)
    wanted = weights_of(net)
    net.to(memory_format=torch.channels_last)
    loras.set({"a": 1.0})
    loras.set({"a": 0.5})
    assert all(torch.allclose(p, w, atol=1e-6) for p, w in zip(net.parameters(), wanted, strict=True))
    loras.clear()
    assert same_bits(net, before)


def test_a_swap_that_fails_halfway_leaves_the_original_network(monkeypatch):
    net = small_unet().to(torch.bfloat16)
    before = weights_of(net)
    loras = merged(net, kohya(factors_of(net, 2, 1)))
    write, calls = lora_module._write, []

    def failing(*arguments):
        calls.append(0)
        if len(calls) > 7:
            raise MemoryError("no memory left")
        write(*arguments)

    monkeypatch.setattr(lora_module, "_write", failing)
    with pytest.raises(MemoryError):
        loras.set({"a": 2.0})
    monkeypatch.undo()
    assert same_bits(net, before) and loras.active == {} and loras.names == ("a",)
    loras.set({"a": 1.0})
    loras.clear()
    assert same_bits(net, before)


# --- what is refused ---

NAME = "mid_block.attentions.0.proj_in"
HEAD = "lora_unet_mid_block_attentions_0_proj_in"
PAIR = {f"{HEAD}.lora_down.weight": torch.ones(4, 16), f"{HEAD}.lora_up.weight": torch.ones(16, 4)}


@pytest.mark.parametrize(
    "extra, method",
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("diff", "a full difference"),
        ("diff_b", "a difference of biases"),
        ("lora_B.bias", "trained biases"),
        ("w_norm", "trained norms"),
        ("something", "no known layout"),
        ("to_x_lora.down.weight", "no known projection"),
    ],
)
def test_other_methods_are_refused_by_name(extra, method):
    with pytest.raises(ArtifactError, match=method) as caught:
        read_lora(PAIR | {f"{HEAD}.{extra}": torch.ones(4, 4)})
    assert f"{HEAD}.{extra}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "holds no tensor"),
        ({f"{HEAD}.lora_down.weight": torch.ones(4, 16)}, "has no up factor"),
        ({f"{HEAD}.alpha": torch.ones(())}, "has no down factor"),
        (PAIR | {f"{HEAD}.alpha": torch.ones(2)}, r"alpha' is \[2\]; needed: one number"),
        (PAIR | {f"{HEAD}.alpha": torch.tensor(math.inf)}, "alpha' holds values that are not finite"),
        (PAIR | {f"{HEAD}.lora_up.weight": torch.ones(16, 3)}, r"lora_up.weight' is \[16, 3\]; needed: \[out, 4\]"),
        (PAIR | {f"{HEAD}.lora_up.weight": torch.ones(16, 4, 3, 3)}, r"needed: \[out, 4\]"),
        (PAIR | {f"{HEAD}.lora_up.weight": torch.ones(16)}, "needed: 2 or 4 axes"),
        (PAIR | {f"{HEAD}.lora_down.weight": torch.ones(0, 16)}, "needed"),
        (PAIR | {f"{HEAD}.lora_down.weight": torch.full((4, 16), math.nan)}, "not finite"),
        (PAIR | {f"{HEAD}.lora_down.weight": torch.ones(4, 16, dtype=torch.int8)}, "torch.int8; allowed are float"),
        (PAIR | {f"unet.{NAME}.lora_A.weight": torch.ones(4, 16)}, "the same factor of one layer"),
    ],
)
def test_damaged_files_are_refused(change, message):
    with pytest.raises(ArtifactError, match=message):
        read_lora(change)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        ('{"unet.use_dora": true}', "unet.use_dora is True"),
        ('{"unet.lora_alpha": "8"}', "alpha '8'"),
        ('{"unet.lora_alpha": NaN}', "alpha nan"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern is"),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', "alpha_pattern holds"),
    ],
)
def test_damaged_metadata_is_refused(text, message):
    tensors = {f"unet.{NAME}.lora_A.weight": torch.ones(4, 16), f"unet.{NAME}.lora_B.weight": torch.ones(16, 4)}
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_lora(tensors, {"lora_adapter_metadata": text})


def test_files_are_refused_with_their_path(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        read_lora(tmp_path / "nothing.safetensors")
    file = tmp_path / "half.safetensors"
    save_file({f"{HEAD}.lora_down.weight": torch.ones(4, 16)}, file)
    with pytest.raises(ArtifactError, match=re.escape(str(file))):
        read_lora(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        read_lora(str(file))


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            {"nowhere": (torch.ones(2, 16), torch.ones(16, 2))},
            "lora_unet_nowhere.lora_down.weight' belongs to no layer",
        ),
        ({NAME: (torch.ones(2, 15), torch.ones(16, 2))}, r"is \[2, 15\]; needed for its layer: \[2, 16, 1, 1\]"),
        ({NAME: (torch.ones(2, 16, 3, 3), torch.ones(16, 2))}, r"is \[2, 16, 3, 3\]; needed for its layer"),
        ({NAME: (torch.ones(2, 16), torch.ones(15, 2))}, r"up factor of \[15, 2\]; needed for its layer: \[16, 2\]"),
        ({"conv_in": (torch.ones(2, 4), torch.ones(8, 2))}, r"needed for its layer: \[2, 4, 3, 3\]"),
        ({"conv_norm_out": (torch.ones(2, 8), torch.ones(8, 2))}, "belongs to no layer"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(bad, message):
    net = small_unet()
    loras = merged(net, kohya(factors_of(net, 2, 1)), strength=0.5)
    before = weights_of(net)
    rest = {name: pair for name, pair in factors_of(net, 2, 2).items() if name != NAME}
    with pytest.raises(ArtifactError, match=message):
        loras.load("bad", read_lora(kohya(rest | bad)))
    assert same_bits(net, before) and loras.names == ("a",) and loras.active == {"a": 0.5}
    assert len(loras._originals) == len(factors_of(net, 2, 1))


def test_a_part_that_is_not_there_is_refused_and_can_be_left_out():
    net = small_unet()
    both = read_lora(
        kohya(factors_of(net, 2, 1)) | kohya(factors_of(small_text(), 2, 1, "_proj$"), None, "lora_te_text_model_")
    )
    assert both.parts == ("text_encoder", "unet")
    loras = LoraSet({"unet": net})
    with pytest.raises(
        ArtifactError, match="'lora_te_.* belongs to no layer .*; allowed: linear and conv layers of unet"
    ):
        loras.load("a", both)
    loras.load("a", both.only("unet"))
    assert both.only("unet").parts == ("unet",)
    LoraSet({"unet": net, "text_encoder": small_text()}).load("a", both)


def test_names_and_strengths_are_checked_before_anything_changes():
    net = small_unet()
    loras = merged(net, kohya(factors_of(net, 2, 1)))
    before = weights_of(net)
    for strengths in ({"b": 1.0}, {"a": 0.1, "b": 1.0}, {"a": math.nan}, {"a": "1"}, {"a": True}, {"a": None}):
        with pytest.raises(ArtifactError, match="is not loaded; allowed: a|allowed: a finite number"):
            loras.set(strengths)
    with pytest.raises(ArtifactError, match="'b' is not loaded"):
        loras.remove("b")
    with pytest.raises(ArtifactError, match="'a' is loaded already"):
        loras.load("a", Lora({}))
    twice = Factors(torch.ones(2, 12), torch.ones(12, 2), 1.0, "x")
    name = "text_encoder.{}encoder_layers_0_self_attn_q_proj"
    with pytest.raises(ArtifactError, match="change the same layer"):
        LoraSet({"text_encoder": small_text()}).load(
            "c", Lora({name.format(""): twice, name.format("text_model_"): twice})
        )
    assert same_bits(net, before) and loras.active == {"a": 1.0}
