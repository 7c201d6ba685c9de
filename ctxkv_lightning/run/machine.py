"""What the run ran on: processor, precision, versions."""

import ctypes
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("ctxkv-lightning", "torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "tiktoken", "numpy")

COMPILE_PAYS = 15_000


def uses_gpu(accelerator: str) -> bool:
    """Whether Lightning's accelerator of this name is a CUDA GPU here."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def solver_device(accelerator: str) -> torch.device:
    """Where contexts are solved: on the GPU that Phase 2 trains on if it is CUDA's, else on the CPU."""
    return torch.device("cuda" if uses_gpu(accelerator) else "cpu")


def resolve_precision(asked: str, accelerator: str) -> str:
    """Lightning's precision flag: `auto` becomes bf16-mixed where the processor multiplies bf16, else 32-true."""
    if asked != "auto":
        return asked
    if uses_gpu(accelerator):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available() and cpu_multiplies_bf16():
        return "bf16-mixed"
    return "32-true"


def compile_pays(asked: str, accelerator: str, steps: int) -> bool:
    """Whether to compile the model for a run of so many steps; `auto` decides, `on` and `off` are obeyed.

    On a CPU the compiled step is no faster than the eager one (benchmarks/compile.py). On an H200 compiling the
    training step took 20 s and saves 2.5 ms of each (benchmarks/gpu.py): some 8,000 steps earn that back, and
    `COMPILE_PAYS` leaves as much for the validation step.
    """
    return asked == "on" or (asked == "auto" and uses_gpu(accelerator) and steps >= COMPILE_PAYS)


def compile_mode(accelerator: str) -> str | None:
    """How to compile: a GPU replays the compiled step as CUDA graphs, for a host launches its kernels more slowly."""
    return "reduce-overhead" if uses_gpu(accelerator) else None


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next step.

    It would else return each to the system, which zeroes it anew: a good part of a training step on a CPU
    (benchmarks/allocator.py measures it). Nothing happens where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 dot products (AVX512_BF16 or AMX), not only a slow emulation."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def describe_machine(device: str, precision: str) -> dict[str, str | int]:
    """Device and precision of a phase, the processor's name and the number of CPU threads."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": device, "precision": precision, "processor": name, "threads": torch.get_num_threads()}


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that change numbers."""
    return {"python": platform.python_version(), **{name.replace("-", "_"): _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
