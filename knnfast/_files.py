"""Files written whole or not at all, and read with a clear word when something is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one."""
    with replacing(path) as part, open(part, "wb") as f:
        f.write(data)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically.

    Raises:
        OSError: it could not be written (a full disk, say); the old file is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as part:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, dict(metadata or {}))
        except SafetensorError as e:
            raise OSError(f"{path}: could not be written ({e})") from e


def dump_json(value: Any) -> bytes:
    """The one form in which JSON is written.

    What a file's name holds beside UTF-8 becomes an escape, which reading gives back.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, dump_json(value))


def stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it; None: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_plain_name(name: object) -> bool:
    """Whether `name` is one of a file in a folder, and no path out of it."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def plain_name(name: object) -> str:
    """A plain name that was read from a file; TypeError for another."""
    if not is_plain_name(name):
        raise TypeError(f"not a plain file name: {name!r}")
    return str(name)


def read_json(path: Path, expected_format: str | None = None) -> dict[str, Any]:
    """Read a JSON object; `expected_format` is compared with its "format" entry.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or of another format; the message names the path.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if expected_format is not None and value.get("format") != expected_format:
        raise ValueError(f"{path}: format is {value.get('format')!r}, expected {expected_format!r}")
    return value


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """Hash a network's weights (names and FP32 bytes), to tell which checkpoint was measured."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is missing or whose bytes are not those that were saved."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if sha256_file(path) != expected:
        raise ValueError(f"{path}: damaged (its SHA-256 is not the recorded one)")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Lend a folder beside `path`, which is new or empty; in the end it takes its place.

    On an error nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.mkdir()
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder where none is, and hold it for one writer: others, in any process, wait.

    A file system without locks holds nobody off.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(folder)):
                break
        os.close(fd)  # who made it has failed and removed it meanwhile
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may hold the file, too
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a new file beside `path`; in the end it is on disk and takes its place.

    On an error nothing of it is left. Its name is on disk, too, where a file system can do that:
    what is removed next must not be all that is left.
    """
    part = _beside(path)
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        yield part
        part.chmod(mode)  # safetensors puts a file of its own there, for its owner only
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}"
