"""The source model and the checkpoint that the tests of jobs have, and short comparisons of quantizers."""

from collections.abc import Iterator

import compare_quantizers
import pytest

from tests.jobs.conftest import nested, source

__all__ = ["few_windows", "nested", "source"]


@pytest.fixture(scope="module")
def few_windows() -> Iterator[None]:
    """Comparisons evaluate 4 windows of 24 tokens of each text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_quantizers, "SAMPLES", 4)
        patch.setattr(compare_quantizers, "SEQUENCE_LENGTH", 24)
        yield
