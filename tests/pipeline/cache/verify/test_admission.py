import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cache.commit import read_commit
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.verify import admission
from pipeline.cache.verify.admission import admit
from pipeline.errors import AdmissionError, ExitCode
from pipeline.models.tokenizers import ByteTokenizer


def refusal(store, **arguments):
    with pytest.raises(AdmissionError) as caught:
        admit(CacheReader.open(store), **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


@pytest.mark.parametrize("mode", ["topk", "topp", "unbiased", "sampled"])
def test_a_complete_cache_of_the_students_tokenizer_is_admitted(make_cache, mode):
    admitted = admit(CacheReader.open(make_cache(mode=mode)), tokenizer_digest=ByteTokenizer().digest, vocabulary=512)
    assert admitted.units > 0
    assert admitted.audit is not None
    assert 0 < admitted.captured_mass <= 1


def test_a_cache_that_the_capture_found_unfaithful_is_refused_with_its_reason(make_cache):
    store = make_cache()
    verdict = json.loads(store.read(layout.FAITHFULNESS_JSON))
    unfaithful = verdict | {"usable": False, "why": "live against cache 2.00e+00 nats,\nfurther than 7.00e-04"}
    store.put(layout.FAITHFULNESS_JSON, json.dumps(unfaithful).encode())
    message = refusal(store)
    assert "is not faithful to its teacher" in message
    assert "live against cache 2.00e+00 nats, further than 7.00e-04" in message


def test_a_cache_that_was_not_compared_with_its_teacher_is_admitted(make_cache):
    store = make_cache()
    store.delete(layout.FAITHFULNESS_JSON)
    assert admit(CacheReader.open(store)).units > 0


def test_an_invalid_faithfulness_record_is_damage(make_cache):
    store = make_cache()
    store.put(layout.FAITHFULNESS_JSON, b"{}")
    assert "faithfulness.json: invalid content" in refusal(store)


def test_an_incomplete_cache_is_refused(make_cache):
    message = refusal(make_cache(units=["train-00000"]))
    assert "is incomplete" in message
    assert "run: stillhouse capture" in message


def test_a_cache_with_quarantined_rows_is_admitted(make_cache):
    name = next(CacheReader.open(make_cache("unquarantined")).rows()).sequence.sequence_id
    assert admit(CacheReader.open(make_cache(quarantined={name}))).quarantined == 1


def test_another_tokenizer_or_vocabulary_is_refused(make_cache):
    store = make_cache()
    assert f"expected the student's tokenizer {'0' * 64}, got" in refusal(store, tokenizer_digest="0" * 64)
    assert "expected the student's vocabulary 500, got 512" in refusal(store, vocabulary=500)


@pytest.mark.parametrize("hashed_bytes", [admission.HASHED_BYTES, 0])
def test_a_damaged_or_missing_shard_is_refused(make_cache, monkeypatch, hashed_bytes):
    monkeypatch.setattr(admission, "HASHED_BYTES", hashed_bytes)
    store = make_cache()
    path = read_commit(store, "held_out-00000").file
    store.put(path, store.read(path)[:-1])
    message = refusal(store)
    assert "is damaged" in message
    assert "run: stillhouse verify" in message
    store.delete(path)
    assert "is damaged" in refusal(store)


def test_too_little_captured_mass_is_refused(make_cache):
    store = make_cache()
    mass = admit(CacheReader.open(store)).captured_mass
    tails = [np.exp(row.signals.tail_logmass_T) for row in CacheReader.open(store).rows("train")]
    assert mass == pytest.approx(1 - np.concatenate(tails).mean(), abs=1e-6)
    admit(CacheReader.open(store), min_captured_mass=mass - 0.01)
    assert f"(training.min_captured_mass), got {mass:.3f}" in refusal(store, min_captured_mass=mass + 0.01)


def altered(name, edit):
    def change(rows):
        return [replace(row, signals=replace(row.signals, **{name: edit(getattr(row.signals, name))})) for row in rows]

    return change


def test_a_cache_that_deviates_from_its_teacher_is_refused(make_cache):
    wrong_labels = make_cache("labels", change=altered("label_logprob_T", lambda values: values - 1))
    assert "mean error of label log-probs is 1.0" in refusal(wrong_labels)
    wrong_entries = make_cache("entries", change=altered("entry_id_TK", lambda ids: 511 - ids))
    assert "mean KL of the exact to the kept distribution" in refusal(wrong_entries)


def test_a_cache_without_exact_distributions_is_admitted_unaudited(make_cache):
    store = make_cache(audit=0.0, corpus={"held_out": 0.0})
    assert admit(CacheReader.open(store)).audit is None
    store.delete(layout.LM_HEAD)
    assert admit(CacheReader.open(store)).audit is None
