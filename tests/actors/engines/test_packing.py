import numpy as np
import pytest
import torch

from actors.engines.packing import pack_rows, unpack_rows
from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec, TokenSequence


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("temperatures", [(), (1.0, 2.0)])
def test_packed_rows_unpack_to_the_same_values(rows, temperatures):
    spec = CaptureSpec(k=3, temperatures=temperatures, any_temperature=True, hidden_layers=(0, -1))
    shapes = [(3,), (3,), (), (), (), (len(temperatures),), (3,)]
    columns = [torch.randn(rows, *shape) for shape in shapes]
    columns[0] = columns[0].int()
    hidden = [torch.randn(rows, 4).bfloat16() for _ in range(3)]
    packed = pack_rows(RowSignals(*columns, None), hidden[:2], hidden[2])
    ids = np.zeros(rows + 1, np.int32)
    sequence = TokenSequence("s", "d", None, "train", ids, ids.astype(np.uint8), ids, audited=True)
    signals = unpack_rows(packed.numpy(), spec, 4, sequence)
    np.testing.assert_array_equal(signals.entry_logweight_TK, columns[1])
    np.testing.assert_array_equal(signals.log_partition_TC, columns[5])
    np.testing.assert_array_equal(signals.hidden_TLD, torch.stack(hidden[:2], dim=1).view(torch.uint16))
    np.testing.assert_array_equal(signals.exact_hidden_TD, hidden[2].view(torch.uint16))
