#!/usr/bin/env python3
"""Check a matquant checkpoint: SHA-256 of each file, the format, the nesting of the widths."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from vllm_matquant.checkpoint.verify import verify


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="A folder without its last shards passes if it serves some width; what is absent is said. "
        "Exit status: 0 if every check passed, 1 otherwise.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the checkpoint")
    folder: Path = parser.parse_args().folder

    failures = 0
    for result in verify(folder):
        tqdm.write(f"{'ok    ' if result.passed else 'FAILED'} {result.text}")
        failures += not result.passed
    print(f"{folder}: " + (f"failed checks: {failures}" if failures else "sound"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
