"""How a device's data file is read: which rows of it, under which column names, for which part of the work."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from msgspec import Meta, Struct

#: Which rows: those to train on, those to check on, or all.
Part = Literal["all", "train", "evaluation"]
EvaluationShare = Annotated[float, Meta(ge=0, le=0.9)]
Column = Annotated[str, Meta(min_length=1, max_length=200)]
#: A function of a module.
FunctionName = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,199}:[A-Za-z_][A-Za-z0-9_.]{0,199}$(?!\n)")
]
Query = Annotated[str, Meta(min_length=1, max_length=10_000)]


class Reading(Struct, frozen=True):
    """What a worker is told beside the path of a data file.

    Attributes:
        query: query that gives the rows of an SQLite database; empty for a text file.
        text_column: name of the column with the text.
        label_column: name of the column with the label.
        part: which rows are read.
        evaluation_share: share of the rows that is kept for evaluation and never trained on.
        split_key: key, in hex, that decides which rows these are.
        function: function that gives the rows; empty where a file holds them.
        function_folder: folder in which its module is looked for first.
    """

    query: str = ""
    text_column: Column = "text"
    label_column: Column = "label"
    part: Part = "all"
    evaluation_share: EvaluationShare = 0.0
    split_key: str = ""
    function: str = ""
    function_folder: str = ""

    @property
    def includes_all(self) -> bool:
        """Whether every row belongs to the part."""
        return self.part == "all" or self.evaluation_share == 0

    def includes(self, text: str) -> bool:
        """Whether a row belongs to the part.

        A row's side depends on key and text alone: it keeps it while the file grows, and copies of a text are on one
        side. Another device has another key.
        """
        if self.includes_all:
            return True
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=bytes.fromhex(self.split_key)).digest()
        evaluates = int.from_bytes(digest, "big") < self.evaluation_share * 2.0**64
        return evaluates == (self.part == "evaluation")
