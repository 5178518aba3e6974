"""Instructions as the frozen backbones will read them: words that they do not know, texts that are
cut or become one, and signs of their own that stand in a text."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

# Network -> where its tokenizer lies in a folder of backbones: ours, or as published.
FILES = {
    "text encoder": (
        "text.json",
        "wan/google/umt5-xxl/tokenizer.json",
        "wan/tokenizer/tokenizer.json",
    ),
    "VLM": ("vlm.json", "qwen3vl/tokenizer.json"),
}


class Words(NamedTuple):
    """A network's tokenizer, None where its file is not at hand, and how many tokens it keeps."""

    network: str
    tokenizer: Tokenizer | None
    limit: int | None = None

    @classmethod
    def of(cls, preset) -> "tuple[Words, ...]":
        """Those of a `motus.Preset`, or of the folder MOTUS_BACKBONES. The end of a text is one of
        the tokens that its text encoder keeps."""
        folder = os.environ.get("MOTUS_BACKBONES") or preset.backbones
        found = []
        for network, names in FILES.items():
            paths = [Path(folder) / name for name in names] if folder else []
            here = next((str(path) for path in paths if path.is_file()), None)
            limit = preset.motus.video.text_len - 1 if network == "text encoder" else None
            found.append(cls(network, here and Tokenizer.from_file(here), limit))
        return tuple(found)

    def signs(self, text: str) -> list[str]:
        """Special tokens that stand in a text, which is no word of it then."""
        added = self.tokenizer.get_added_tokens_decoder().values() if self.tokenizer else ()
        return [token.content for token in added if token.special and token.content in text]

    def notes(self, texts: Collection[str]) -> Iterator[str]:
        """Lines that say what is lost of these texts."""
        if self.tokenizer is None:
            yield f"instructions are not tried on the {self.network}: its tokenizer is not here"
            return
        unknown = {}  # words, in order
        long = []
        alike = {}  # tokens -> texts
        unk = self.tokenizer.token_to_id("<unk>")
        for text in texts:
            code = self.tokenizer.encode(text, add_special_tokens=False)
            spans = [span for token, span in zip(code.ids, code.offsets) if token == unk]
            unknown |= dict.fromkeys(text[begin:end] for begin, end in spans)
            if self.limit and len(code) > self.limit:
                long.append(f"{text!r} after {text[: code.offsets[self.limit - 1][1]][-30:]!r}")
            alike.setdefault(tuple(code.ids[: self.limit]), []).append(text)
        if unknown:
            yield f"unknown words, all one to the {self.network}: {some(unknown)}"
        if long:
            yield f"longer than {self.limit} tokens and cut for the {self.network}: {some(long)}"
        same = [" = ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
        if same:
            yield f"different instructions that are the same to the {self.network}: {some(same)}"


def some(items: Collection[object]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(map(str, list(items)[:5]))[:600] + more
