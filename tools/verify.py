"""Check a checkpoint: the command ``matquant verify``."""

from vllm_matquant.cli import tool

main = tool("verify")

if __name__ == "__main__":
    raise SystemExit(main())
