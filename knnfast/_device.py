"""Names of devices: cpu, cuda and cuda:N."""

from __future__ import annotations


def is_cuda(name: str, device: object) -> bool:
    """Whether a device is a CUDA one; `name` is the argument's.

    Raises:
        ValueError: no name of a device.
    """
    kind, colon, number = str(device).partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"{name}: must be cpu, cuda or cuda:N, got {str(device)!r}")
    return kind == "cuda"


def check_torch_device(name: str, device: object) -> None:
    """Refuse a device that torch cannot use here; `name` is the argument's.

    Raises:
        ValueError: no name of a device, or one that this machine does not have.
    """
    if not is_cuda(name, device):
        return
    import torch

    found = torch.cuda.device_count()
    if int(str(device).partition(":")[2] or 0) >= found:
        allowed = f"cpu or cuda:N below {found}" if found else "cpu"
        raise ValueError(
            f"{name}: must be {allowed}, torch finds {found} CUDA devices here, got {str(device)!r}"
        )
