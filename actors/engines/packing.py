"""Packs signals into one uint8 tensor a sequence, since a vLLM pooler returns one tensor a request, and unpacks it.

A packed row is the concatenation of its fields, little-endian, without padding. The fields and their widths follow from
the capture spec, the hidden width and whether the sequence is audited, so no header is stored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec, Signals, TokenSequence
from pipeline.errors import RowError


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=int)) * np.dtype(self.dtype).itemsize


def row_fields(spec: CaptureSpec, hidden_width: int, audited: bool) -> list[_Field]:
    """Return the fields of a packed row in order, named as in `pipeline.contracts.Signals`."""
    fields = [
        _Field("entry_id_TK", "<i4", (spec.k,)),
        _Field("entry_logweight_TK", "<f4", (spec.k,)),
        _Field("tail_logmass_T", "<f4", ()),
        _Field("label_logprob_T", "<f4", ()),
        _Field("entropy_T", "<f4", ()),
        _Field("log_partition_TC", "<f4", (len(spec.temperatures),)),
    ]
    if spec.any_temperature:
        fields.append(_Field("tail_shape_T3", "<f4", (3,)))
    if spec.boundary:
        fields.append(_Field("boundary_logmass_T", "<f4", ()))
    if spec.hidden_layers:
        fields.append(_Field("hidden_TLD", "<u2", (len(spec.hidden_layers), hidden_width)))
    if audited:
        fields.append(_Field("exact_hidden_TD", "<u2", (hidden_width,)))
    return fields


def pack_rows(rows: RowSignals, hidden_RD: list[Tensor], state_RD: Tensor | None) -> Tensor:
    """Return the rows as uint8 [R, X] on the rows' device.

    `hidden_RD` has one tensor for each layer of the spec, in its order; `state_RD` is the LM head's input, for audited
    sequences only. Both are rounded to bfloat16.
    """
    columns = [rows.entry_id_RK, rows.entry_logweight_RK]
    scalars = [rows.tail_logmass_R, rows.label_logprob_R, rows.entropy_R, rows.log_partition_RC]
    scalars += [column for column in (rows.tail_shape_R3, rows.boundary_logmass_R) if column is not None]
    columns += [column.float() for column in scalars]
    columns += [state.bfloat16() for state in hidden_RD]
    columns += [] if state_RD is None else [state_RD.bfloat16()]
    bytes_RX = [(c[:, None] if c.dim() == 1 else c).contiguous().view(torch.uint8) for c in columns]
    return torch.cat(bytes_RX, dim=1)


def unpack_rows(packed_TX: NDArray[np.uint8], spec: CaptureSpec, hidden_width: int, sequence: TokenSequence) -> Signals:
    """Return the signals of one sequence. Raises RowError if the logits had nan or +inf."""
    columns: dict[str, NDArray[np.generic]] = {}
    offset = 0
    for field in row_fields(spec, hidden_width, sequence.audited):
        raw = np.ascontiguousarray(packed_TX[:, offset : offset + field.width_bytes])
        columns[field.name] = raw.view(field.dtype).reshape(len(packed_TX), *field.shape)
        offset += field.width_bytes
    if offset != packed_TX.shape[1]:
        raise ValueError(f"packed rows: expected {offset} bytes a row, got {packed_TX.shape[1]}")
    if not np.isfinite(columns["entropy_T"]).all():
        raise RowError(sequence.sequence_id, "the teacher's logits contain nan or +inf")
    return Signals(**columns)  # type: ignore[arg-type]
