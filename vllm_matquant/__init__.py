"""Nested quantization: one 8-bit checkpoint that vLLM serves at any width from 2 to 8 bits.

Everything in ``__all__`` is imported when it is first asked for; importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
    from vllm_matquant.checkpoint.recipe import Recipe
    from vllm_matquant.checkpoint.slice import Slice
    from vllm_matquant.jobs.bench import (
        BenchExperts,
        BenchKernel,
        BenchServe,
        bench_experts,
        bench_kernel,
        bench_serve,
    )
    from vllm_matquant.jobs.control import Control, control
    from vllm_matquant.jobs.evaluate import Evaluate, evaluate
    from vllm_matquant.jobs.import_model import ImportModel, import_model
    from vllm_matquant.jobs.models import load_model, serve, switch
    from vllm_matquant.jobs.plot import Plot, plot
    from vllm_matquant.jobs.quantize import Quantize, quantize
    from vllm_matquant.jobs.search import Search, search
    from vllm_matquant.jobs.simulate import Simulate, simulate
    from vllm_matquant.jobs.train import Train, train
    from vllm_matquant.jobs.verify import Verify, verify
    from vllm_matquant.quantize.baselines import GPTQ, MatGPTQ, RoundToNearest
    from vllm_matquant.quantize.gptvq import GPTVQ
    from vllm_matquant.quantize.method import Method
    from vllm_matquant.quantize.methods import METHODS
    from vllm_matquant.quantize.nested import Nested
    from vllm_matquant.quantize.nested_tuned import NestedTuned
    from vllm_matquant.quantize.nested_vq import NestedVQ
    from vllm_matquant.quantize.omni import MatQuantOmni, MatQuantOmniExtra, OmniQuant

__all__ = [
    "GPTQ",
    "GPTVQ",
    "METHODS",
    "BenchExperts",
    "BenchKernel",
    "BenchServe",
    "Checkpoint",
    "Control",
    "Evaluate",
    "ImportModel",
    "MatGPTQ",
    "MatQuantOmni",
    "MatQuantOmniExtra",
    "Method",
    "Nested",
    "NestedTuned",
    "NestedVQ",
    "OmniQuant",
    "Plot",
    "Quantize",
    "Recipe",
    "RoundToNearest",
    "Search",
    "Simulate",
    "Slice",
    "Train",
    "Verify",
    "__version__",
    "bench_experts",
    "bench_kernel",
    "bench_serve",
    "control",
    "evaluate",
    "import_model",
    "load_model",
    "open_checkpoint",
    "plot",
    "quantize",
    "search",
    "serve",
    "simulate",
    "switch",
    "train",
    "verify",
]

_MODULES = {
    "checkpoint.reader": ("Checkpoint", "open_checkpoint"),
    "checkpoint.recipe": ("Recipe",),
    "checkpoint.slice": ("Slice",),
    "jobs.bench": (
        "BenchExperts",
        "BenchKernel",
        "BenchServe",
        "bench_experts",
        "bench_kernel",
        "bench_serve",
    ),
    "jobs.control": ("Control", "control"),
    "jobs.evaluate": ("Evaluate", "evaluate"),
    "jobs.import_model": ("ImportModel", "import_model"),
    "jobs.models": ("load_model", "serve", "switch"),
    "jobs.plot": ("Plot", "plot"),
    "jobs.quantize": ("Quantize", "quantize"),
    "jobs.search": ("Search", "search"),
    "jobs.simulate": ("Simulate", "simulate"),
    "jobs.train": ("Train", "train"),
    "jobs.verify": ("Verify", "verify"),
    "quantize.baselines": ("GPTQ", "MatGPTQ", "RoundToNearest"),
    "quantize.gptvq": ("GPTVQ",),
    "quantize.method": ("Method",),
    "quantize.methods": ("METHODS",),
    "quantize.nested": ("Nested",),
    "quantize.nested_tuned": ("NestedTuned",),
    "quantize.nested_vq": ("NestedVQ",),
    "quantize.omni": ("MatQuantOmni", "MatQuantOmniExtra", "OmniQuant"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def _exported(name: str) -> Any:
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = _exported(name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """A sub-package that bears the name of a function of this package and can be called as that function.

    Importing anything below ``vllm_matquant.quantize`` makes the sub-package the attribute ``quantize`` of this one,
    whatever stood there before, so that the function alone could not keep its name. As a module of this class the
    sub-package stays a module for every import, and is the function for whoever calls it or asks for its signature.
    """

    def _function(self) -> Any:
        return _exported(self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        return self._function().__signature__


for _name in ("quantize", "search", "serve", "train"):
    importlib.import_module(f"{__name__}.{_name}").__class__ = _CallablePackage
