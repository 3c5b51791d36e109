"""Windows of tokens to calibrate and to measure on, each of which begins as the model's texts begin.

A model whose texts all began with one token in training, the beginning-of-text token, predicts badly without it, and
what its layers are then given is not what they are given in use. So for such a model every window has this token in
front: that of a calibration, of a held-out text, of an evaluation and of a search alike. A window of length L then
holds the token and L - 1 tokens of text, of which the first is predicted too, as it is in use; other models' windows
hold L tokens of text, of which the first is given. Either way L - 1 tokens are predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_matquant.checkpoint.copied import check_copied
from vllm_matquant.checkpoint.errors import MissingFileError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.measure.records import Chat
from vllm_matquant.measure.text import HUB, TextError, held_out_text, read_source

_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer of natural text takes on average
_MARGIN = 4  # as much text is read as holds this many times the tokens asked for, to sample windows from
_BUILTIN = "built-in text"
_FAMILY = "gemma"  # whose models all begin texts with the token: gemma, gemma2, gemma3_text, paligemma ...


@dataclass(frozen=True)
class TextTokenizer:
    """A model's tokenizer, and what its texts begin with.

    Attributes:
        tokenizer: transformers' tokenizer.
        beginning: the tokens that every text of the model begins with: its beginning-of-text token, or none.
        vocabulary: how many tokens the model's embedding has, None if that is not known.
        positions: how many tokens the longest text of the model has, None if that is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    beginning: tuple[int, ...] = ()
    vocabulary: int | None = None
    positions: int | None = None

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without any that the model wants before or after it.

        Raises:
            TextError: the model's embedding does not have one of them.
        """
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        largest = max((*found, *self.beginning), default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise TextError(
                f"{self.tokenizer.name_or_path}: tokenizer: found token {largest}, expected one of the embedding's "
                f"{self.vocabulary} (vocab_size). Take the model's own tokenizer"
            )
        return found

    def render(self, chat: Chat, tools: list[dict[str, Any]] | None = None) -> str:
        """The text that the model's chat template makes of a chat, and of the tools at hand in it.

        Raises:
            TextError: there is no template, or it refuses the chat.
        """
        try:
            return str(self.tokenizer.apply_chat_template(chat, tools=tools, tokenize=False))
        except Exception as cause:  # a template is a program
            reason = str(cause).strip().split("\n")[0]
            raise TextError(
                f"{self.tokenizer.name_or_path}: chat template: found none that renders the records' chats ({reason}), "
                "expected one. Take a model with a chat template, or texts"
            ) from cause

    def text_length(self, sequence_length: int) -> int:
        """How many tokens of text a window of ``sequence_length`` tokens holds.

        Raises:
            TextError: none, or more tokens than the model has positions.
        """
        if self.positions is not None and sequence_length > self.positions:
            raise TextError(
                f"sequence_length: found {sequence_length}, expected at most the model's {self.positions} positions "
                f"(max_position_embeddings in {CONFIG_FILE}): --sequence-length {self.positions}"
            )
        least = len(self.beginning) + 1
        if sequence_length < least:
            raise TextError(
                f"sequence_length: found {sequence_length}, expected at least {least}: a window of this model begins "
                "with its beginning-of-text token"
            )
        return sequence_length - len(self.beginning)

    def windows(self, ids: torch.Tensor, places: Sequence[int], sequence_length: int) -> torch.Tensor:
        """Windows of a text, each begun as the model's texts begin.

        Args:
            ids: the text's tokens, int64 [tokens].
            places: where in it each window's text begins; as much text as the window holds must follow.
            sequence_length: of each window, at least one more than there are tokens in ``beginning``.

        Returns:
            int64 [places, sequence_length].
        """
        count = self.text_length(sequence_length)
        text = torch.stack([ids[place : place + count] for place in places]) if places else ids.new_empty(0, count)
        return torch.cat([ids.new_tensor(self.beginning).expand(len(text), -1), text], dim=1)


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        tokens: int64 [samples, sequence_length].
        source: what they were made from, for manifests and reports: name, SHA-256 of the text, samples, length, whether
            each begins with the model's beginning-of-text token (``beginning_of_text``), and the seed if there is one.
    """

    tokens: torch.Tensor
    source: dict[str, Any]


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of the model in ``folder``, and what the model's texts begin with.

    Three are asked, until one says what texts begin with:

    1. the tokenizer: the tokens that it puts in front of a text by itself, as it does when the model is served;
    2. ``add_bos_token`` in tokenizer_config.json, which transformers does not heed beside a tokenizer.json: false means
       that texts begin with nothing;
    3. ``model_type`` in config.json: a Gemma begins every text with its beginning-of-text token, also where its
       tokenizer has lost the rule, as one that transformers converted from a GGUF file has.

    The token is then the tokenizer's ``bos_token``, or without one ``bos_token_id`` of config.json.

    That a beginning-of-text token exists says nothing: many models have one and never put it before a text.

    Raises:
        MissingFileError: transformers finds no tokenizer there, or Git has not fetched a file's content.
    """
    if folder.is_dir():
        check_copied(folder)
    try:
        # Code beside a model is never run, and nobody is asked whether it shall be.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as cause:
        reason = str(cause).strip().split("\n")[0]
        raise MissingFileError(folder, "tokenizer", f"none ({reason})", "files that transformers can load") from cause
    own, model = (
        read_json(folder / name, any_float=True) if (folder / name).is_file() else {}
        for name in (_TOKENIZER_CONFIG_FILE, CONFIG_FILE)
    )
    vocabulary, positions = _number(model, "vocab_size"), _number(model, "max_position_embeddings", "n_positions")
    return TextTokenizer(tokenizer, _beginning(tokenizer, own, model), vocabulary, positions)


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of some fields of a model's configuration that is a number, None if none is."""
    found = (part.get(name) for part in (config, config.get("text_config") or {}) for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def _beginning(tokenizer: PreTrainedTokenizerBase, own: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[int, ...]:
    """What texts begin with by the tokenizer, by ``own``, its configuration, and by ``model``, that of the model."""
    plain, whole = (tokenizer("text", add_special_tokens=added)["input_ids"] for added in (False, True))
    for count in range(1, len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return tuple(whole[:count])
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.get("bos_token_id")
    says = own.get("add_bos_token")
    if not isinstance(says, bool):
        says = _FAMILY in str(model.get("model_type"))
    return (token,) if says and isinstance(token, int) else ()


def draw_windows(
    source: str | None,
    tokenizer: TextTokenizer,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    text_column: str = "text",
) -> Windows:
    """Windows at random places of a text, to calibrate on.

    Args:
        source: where the text is from, see :func:`vllm_matquant.measure.text.read_source`.
        tokenizer: the model's.
        samples: how many windows.
        sequence_length: tokens of each, the beginning-of-text token included.
        seed: of the windows' places.
        text_column: the text's field in a line, or column in a data set.

    Raises:
        TextError: no such file, a line without text, a text with too few tokens, or no ``datasets`` package.
        OSError: the text cannot be read.
    """
    ids, described = _tokenize(source, tokenizer, samples, sequence_length, text_column)
    generator = torch.Generator().manual_seed(seed)
    last = len(ids) - tokenizer.text_length(sequence_length)
    places = torch.randint(last + 1, (samples,), generator=generator).tolist()
    return Windows(tokenizer.windows(ids, places, sequence_length), described | {"seed": seed})


def split_windows(
    source: str | None,
    tokenizer: TextTokenizer,
    *,
    samples: Sequence[int],
    sequence_length: int,
    seed: int,
    text_column: str = "text",
) -> list[Windows]:
    """Several sets of windows no two of which share a token of the text: to train on one, say, and measure on another.

    Args:
        source: where the text is from, see :func:`vllm_matquant.measure.text.read_source`.
        tokenizer: the model's.
        samples: how many windows each set has.
        sequence_length: tokens of each, the beginning-of-text token included.
        seed: of the choice among the text's windows.
        text_column: the text's field in a line, or column in a data set.

    Raises:
        TextError: no such file, a line without text, a text with too few tokens, or no ``datasets`` package.
        OSError: the text cannot be read.
    """
    ids, described = _tokenize(source, tokenizer, sum(samples), sequence_length, text_column)
    step = tokenizer.text_length(sequence_length)
    count = len(ids) // step
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: sum(samples)]
    return [
        Windows(
            tokenizer.windows(ids, (step * part).tolist(), sequence_length),
            described | {"samples": size, "seed": seed, "part": index},
        )
        for index, (size, part) in enumerate(zip(samples, order.split(list(samples)), strict=True))
    ]


def every_window(
    source: str | None, tokenizer: TextTokenizer, *, most: int, sequence_length: int, text_column: str = "text"
) -> Windows:
    """All windows of a text, one after the other, to train on; what is left at its end makes none.

    Args:
        source: where the text is from, see :func:`vllm_matquant.measure.text.read_source`.
        tokenizer: the model's.
        most: how many windows to give at the most; of a text that holds far more only a part is read.
        sequence_length: tokens of each, the beginning-of-text token included.
        text_column: the text's field in a line, or column in a data set.

    Raises:
        TextError: no such file, a line without text, a text shorter than one window, windows that hold nothing to
            predict, or no ``datasets`` package.
        OSError: the text cannot be read.
    """
    _check_predicted(sequence_length)
    count, name = tokenizer.text_length(sequence_length), source or _BUILTIN
    text = read_source(source, most * count * _CHARACTERS_PER_TOKEN, text_column, tokenizer.render)
    ids = torch.tensor(tokenizer.ids(text), dtype=torch.int64)
    if len(ids) < count:
        raise TextError(
            f"{name}: found {len(ids):,} tokens, expected at least {count:,}, one window. Give a longer text, or ask "
            "for shorter windows (--sequence-length)"
        )
    windows = min(most, len(ids) // count)
    tokens = tokenizer.windows(ids, range(0, windows * count, count), sequence_length)
    name = name if name.startswith(HUB) else Path(name).name
    return Windows(tokens, _described(name, text, windows, sequence_length, tokenizer))


def spread_windows(
    path: Path | None, tokenizer: TextTokenizer, *, samples: int, sequence_length: int, text_column: str = "text"
) -> Windows:
    """Windows spread evenly over a text, to measure on.

    Args:
        path: the text's file, see :func:`vllm_matquant.measure.text.read_source`; None for the part of Python's
            language reference that the built-in calibration text leaves out.
        tokenizer: the model's.
        samples: how many windows.
        sequence_length: tokens of each, the beginning-of-text token included.
        text_column: the text's field in a record.

    Raises:
        TextError: the text is shorter than one window for each sample, windows hold nothing to predict, or the file
            holds no text.
        OSError: the file cannot be read.
    """
    _check_predicted(sequence_length)
    count, source = tokenizer.text_length(sequence_length), str(path or _BUILTIN)
    if path is None:
        text = held_out_text()
    else:
        wanted = samples * count * _CHARACTERS_PER_TOKEN
        text = read_source(source, wanted, text_column, tokenizer.render, whole=True)
    ids = torch.tensor(tokenizer.ids(text), dtype=torch.int64)
    _check_count(source, len(ids), samples, count)
    name = path.name if path and not source.startswith(HUB) else source
    places = torch.linspace(0, len(ids) - count, samples).long().tolist()
    tokens = tokenizer.windows(ids, places, sequence_length)
    return Windows(tokens, _described(name, text, samples, sequence_length, tokenizer))


def _tokenize(
    source: str | None, tokenizer: TextTokenizer, samples: int, sequence_length: int, text_column: str
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The tokens of a text that is long enough for the windows, and what to say of it."""
    count = tokenizer.text_length(sequence_length)
    text = read_source(source, samples * count * _CHARACTERS_PER_TOKEN * _MARGIN, text_column, tokenizer.render)
    ids = torch.tensor(tokenizer.ids(text), dtype=torch.int64)
    name = source or _BUILTIN
    _check_count(name, len(ids), samples, count)
    name = name if name.startswith(HUB) else Path(name).name
    return ids, _described(name, text, samples, sequence_length, tokenizer)


def _check_predicted(sequence_length: int) -> None:
    if sequence_length < 2:
        raise TextError(f"sequence_length: found {sequence_length}, expected at least 2: the first token is given")


def _check_count(name: str, found: int, samples: int, count: int) -> None:
    if found < samples * count:
        raise TextError(
            f"{name}: found {found:,} tokens, expected at least {samples * count:,} ({samples} x {count}). "
            "Give a longer text, or ask for fewer windows (--samples, or --held-out-samples of a held-out text)"
        )


def _described(name: str, text: str, samples: int, sequence_length: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    return {
        "name": name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples,
        "sequence_length": sequence_length,
        "beginning_of_text": bool(tokenizer.beginning),
    }
