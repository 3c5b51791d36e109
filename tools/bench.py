"""Measure speed: the commands ``matquant bench kernel`` and ``matquant bench serve``."""

from vllm_matquant.cli import tool

main = tool("bench")

if __name__ == "__main__":
    raise SystemExit(main())
