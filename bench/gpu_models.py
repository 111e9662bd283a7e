"""Whole networks on a GPU: eager PyTorch, ``torch.compile`` and fusegen.

A denoiser's evaluation with guidance (batch 2), a generator's picture.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusegen.bench import timing, verify
from fusegen.bench.gpu_stages import Setting, captured, name_of, reason, row
from fusegen.bench.row import Row
from fusegen.kernels.op import Tolerance

MARGIN = 2.0  # a contender may be this many times as far from float32 as eager PyTorch in its own dtype is


@dataclass(frozen=True)
class Subject:
    """A network in float32 on the CPU and its arguments; ``case`` says what it is and that weights are random."""

    case: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


def emoji() -> Subject:
    """The zoo's architecture at 64 by 64 pixels.  Random weights do for speed; those that training starts at zero are
    drawn too, as an output of zeros would prove nothing."""
    from fusegen.models.unet import UNet
    from fusegen.models.zoo.emoji.train import NETWORKS

    torch.manual_seed(0)
    module = UNet(NETWORKS[64]).eval()
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    inputs = (torch.randn(2, 3, 64, 64), torch.tensor([499.0, 499.0]), torch.randn(2, 16, module.cfg.context_width))
    return Subject("emoji U-Net, random weights, 2x3x64x64", module, inputs)


def sd15() -> Subject:
    """Stable Diffusion 1.5's U-Net (860 M parameters) at 512 by 512 pixels."""
    if importlib.util.find_spec("diffusers") is None:
        raise RuntimeError("diffusers is not installed here, and the architecture comes from it")
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    module = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    inputs = (torch.randn(2, 4, 64, 64), torch.tensor([499.0, 499.0]), torch.randn(2, 77, 768))
    return Subject("SD1.5 U-Net, random weights, 2x4x64x64", module, inputs)


def stylegan2() -> Subject:
    """StyleGAN2's synthesis network at its published size for 256 pixels, one picture."""
    from fusegen.bench import gan_models

    net = gan_models.large_network()
    return Subject("StyleGAN2 256, random weights, batch 1", net, tuple(gan_models.large_inputs(net.cfg, 1)))


SUBJECTS: dict[str, Callable[[], Subject]] = {"emoji": emoji, "stylegan2": stylegan2, "sd15": sd15}


def first(output: Any) -> Tensor:
    """The tensor in what a network returns."""
    return output if isinstance(output, Tensor) else output[0]


def last(module: nn.Module) -> nn.Module:
    """The module with channels-last weights."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def eager(module: nn.Module, inputs: tuple[Tensor, ...], subject: Subject) -> Callable[[], Tensor]:
    """Eager PyTorch, channels-last."""
    net = last(module)
    return lambda: first(net(*inputs))


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], subject: Subject) -> Callable[[], Tensor]:
    """``torch.compile`` with static shapes, channels-last; max-autotune would take minutes of the check's eight."""
    net = torch.compile(last(module), dynamic=False)
    net(*inputs)
    return lambda: first(net(*inputs))


def fusegen(module: nn.Module, inputs: tuple[Tensor, ...], subject: Subject) -> Callable[[], Tensor]:
    """A session of the captured program; it makes a CUDA graph of its own."""
    from fusegen.runtime import api

    program = api.capture(subject.module, subject.inputs)
    device, dtype = inputs[0].device.type, inputs[0].dtype
    session = api.compile(program, device=device, dtype=None if dtype == torch.float32 else name_of(dtype))
    wide = tuple(i.float() for i in inputs)
    session(*wide)
    return lambda: first(session(*wide))


CONTENDERS = {"eager": eager, "fusegen": fusegen, "compile": compiled}
HEATS = (("eager", "fusegen"), ("compile",))  # the slow one last, if time runs out; it is timed beside both


def prepare(setting: Setting, name: str) -> Iterator[Row]:
    """What :func:`race` has compiled in bfloat16, compiled beside everything else: a race then finds it on disk."""
    for who in ("fusegen", "compile") if not setting.rehearse else ():
        base, begun = row(setting, "network", name, who, "bfloat16"), time.time()
        try:
            subject = SUBJECTS[name]()
            module = copy.deepcopy(subject.module).to(setting.device, torch.bfloat16)
            CONTENDERS[who](module, tuple(i.to(setting.device, torch.bfloat16) for i in subject.inputs), subject)()
            yield replace(base, ok=True, note=f"{time.time() - begun:.0f} s")
        except Exception as error:
            yield replace(base, note=reason(error))


def race(setting: Setting, name: str) -> Iterator[Row]:
    """A row a contender and dtype, gated against eager float32."""
    base = row(setting, "model", name, "", ok=False)
    if setting.rehearse and name == "sd15":
        yield replace(base, contender="all", ok=True, note="too large to rehearse on a CPU")
        return
    try:
        subject = SUBJECTS[name]()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        inputs = tuple(i.to(setting.device) for i in subject.inputs)
        want = first(subject.module.to(setting.device)(*inputs)).double()
        subject.module.cpu()
    except Exception as error:
        yield replace(base, contender="all", note=reason(error))
        return
    for dtype in (torch.bfloat16,) if setting.rehearse else (torch.bfloat16, torch.float16, torch.float32):
        yield from _dtype(setting, replace(base, case=subject.case, dtype=name_of(dtype)), subject, want, dtype)


def _dtype(setting: Setting, base: Row, subject: Subject, want: Tensor, dtype: torch.dtype) -> Iterator[Row]:
    """The contenders in one dtype; those before the slow one are timed, and their rows are kept, before it begins."""
    calls: dict[str, Callable[[], Any]] = {}
    module = copy.deepcopy(subject.module).to(setting.device, dtype)
    inputs = tuple(i.to(setting.device, dtype) for i in subject.inputs)
    limit = Tolerance(0.1, 0.5)  # eager's own: there to catch nonsense
    for heat in HEATS:
        rows: dict[str, Row] = {}
        for who in heat:
            rows[who] = replace(base, contender=who, note="not reached: out of time", ok=setting.rehearse)
            if setting.over() or (setting.rehearse and who != "eager"):
                continue
            try:
                call = CONTENDERS[who](module, inputs, subject)
                found = verify.check((call(),), (want,), limit)
                rows[who] = replace(rows[who], ok=found.ok, error_rms=found.rms, error_peak=found.peak, note="")
                if who == "eager":
                    limit = Tolerance(MARGIN * found.rms + 1e-4, MARGIN * found.peak + 1e-4)
                if not found.ok:
                    rows[who] = replace(rows[who], note="over its error bound")
                elif not setting.rehearse:
                    calls[who] = call if who == "fusegen" else captured([call])
            except Exception as error:
                rows[who] = replace(rows[who], ok=False, note=reason(error))
        yield from _timed(rows, calls)


def _timed(rows: dict[str, Row], calls: Mapping[str, Callable[[], Any]]) -> Iterable[Row]:
    """``rows`` with the times of a race of all of ``calls``."""
    if rows.keys() & calls.keys():
        for who, t in timing.interleave(calls, next(iter(calls)), seconds=0.5, device="cuda").items():
            if who in rows:
                rows[who] = replace(rows[who], median_s=t.median, p20_s=t.p20, p80_s=t.p80, ratio=t.ratio)
    return rows.values()
