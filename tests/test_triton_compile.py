"""Triton kernels compile for GPUs that are not here, without spilling; measured configurations are kept and found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.gpu import compile as compiler
from fusegen.kernels.gpu import tune
from fusegen.kernels.gpu.launch import unit
from fusegen.kernels.gpu.machine_code import unset

# The fewest that reach every kernel, both layouts, the split head and the matrix units.
SUBSET = (
    ("attention", "bf16 d40", 90),
    ("attention", "bf16 d80", 80),
    ("attention", "bf16 d64 causal", 100),
    ("attention", "fp32 d64", 90),
    ("group_norm", "bf16 320x64x64 channels-last", 90),
    ("group_norm", "bf16 1280x8x8 contiguous", 100),
    ("layer_norm", "bf16 1280", 80),
    ("noise_normal", "4x64x64", 90),
    ("sampler_step", "bf16 rescale 0.7", 90),
)
SUBSET += tuple(  # and one of every other op
    (op, next(iter(compiler.specimens([op]))).name, 90)
    for op in catalogue.triton_names()
    if op not in {name for name, _, _ in SUBSET}
)


# What no configuration with pipelined loads was found for, by Triton 3.9: the rest of sm_90's products overlap.
SERIALIZED = {
    ("attention", "bf16 d64 added mask"),
    ("attention_varlen", "bf16 d256"),
    ("attention_varlen", "bf16 d256 window, softcap"),
}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew: a machine's Triton cache would answer for the compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    registry.ops()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("op", "name", "arch"), SUBSET)
def test_compiles_without_spilling(op: str, name: str, arch: int) -> None:
    (specimen,) = [s for s in compiler.specimens([op]) if s.name == name]
    usages = list(compiler.compile_for(specimen, arch))
    assert usages
    for usage in usages:
        assert usage.spills == 0, usage
        assert not usage.serialized, usage
        assert usage.unset == 0, usage
        assert 0 < usage.registers <= 255
        assert usage.shared <= compiler.ARCHITECTURES[arch]
    if op == "attention" and name.startswith("bf16"):
        unit_of = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
        assert unit_of in usages[0].matrix
        assert usages[0].wide > 0  # rows of 40 elements are read 16 bytes a thread all the same


def test_noise_is_compiled_without_fused_multiply_add() -> None:
    """One fused multiply-add would round once where numpy rounds twice."""
    import triton
    from triton.backends.compiler import GPUTarget

    for op in ("noise_normal", "sampler_step"):
        specimen = next(iter(compiler.specimens([op])))
        args = specimen.args()
        for stage in specimen.stages(compiler.ARCHITECTURES[90]):
            source = compiler.source(stage, args)
            ptx = triton.compile(source, GPUTarget("cuda", 90, 32), options=dict(stage.options)).asm["ptx"]
            assert "fma.rn.f32" not in ptx
            assert "mul.rn.f32" in ptx or "mul.f32" in ptx


def test_the_committed_table_has_every_specimen_on_every_architecture_and_no_spill() -> None:
    path = Path(__file__).resolve().parent.parent / "bench" / "results" / "triton_resources.json"
    rows = [compiler.Usage(**row) for row in json.loads(path.read_text())]
    known = {(s.op, s.name, arch) for s in compiler.specimens() for arch in compiler.ARCHITECTURES}
    assert {(r.op, r.specimen, r.arch) for r in rows} == known
    assert [r for r in rows if r.spills or r.unset] == []
    assert {(r.op, r.specimen) for r in rows if r.serialized} == SERIALIZED


# One side of the branch skips the write; so lay the address of a product in code of CUDA 12.8's assembler.
SKIPPED = """
        /*0000*/                   ULDC UR4, c[0x0][0x210] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   UIADD3 UR38, UR4, 0xc000, URZ ;
.L_x_0:
        /*0030*/                   UIADD3 UR46, UP1, UR38, 0x20, URZ ;
        /*0040*/                   EXIT ;
"""


def test_a_register_that_one_path_leaves_unset_is_found() -> None:
    assert list(unset(SKIPPED)) == ["UIADD3 UR46, UP1, UR38, 0x20, URZ"]
    assert list(unset(SKIPPED.replace("@!P0 BRA `(.L_x_0)", "NOP"))) == []
    summed = SKIPPED.replace("@!P0 BRA `(.L_x_0)", "REDUX.SUM UR38, R5").replace("UIADD3 UR38, UR4, 0xc000, URZ", "NOP")
    assert list(unset(summed)) == []
    assert list(unset(SKIPPED.replace("ULDC UR4", "ULDC UR38"))) == ["UIADD3 UR38, UR4, 0xc000, URZ"]


def test_a_product_reads_the_addresses_of_the_operands_that_it_has_in_memory() -> None:
    product = "        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, {}, R24, gsb0 ;\n"
    half = "        /*0000*/                   UMOV UR{} , 0x1 ;\n"
    right, both = product.format("R36, gdesc[UR16]"), product.format("gdesc[UR16]")
    written = "".join(half.format(n) for n in (18, 19))
    assert list(unset(written + right)) == []
    assert len(list(unset(written + both))) == 1


@pytest.mark.parametrize(("strides", "expected"), [((40, 320), 8), ((44, 320), 4), ((3, 8), 1), ((0, 16), 8)])
def test_unit_is_the_widest_common_alignment(strides: tuple[int, ...], expected: int) -> None:
    assert unit(2, *strides) == expected


@dataclasses.dataclass(frozen=True)
class Config:
    block: int


def tunable(source: Path) -> tune.Tunable:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        return ()

    return tune.Tunable("toy", Config, lambda *a: "k", lambda *a, limit=0: Config(1), nothing, nothing, source)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSEGEN_CACHE", str(tmp_path / "cache"))
    tune.table.cache_clear()
    yield tmp_path / "cache"
    tune.table.cache_clear()


def test_a_winner_is_found_again_for_the_same_driver_and_source_alone(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("one")
    toy = tunable(source)
    path = tune.keep(toy, "k", tune.Trial(Config(64), 1e-6), "GPU X", "1.0")
    assert path.parent == cache / "tuned"
    assert tune.table(toy, "GPU X", "1.0") == {"k": Config(64)}
    assert tune.table(toy, "GPU X", "2.0") == {}
    assert tune.table(toy, "GPU Y", "1.0") == {}
    source.write_text("two")
    tune.table.cache_clear()
    assert tune.table(toy, "GPU X", "1.0") == {}
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".json"] == []


def test_what_a_kernel_imports_of_its_folder_makes_measurements_stale_too(tmp_path: Path) -> None:
    kernel, tile, other = (tmp_path / f"{stem}.py" for stem in ("kernel", "tile", "other"))
    kernel.write_text("from fusegen.kernels.gpu import tile as t\nfrom fusegen.kernels.gpu.tune import Tunable\n")
    tile.write_text("from fusegen.kernels.gpu.other import (\n    x,\n)\nimport torch\n")
    other.write_text("x = 1\n")
    assert tune.sources(kernel) == (kernel, other, tile)
    before = tune.filename(tunable(kernel), "GPU X")
    other.write_text("x = 2\n")
    assert tune.filename(tunable(kernel), "GPU X") != before
    named = [p.stem for p in tune.sources(Path(tune.__file__).parent / "attention_varlen.py")]
    assert named == ["arrival", "attention", "attention_split", "attention_tile", "attention_varlen", "launch"]


def test_tuning_prefers_right_over_fast(cache: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "kernel.py").write_text("one")
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}

    class Launch:
        def __init__(self, args: Any, stages: Any):
            self.block = stages[0]

        def run(self) -> None:
            out.fill_(self.block)

    toy = dataclasses.replace(
        tunable(tmp_path / "kernel.py"),
        space=lambda *a: [Config(b) for b in seconds],
        stages=lambda outs, args, config: (config.block,),
    )
    out = torch.zeros(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "TritonLaunch", Launch)
        right = lambda outs: bool((outs[0] != 2).all())  # noqa: E731  (the fastest one is wrong)
        trials = tune.tune(toy, (out,), (out,), right, lambda run: seconds[run.__self__.block])  # type: ignore[attr-defined]
    assert trials[0].config == Config(4)
    assert {t.config.block for t in trials if t.reason} == {2}
    assert tune.table(toy, "cpu", "") == {"k": Config(4)}
