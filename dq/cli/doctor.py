"""`dq doctor`: report this machine, what a run would use, and problems."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from dq.config.dtypes import slow_dtypes
from dq.config.schema import RunConfig
from dq.core.devices import available_cores, has_native_bfloat16, read_text, resolve_dtype, set_threads
from dq.core.files import existing
from dq.core.text import format_bytes, plural
from dq.core.trackers import TRACKERS, is_installed
from dq.networks.teacher_loading import POOL, PRETRAINED
from dq.run.refinement import stages_of

MIN_FREE = 1 << 30  # bytes of disk below which a run is likely to stop half-way
PACKAGES = (
    *("diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "pyarrow", "safetensors"),
    *("numpy", "scikit-learn", "POT", "pillow"),
)
REQUIRED = ("diffusers", "accelerate", "datasets", "huggingface_hub", "scikit-learn", "POT", "pillow")
FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12")
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
ABSENT = "not installed"


@dataclass
class Report:
    """What was found, section by section, and what is wrong."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for section, facts in self.facts.items():
            width = max(map(len, facts))
            lines += [section, *(f"  {name:<{width}}  {value}" for name, value in facts.items()), ""]
        lines += [plural(len(self.problems), "problem") if self.problems else "no problems found"]
        return "\n".join([*lines, *(f"  - {p}" for p in self.problems)])

    def json(self) -> str:
        return json.dumps({"facts": self.facts, "problems": self.problems}, indent=2)


def examine(config: RunConfig, *, named: bool = False, cpu: bool = False, min_free: int = MIN_FREE) -> Report:
    """Report packages, devices, launch, disks, Hub, and what `config` needs of them.

    Nothing is left behind.

    Args:
        config: the run that is examined for.
        named: the configuration is a user's, so that the paths in it must be there.
        cpu: as the flag `--cpu` of a run.
        min_free: bytes that a disk should have left.
    """
    report = Report()
    say = report.problems.append
    report.facts["packages"] = _versions(say)
    report.facts["devices"] = _devices()
    report.facts["launch"] = _launch(say)
    report.facts["disk"] = _disk(config, say, min_free)
    report.facts["hub"] = _hub(say)
    report.facts["a run will use"] = _used(config, say, cpu=cpu)
    if named:
        report.facts["paths"] = _paths(config, say)
    return report


# --- packages -----------------------------------------------------------------------------------------------------


def version_of(name: str) -> str:
    """Version of an installed distribution, else `ABSENT`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def _versions(say: Callable[[str], None]) -> dict[str, str]:
    from dq.core.version import __version__

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    versions = {
        "python": platform.python_version(),
        "dq": __version__,
        "torch": f"{torch.__version__} (built for {build})",
        **{name: version_of(name) for name in PACKAGES},
        "faiss": _faiss(say),
        **{name: _importable(name, say) for name in ("torchvision", "timm")},
        **{name: version_of(name) for name in TRACKERS},
    }
    for name in REQUIRED:
        if versions[name] == ABSENT:
            say(f"{name} is not installed; pip install {name}")
    return versions


def _faiss(say: Callable[[str], None]) -> str:
    wheels = [name for name in FAISS_WHEELS if version_of(name) != ABSENT]
    if len(wheels) > 1:
        say(f"{' and '.join(wheels)} are both installed and overwrite each other; uninstall all of them but one")
    try:
        faiss = importlib.import_module("faiss")
    except (ImportError, RuntimeError, OSError) as e:
        if not wheels:
            return f"{ABSENT}; the engine torch needs none"
        say(f"faiss is installed but does not import ({_first_line(e)}); install it again")
        return f"{', '.join(wheels)}: broken"
    options = faiss.get_compile_options() if hasattr(faiss, "get_compile_options") else ""
    gpu = hasattr(faiss, "StandardGpuResources")
    build = "GPU with cuVS" if gpu and "CUVS" in options else "GPU" if gpu else "CPU"
    seen = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return f"{getattr(faiss, '__version__', '?')} ({build} build, sees {plural(seen, 'GPU')})"


def _importable(name: str, say: Callable[[str], None]) -> str:
    """Version of a package that may be installed and yet not import.

    A CUDA torchvision over a CPU torch raises RuntimeError.
    """
    version = version_of(name)
    try:
        importlib.import_module(name)
    except ImportError as e:
        if version == ABSENT:
            return ABSENT
        say(f"{name} {version} does not import ({_first_line(e)}); install it again, or uninstall it")
    except (RuntimeError, OSError, AttributeError) as e:
        say(
            f"{name} {version} does not import beside torch {torch.__version__} ({_first_line(e)}); it is built for "
            "another torch: install both from one index, or uninstall it"
        )
    else:
        return version
    return f"{version}: broken"


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"


# --- devices and launch -------------------------------------------------------------------------------------------


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{available_cores()} of {os.cpu_count()} cores, {format_bytes(_memory())} RAM for this process; "
        f"float32, bfloat16 ({'native' if has_native_bfloat16('cpu') else 'slow'})"
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        dtypes = "float32, float16" + ", bfloat16" * (major >= 8)
        devices[f"cuda:{i}"] = (
            f"{torch.cuda.get_device_name(i)}, {format_bytes(total)}, {format_bytes(free)} free, "
            f"capability {major}.{minor}; {dtypes}"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "float32, float16, bfloat16"
    return devices


def _memory() -> int:
    """Bytes of memory that this process may use.

    The minimum of the machine's and the limits of its control group.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = read_text(file).strip()
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _launch(say: Callable[[str], None]) -> dict[str, str]:
    """Number of processes by the environment alone, which needs no other process."""
    env = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    world = os.environ.get("WORLD_SIZE", "1")
    count = int(world) if world.isdigit() else 0
    facts = {"processes": world, "variables": ", ".join(f"{k}={v}" for k, v in env.items()) or "none"}
    missing = [name for name in LAUNCHED if name not in env]
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    rank = os.environ.get("RANK", "0")
    if count < 1:
        say(f"WORLD_SIZE={world} is not a number of processes; unset it")
    elif count > 1 and missing:
        say(
            f"WORLD_SIZE={world} but {', '.join(missing)} not set, so that this process would be alone or wait for "
            "ever; unset WORLD_SIZE, or start with accelerate launch or torchrun"
        )
    elif count > 1 and not (rank.isdigit() and int(rank) < count):
        say(f"RANK={rank} does not lie below WORLD_SIZE={world}; start with accelerate launch or torchrun")
    if count == 1 and tasks.isdigit() and int(tasks) > 1:
        say(
            f"srun started {tasks} tasks that do not know of each other, each a run of its own; let srun start one "
            "accelerate launch on each node, see configs/accelerate/slurm_2x8.sh"
        )
    local, gpus = os.environ.get("LOCAL_WORLD_SIZE", "1"), torch.cuda.device_count()
    if gpus and local.isdigit() and int(local) > gpus:
        say(
            f"{local} processes on this machine would share {plural(gpus, 'GPU')}; start at most {gpus}, or give "
            "--share_gpus"
        )
    return facts


# --- disk and Hub -------------------------------------------------------------------------------------------------


def _disk(config: RunConfig, say: Callable[[str], None], min_free: int) -> dict[str, str]:
    facts = {}
    for name in ("output_dir", "cache_dir"):
        path = Path(getattr(config, name))
        free, state = _room(path, name, say)
        facts[name] = f"{path}: {state}"
        if free is not None and free < min_free:
            say(f"{name} {path} has {format_bytes(free)} free; free some, or choose another --{name}")
    return facts


def _room(path: Path, name: str, say: Callable[[str], None]) -> tuple[int | None, str]:
    """Free bytes where `path` is or will be, and what may be said of it."""
    parent = existing(path)
    if not parent.is_dir():
        say(f"{name} {path} lies below {parent}, which is no folder; choose another --{name}")
        return None, "cannot be made"
    free = shutil.disk_usage(parent).free
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        say(f"{name} {path} cannot be written ({e.strerror}); choose another --{name}")
        return free, f"{format_bytes(free)} free, not writable"
    return free, f"{format_bytes(free)} free, writable"


def _hub(say: Callable[[str], None]) -> dict[str, str]:
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return {"huggingface_hub": ABSENT}
    from_env = next((n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)), None)
    where = f"yes, from {from_env}" if from_env else f"yes, from {constants.HF_TOKEN_PATH}" if get_token() else "no"
    cache = Path(constants.HF_HUB_CACHE)
    flags = [f"{n}={os.environ[n]}" for n in OFFLINE if os.environ.get(n)]
    return {
        "endpoint": constants.ENDPOINT,
        "cache": f"{cache}: {_room(cache, 'the Hub cache', say)[1]}",
        "token": where,
        "offline": ", ".join(flags) or "no",
    }


# --- the run ------------------------------------------------------------------------------------------------------


def _used(config: RunConfig, say: Callable[[str], None], *, cpu: bool) -> dict[str, str]:
    from dq.cluster.engines import choose_engine

    device = "cuda" if not cpu and torch.cuda.is_available() else "cpu"
    engine = choose_engine(config.cluster.engine)
    codec, dtype = (resolve_dtype(c.dtype, device, "inference") for c in (config.codec, config.generate))
    if engine == "faiss" and version_of_module("faiss") is None:
        say("cluster.engine=faiss but faiss does not import; pip install faiss-cpu, or set cluster.engine=torch")
    if slow := slow_dtypes(config, device, without=("train_teachers", "prior")):
        say(slow)
    for tracker in config.report_to:
        if not is_installed(tracker):
            say(f"report_to names {tracker}, which is not installed; pip install {tracker}")
    return {
        "device": device,
        "engine": f"{engine} (cluster.engine={config.cluster.engine})",
        "dtypes": f"codec {codec}, generate {dtype}",
        "threads": str(set_threads()),
        "trackers": ", ".join(config.report_to) or "none",
    }


def version_of_module(name: str) -> str | None:
    """Version of a module, or None if it does not import."""
    try:
        return str(getattr(importlib.import_module(name), "__version__", "?"))
    except (ImportError, RuntimeError, OSError):
        return None


def named_paths(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Every path that a configuration names: its setting, the path, and "data", "model" or "file"."""
    yield "source.path", config.source.path, "data"
    yield "codec.path", config.codec.path, "model"
    if config.generate.model is not None:
        yield "generate.model", config.generate.model, "model"
    for i, t in enumerate(config.teachers):
        yield f"teachers.{i}.path", t.path, "model" if t.net == "transformers" else "file"
    for method in config.methods:
        for i, stage in enumerate(stages_of(config, method)):
            where = "refine" if config.methods[method].refine is None else f"methods.{method}.refine"
            for group in ("teachers", "validation_teachers"):
                for j, t in enumerate(getattr(stage, group)):
                    kind = "model" if t.net == "transformers" else "pool" if t.net == POOL else "file"
                    yield f"{where}.{i}.{group}.{j}.path", t.path, kind
            for name, path in stage.paths().items():
                yield f"{where}.{i}.{name}", path, "file"


def _paths(config: RunConfig, say: Callable[[str], None]) -> dict[str, str]:
    states: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    prior_folder = Path(config.prior.output_dir)
    for name, path, kind in named_paths(config):
        local = kind in ("file", "pool") or path.startswith(("/", ".", "~")) or path.count("/") != 1
        if name in states:
            continue
        if not path:
            states[name] = "not named"
            say(f"{name} is not set; name {'a data set' if kind == 'data' else 'a model'} there")
        elif Path(path).exists() or path == "sklearn:digits" or path == PRETRAINED:
            states[name] = path
        elif prior_folder in (Path(path), *Path(path).parents):
            states[name] = f"{path}, which dq train-codec and dq train-denoiser will make"
        elif not local or (kind == "data" and "/" not in path):
            states[name] = f"{path}, taken for a Hub id"
            if _offline() and not _is_cached(path, kind):
                say(f"{name}={path} is not a local folder, and the Hub is switched off; unset HF_HUB_OFFLINE")
        else:
            states[name] = f"{path}: missing"
            missing.setdefault(path, []).append(name)
    for path, names in missing.items():
        others = f" (and {len(names) - 1} other settings)" if len(names) > 1 else ""
        say(f"{names[0]}={path}{others} does not exist; correct it, or set it with --set {names[0]}=PATH")
    return states


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in OFFLINE[:2])


def _is_cached(repo: str, kind: str) -> bool:
    from huggingface_hub import constants

    folder = f"{'datasets' if kind == 'data' else 'models'}--{repo.replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def doctor(config: RunConfig, *, named: bool, cpu: bool, as_json: bool) -> int:
    """Print the report, in the first process only; 0 without problems, else 1."""
    report = examine(config, named=named, cpu=cpu)
    if os.environ.get("RANK", "0") == "0":
        print(report.json() if as_json else report, file=sys.stdout)
    return 1 if report.problems else 0
