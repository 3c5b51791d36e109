"""The job that checks a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.verify import Result
from vllm_matquant.checkpoint.verify import verify as verify_folder
from vllm_matquant.jobs.job import Job, Say, argument, running, silent


@dataclass(frozen=True)
class Verify(Job[list[Result]]):
    """Check a matquant checkpoint: SHA-256 of each file, the format, the nesting of the widths.

    Gives the results of all checks, each with passed and text.
    """

    epilog = (
        "A folder without its last shards passes if it serves some width; what is absent is said.\n"
        "Exit status: 0 if every check passed, 1 otherwise."
    )

    folder: Path | str = field(
        metadata=argument("folder of the checkpoint", parse=Path, positional=True, metavar="DIR")
    )

    def run(self, say: Say = silent) -> list[Result]:
        results = []
        for result in verify_folder(Path(self.folder)):
            say(f"{'ok    ' if result.passed else 'FAILED'} {result.text}")
            results.append(result)
        failures = sum(not result.passed for result in results)
        say(f"{self.folder}: " + (f"failed checks: {failures}" if failures else "sound"))
        return results

    def exit_status(self, result: Any) -> int:
        return 0 if all(each.passed for each in result) else 1


verify = running(Verify)
