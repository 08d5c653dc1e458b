"""Tensors that say cuda:0 and hold their values on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_map

from fake_cuda.device_log import LAUNCH, TO_DEVICE, TO_HOST, WAIT, DeviceLog, lines_of_dq
from fake_cuda.rules import INDEXING, DeviceMixError, launches, mix_up, name_of, waits

DEVICE = torch.device("cuda:0")
LOG = DeviceLog()
GENERATOR = torch.Generator()  # of the device: what it draws leaves the generator of the CPU alone


class FakeCudaTensor(Tensor):
    """A tensor on the device; `host` has its values, views share them."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeCudaTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # in inference mode an operation comes before it is taken apart, `to` for instance
        if torch.is_inference_mode_enabled() and func._can_decompose():
            return func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                copy: Tensor = FakeCudaTensor(self.host.clone())
            if getattr(self, "_is_param", False):
                copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
            elif self.requires_grad:
                copy.requires_grad_()
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"FakeCudaTensor({self.host!r})"

    def tolist(self) -> Any:
        LOG.add(WAIT, "tolist")
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
        )

    __array__ = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()


def run(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check, count and do an operation of which an argument is on the device."""
    name = name_of(operation)
    if name == "_fused_sdp_choice":
        return 0  # attention by its formula; fused kernels exist on a real device only
    target = kwargs.get("device")
    to_host = target is not None and torch.device(target).type == "cpu"
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if name in ("copy_", "_to_copy"):
        _count_copy(name, args, kwargs, to_host)
    else:
        message = mix_up(operation, args, tensors) or _wrong_generator(kwargs, args)
        if message:
            shapes = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in tensors)
            chain = lines_of_dq() or [LOG.current_line()]
            raise DeviceMixError(f"{message}: {operation} got {shapes} at {' < '.join(chain)}")
        indices = list(args[1]) if name in INDEXING else []
        for index in indices:
            if index is not None and index.device.type == "cpu":
                LOG.add(TO_DEVICE, "an index")
        if waits(operation, indices):
            LOG.add(WAIT, name)
        if launches(operation):
            LOG.add(LAUNCH, name)
    result = _on_host(operation, args, kwargs)
    if torch.Tag.inplace_view in operation.tags and name != "resize_":
        with no_dispatch():
            operation(*args, **kwargs)  # the shape of the tensor itself, which has no memory
    if to_host or (name == "copy_" and not isinstance(args[0], FakeCudaTensor)):
        return args[0] if name == "copy_" else result
    return _to_device(operation, args, kwargs, result)


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy of which the log says that it is in page-locked memory."""
    copy = tensor.clone()
    copy._is_fake_pinned = True
    return copy


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether a tensor, or the one it is a view of, came from `pin_memory`."""
    return getattr(tensor if tensor._base is None else tensor._base, "_is_fake_pinned", False)


def _count_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_host: bool) -> None:
    source = args[1] if name == "copy_" else args[0]
    to_host = not isinstance(args[0], FakeCudaTensor) if name == "copy_" else to_host
    blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    what = f"{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')}"
    if not isinstance(source, FakeCudaTensor):
        LOG.add(TO_DEVICE, f"{what} from {'pinned' if is_pinned(source) else 'pageable'} memory")
    elif to_host:
        LOG.add(TO_HOST, what)
        if blocking:
            LOG.add(WAIT, f"copy to the host of {what}")
    else:
        LOG.add(LAUNCH, name)


def _wrong_generator(kwargs: dict[str, Any], args: tuple[Any, ...]) -> str | None:
    generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    if generators and generators[0] is not GENERATOR and generators[0].device.type == "cpu":
        return "expected a 'cuda' device type for generator but found 'cpu'"
    return None


def _on_host(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the values; draws come from the generator of the device."""
    args, kwargs = tree_map(_value, args), tree_map(_value, dict(kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    if any(a.name == "generator" for a in operation._schema.arguments):
        if not any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            kwargs["generator"] = GENERATOR
    elif torch.Tag.nondeterministic_seeded in operation.tags:  # as native_dropout: draws, but takes no generator
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(GENERATOR.get_state())
        try:
            return operation(*args, **kwargs)
        finally:
            GENERATOR.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)
    return operation(*args, **kwargs)


def _value(x: Any) -> Any:
    return x.host if isinstance(x, FakeCudaTensor) else x


def _to_device(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Results as tensors of the device; an argument that was changed in place is its own result."""
    returns = operation._schema.returns
    if operation.is_view:  # an inference tensor where its base is one, whatever the mode is now
        with torch.inference_mode(args[0].is_inference()):
            return tree_map(lambda x: FakeCudaTensor(x) if isinstance(x, Tensor) else x, result)
    if not any(r.alias_info is not None and r.alias_info.is_write for r in returns):
        return tree_map(lambda x: FakeCudaTensor(x) if isinstance(x, Tensor) else x, result)
    values = []
    for alias, value in zip(
        (r.alias_info for r in returns), result if isinstance(result, tuple) else (result,), strict=True
    ):
        if alias is None or not alias.is_write:
            values.append(FakeCudaTensor(value) if isinstance(value, Tensor) else value)
            continue
        changed = _argument(operation, args, kwargs, alias.before_set)
        if isinstance(changed, FakeCudaTensor) and changed.shape != changed.host.shape:
            raise NotImplementedError(f"{operation} changes a shape in place, which the fake device cannot follow")
        values.append(changed)
    return values[0] if len(values) == 1 else tuple(values)


def _argument(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], alias: set[str]) -> Any:
    """The argument that carries an alias mark of the schema, as `a` in `add_(Tensor(a!) self, ...) -> Tensor(a!)`."""
    for i, a in enumerate(operation._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write and a.alias_info.before_set == alias:
            return kwargs[a.name] if a.kwarg_only or i >= len(args) else args[i]
    raise AssertionError(operation)
