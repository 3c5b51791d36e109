from tests.jobs.conftest import nested, source

__all__ = ["nested", "source"]
