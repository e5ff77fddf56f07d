"""What every stage asks of a model before and beside calling it: its signature, its place, its mode, its weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError


def signature_of(model: nn.Module) -> inspect.Signature:
    """The parameters of the model's forward.

    What stands around it may take any arguments, as hooks of offloading do: then those of its class count.

    Raises:
        InputError: it has none that Python knows, as a compiled script has not.
    """
    try:
        found = inspect.signature(model.forward)
        any_arguments = any(p.kind is p.VAR_POSITIONAL for p in found.parameters.values())
        if "forward" in vars(model) and any_arguments and type(model).forward is not nn.Module.forward:
            found = inspect.signature(type(model).forward.__get__(model))
        return found
    except (TypeError, ValueError):
        what = "a torch.jit script" if isinstance(model, torch.jit.ScriptModule) else type(model).__name__
        raise InputError(
            f"the model is {what}, whose forward has no signature: pass the nn.Module it was made from"
        ) from None


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of `model.forward(*args, **kwargs)` by the names of its parameters.

    Raises:
        InputError: they do not fit; says which parameters there are.
    """
    signature = signature_of(model)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {type(model).__name__}.forward: {error}; its parameters are "
            f"{', '.join(signature.parameters)}"
        ) from None


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments as keyword arguments.

    Raises:
        InputError: some are only known by their position.
    """
    found = named(bound)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and found.pop(name, None):
            raise InputError(f"the model's forward takes *{name}: pass its inputs by keyword")
    return found


def named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name: those that a signature gathers by keyword by their own, those by position by that of all."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        keywords = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found |= value if keywords else {name: value}
    return found


def described(value: Tensor) -> str:
    """Dtype and shape of a tensor, and the range of integers."""
    text = f"{str(value.dtype)[6:]}{list(value.shape)}"
    if value.is_floating_point() or value.is_complex() or value.is_meta or not value.numel():
        return text
    return f"{text} from {int(value.min())} to {int(value.max())}"


def place_of(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the model's first floating-point weight, or of its first buffer; the CPU's default without any."""
    values = chain(model.parameters(), model.buffers())
    first = next((value for value in values if value.is_floating_point()), torch.empty(0))
    return first.dtype, first.device


class InPlaceOf(nn.Module):
    """A module in the place of another one: it has that one's config, dtype, device, and all else that it lacks itself.

    `isinstance` takes it for one of that one's class, too: pipelines ask, and write down the class of what they save.

    Attributes:
        model: the other one.
    """

    model: nn.Module

    #: What is never looked for in the other one, even before it is here.
    _own = ("model", "gates", "engine")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        model = vars(self).get("_modules", {}).get("model")
        return type(self) if model is None else model.__class__

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "model":
            vars(self)["__module__"] = value.__module__  # where its class is from

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        found = getattr(self.model, "dtype", None)
        return found if isinstance(found, torch.dtype) else place_of(self.model)[0]

    @property
    def device(self) -> torch.device:
        return place_of(self.model)[1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self._own:
                raise
            return getattr(super().__getattr__("model"), name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode: no dropout, running statistics. Afterwards each part is as it was.

    The flag is set by itself, as `eval()` may be a model's own and do more.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def not_finite(value: Tensor) -> str:
    """ "NaN" or "inf" if a tensor holds it, else nothing."""
    if not value.is_floating_point() or value.is_meta:
        return ""
    value = value.float() if value.element_size() == 1 else value  # float8 knows few operators
    if bool(value.isfinite().all()):
        return ""
    return "NaN" if bool(value.isnan().any()) else "inf"


def bad_weight(model: nn.Module) -> str:
    """What is wrong with the first weight that holds NaN or inf, as a part of a sentence; nothing if all are finite."""
    for name, weight in model.named_parameters():
        try:
            found = not_finite(weight.detach())
        except (RuntimeError, NotImplementedError, TypeError):  # quantized weights are tensors of a kind of their own
            continue
        if found:
            return f"its weight {name} holds {found}"
    return ""


def on_meta(model: nn.Module) -> str:
    """The first weight that is on the meta device, where values are none, as a part of a sentence; or nothing."""
    found = next((name for name, weight in model.named_parameters() if weight.is_meta), "")
    return f"its weight {found} is on the meta device: load the weights first" if found else ""
