"""Memory and products: what a call will need, from a run on fake tensors; what it took; what there is."""

import contextlib
import ctypes
import gc
import math
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mvat.kernels import native


class Need(NamedTuple):
    """FLOPs of the products (2 a multiply-add) and bytes of the tensors alive at the worst moment."""

    flops: float
    peak_bytes: int


class _LiveBytes(TorchDispatchMode):
    """Follows every storage from its birth to its death."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, size).atexit = False

    def _end(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _attention_flops(query: Sequence[int], key: Sequence[int], *rest: Any, **options: Any) -> int:
    *batch, tokens, width = query
    return 4 * torch.Size(batch).numel() * tokens * key[-2] * width


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], *rest: Any, **_: Any
) -> int:
    return _attention_flops(query, key) * 5 // 2  # the scores once more, and four products


def _convolution_backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    # A product the size of the forward one for the input's gradient and one for the weight's. PyTorch's own formula
    # counts the weight's as if there were one group.
    return (output_mask[0] + output_mask[1]) * 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])


# The fused operators: products of the algorithm that they run (csrc/cpu), at least.


def _local_attention_flops(x: Sequence[int], depthwise: Sequence[int], *rest: Any, **_: Any) -> int:
    training = rest[-1]  # the batch's statistics take a pass of their own
    return (2 if training else 1) * 2 * math.prod(x) * depthwise[-1]  # both chunks of a sample share its taps


def _local_attention_backward_flops(grad: Any, x: Sequence[int], depthwise: Sequence[int], *rest: Any, **_: Any) -> int:
    return 2 * 2 * math.prod(x) * depthwise[-1]  # gradients of x and of the weight


def _stage_flops(x: Sequence[int], *rest: Any, **_: Any) -> int:
    weight, stride, padding, transposed = rest[4], *rest[8:10], rest[11]
    length = x[2] if transposed else (x[2] + 2 * padding - weight[2]) // stride + 1
    return 2 * x[0] * length * math.prod(weight)


def _stage_backward_flops(grad: Sequence[int], x: Sequence[int], *rest: Any, **_: Any) -> int:
    weight, transposed = rest[4], rest[-1]
    return 2 * 2 * x[0] * (x if transposed else grad)[2] * math.prod(weight)  # gradients of x and of the weight


def _gate_flops(x: Sequence[int], *rest: Any, **_: Any) -> int:
    gates, last = rest[4], rest[6]
    return 2 * x[0] * x[2] * (math.prod(gates) + math.prod(last))


def _gate_backward_flops(grad: Any, x: Sequence[int], *rest: Any, **_: Any) -> int:
    return 3 * _gate_flops(x, *rest)  # the gates anew, and both gradients


def _global_attention_flops(x: Sequence[int], a: Sequence[int], *rest: Any, **_: Any) -> int:
    return 2 * _overlapped_product(x, a)


def _global_attention_backward_flops(grad: Any, x: Sequence[int], a: Sequence[int], *rest: Any, **_: Any) -> int:
    return 5 * _overlapped_product(x, a)


def _overlapped_product(x: Sequence[int], a: Sequence[int]) -> int:
    """Of all chunks with all others: overlapped ones take two thirds of the multiply-adds of others."""
    batch, n, length = x
    heads, width, _ = a
    chunks = (length + width) // (width // 2) + 1
    return batch * n * heads * 2 * chunks**2 * width * 2 // 3


#: What PyTorch's counter does not know, the attention kernels of the CPU and our operators, or gets wrong.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
if native.missing("global_attention") is None:
    _FORMULAS |= {
        torch.ops.mvat.local_attention: _local_attention_flops,
        torch.ops.mvat.local_attention_backward: _local_attention_backward_flops,
        torch.ops.mvat.norm_act_conv: _stage_flops,
        torch.ops.mvat.norm_act_conv_backward: _stage_backward_flops,
        torch.ops.mvat.mask_gate: _gate_flops,
        torch.ops.mvat.mask_gate_backward: _gate_backward_flops,
        torch.ops.mvat.global_attention: _global_attention_flops,
        torch.ops.mvat.global_attention_backward: _global_attention_backward_flops,
    }


def foresee(body: Callable[[], object]) -> Need:
    """Run `body`, which makes its own inputs, on fake tensors: nothing is computed or allocated.

    Products inside a fused op count by its formula above. Kernels' own scratch is not seen.
    """
    with FakeTensorMode(), _LiveBytes() as live, FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        result = body()
    del result
    return Need(float(counter.get_total_flops()), live.peak)


def available(device: str) -> int:
    """Bytes that a process can still take: memory of the GPU, or of the machine."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    # What the kernel says it can give without swapping; Linux only, as the peak below.
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable: the benchmarks need Linux 3.14 or newer")
    return int(found[1]) * 1024


def peak_extra(body: Callable[[], object], device: str) -> int:
    """Bytes that one call of `body` held at its worst moment, beyond what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory that the C library keeps would hide what the call needs.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    body()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024
