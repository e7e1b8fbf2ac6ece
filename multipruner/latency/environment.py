"""What times depend on beside the model."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts: dict[str, str] = {}
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        if "model name" in facts:
            ids = [facts[key] for key in ("cpu family", "model") if key in facts]
            return f"{facts['model name']} ({'/'.join(ids)})" if ids else facts["model name"]
    return platform.processor() or platform.machine()


def environment_of(model: PreTrainedModel, *, compiled: bool = False) -> dict[str, Any]:
    """Return machine, software and settings that a model's times depend on, as latency tables record them."""
    device = model.device
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": str(model.config._attn_implementation),
        "compiled": compiled,
        "torch": version("torch"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "transformers": version("transformers"),
        "platform": platform.platform(terse=True),
    }
