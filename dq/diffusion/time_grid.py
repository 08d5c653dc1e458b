"""Schedulers with their time grid set."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import torch

from dq.core.errors import InputError
from dq.diffusion.sampling import is_flow

MAX_GRIDS = 16
_grids: dict[tuple[Any, ...], Any] = {}  # schedulers with their time grid, which are only copied


def fresh_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> Any:
    """A new scheduler of the same settings with its time grid set.

    A learned variance, which a model gives beside its prediction, is not handed over: steps use the scheduler's fixed
    one. Grids are kept by settings and copied, since some take a second to set.

    Raises:
        InputError: for more steps than the model was trained for, or a number that this scheduler has no grid of.
    """
    trained = scheduler.config.get("num_train_timesteps")
    if trained is not None and num_inference_steps > trained and not is_flow(scheduler):  # steps would come twice
        raise InputError(
            f"num_inference_steps={num_inference_steps} is more than the {trained} steps that the model was trained "
            f"for; set generate.num_inference_steps to at most {trained}"
        )
    settings = json.dumps(dict(scheduler.config), sort_keys=True, default=_plain)
    key = (type(scheduler), settings, num_inference_steps, str(device))
    if key not in _grids:
        if len(_grids) >= MAX_GRIDS:
            _grids.pop(next(iter(_grids)))
        _grids[key] = _with_grid(scheduler, num_inference_steps, device)
    return copy.deepcopy(_grids[key])


def _plain(value: Any) -> Any:
    """An array among the settings of a scheduler as a list; other objects as text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _with_grid(scheduler: Any, num_inference_steps: int, device: torch.device | str) -> Any:
    parameters = inspect.signature(type(scheduler).__init__).parameters
    learned = "variance_type" in parameters and str(scheduler.config.get("variance_type")).startswith("learned")
    changed = {"variance_type": parameters["variance_type"].default} if learned else {}
    new = type(scheduler).from_config(scheduler.config, **changed)
    try:
        new.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"{type(new).__name__} has no grid of {num_inference_steps} steps ({reason}); set another "
            "generate.num_inference_steps or generate.scheduler"
        ) from e
    return new
