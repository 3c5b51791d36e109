"""Search a width for each layer within a budget: the command ``matquant search``."""

from vllm_matquant.cli import tool

main = tool("search")

if __name__ == "__main__":
    raise SystemExit(main())
