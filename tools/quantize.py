"""Quantize a Hugging Face checkpoint to a nested one: the command ``matquant quantize``."""

from vllm_matquant.cli import tool

main = tool("quantize")

if __name__ == "__main__":
    raise SystemExit(main())
