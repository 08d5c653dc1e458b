"""Make the fake device the CUDA device of this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fake_cuda.build import load_guard
from fake_cuda.device_log import LAUNCH, WAIT
from fake_cuda.tensor import GENERATOR, LOG, FakeCudaTensor, is_pinned, pin_memory

TOTAL_BYTES = 80 << 30
PROPERTIES = SimpleNamespace(
    name="Fake CUDA", total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=132, gcnArchName=""
)
# operations that make tensors from numbers; the others of their kind call the first two
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "logspace",
    "range", "range.step", "randperm", "randperm.generator", "eye", "eye.m", "tril_indices", "triu_indices",
)  # fmt: skip
# one kernel on CUDA, though torch takes them apart for a device without kernels
FUSED = ("silu_backward", "mish_backward")
_library: torch.library.Library | None = None


def install() -> None:
    """From here on, this process has a CUDA device. It cannot be taken back."""
    global _library
    if _library is not None:
        return
    load_guard()
    _library = torch.library.Library("aten", "IMPL", "CUDA")
    for name in FACTORIES:
        _library.impl(name, _factory(name))
    for name in FUSED:
        _library.impl(name, _never)
    # torch.tensor(data, device="cuda") reads its data on the CPU, then copies
    torch._C._set_only_lift_cpu_tensors(True)
    # a parameter cannot become a subclass in place, so that `module.to` makes new ones
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name, value in _answers().items():
        setattr(torch.cuda, name, value)
    torch.accelerator.synchronize = _synchronize
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = is_pinned
    _let_optimizers_take_lists()
    _mark_backward()


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    if packet == "randperm":
        overload = "generator"  # of which the device has one of its own
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> FakeCudaTensor:
        if not packet.startswith("empty"):
            LOG.add(LAUNCH, packet)
        if packet == "randperm":
            kwargs.setdefault("generator", GENERATOR)
        return FakeCudaTensor(operation(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    return make


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("tensors of the device take care of this operation before")


def _synchronize(device: Any = None) -> None:
    LOG.add(WAIT, "synchronize")


def _answers() -> dict[str, Any]:
    """What `torch.cuda` answers about the device."""
    return {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (TOTAL_BYTES * 7 // 8, TOTAL_BYTES),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "synchronize": _synchronize,
        "manual_seed": GENERATOR.manual_seed,
        "manual_seed_all": GENERATOR.manual_seed,
        "get_rng_state": lambda device="cuda": GENERATOR.get_state(),
        "get_rng_state_all": lambda: [GENERATOR.get_state()],
        "set_rng_state": lambda state, device="cuda": GENERATOR.set_state(state),
        "set_rng_state_all": lambda states: GENERATOR.set_state(states[0]),
    }


def _let_optimizers_take_lists() -> None:
    """Optimizers update lists of parameters at once on CUDA, if they know the type of the parameters."""
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach

    for module in (optimizer, foreach):
        types = getattr(module, "_foreach_supported_types", None)
        if types is not None and FakeCudaTensor not in types:
            types.append(FakeCudaTensor)


def _mark_backward() -> None:
    """Remember which line called autograd: it works on a thread of its own, where no line of dq runs."""
    engine = torch.autograd._engine_run_backward

    def marked(*args: Any, **kwargs: Any) -> Any:
        outer = LOG.backward_line
        LOG.backward_line = f"{LOG.current_line()} (backward)"
        try:
            return engine(*args, **kwargs)
        finally:
            LOG.backward_line = outer

    torch.autograd._engine_run_backward = marked
