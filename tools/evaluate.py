"""Measure the quality of widths and recipes: the command ``matquant evaluate``."""

from vllm_matquant.cli import tool

main = tool("evaluate")

if __name__ == "__main__":
    raise SystemExit(main())
