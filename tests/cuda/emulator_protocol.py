"""What the tests of the CUDA kernels ask of an emulator of PTX, of which there is none in this repository.

The environment variable MATQUANT_PTX_EMULATOR names a folder with a package ``ptxemu`` that is an
:class:`EmulatorModule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Emulator(Protocol):
    """Executes the kernels of a piece of PTX on the CPU.

    It is to refuse, by the module's ``EmuError``, an access outside of the arrays, a read of memory that was never
    written, shared memory that is read before a copy to it was waited for, and, where asked for, a race between
    threads. Without these checks the tests that break a kernel on purpose fail.
    """

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int,
        schedule: int | None = None,
        async_early: bool = False,
        racecheck: bool | str = False,
    ) -> object:
        """Run a kernel to its end.

        Args:
            name: the kernel's.
            grid: blocks in up to three dimensions.
            block: threads of a block.
            arguments: an array for a pointer, which is copied in and out and is an allocation of its own; what
                :attr:`EmulatorModule.Out` makes of one for a pointer to memory that must be written before it is read,
                and that holds anything where it is not written; None for the null pointer; bytes for a structure that
                is passed by value.
            shared: bytes of dynamic shared memory of a block.
            schedule: a seed for the order in which warps take turns; by default any order.
            async_early: whether what ``cp.async`` copies is there at once; by default when it is waited for, no sooner.
            racecheck: "warp" to find races between any two lanes.
        """
        ...


class EmulatorModule(Protocol):
    """The package."""

    EmuError: type[Exception]

    def Emulator(self, ptx: str) -> Emulator:
        """An emulator for the kernels of a piece of PTX."""
        ...

    def Out(self, array: np.ndarray) -> object:
        """An argument that is written, and not read before."""
        ...
