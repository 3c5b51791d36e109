"""The source model and the checkpoint that the tests of jobs have."""

from tests.jobs.conftest import nested, source

__all__ = ["nested", "source"]
