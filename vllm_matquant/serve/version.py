"""Which versions of vLLM the plugin is tested with, and what becomes of others."""

from __future__ import annotations

import re

LEAST = (0, 32)  # older ones lack functions that the plugin calls
TESTED = ((0, 32),)  # as "major.minor"


def text_of(version: tuple[int, int]) -> str:
    """A version as users know it, such as 0.32."""
    return ".".join(map(str, version))


EXPECTED = f"vLLM {text_of(LEAST)} or newer (pip install 'vllm_matquant[cuda]', or [cpu] on a machine without a GPU)"


def check_version(found: str) -> None:
    """Refuse a vLLM that is too old for the plugin.

    Args:
        found: its version. One that does not begin with two numbers, as that of a build from a source tree without
            history may, is let pass.

    Raises:
        ImportError: it is older than :data:`LEAST`.
    """
    version = _parsed(found)
    if version is not None and version < LEAST:
        raise ImportError(
            f"vllm: found version {found}, expected {EXPECTED}. To go on with this vLLM and without matquant "
            "checkpoints, uninstall vllm_matquant, or name the other plugins in VLLM_PLUGINS"
        )


def untested(found: str) -> str | None:
    """What to tell whoever serves with a vLLM that the plugin is not tested with; None where it is.

    Args:
        found: its version.
    """
    if _parsed(found) in TESTED:
        return None
    return (
        f"Found vLLM {found}; vllm_matquant is tested with {', '.join(map(text_of, TESTED))}. It wraps functions of "
        "vLLM that are no public interface: where they have changed, the start fails, or an option does not do what it "
        "says"
    )


def _parsed(version: str) -> tuple[int, int] | None:
    """Major and minor; None where the version does not say, such as "dev" or 0.0."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = None if numbers is None else (int(numbers[1]), int(numbers[2]))
    return None if found == (0, 0) else found
