"""Backends on networks that nobody here wrote, the forms oneDNN is given, and what keeps a sample's bits its own."""

from __future__ import annotations

import peers
import pytest
import torch
from networks import plainly, relative
from torch import nn

from fusegen.runtime import api, backends
from fusegen.runtime.backends import onednn
from fusegen.runtime.errors import RequestError


def sessions(module, inputs, **more):
    program = api.capture(module.eval(), inputs)
    return api.compile(program, **more)


class QuickGELU(nn.Module):
    """CLIP's, as transformers writes it; ATen and oneDNN have no operator of it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Epilogues(nn.Module):
    """Every epilogue a product can have, alone and together."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 40, bias=False)
        self.conv, self.twin = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.pool = nn.Conv2d(8, 8, 3, stride=2, groups=2)

    def forward(self, x, image):
        h = self.activation(self.a(x))
        h = h + self.b(h)
        h = self.activation(self.b(h) + h)
        value, gate = self.a(x), self.b(h)
        picture = self.conv(image)
        picture = self.activation(self.twin(image) + picture)
        return value * self.activation(gate), self.activation(self.pool(picture))


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), QuickGELU()],
    ids=["relu", "silu", "gelu", "gelu_tanh", "quick_gelu"],
)
def test_epilogues_compute_what_the_graph_says(activation, dtype, bound):
    torch.manual_seed(0)
    module, inputs = Epilogues(activation), (torch.randn(5, 17, 24), torch.randn(2, 4, 9, 11))
    session = sessions(module, inputs, dtype=dtype)
    with torch.no_grad():
        want = module(*inputs)
    got = session(*inputs)
    assert all(relative(g, w) <= bound for g, w in zip(got, want, strict=True))
    bound_to = " ".join(session.plan.counts())
    assert "linear + residual" in bound_to and "conv2d + residual" in bound_to and "activation" in bound_to


@pytest.mark.parametrize("shape", [(1, 24), (24,), (0, 24), (3, 1, 24), (2, 3, 4, 24)])
def test_linear_takes_every_rank_and_no_rows(shape):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(24, 600), nn.SiLU(), nn.Linear(600, 8)), torch.randn(shape)
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        got, want = sessions(module, (x,), dtype=dtype)(x), plainly(module, x)
        assert got.shape == want.shape
        assert not x.numel() or relative(got, want) <= bound


class Convolutions(nn.Module):
    """Convolutions of every kind, plain, with a residual, and one whose output is the network's."""

    def __init__(self, channels):
        super().__init__()
        self.wide = nn.Conv2d(4, channels, 3, padding=1)
        self.rows = nn.Conv2d(channels, channels, (1, 5), padding=(0, 4), dilation=(1, 2), bias=False)
        self.groups = nn.Conv2d(channels, channels, 3, stride=2, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = torch.tanh(self.wide(x))
        h = self.rows(h) + h
        return self.point(torch.sin(h)), torch.cos(h + self.point(h)), self.groups(h)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("channels, batch", [(8, 2), (3, 1), (1, 2)])
def test_convolutions_written_to_their_planned_place(channels, batch, dtype, bound, monkeypatch):
    torch.manual_seed(0)
    module, x = Convolutions(channels), torch.randn(batch, 4, 9, 11)
    fresh = sessions(module, (x,), dtype=dtype)
    want = fresh(x)
    monkeypatch.setattr(onednn, "MAPPED", 0)
    session = sessions(module, (x,), dtype=dtype)
    session(torch.full_like(x, torch.nan))  # what lay there before must not be added to
    for _ in range(2):
        got = session(x)
        assert all(relative(g, w) <= bound for g, w in zip(got, plainly(module, x), strict=True))
        assert all(relative(g, w) <= bound / 4 for g, w in zip(got, want, strict=True))
    planned = [s.binding.planned for s in session.plan.steps if "conv2d" in s.binding.name]
    assert len(planned) >= 4 and all(planned)
    rounded = not onednn.serves(getattr(torch, dtype))  # then it is rounded to its place whatever its size
    assert all(s.binding.planned is rounded for s in fresh.plan.steps if "onednn conv2d" in s.binding.name)


class Aliases(nn.Module):
    """Outputs that are an input, a weight, a view and one value twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))

    def forward(self, x):
        y = x * 2
        return x, self.weight, y.t(), y, self.weight.exp()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_outputs_that_share_memory_are_given_as_copies(backend):
    module, x = Aliases(), torch.randn(2, 3)
    session = sessions(module, (x,), backend=backend)
    for _ in range(2):
        got = session(x)
        for g, w in zip(got, module(x), strict=True):
            assert torch.equal(g, w)
            g.fill_(7)  # the caller's own: the next call is as before


class Cats(nn.Module):
    """Lists of tensors, several outputs, integers, comparisons, and values that are used much later."""

    def forward(self, x, index):
        a, b, c = x.split([1, 2, 1], dim=1)
        late = torch.cat([c, a], 1)
        mask = torch.where(index > 1, 1.0, 0.5)
        top = torch.topk(x.flatten(1), 3).values
        return torch.cat([late * mask[:, None, None], b], 1).mean(-1), top, x.new_ones(2) + index.sum()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_lists_several_outputs_and_integers(backend):
    inputs = (torch.randn(3, 4, 5), torch.tensor([0, 1, 2]))
    session = sessions(Cats(), inputs, backend=backend)
    for _ in range(2):
        for got, want in zip(session(*inputs), Cats()(*inputs), strict=True):
            assert torch.equal(got, want)


class Products(nn.Module):
    """The library calls that a deterministic session cuts into samples."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(33, 65), nn.Conv2d(5, 7, 3)

    def forward(self, x, image):
        h = torch.nn.functional.silu(self.linear(x))
        scores = torch.softmax(torch.matmul(h, h.transpose(1, 2)), -1)
        return torch.bmm(scores, h).mean(1) + self.conv(image).sum((1, 2, 3), keepdim=True)[:, :, 0, 0]


def test_deterministic_cuts_every_library_product_into_samples():
    torch.manual_seed(0)
    x, image = torch.randn(4, 50, 33), torch.randn(4, 5, 12, 12)
    dynamic = {"x": {0: ("batch", 1, 9)}, "image": {0: "batch"}}
    session = api.compile(api.capture(Products().eval(), (x, image), dynamic=dynamic), deterministic=True)
    whole = session(x, image)
    for i in range(4):
        assert torch.equal(session(x[i : i + 1], image[i : i + 1])[0], whole[i])
    steps = session.planned({"x": x, "image": image}).steps
    assert all(s.binding.invariant for s in steps)
    assert {"conv2d", "bmm"} <= {s.node.op.split(".")[1] for s in steps if s.binding.by_sample}
    assert not any(s.binding.by_sample for s in session.plan.steps), "one sample is the call that each of more gets"


def test_float16_never_stays_on_a_cpu_without_it(monkeypatch):
    from fusegen.runtime import compile as compiling

    module, x = nn.Linear(8, 8).half(), torch.randn(2, 8).half()
    program = api.capture(module, (x,))
    for bf16, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(compiling, "native", lambda dtype, bf16=bf16: bf16 and dtype == "bfloat16")
        session = api.compile(program)
        assert relative(session(x).float(), plainly(module.float(), x.float())) <= 2e-2
        assert name in str(session.plan) and "float16 arithmetic" in str(session.plan)
        module.half()


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch):
    from fusegen.runtime import compile as compiling

    module, x = nn.Linear(64, 64), torch.randn(2, 9, 64)
    program = api.capture(module, (x,))
    for bf16, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(compiling, "native", lambda dtype, bf16=bf16: bf16 and dtype == "bfloat16")
        assert str(compiling.default_dtype("cpu")) == f"torch.{name}"
        plan = api.compile(program, dtype="auto", quantize="int8").planned(dict(zip(program.inputs, [x], strict=True)))
        said = "computes in float32: this CPU has no bfloat16 instructions"
        assert (said in plan.notes) is not bf16 and "1 linear layers multiply in int8, 0 stay" in plan.notes


def test_bfloat16_that_a_library_emulates_does_not_count(monkeypatch):
    from fusegen.runtime import compile as compiling

    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx512: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert compiling.native("bfloat16") is (avx512 or amx)


def test_unknown_backends_are_named():
    assert {"cpu", "cuda", "eager"} == set(backends.names())
    with pytest.raises(RequestError, match="cpu, cuda, eager"):
        backends.get("tpu")


def test_a_unet_of_diffusers():
    torch.manual_seed(0)
    unet = peers.diffusers().UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t, context):
            return self.unet(x, t, context, return_dict=False)[0]

    module = Denoiser().eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([7, 700]), torch.randn(2, 7, 24))
    want = plainly(module, *inputs)
    program = api.capture(module, inputs)
    assert torch.equal(api.compile(program, backend="eager")(*inputs), want)
    assert relative(api.compile(program)(*inputs), want) <= 1e-5
    assert relative(api.compile(program, dtype="bfloat16")(*inputs), want) <= 2e-2


def test_a_text_encoder_of_transformers():
    torch.manual_seed(0)
    library = peers.transformers()
    config = library.CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, eos_token_id=99,
    )  # fmt: skip

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = library.CLIPTextModel(config)

        def forward(self, tokens):
            return self.clip(tokens).last_hidden_state

    module, tokens = Encoder().eval(), torch.randint(0, 99, (2, 12))
    want = plainly(module, tokens)
    program = api.capture(module, (tokens,))
    assert torch.equal(api.compile(program, backend="eager")(tokens), want)
    assert relative(api.compile(program)(tokens), want) <= 1e-5
