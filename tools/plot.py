"""Draw quality against bits and speed: the command ``matquant plot``."""

from vllm_matquant.cli import tool

main = tool("plot")

if __name__ == "__main__":
    raise SystemExit(main())
