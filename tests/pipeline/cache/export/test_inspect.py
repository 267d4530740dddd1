import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from pipeline.cache.export.inspect import LEGEND, LEGEND_OF_SAMPLES, inspect_cache
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.errors import StorageError, UsageError

EXACT = {"exact distributions of the audit"}


def first_row(store):
    return next(CacheReader.open(store).rows("train"))


def test_an_overview_shows_teacher_capture_units_and_sizes(make_cache):
    store = make_cache(hidden_layers=[-1])
    overview = inspect_cache(store)
    reader = CacheReader.open(store)
    assert overview.fingerprint == reader.identity.fingerprint
    assert overview.rows == sum(1 for _ in reader.rows())
    shown = str(overview)
    assert "dummy: Dummy, 4 layers, V=512, bfloat16, dummy 1" in shown
    assert "mode=topk, k=8, temperatures=(1.0,), hidden_layers=(-1,)" in shown
    assert f"train {len(reader.unit_ids('train'))} of {len(reader.unit_ids('train'))}" in shown
    assert first_row(store).sequence.sequence_id in shown
    assert "faithful    yes: live against cache 1.00e-04 nats, within 7.00e-04" in shown
    size = reader.commit("train-00000").bytes / reader.commit("train-00000").tokens
    assert set(overview.bytes_per_token) == {"entries", "hidden states", "tokens and scalars"} | EXACT
    assert 0.3 * size < sum(overview.bytes_per_token.values()) < size
    assert f"hidden states {overview.bytes_per_token['hidden states']:.1f}" in shown
    json.dumps(asdict(overview))


def test_an_overview_shows_the_comparison_with_the_live_teacher(make_cache):
    store = make_cache()
    verdict = json.loads(store.read(layout.FAITHFULNESS_JSON))
    store.put(layout.FAITHFULNESS_JSON, json.dumps(verdict | {"usable": False, "why": "far off"}).encode())
    assert "faithful    NO: far off" in str(inspect_cache(store))
    store.delete(layout.FAITHFULNESS_JSON)
    assert "faithful    not compared with the live teacher" in str(inspect_cache(store))


def test_a_sequence_is_shown_with_its_text_and_signals(make_cache):
    store = make_cache()
    row = first_row(store)
    view = inspect_cache(store, row.sequence.sequence_id, rows=4)
    assert view.text == "Document 0 says: naïve w"[: len(view.text)]
    assert (view.unit_id, view.document_id, view.n_tokens) == ("train-00000", "doc 0", 24)
    assert [position.label for position in view.positions] == list("ocum")
    third = view.positions[2]
    assert third.label_probability == pytest.approx(np.exp(row.signals.label_logprob_T[2]))
    assert third.entropy == pytest.approx(row.signals.entropy_T[2])
    assert third.captured_mass == pytest.approx(1 - np.exp(row.signals.tail_logmass_T[2]), abs=1e-3)
    assert third.kept_entries == 8
    assert [entry.token_id for entry in third.entries] == row.signals.entry_id_TK[2][:5].tolist()
    shown = str(view)
    assert "... 19 more positions: --rows N shows more" in shown
    assert LEGEND in shown
    assert len([line for line in shown.splitlines() if line.lstrip()[:1].isdigit()]) >= 4
    json.dumps(asdict(view))


def test_a_row_limit_above_the_length_shows_all_positions(make_cache):
    store = make_cache()
    name = first_row(store).sequence.sequence_id
    view = inspect_cache(store, name, rows=1000)
    assert len(view.positions) == view.n_tokens - 1
    assert "more positions" not in str(view)


def test_spaces_and_unprintable_characters_of_tokens_are_visible(make_cache):
    store = make_cache()
    view = inspect_cache(store, first_row(store).sequence.sequence_id)
    position = replace(view.positions[0], label=" a\n\x07")
    assert "·a\\n\\x07" in str(replace(view, positions=(position,))).splitlines()[-2]


@pytest.mark.parametrize("mode", ["topp", "unbiased", "sampled"])
def test_every_mode_can_be_inspected(make_cache, mode):
    store = make_cache(mode=mode)
    view = inspect_cache(store, first_row(store).sequence.sequence_id)
    assert all(0 < position.captured_mass <= 1.001 for position in view.positions)
    assert all(entry.weight > 0 for position in view.positions for entry in position.entries)
    assert f"mode={mode}" in str(inspect_cache(store))
    (header,) = [line for line in str(view).splitlines() if "p(label)  " in line]
    word = "mass  likeliest" if mode == "topp" else "weight  heaviest"
    assert header.endswith(f"{word} entries")
    assert (LEGEND if mode == "topp" else LEGEND_OF_SAMPLES) in str(view)
    assert json.loads(json.dumps(asdict(view)))["mode"] == mode


def test_the_number_of_shown_entries_is_an_option(make_cache):
    store = make_cache()
    row = first_row(store)
    for limit, shown in ((1, 1), (7, 7), (100, 8)):
        view = inspect_cache(store, row.sequence.sequence_id, rows=3, entries=limit)
        assert [len(position.entries) for position in view.positions] == [shown] * 3
        assert [e.token_id for e in view.positions[2].entries] == row.signals.entry_id_TK[2][:limit].tolist()
        assert [len(position["entries"]) for position in asdict(view)["positions"]] == [shown] * 3
    with pytest.raises(UsageError, match="entries: expected at least 1, got 0"):
        inspect_cache(store, row.sequence.sequence_id, entries=0)


def test_unknown_sequences_and_invalid_options_are_refused(make_cache, tmp_path):
    with pytest.raises(UsageError, match="sequence unknown: not in cache"):
        inspect_cache(make_cache(), "unknown")
    with pytest.raises(UsageError, match="rows: expected at least 1, got 0"):
        inspect_cache(make_cache(), rows=0)
    with pytest.raises(StorageError, match="expected a cache"):
        inspect_cache(tmp_path / "nowhere")


def test_a_quarantined_sequence_is_refused_with_that_reason(make_cache):
    name = first_row(make_cache("unquarantined")).sequence.sequence_id
    with pytest.raises(UsageError, match="quarantined"):
        inspect_cache(make_cache(quarantined={name}), name)
