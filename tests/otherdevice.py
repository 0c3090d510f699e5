"""A device called "other", with the CPU's arithmetic and a GPU's rules: what lies elsewhere can't be computed with.

torch takes it for a backend of its own, so that whatever is made without a ``device``, or read without ``.cpu()``,
fails as it would on a GPU. It counts what goes ``up`` to it and ``down`` from it, where the host would wait for a GPU.
torch has one such backend a process, so this is a script: ``otherdevice.py JOBS.json`` does a list of jobs,
["train", RECIPE, OUT] or ["command", ARGUMENT, …], and prints what came of each.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from diffexp import Recipe, cli
from diffexp.models.base import device_of
from diffexp.training import Training

CPU = torch.device("cpu")
TRAFFIC: Counter[str] = Counter()


class Other(Tensor):
    """A tensor of that device; ``here`` is the CPU tensor that it really is."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Other:
        like = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, device="other:0", **like)
        tensor.here = here
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        TRAFFIC["down"] += 1
        return self.here.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert other:0 device type tensor to numpy")

    @property
    def data(self) -> Any:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Other) -> None:
        Tensor.data.__set__(self, value)
        self.here = value.here


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operation of torch, on CPU tensors or on the other device's."""
    others: dict[int, Other] = {}  # by what they really are: it may come back, from what works in place
    elsewhere: list[Tensor] = []

    def bring(value: Any) -> Any:
        if isinstance(value, Other):
            others[id(value.here)] = value
            return value.here
        if isinstance(value, Tensor):
            elsewhere.append(value)
        return [bring(each) for each in value] if isinstance(value, (list, tuple)) else value

    def send(value: Any) -> Any:
        if isinstance(value, Tensor):
            return others[id(value)] if id(value) in others else Other(value)
        return type(value)(map(send, value)) if isinstance(value, (list, tuple)) else value

    here, named = bring(args), {key: bring(value) for key, value in kwargs.items()}
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not others and (wanted is None or wanted.type != "other"):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    down = wanted == CPU or (name == "copy_" and not isinstance(args[0], Other))
    if down or name == "_local_scalar_dense":
        TRAFFIC["down"] += 1
    elif name in ("_to_copy", "copy_") and elsewhere:
        TRAFFIC["up"] += 1
    elif others and any(x.ndim for x in elsewhere):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device: some are on the CPU")
    result = func(*here, **(named | {"device": CPU} if wanted else named))
    return result if down else send(result)


class Machine(TorchDispatchMode):
    """A machine that has the device: also what is made from nothing can lie there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    """What is asked of a backend besides: to wait for it, and the precisions that it may compute in."""

    def synchronize(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def train(recipe: Mapping[str, Any], out: str) -> dict[str, Any]:
    """A run on the device; returns the traffic of its last iteration, without evaluation and files.

    Besides, where its text encoders are then, and what they embed.
    """
    seen: list[dict[str, int]] = []

    class Watched(Training):
        def step(self) -> None:
            TRAFFIC.clear()
            super().step()
            seen.append(dict(TRAFFIC))

    training = Watched(Recipe.parse(recipe, "test"), Path(out))
    training.run()
    model = training.model
    encoders = {device_of(encoder).type for encoder in model.text_encoders().values()}
    return seen[-1] | {"encoders": sorted(encoders), "embedded": model.encode(["a cat"]).hidden.device.type}


def command(*arguments: str) -> str:
    """What a command prints; whatever is no clean exit is an error."""
    sys.argv = ["diffexp", *arguments]
    with redirect_stdout(StringIO()) as said, redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as left:
            if left.code:
                raise RuntimeError(said.getvalue()) from left
    return said.getvalue()


def outcome(job: Sequence[Any]) -> Any:
    """What a job returned, or its traceback."""
    what, *arguments = job
    try:
        return {"result": {"train": train, "command": command}[what](*arguments)}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("other", backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) takes the way that can be seen
    torch.set_num_threads(1)
    with Machine():
        print(json.dumps([outcome(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
