import numpy as np

from pipeline.cache.codecs import decode_signals, encode_signals
from pipeline.cache.schema import ShardSpec
from pipeline.contracts import CaptureSpec, Signals


def test_top_entries_round_trip():
    rng = np.random.default_rng(0)
    spec = ShardSpec(CaptureSpec(k=8), vocabulary=1000, hidden_width=4, layers=2)
    logits = rng.normal(size=(20, 1000)) * 3
    logprob = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    order = np.argsort(-logprob, axis=1)[:, :8]
    weight = np.take_along_axis(logprob, order, 1)
    tail = np.log1p(-np.exp(weight).sum(1))
    zeros = np.zeros(20, np.float32)
    signals = Signals(order.astype(np.int32), weight, tail, zeros, zeros, zeros[:, None])
    decoded = decode_signals(encode_signals(signals, spec), 21, spec)
    for t in range(20):
        assert set(decoded.entry_id_TK[t]) == set(order[t])
    np.testing.assert_allclose(decoded.entry_logweight_TK, weight, atol=0.1)
    np.testing.assert_allclose(np.exp(decoded.entry_logweight_TK).sum(1) + np.exp(tail), 1, atol=1e-3)
