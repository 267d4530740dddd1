"""Decoded rows as pandas DataFrames and torch tensors. Names are those of `contracts` without the shape suffix."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from pipeline.contracts import ScoredSequence, Signals, TokenSequence

_BFLOAT16 = {"hidden", "exact_hidden"}


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return stem if stem and suffix[:1].isupper() else name


_NAMES = {
    contract: [(_without_suffix(field.name), field.name) for field in fields(contract)]
    for contract in (TokenSequence, Signals)
}


def to_row(row: ScoredSequence) -> dict[str, Any]:
    """Return every field of the sequence and its signals; `input_ids_N` becomes `input_ids`."""
    parts = (row.sequence, row.signals)
    return {key: getattr(part, name) for part in parts for key, name in _NAMES[type(part)]}


def to_frame(rows: Iterable[ScoredSequence]) -> Any:
    """Return a pandas DataFrame with one row per sequence and numpy arrays as cells.

    bfloat16 states are uint16 bits. Raises ImportError without pandas.
    """
    import pandas

    return pandas.DataFrame([to_row(row) for row in rows])


def to_tensors(row: ScoredSequence) -> dict[str, Any]:
    """Return the row's fields, arrays as torch tensors and states as bfloat16. Raises ImportError without torch."""
    import torch

    values = to_row(row)
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
            values[name] = tensor.view(torch.bfloat16) if name in _BFLOAT16 else tensor
    return values
