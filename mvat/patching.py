"""mvat's speed for an existing MANNER: its modules take our classes, in place.

A part is taken only when all of these hold, so that nothing but its speed changes:

- its modules, parameters and buffers have the names, kinds and shapes of ours;
- nothing inside it asks to be called by itself: no hook, parametrisation, replaced or compiled forward, and no module
  that stands elsewhere too;
- one device, one dtype, one that the kernels know;
- with random weights it computes what ours computes, in training and in evaluation, which tells a changed forward from
  the original's.

Where the whole network cannot be taken, its layers are looked at, and where a layer cannot, its blocks.
"""

import copy
import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mvat.kernels import use_backend
from mvat.models.recognition import Kind, difference, kind_of

__all__ = ["Part", "PatchReport", "patch", "patch_report", "unpatch"]


class Part(NamedTuple):
    """A part of a model that is, or resembles, one of MANNER's.

    Attributes:
        name: as in `named_modules`, "" for the model itself.
        kind: the name of our class.
        original: the name of the model's own class.
        reason: why it was left alone, or what there is to know of a part that was taken.
    """

    name: str
    kind: str
    original: str
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.name or 'the model'} ({self.original}) as {self.kind}"
        return f"{name}: {self.reason}" if self.reason else name


class PatchReport(NamedTuple):
    """What runs mvat's code in a model and what does not; print it to read it."""

    taken: tuple[Part, ...]
    left: tuple[Part, ...]

    def __str__(self) -> str:
        lines = []
        for title, parts in (("taken", self.taken), ("left alone", self.left)):
            lines += [f"{title}:", *(f"  {part}" for part in parts)] if parts else [f"{title}: nothing"]
        return "\n".join(lines)


def patch(model: nn.Module) -> nn.Module:
    """Let mvat compute what MANNER's own modules compute.

    Recognised by structure, whatever the sizes: the network, encoders, decoders, Conformer blocks, multi-view blocks
    and the mask gate of the repository winddori2002/MANNER, base and small, alone or anywhere inside the model.
    Modules, parameters, buffers, state_dict, modes, optimisers and class names stay what they are: the modules' classes
    become subclasses of theirs and ours, so that `isinstance` and their methods still hold. A network that is taken
    whole also has what `mvat.Manner` has, such as `save_pretrained` and `return_maps`. Patch before torch.compile. It
    takes seconds, in which a float64 copy of what is to be taken is tried.

    A model that was patched before is looked at afresh, and so are hooks that were registered since: one inside a part
    that is taken is never called.

    Args:
        model: changed in place, or not at all where an error is raised.

    Returns:
        The model.

    Raises:
        TypeError: if it is no module.
        ValueError: if no part of it can be taken; names the parts and the reasons.
    """
    _check(model, "patch")
    former = _release(model)
    try:
        findings = list(_findings(model))
        if not any(finding.taken for finding in findings):
            reasons = "; ".join(str(finding.part) for finding in findings) or "it has no part of a MANNER network"
            raise ValueError(f"patch: nothing was taken: {reasons}")
        former = [swap for finding in findings for swap in finding.swaps]
    finally:
        _apply(former)
    return model


def patch_report(model: nn.Module) -> PatchReport:
    """What runs mvat's code in the model, what resembles MANNER and does not, and why; nothing is changed.

    Raises:
        TypeError: if it is no module.
    """
    _check(model, "patch_report")
    findings = list(_findings(model))
    taken = tuple(finding.part for finding in findings if finding.taken and not finding.swaps)
    left = tuple(
        finding.part._replace(reason="not patched; mvat.patch takes it") if finding.swaps else finding.part
        for finding in findings
        if finding.swaps or not finding.taken
    )
    return PatchReport(taken, left)


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module its own class back, in place.

    Returns:
        The model.

    Raises:
        TypeError: if it is no module.
        ValueError: if a patched module stands inside a compiled one.
    """
    _check(model, "unpatch")
    for name, module in _opened(model):
        if (reason := _closed(module)) and any(_is_patched(inner) for inner in module.modules()):
            raise ValueError(f"unpatch: {name or 'the model'} {reason}")
    _release(model)
    return model


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: the model must be a module, got {type(model).__name__}")


# The classes.


class _Swap(NamedTuple):
    """A module, the class of ours that it takes, and the attributes that this class has and the module has not."""

    module: nn.Module
    ours: Any
    attributes: Mapping[str, Any]


def _apply(swaps: list[_Swap]) -> None:
    for module, ours, attributes in swaps:
        if not _is_patched(module):  # a module may stand at two places of a part
            module.__class__ = _patched_class(cast(Any, type(module)), ours)
            vars(module).update(attributes, _mvat_attributes=tuple(attributes))


def _release(model: nn.Module) -> list[_Swap]:
    """Undo all swaps outside compiled modules, and tell them."""
    swaps = []
    for _, module in _opened(model):
        if _is_patched(module):
            own, patched = vars(module), cast(Any, type(module))
            names = own.pop("_mvat_attributes")
            swaps.append(_Swap(module, patched._mvat_ours, {name: own.pop(name) for name in names if name in own}))
            module.__class__ = patched._mvat_original
    return swaps


def _is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), "_mvat_original")


@functools.cache
def _patched_class(original: Any, ours: Any) -> Any:
    """A subclass of both, the original first, with our forward."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Pickle and deepcopy find a class by its name, and this one has the original's.
        make, arguments, *rest = original.__reduce_ex__(self, protocol)
        return _remake, (original, ours, make, *arguments[1:]), *rest

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "_mvat_original": original,
        "_mvat_ours": ours,
        "forward": ours.forward,
    }
    bases = (ours,) if issubclass(ours, original) else (original, ours)
    return types.new_class(original.__name__, bases, exec_body=lambda body: body.update(namespace))


def _remake(original: Any, ours: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    return make(_patched_class(original, ours), *arguments)


# The search.


class _Finding(NamedTuple):
    part: Part
    taken: bool
    swaps: list[_Swap]


def _findings(model: nn.Module) -> Iterator[_Finding]:
    """Every part that is or resembles MANNER's, the outermost first; inside one that can be taken no other."""
    parents: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(id(child), []).append(module)

    seen: set[int] = set()

    def visit(name: str, module: nn.Module, closed: str) -> Iterator[_Finding]:
        if id(module) in seen:
            return
        seen.add(id(module))
        closed = closed or _closed(module)
        kind = kind_of(module)
        if kind is not None:
            part = Part(name, kind.ours.__name__, type(module).__name__)
            if isinstance(module, kind.ours):
                hooked = _hooked(module)
                note = f"{hooked} has hooks, which are not called; mvat.patch looks at it afresh" if hooked else ""
                yield _Finding(part._replace(reason=note if _is_patched(module) else "mvat's own"), True, [])
                return
            reason, swaps = (f"it {closed}", []) if closed else _examine(module, kind, parents)
            yield _Finding(part._replace(reason=reason), not reason, swaps)
            if closed or not reason:
                return
        for child_name, child in module.named_children():
            yield from visit(f"{name}.{child_name}".lstrip("."), child, closed)

    return visit("", model, "")


def _opened(model: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, those inside a compiled one left out."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield name, model
    if not _closed(model):
        for child_name, child in model.named_children():
            yield from _opened(child, f"{name}.{child_name}".lstrip("."), seen)


def _closed(module: nn.Module) -> str:
    """Why nothing in it may be changed: its code was made from its modules' present classes; else ""."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted or traced: patch the module that it was made from"
    if isinstance(module, torch.fx.GraphModule):
        return "is a traced graph: patch the module that it was made from"
    # torch.compile's wrapper, told by its child, as to import its class takes a second or two.
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "is compiled: patch or unpatch before torch.compile"
    return ""


# The examination.


def _examine(module: nn.Module, kind: Kind, parents: Mapping[int, list[nn.Module]]) -> tuple[str, list[_Swap]]:
    """Why the module cannot be taken, or "" and the swaps that take it."""
    try:
        with torch.device("meta"):
            ours = kind.build(module)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"its parts are not those of {kind.ours.__name__}: {_first_line(error)}", []
    reason = _obstacle(module, parents) or difference(module, ours)
    if reason:
        return reason, []
    reason, swaps = _swaps(module, ours)
    reason = reason or _trial(module, ours, *kind.trial(ours))
    return reason, [] if reason else swaps


def _obstacle(module: nn.Module, parents: Mapping[int, list[nn.Module]]) -> str:
    """What in the module's state forbids to take it, "" where nothing does."""
    inside = {id(inner) for inner in module.modules()}
    for name, inner in module.named_modules():
        if reason := _closed(inner):
            return f"{name or 'it'} {reason}"
        if "forward" in vars(inner):
            return f"{name or 'it'} has a forward of its own, set on the instance"
        if name and any(id(parent) not in inside for parent in parents[id(inner)]):
            return f"{name} stands elsewhere in the model too"
    if hooked := _hooked(module):
        return f"{hooked} has hooks, which would not be called"
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"{name} is a {type(tensor).__name__} instead of a plain tensor"
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if devices == ["meta"]:
        return "it has no values yet (device meta)"
    if len(devices) > 1:
        return f"it lies on several devices: {', '.join(devices)}"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    if len(dtypes) > 1:
        return f"its parameters have several dtypes: {', '.join(dtypes)}"
    known = ("float32", "float64") if devices[0] == "cpu" else ("float32", "float64", "bfloat16", "float16")
    if dtypes[0] not in known:
        return f"its parameters are {dtypes[0]}, on {devices[0]} the kernels take {' and '.join(known)}"
    return ""


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _hooked(module: nn.Module) -> str:
    """The first module inside that has hooks, "" where none has. The module's own hooks are called as ever."""
    if torch.nn.modules.module._has_any_global_hook():
        return "every module"
    inner = (name for name, inner in module.named_modules() if name and any(vars(inner)[kind] for kind in _HOOKS))
    return next(inner, "")


def _swaps(module: nn.Module, ours: nn.Module) -> tuple[str, list[_Swap]]:
    """An attribute of the module's own that stands in the way of ours, or "" and the swaps."""
    theirs = dict(module.named_modules(remove_duplicate=False))
    plain = vars(nn.Module())
    swaps = []
    for name, part in ours.named_modules():
        # A class of ours without a forward only names its parts.
        if type(part).__module__.startswith("torch.") or type(part).forward is nn.Module.forward:
            continue
        other, attributes = theirs[name], {}
        for attribute, value in vars(part).items():
            if attribute in plain or vars(other).get(attribute, plain) == value:
                continue
            if hasattr(other, attribute):
                return f"{name or 'it'} has an attribute {attribute} of its own", []
            attributes[attribute] = value
        swaps.append(_Swap(other, type(part), attributes))
    return "", swaps


def _trial(module: nn.Module, ours: nn.Module, channels: int, samples: int) -> str:
    """Run a copy with random weights as it is and as ours; what differs, "" where nothing does.

    On the CPU, in float64, with the references: the question is which function it is.
    """
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            use_backend("eager"),
            warnings.catch_warnings(action="ignore"),
        ):
            trial = copy.deepcopy(module).to("cpu", torch.float64)
            theirs = _results(trial, channels, samples)
            _apply(_swaps(trial, ours)[1])
            results = _results(trial, channels, samples)
    except Exception as error:  # whatever a foreign module may raise
        return f"a trial of a copy failed: {type(error).__name__}: {_first_line(error)}"
    for name, expected in theirs.items():
        if results[name].shape != expected.shape:
            return (
                f"it computes something else: {name} has shape {list(expected.shape)}, not {list(results[name].shape)}"
            )
        difference = float((results[name] - expected).norm() / expected.norm())
        if not difference < 1e-6:
            return f"it computes something else than {type(ours).__name__}: {name} differs by {difference:.1e}"
    return ""


def _results(module: nn.Module, channels: int, samples: int) -> dict[str, Tensor]:
    """Outputs in training and in evaluation, and what training leaves in the buffers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    for parameter in module.parameters():
        parameter.copy_(normal(*parameter.shape) / math.sqrt(max(parameter[0].numel(), 1)))
    for name, buffer in module.named_buffers():
        buffer.copy_(normal(*buffer.shape).abs() + 0.5 if name.endswith("running_var") else normal(*buffer.shape))
    results = {}
    for mode in ("training", "evaluation"):
        for inner in module.modules():
            inner.training = mode == "training"
        # The class's forward, as the module's own hooks are not to be called.
        results[f"the output in {mode}"] = type(module).forward(module, normal(2, channels, samples))
    return results | {name: buffer.double() for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
