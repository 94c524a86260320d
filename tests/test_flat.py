"""The flat plan: whole networks against the UNet's own forward pass, what it joins, and how it follows its weights."""

from __future__ import annotations

import pytest
import torch
from narrow_unets import error, first, inputs, network
from tolerances import assert_no_worse_than

from fastdiff.backends.flat import FlatNetwork, FlatTrunk
from fastdiff.backends.flat.join import join
from fastdiff.backends.lower import Shape, lower
from fastdiff.benchmarks.layouts import LAYOUTS
from fastdiff.errors import ShapeError
from fastdiff.kernels import REFERENCE
from fastdiff.sampling.denoiser import Cond


def doubled(given):
    x, rows, contexts = given
    return x.double(), rows.double(), [(k.double(), v.double()) for k, v in contexts]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_published_layout(layout):
    unet = network(layout)
    given = inputs(unet, 2, 32, 32)
    got, plain = FlatTrunk(unet)(*given), unet.trunk(*given)
    unet.double()
    exact = unet.trunk(*doubled(given))
    assert_no_worse_than(got, plain, exact)
    assert error(FlatTrunk(unet)(*doubled(given)), exact) < 1e-13


@pytest.mark.parametrize("size", [(8, 8), (40, 24), (16, 72)], ids=str)
def test_any_size_and_batch(size):
    unet = network().double()
    trunk, given = FlatTrunk(unet), doubled(inputs(unet.float(), 3, *size))
    unet.double()
    assert error(trunk(*given), unet.trunk(*given)) < 1e-13
    assert error(trunk(*first(given)), unet.trunk(*first(given))) < 1e-13


def test_residuals_of_a_controlnet():
    unet = network()
    trunk, given = FlatTrunk(unet), inputs(unet, 2, 16, 16)
    _, skips = unet.encode(unet.conv_in(given[0]), unet.split_rows(given[1]), iter(given[2]))
    control = [0.1 * torch.randn_like(skip) for skip in [*skips, skips[-1]]]
    assert error(trunk(*given, control), unet.trunk(*given, control)) < 1e-6
    with pytest.raises(ShapeError, match="control is 2; needed"):
        trunk(*given, control[:2])


def test_half_precision_attends_in_float32_where_the_config_says_so():
    """Stable Diffusion 2.1's logits overflow float16: without upcasting these are NaN."""
    unet = network("SD 2.1")
    assert unet.config.upcast_attention
    for name, parameter in unet.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            parameter.mul_(200)
    given = inputs(unet, 1, 16, 16)
    unet.bfloat16()
    halves = [given[0].bfloat16(), given[1].bfloat16(), [(k.bfloat16(), v.bfloat16()) for k, v in given[2]]]
    got, plain = FlatTrunk(unet)(*halves), unet.trunk(*halves)
    assert got.isfinite().all()
    unet.double()
    exact = unet.trunk(*doubled(halves))
    assert_no_worse_than(got, plain, exact)


def counted(name, calls):
    """Plain ops that count how often one of them is called."""
    op = getattr(REFERENCE, name)

    def call(*arguments, **options):
        calls.append(arguments)
        return op(*arguments, **options)

    return REFERENCE._replace(**{name: call})


def test_what_is_joined_is_written_in_place(monkeypatch):
    """No skip connection is concatenated, and each join's two parts lie in one buffer."""
    unet = network("SD 1.5")
    given = inputs(unet, 1, 16, 16)
    program = lower(unet, shape_of(given))
    pairs = {(op.src0, op.src1) for op in program.ops if op.src1 >= 0 and op.C1}
    buffers = join(program)
    assert len(buffers) == len(pairs) == 12
    assert all(program.alias[a][0] == program.alias[b][0] for a, b in pairs)
    assert all(op.C1 == 0 for op in program.ops)
    trunk = FlatTrunk(unet)
    trunk(*given)

    def cat(*_, **__):
        raise AssertionError("features were concatenated")

    monkeypatch.setattr(torch, "cat", cat)
    trunk(*given)


def shape_of(given):
    from fastdiff.backends.lower import keys_of

    x, rows, contexts = given
    return Shape(tuple(x.shape), tuple(rows.shape), tuple(keys_of(i, k) for i, (k, _) in enumerate(contexts)))


def test_queries_keys_and_values_are_one_product():
    calls = []
    unet = network("SD 1.5")
    unet.ops = counted("linear", calls)
    given = inputs(unet, 1, 16, 16)
    calls.clear()
    FlatTrunk(unet)(*given)
    flat = len(calls)
    calls.clear()
    unet.trunk(*given)
    assert len(calls) - flat == 2 * 16 - len([r for r in shortcuts(unet)])


def shortcuts(unet):
    return [r for block in unet.blocks() for r in block.all_resnets() if r.conv_shortcut is not None]


def test_weights_that_change_are_followed_in_place_and_when_replaced():
    unet = network()
    flat, given = FlatNetwork(unet), inputs(unet, 1, 16, 16)
    cond = Cond(extra={"encoder_hidden_states": torch.randn(1, 7, unet.config.cross_attention_dim)})
    times = torch.tensor([[[500.0, 500.0]]])
    flat.prepare(cond, times)
    before = flat.trunk(*given)
    plans = list(flat.trunk._plans.values())
    for name, parameter in unet.named_parameters():
        if "attn1.to_v" in name or "conv1.weight" in name:
            parameter.mul_(1.5)
    flat.prepare(cond, times)
    after = flat.trunk(*given)
    assert error(after, unet.trunk(*given)) < 1e-6 < error(after, before)
    assert list(flat.trunk._plans.values()) == plans, "weights changed in place need no new plan"
    unet.conv_out.weight = torch.nn.Parameter(2 * unet.conv_out.weight, requires_grad=False)
    flat.prepare(cond, times)
    assert error(flat.trunk(*given), unet.trunk(*given)) < 1e-6


def test_gradients_go_the_plain_way():
    unet = network("DDPM CIFAR-10")
    x, rows, _ = inputs(unet, 1, 16, 16)
    x.requires_grad_()
    FlatTrunk(unet)(x, rows).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
