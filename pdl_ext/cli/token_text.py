"""The text of tokens, as sub-commands show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pdl_ext.cli.streams import tell

if TYPE_CHECKING:
    from pdl_ext.provenance import Provenance

__all__ = ["literals_of_tokens"]


def literals_of_tokens(tokenizer: str | None, provenance: Provenance | None) -> Callable[[int], str]:
    """A function that returns the text of an id as a Python literal; without a tokenizer, an empty string.

    tokenizer: a path or URL. Warns on standard error if it is not the tokenizer of the provenance. Raises ValueError
    for a damaged tokenizer, ImportError if the tokenizers library is missing. The function raises ValueError for an id
    that the tokenizer refuses.
    """
    if tokenizer is None:
        return lambda token: ""
    from pdl_ext.corpus.reading.pretrained import text_of_token, tokenizer_digest
    from pdl_ext.storage.place import place

    path = place("tokenizer", tokenizer)
    text = text_of_token(path)
    if provenance is not None and provenance.tokenizer not in (None, tokenizer_digest(path)):
        tell(f"pdl-ext: warning: {path} is not the tokenizer of the counts")
    # As a literal: a token may be a line feed, or half of a character.
    return lambda token: repr(text(token))
