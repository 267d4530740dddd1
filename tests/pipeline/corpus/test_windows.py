import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusSpec
from pipeline.contracts import Document, Message
from pipeline.corpus.splits import Splitter
from pipeline.corpus.windows import CutSettings, Cutter, cut_windows, sequence_id, units_of
from pipeline.errors import CorpusError
from pipeline.models.tokenizers import ByteTokenizer, Tokens

TOKENIZER = ByteTokenizer()


def settings(audit=0.0, seed=0, **corpus):
    return CutSettings(CorpusSpec(source="x", **corpus), audit, seed)


def cut_all(documents, tokenizer=TOKENIZER, **given):
    cut = settings(**given)
    cutter = Cutter(tokenizer, cut, Splitter([d.id for d in documents], cut.corpus.held_out, cut.seed))
    return list(cutter.sequences(documents)), cutter


@given(st.integers(2, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_a_label_exactly_once(n, length):
    text = "".join(chr(97 + i % 26) for i in range(n))
    windows = cut_windows(Document(id="d", text=text), TOKENIZER, "train", settings(sequence_length=length))
    assert all(2 <= len(w.input_ids_N) <= length for w in windows)
    ends = np.concatenate([w.byte_end_N[w.loss_mask_N == 1] for w in windows])
    assert ends.tolist() == list(range(2, n + 1))
    labels = np.concatenate([w.input_ids_N[w.loss_mask_N == 1] for w in windows])
    assert bytes(labels.tolist()).decode() == text[1:]
    assert all(w.loss_mask_N[0] == 0 for w in windows)


def test_a_window_has_the_byte_at_which_its_first_token_begins():
    windows = cut_windows(Document(id="d", text="abcdefg"), TOKENIZER, "train", settings(sequence_length=4))
    assert [(w.byte_start, w.byte_end_N.tolist()) for w in windows] == [(0, [1, 2, 3, 4]), (3, [4, 5, 6, 7])]


def test_a_chat_has_labels_on_all_tokens_or_on_the_assistants():
    chat = Document(id="c", messages=(Message("user", "hi"), Message("assistant", "yes"), Message("user", "no")))
    (everything,) = cut_windows(chat, TOKENIZER, "train", settings())
    assert everything.loss_mask_N.sum() == len(everything.input_ids_N) - 1
    (answers,) = cut_windows(chat, TOKENIZER, "train", settings(loss_on="assistant"))
    assert TOKENIZER.decode(answers.input_ids_N[answers.loss_mask_N == 1]) == "yes<|turn|>"
    assert answers.byte_end_N[-1] == len(b"user: hi<|turn|>assistant: yes<|turn|>user: no<|turn|>")


def test_windows_without_labels_are_omitted():
    chat = Document(id="c", messages=(Message("user", "q" * 40), Message("assistant", "yes")))
    windows = cut_windows(chat, TOKENIZER, "train", settings(loss_on="assistant", sequence_length=16))
    labels = [TOKENIZER.decode(w.input_ids_N[w.loss_mask_N == 1]) for w in windows]
    assert "".join(labels) == "yes<|turn|>"
    assert windows[0].sequence_id.endswith("-00003")


def test_a_document_without_tokens_is_refused_by_its_id():
    class Mute(ByteTokenizer):
        def encode(self, text, *, rendered=False):
            return Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))

    with pytest.raises(CorpusError, match="corpus document 'd': expected at least one token, got none"):
        cut_windows(Document(id="d", text="x"), Mute(), "train", settings())


def test_the_document_of_a_chat_that_the_template_rejects_is_named():
    class Strict(ByteTokenizer):
        def render(self, messages, *, spans=True):
            raise CorpusError("the chat template rejects the chat: no")

    with pytest.raises(CorpusError, match="corpus document 'c': the chat template rejects"):
        cut_windows(Document(id="c", messages=(Message("user", "a"),)), Strict(), "train", settings())


def test_a_document_of_one_token_is_skipped_and_reported():
    sequences, cutter = cut_all([Document(id="short", text="x"), Document(id="long", text="xyz")], held_out=0.0)
    assert [s.document_id for s in sequences] == ["long"]
    assert (cutter.skipped, cutter.documents_read) == (["short"], 2)


@given(st.lists(st.text(min_size=1, max_size=400), min_size=1, unique=True, max_size=20))
def test_sequence_ids_are_valid_in_paths_and_unique_for_any_document_id(ids):
    names = {sequence_id(i, window) for i in ids for window in (0, 1, 99999)}
    assert len(names) == 3 * len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name) for name in names)


def test_sequence_ids_contain_the_readable_part_of_the_document_id():
    assert sequence_id("python-docs/assert", 3).startswith("python-docs-assert-")
    assert sequence_id("../../etc/passwd", 0).startswith("etc-passwd-")


def test_token_caps_are_reached_and_not_exceeded():
    documents = [Document(id=f"d{n}", text="x" * 50) for n in range(200)]
    sequences, cutter = cut_all(documents, max_tokens=330, max_held_out_tokens=70, held_out=0.3, sequence_length=20)
    tokens = {"train": 0, "held_out": 0}
    for sequence in sequences:
        tokens[sequence.split] += len(sequence.input_ids_N)
    assert tokens == cutter.tokens == {"train": 330, "held_out": 70}
    assert cutter.documents_read < 30


def test_the_held_out_split_is_capped_in_proportion():
    documents = [Document(id=f"d{n}", text="x" * 50) for n in range(500)]
    _, cutter = cut_all(documents, max_tokens=900, held_out=0.1)
    assert cutter.tokens == {"train": 900, "held_out": 100}
    assert cutter.documents_read < 200


def test_nothing_is_capped_by_default_and_all_may_be_held_out():
    documents = [Document(id=f"d{n}", text="x" * 50) for n in range(20)]
    assert cut_all(documents, held_out=0.0)[1].tokens == {"train": 1000, "held_out": 0}
    assert cut_all(documents, held_out=1.0)[1].tokens == {"train": 0, "held_out": 1000}
    assert cut_all(documents, held_out=1.0, max_tokens=70)[1].tokens == {"train": 0, "held_out": 70}


def test_held_out_sequences_are_audited_and_the_configured_fraction_of_the_others():
    documents = [Document(id=f"d{n}", text="x" * 300) for n in range(100)]
    sequences, _ = cut_all(documents, audit=0.25, held_out=0.2, sequence_length=16)
    assert all(s.audited for s in sequences if s.split == "held_out")
    share = np.mean([s.audited for s in sequences if s.split == "train"])
    assert 0.2 < share < 0.3
    again, _ = cut_all(documents[::-1], audit=0.25, held_out=0.2, sequence_length=16)
    assert {s.sequence_id: s.audited for s in again} == {s.sequence_id: s.audited for s in sequences}


def test_units_contain_one_split_in_the_corpus_order():
    documents = [Document(id=f"d{n}", text="x" * 30) for n in range(40)]
    sequences, _ = cut_all(documents, held_out=0.25)
    units = list(units_of(sequences, 3))
    for split in ("train", "held_out"):
        of_split = [unit for unit in units if unit.split == split]
        assert [unit.unit_id for unit in of_split] == [f"{split}-{n:05d}" for n in range(len(of_split))]
        assert all(len(unit.sequences) == 3 for unit in of_split[:-1])
        assert [s for unit in of_split for s in unit.sequences] == [s for s in sequences if s.split == split]


def test_sequences_do_not_depend_on_later_documents():
    documents = [Document(id=f"d{n}", text="x" * 30, domain="y") for n in range(40)]
    few, _ = cut_all(documents[:20], held_out=0.25)
    many, _ = cut_all(documents, held_out=0.25)
    assert [s.sequence_id for s in many[: len(few)]] == [s.sequence_id for s in few]
    assert {s.domain for s in many} == {"y"}
