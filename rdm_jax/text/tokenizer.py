"""Tokenizers from the files of the `tokenizers` library."""

from pathlib import Path
from typing import Any

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

tokenizers = lazy_import("tokenizers", "text")


def open_tokenizer(path: Path, vocabulary: int, last: int, fix: str) -> Any:
    """Opens a tokenizer.json as a `tokenizers.Tokenizer` that neither pads nor truncates.

    Args:
      path: of the file.
      vocabulary: the number of tokens that the network knows.
      last: the id of the token that ends every text.
      fix: of errors.

    Raises:
      InputError: the file is missing, damaged, or another network's.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}, the tokenizer", fix)
    read = tokenizers.Tokenizer.from_file
    try:
        tokenizer = read(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{path} cannot be used ({str(error)[:200]})", fix) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=-1)
    if largest >= vocabulary:
        raise InputError(
            f"{path} has a token {largest}, and the network knows {vocabulary} tokens", fix
        )
    if tokenizer.encode("a").ids[-1:] != [last]:
        raise InputError(f"{path} does not end a text with the token {last}", fix)
    return tokenizer
