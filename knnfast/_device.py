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


def device_number(name: str, device: object, found: int, finder: str) -> int:
    """The number of a CUDA device, of which `finder` finds `found`; `name` is the argument's.

    Raises:
        ValueError: there are fewer.
    """
    number = int(str(device).partition(":")[2] or 0)
    if number >= found:
        allowed = f"cpu or cuda:N below {found}" if found else "cpu"
        raise ValueError(
            f"{name}: must be {allowed}, {finder} finds {found} CUDA devices here, "
            f"got {str(device)!r}"
        )
    return number


def check_torch_device(name: str, device: object) -> None:
    """Refuse a device that torch cannot use here; `name` is the argument's.

    Raises:
        ValueError: no name of a device, or one that this machine does not have.
    """
    if is_cuda(name, device):
        import torch

        device_number(name, device, torch.cuda.device_count(), "torch")
