"""Names of files, and which of them stay in their folder."""

from __future__ import annotations

from vllm_matquant.checkpoint.names import is_plain_name, shard_name, shard_pattern, shard_width


def test_shard_names() -> None:
    assert shard_name(3, 1, 12) == "model-width3-00001-of-00012.safetensors"
    assert shard_width(shard_name(3, 1, 12)) == 3
    for name in ("model-width9-00001-of-00001.safetensors", "../" + shard_name(3, 1, 1), shard_name(3, 1, 1) + "\n"):
        assert shard_width(name) is None
    assert shard_pattern(4) == "model-width[2-4]-*.safetensors"


def test_plain_names() -> None:
    assert is_plain_name("model-width2-00001-of-00001.safetensors")
    for name in ("", ".", "..", "../a", "/a", "a/b", "a\\b", "C:a", "a\0"):
        assert not is_plain_name(name)
