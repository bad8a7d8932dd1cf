from pathlib import Path

import cuda_compile
import pytest
from cuda_compile import find_nvcc, main, parse, short_name, table

pytestmark = pytest.mark.slow

# From nvcc 13.0: the first kernel asks for more blocks a multiprocessor than its registers allow.
OUTPUT = """\
loss.cu(7): warning #177-D: variable "i" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z7crowdedPKfPf' for 'sm_90a'
ptxas info    : Function properties for _Z7crowdedPKfPf
    552 bytes stack frame, 1140 bytes spill stores, 1148 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 552 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compile time = 37.068 ms
ptxas info    : Compiling entry function '_Z4axpyIfEvPKT_PS0_i' for 'sm_90a'
ptxas info    : Function properties for _Z4axpyIfEvPKT_PS0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 1.961 ms
"""


def test_parse_reads_every_figure_and_marks_the_kernel_that_spills():
    (crowded, axpy), _ = parse(OUTPUT, "90a")
    assert tuple(vars(crowded).values()) == ("_Z7crowdedPKfPf", "90a", 32, 128, 552, 1140, 1148)
    assert tuple(vars(axpy).values()) == ("_Z4axpyIfEvPKT_PS0_i", "90a", 10, 0, 0, 0, 0)
    assert crowded.spills
    assert not axpy.spills


def test_parse_keeps_warnings():
    _, rest = parse(OUTPUT, "90a")
    assert rest == 'loss.cu(7): warning #177-D: variable "i" was declared but never referenced'


def test_spills_of_a_called_function_count():
    called = OUTPUT.replace("Function properties for _Z4axpy", "Function properties for _Z6helper")
    called = called.replace("0 bytes spill loads", "8 bytes spill loads")
    kernels, _ = parse(called, "90a")
    assert [kernel.name for kernel in kernels if kernel.spills] == ["_Z7crowdedPKfPf", "_Z6helperIfEvPKT_PS0_i"]


def test_short_name_keeps_template_arguments_only():
    mangled_away = "void pdl::cuda::(anonymous namespace)::forward<float, (pdl::Reduction)2, true>(float const*, int)"
    assert short_name(mangled_away) == "forward<float, (Reduction)2, true>"
    assert short_name("pdl::cuda::_GLOBAL__N__3f8a_7_loss_cu_1b::fill(long*, long)") == "fill"


def test_table_has_a_column_for_each_architecture():
    kernels = parse(OUTPUT, "90a")[0] + parse(OUTPUT, "80")[0]
    heading, axpy, crowded = table(kernels).splitlines()
    assert heading.split() == ["registers/shared", "bytes", "sm_90a", "sm_80"]
    assert crowded.count("32/128 stack 552 SPILLS 1140+1148") == 2
    assert axpy.split()[1:] == ["10/0", "10/0"]


# Each thread keeps 64 sums, which 32 registers do not hold.
CROWDED = """
__global__ void __launch_bounds__(LIMITS) crowded(const float* x, float* y, int n) {
  float sums[64] = {};
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 64; ++k) sums[k] += sums[(k + 7) % 64] * x[64 * i + k];
  for (int k = 0; k < 64; ++k) y[64 * threadIdx.x + k] = sums[k];
}
"""


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on this machine")
def test_a_kernel_that_spills_is_refused_also_when_its_result_was_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "crowded.cu"
    for limits, code in (("128", 0), ("1024, 2", 1)):
        source.write_text(CROWDED.replace("LIMITS", limits))
        kept = len(list(tmp_path.rglob("crowded-90a-*.json")))
        tables = []
        for _ in range(2):
            assert main(["--arch", "90a", str(source)]) == code
            tables.append(capsys.readouterr().out)
        assert ("SPILLS" in tables[0]) == bool(code)
        assert tables[0] == tables[1]
        assert len(list(tmp_path.rglob("crowded-90a-*.json"))) == kept + 1


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on this machine")
def test_what_does_not_compile_is_refused_and_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "wrong.cu").write_text("__global__ void wrong() { no such thing; }")
    assert main(["--arch", "90a", str(tmp_path / "wrong.cu")]) == 1
    assert "wrong.cu for sm_90a" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler that only counts its calls."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.h").write_text("int a;")
    (tmp_path / "a.cu").write_text('#include "a.h"\n')
    monkeypatch.setattr(cuda_compile, "CSRC", tmp_path / "csrc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for memory in (cuda_compile.compilers, cuda_compile.say_once):
        memory.cache_clear()
    return program(tmp_path, "1")


def program(folder: Path, release: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo {release}; else echo >> {folder}/calls; fi\n')
    path.chmod(0o755)
    return path


def calls(nvcc: Path) -> int:
    """How often it compiled by now, after it was asked for once more."""
    cuda_compile.compilers.cache_clear()
    assert cuda_compile.compile_source(nvcc, [], [], nvcc.parent / "a.cu", "90a").ok
    return len((nvcc.parent / "calls").read_text().splitlines())


def test_a_result_is_kept_until_what_it_depends_on_changes(nvcc, monkeypatch):
    assert calls(nvcc) == calls(nvcc) == 1
    header = cuda_compile.CSRC / "a.h"
    header.with_name("b.h").write_text("int of_others;")
    assert calls(nvcc) == 1, "a header that it does not include"
    header.write_text('#include "b.h"\n')
    assert calls(nvcc) == calls(nvcc) == 2, "one that it does"
    header.with_name("b.h").write_text("int b;")
    assert calls(nvcc) == 3, "and what that one includes"
    program(nvcc.parent, "2")
    assert calls(nvcc) == 4, "the release of the compiler"
    nvcc.touch()
    assert calls(nvcc) == 4, "but not its date"
    for number, variable in enumerate(("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"), 5):
        monkeypatch.setenv(variable, "-G")
        assert calls(nvcc) == number


def test_results_that_cannot_be_kept_are_none_the_less_results(nvcc, monkeypatch, capsys):
    (nvcc.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nvcc.parent / "file"))
    assert (calls(nvcc), calls(nvcc)) == (1, 2)
    folder = nvcc.parent / "file" / "pdl_ext" / "cuda_compile"
    assert capsys.readouterr().err == f"results are not kept: Not a directory: {folder}\n"
