"""Decoded rows for pandas and torch. Names are those of the contracts without their shape suffix."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from pipeline.contracts import ScoredSequence, Signals, TokenSequence

_BFLOAT16 = {"hidden", "exact_hidden"}


def _plain_name(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return stem if stem and suffix[:1].isupper() else name


_NAMES = {
    contract: [(_plain_name(field.name), field.name) for field in fields(contract)]
    for contract in (TokenSequence, Signals)
}


def to_row(row: ScoredSequence) -> dict[str, Any]:
    """Every field of the sequence and of its signals: `input_ids_N` becomes `input_ids`."""
    parts = (row.sequence, row.signals)
    return {plain: getattr(part, name) for part in parts for plain, name in _NAMES[type(part)]}


def to_frame(rows: Iterable[ScoredSequence]) -> Any:
    """A pandas DataFrame with one row a sequence and an array in each cell that holds a tensor.

    bfloat16 states stay uint16, by their bits. Raises ImportError without pandas.
    """
    import pandas

    return pandas.DataFrame([to_row(row) for row in rows])


def to_tensors(row: ScoredSequence) -> dict[str, Any]:
    """The row's arrays as torch tensors, states as bfloat16, beside its plain fields. Needs torch: ImportError."""
    import torch

    values = to_row(row)
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
            values[name] = tensor.view(torch.bfloat16) if name in _BFLOAT16 else tensor
    return values
