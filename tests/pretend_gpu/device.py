"""A pretend GPU: tensors that say they are on a device of their own, and lie in the CPU's memory.

    with watched() as seen:
        model.to(GPU)(input_ids=torch.tensor([[1, 2]], device=GPU)).logits.cpu()
    seen.waits    # Counter of the places where a CUDA device would have made the program wait

A tensor of the CPU that meets one of the device is an error, as on CUDA; so is a CPU tensor as an index, which CUDA
copies over in silence. Every copy is counted, to the device too: from memory that is not pinned torch waits for it,
unless it is told not to. Importing this makes the device, once and for good: not in a process that runs other tests.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
GPU = torch.device("pretend", 0)
CPU = torch.device("cpu")
has_kernel_for = torch._C._dispatch_has_kernel_for_dispatch_key

READS = ("_local_scalar_dense", "equal")
"""Read a number of the device."""
SIZES = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount", "repeat_interleave")
"""Must know numbers of the device to know how large their result is."""
CHECKED = ("_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "_linalg_check_errors", "linalg_cholesky_ex")
"""Wait for a decomposition to say whether it worked."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = ("copy_", "_to_copy", "_copy_from")


@dataclass
class Seen:
    """What a device would have been asked.

    Attributes:
        waits: how often the program would have had to wait, by why.
        operations: how often each overload was called with the device's tensors, by its name and their dtypes.
    """

    waits: Counter[str] = field(default_factory=Counter)
    operations: Counter[tuple[str, torch.dtype | None]] = field(default_factory=Counter)


_seen = [Seen()]


@contextmanager
def watched() -> Iterator[Seen]:
    """What the device is asked inside, less what inner ones have seen."""
    _seen.append(Seen())
    try:
        yield _seen[-1]
    finally:
        _seen.pop()


class _OnDevice(torch.Tensor):
    """A tensor of the device: `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "_OnDevice":
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "device": GPU}
        with torch.inference_mode(False):  # a view of what was made outside it must not count as made inside
            found = torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, **place)
        found.held = held
        return found

    def __repr__(self) -> str:
        return f"{self.held!r} on {GPU}"

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as on CUDA."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        """By way of the CPU."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do it on the CPU, as far as the device could."""
    if _is_composite(operation):
        return operation.decompose(*args, **kwargs)  # under inference mode torch leaves that to us
    name = operation.overloadpacket.__name__
    if name in COPIES:
        return _copied(operation, name, args, kwargs)
    tensors: list[torch.Tensor] = []
    _mapped((*args, *kwargs.values()), tensors.append)
    ours = [x for x in tensors if isinstance(x, _OnDevice)]
    _refuse_mixture(operation, name, tensors)
    _note(operation, name, tensors, args)
    to = torch.device(kwargs.get("device") or GPU)  # where what is made like a tensor shall be
    if "device" in kwargs:
        kwargs = kwargs | {"device": CPU if to.type == GPU.type else to}
    held = lambda x: x.held if isinstance(x, _OnDevice) else x  # noqa: E731
    found = operation(*_mapped(args, held), **{key: _mapped(x, held) for key, x in kwargs.items()})
    if to.type != GPU.type:
        return found
    same = {id(x.held): x for x in ours}  # of an operation in place, or into `out`
    return _mapped(found, lambda x: same[id(x)] if id(x) in same else _OnDevice(x))


@cache
def _is_composite(operation: Any) -> bool:
    """Whether it is made of others on every device: some that are have a kernel of their own besides."""
    has_kernel = [has_kernel_for(operation.name(), key) for key in ("CompositeImplicitAutograd", "CPU")]
    return has_kernel == [True, False]


def _mapped(tree: Any, of: Callable[[torch.Tensor], Any]) -> Any:
    """The same with `of` each tensor in its place."""
    if isinstance(tree, torch.Tensor):
        return of(tree)
    return type(tree)([_mapped(x, of) for x in tree]) if type(tree) in (list, tuple) else tree


def _refuse_mixture(operation: Any, name: str, tensors: list[torch.Tensor]) -> None:
    others = [x for x in tensors if x.device.type == "cpu"]
    if others and (name in INDEXING or any(x.dim() > 0 for x in others)):
        raise RuntimeError(f"{operation.name()}: expected all tensors to be on the same device, found {GPU} and cpu")


def _note(operation: Any, name: str, tensors: list[torch.Tensor], args: Any) -> None:
    seen, is_mask = _seen[-1], lambda x: x is not None and x.dtype in (torch.bool, torch.uint8)
    seen.operations[operation.name(), tensors[0].dtype if tensors else None] += 1
    if name in READS:
        seen.waits["a number is read"] += 1
    elif name in CHECKED:
        seen.waits["a decomposition is checked"] += 1
    elif name in SIZES or (name in INDEXING and any(map(is_mask, args[1]))):
        seen.waits["a size hangs on numbers"] += 1


def _copied(operation: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`_to_copy` of one tensor, or the others, of two."""
    source, goes_on = args[1] if name == "copy_" else args[0], kwargs.get("non_blocking", len(args) > 2 and args[2])
    held = source.held if isinstance(source, _OnDevice) else source
    if name != "_to_copy":
        target = args[0] if name == "copy_" else args[1]
        _note_copy(operation, source, target.device, goes_on)
        (target.held if isinstance(target, _OnDevice) else target).copy_(held)
        return target
    device = torch.device(kwargs.get("device") or source.device)
    _note_copy(operation, source, device, goes_on)
    found = operation(held, **kwargs | {"device": CPU if device.type == GPU.type else device})
    return _OnDevice(found) if device.type == GPU.type else found


def _note_copy(operation: Any, source: torch.Tensor, to: torch.device, goes_on: bool) -> None:
    seen, ends = _seen[-1], (source.device.type, to.type)
    seen.operations[operation.name(), source.dtype] += 1
    if source.numel() and set(ends) == {"cpu", GPU.type} and not (goes_on and ends[0] == "cpu"):
        seen.waits["copied to the host" if to.type == "cpu" else "copied to the device"] += 1


def _empty(size: list[int], *, dtype: Any = None, **options: Any) -> torch.Tensor:
    return _OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size: list[int], stride: list[int], *, dtype: Any = None, **options: Any) -> torch.Tensor:
    return _OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _zeros(size: list[int], *, dtype: Any = None, **options: Any) -> torch.Tensor:
    return _OnDevice(torch.zeros(size, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _copied(torch.ops.aten.copy_.default, "_copy_from", (source, target, non_blocking), {})


_library = torch.library.Library("aten", "IMPL")
for _name, _kernel in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
    ("_efficientzerotensor", _zeros),
):
    _library.impl(_name, _kernel, "PrivateUse1")
