"""The device, the precision and the memory that a script computes with."""

import os
import platform
import re
import resource
import shutil
from pathlib import Path
from typing import Literal

from lit_llama.errors import UserError

import torch

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]  # as Fabric spells them
TrainingPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]  # the others store trained weights too coarsely


def check_gpu() -> None:
    """Raise a UserError if there is an NVIDIA GPU that torch does not see, unless CUDA_VISIBLE_DEVICES hides it."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    there_is_one = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    if there_is_one and not is_hidden and not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        raise UserError(
            f"there is an NVIDIA GPU, but torch {torch.__version__} does not see it: it {build}; install one that "
            'fits its driver (see https://pytorch.org), or compute on the CPU: export CUDA_VISIBLE_DEVICES=""'
        )


def default_device() -> torch.device:
    """The first accelerator, or the CPU."""
    check_gpu()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a plan for every new length, so for every token
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_precision() -> TrainingPrecision:
    """Default compute precision: bf16-mixed on a GPU that has bfloat16, 16-mixed on an older one, else 32-true."""
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def storage_dtype(precision: Precision) -> torch.dtype:
    """What frozen weights are stored in: the 16-bit type if all or most is computed in it, else float32."""
    dtypes = {"32-true": torch.float32, "16-true": torch.float16, "16-mixed": torch.float16}
    return dtypes.get(precision, torch.bfloat16)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GB: on the GPU if it uses one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage would count what the process that started this one used
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e9


def describe_machine() -> str:
    """What this ran on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = []
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    gpu = "an Apple GPU" if torch.backends.mps.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, {gpu}"


def free_memory(device: torch.device) -> int:
    """Bytes of a device that tensors of this process take or could take beside other processes; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    status = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0
