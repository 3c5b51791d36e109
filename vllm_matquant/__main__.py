"""``python -m vllm_matquant``: the command ``matquant``."""

from vllm_matquant.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
