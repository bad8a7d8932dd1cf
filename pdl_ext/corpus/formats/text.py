"""Plain text: each line that is not empty, or the whole file, is one text for the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from pdl_ext.corpus.reading.lines import LineSource, has_suffix
from pdl_ext.corpus.reading.tokenizer import PlacedText, TextEncoder
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Sample, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]


class _TextSource(LineSource):
    """A text is a line without its end. Empty lines are layout, not texts of special tokens only."""

    def __init__(self, path: Place, options: ReadOptions) -> None:
        super().__init__("text", path)
        for name in ("column", "mask", "skip_prompt"):
            column = getattr(options.policy, name)
            if column is not None:
                raise ValueError(f"{path}: got {name}={column!r}, expected none: plain text has no columns")
        self._encoder = TextEncoder(options, path)

    def batches(self, part: Part) -> Iterator[Batch]:
        return self._encoder.batches(text for text in self._texts(part) if text.text)

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        return ((text.place, self._encoder.encode([text])) for text in self._texts(part))

    def _texts(self, part: Part) -> Iterator[PlacedText]:
        return (PlacedText(self.place(line.offset), self.decode(line)) for line in self.lines(part))


class _DocumentSource(_TextSource):
    """The text is the whole file, with \\n where lines end in \\r\\n. An empty file has none."""

    def parts(self, size: int) -> Iterator[Part]:
        if self.size:
            yield Part(0, self.size, self.size)

    def sample(self) -> Sample:
        # A part of the file is not a text.
        return Source.sample(self)

    def _texts(self, part: Part) -> Iterator[PlacedText]:
        yield PlacedText(self.path, self.decode(self.whole()).replace("\r\n", "\n"))


def _open(path: Place, options: ReadOptions) -> list[Source]:
    return [_DocumentSource(path, options) if options.policy.sample_by == "document" else _TextSource(path, options)]


# Not .md, which describes the corpus beside it.
FORMAT = Format("text", _open, recognises=lambda path, head: has_suffix(path, ".txt", ".text"))
