"""A small model, trained on a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_model_that_learned_its_text(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(folder: str, steps: int) -> str:
        sizes = ["--hidden-size", "64", "--layers", "1", "--vocabulary", "300", "--sequence-length", "32"]
        output = str(tmp_path / folder)
        assert train_model.main(["--text", str(text_file), "--output", output, "--steps", str(steps), *sizes]) == 0
        return capsys.readouterr().out

    def perplexity(said: str) -> float:
        return float(said.rsplit(" ", 1)[1])

    assert perplexity(train("long", 60)) < 0.2 * perplexity(train("short", 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "long")
    text = "The 7 cats of house 49 sat there."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(SystemExit):
        train_model.main(["--text", str(text_file), "--output", str(tmp_path / "long")])
    assert "expected a folder that is not there, or is empty" in capsys.readouterr().err


def test_some_blocks_of_a_trained_model(source: Path, text_file: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(source)
    count = whole.config.num_hidden_layers
    assert count > 1
    arguments = ["--text", str(text_file), "--start", str(source), "--steps", "1", "--sequence-length", "16"]
    arguments += ["--learning-rate", "1e-9"]
    for layers in (1, count):
        output = tmp_path / str(layers)
        assert train_model.main([*arguments, "--layers", str(layers), "--output", str(output)]) == 0
        model = AutoModelForCausalLM.from_pretrained(output)
        assert model.config.num_hidden_layers == len(model.get_decoder().layers) == layers
        for place, block in enumerate(model.get_decoder().layers):
            # The first and the last block stay, where there is room for both.
            before = whole.get_decoder().layers[place].state_dict()
            for name, values in block.state_dict().items():
                torch.testing.assert_close(values.float(), before[name].float(), rtol=1e-2, atol=1e-4)
    with pytest.raises(SystemExit):
        train_model.main([*arguments, "--layers", str(count + 1), "--output", str(tmp_path / "more")])
