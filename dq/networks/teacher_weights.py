"""Read weights of teachers and rename them as the network has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.core.files import suggest_folder

WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel, DDP, weight averaging and torch.compile add
COUNTERS = ("num_batches_tracked", "n_averaged")  # in no evaluation
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
CONVERT = (
    "load it where you trust it and save its tensors, as in safetensors.torch.save_file("
    "torch.load(FILE, weights_only=True), 'model.safetensors'), then set teachers.N.path to that file"
)


def weights_file(path: Path) -> Path:
    """Return the safetensors file at a teacher's path.

    The path is a file or a folder with `model.safetensors`.

    Raises:
        InputError: if there is none; names files in its place.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file():
        return file
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if others:
        names = ", ".join(p.name for p in others[:3])
        raise InputError(f"{path} has no model.safetensors but {names}; set teachers.N.path to the file itself")
    pickled = sorted(p for p in path.iterdir() if p.suffix in TORCH_SUFFIXES) if path.is_dir() else []
    if pickled:
        raise InputError(
            f"{path} has no model.safetensors but {pickled[0].name}; a file of torch.save can run code and is not "
            f"opened: {CONVERT}"
        )
    raise InputError(
        f"there is no teacher at {file}{suggest_folder(path)}; set teachers.N.path to a safetensors file or its folder"
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        InputError: if it is something else, with how to convert it.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        with open(file, "rb") as f:
            head = f.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise InputError(
                f"the teacher {file} is a pointer of Git LFS and not the file; run `git lfs pull` in its repository"
            ) from e
        pickled = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and head[8:9] != b"{")
        if pickled or file.suffix in TORCH_SUFFIXES:
            raise InputError(
                f"the teacher {file} is not a safetensors file; one of torch.save can run code and is not opened: "
                f"{CONVERT}"
            ) from e
        raise InputError(f"the teacher {file} is not a readable safetensors file ({e}); get it again") from e


def named_as(net: nn.Module, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Rename weights as the network has them, without the parts that wrappers add.

    The parts `module` and `_orig_mod` are removed anywhere in a name, other common prefixes where the rest are the
    names of the network.

    Raises:
        InputError: if the file holds several such networks.
    """
    expected = {k for k in net.state_dict() if not k.endswith(COUNTERS)}
    wrappers = {w for w in WRAPPERS if not any(w in k.split(".") for k in expected)}
    renamed = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in state.items()}
    if len(renamed) < len(state):
        return state
    renamed = {k: v for k, v in renamed.items() if k in expected or not k.endswith("n_averaged")}
    if expected & renamed.keys():
        return renamed
    prefixes = sorted(p for p in _prefixes(renamed) if all(p + k in renamed for k in expected))
    if len(prefixes) > 1:
        raise InputError(
            f"{file} holds several networks, with the prefixes {', '.join(map(repr, prefixes))}; "
            "save the one that labels, without its prefix"
        )
    if prefixes:
        p = prefixes[0]
        return {k.removeprefix(p): v for k, v in renamed.items() if k.startswith(p)}
    return renamed


def _prefixes(names: Iterable[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(p[:i]) + "." for p in parts for i in range(1, len(p))}


def common_prefix(names: Iterable[str]) -> str:
    """Return the common first parts of all names, with the last dot."""
    shared = set.intersection(*map(_prefixes, ([name] for name in names)))
    return max(shared, key=len, default="")
