"""WordPiece vocabularies that are the same in every process; a trained one numbers its pieces in no fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import BertWordPieceTokenizer, Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_pieces(texts: Iterable[str], size: int) -> Tokenizer:
    """A lower-case WordPiece tokenizer of at most ``size`` pieces: the texts' characters, then the commonest words."""
    plain = BertWordPieceTokenizer(lowercase=True)
    words = Counter(
        word
        for text in texts
        for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
    )
    characters = sorted({character for word in words for character in word})
    ordered = sorted(words, key=lambda word: (-words[word], word))
    pieces = dict.fromkeys([*SPECIAL, *characters, *(f"##{each}" for each in characters), *ordered])
    vocabulary = {piece: number for number, piece in enumerate(list(pieces)[:size])}
    return BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)._tokenizer
