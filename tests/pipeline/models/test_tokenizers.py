import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import Message
from pipeline.errors import CorpusError, ModelError
from pipeline.models.tokenizers import ByteTokenizer, load_tokenizer
from pipeline.models.tokenizers.transformers_tokenizer import TransformersTokenizer

TEXT = "The quick brown fox — naïve café, 日本語 🙂 and  two spaces\n\ttab."
CHAT = (
    Message("user", "What is é?"),
    Message("assistant", "A letter."),
    Message("user", "?"),
    Message("assistant", "!"),
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save(folder, inner, **config):
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE tokenizer whose tokens may split a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    return save(tmp_path_factory.mktemp("bpe"), inner, eos_token="<|end|>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """A tokenizer like SentencePiece's: `▁` for spaces, `<0xNN>` for unknown bytes, a BOS token in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "é", "▁é"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "é")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(tmp_path_factory.mktemp("metaspace"), inner, bos_token="<s>")


def test_byte_tokens_are_the_bytes_of_the_text():
    tokens = ByteTokenizer().encode("né")
    assert tokens.input_ids_N.tolist() == [110, 195, 169]
    assert tokens.byte_end_N.tolist() == [1, 2, 3]
    assert ByteTokenizer().decode(tokens.input_ids_N) == "né"


def test_the_special_token_is_parsed_in_rendered_chats_only():
    assert ByteTokenizer.END_OF_MESSAGE not in ByteTokenizer().encode("a<|turn|>b").input_ids_N
    rendered = ByteTokenizer().encode("a<|turn|>b", rendered=True)
    assert rendered.input_ids_N.tolist() == [97, 256, 98]
    assert rendered.byte_end_N.tolist() == [1, 9, 10]


def test_transformers_loads_the_byte_tokenizer_with_the_same_ids_and_ends(tmp_path):
    for name, data in ByteTokenizer().files().items():
        (tmp_path / name).write_bytes(data)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    twin = TransformersTokenizer(tmp_path)
    chat = ByteTokenizer().render(CHAT)
    assert twin.render(CHAT).text == chat.text
    for text, rendered in ((TEXT, False), (chat.text, True)):
        ours, theirs = ByteTokenizer().encode(text, rendered=rendered), twin.encode(text, rendered=rendered)
        assert ours.input_ids_N.tolist() == theirs.input_ids_N.tolist()
        assert ours.byte_end_N.tolist() == theirs.byte_end_N.tolist()
    assert twin.size == ByteTokenizer().size


def test_byte_level_tokens_end_where_their_bytes_end(byte_level):
    tokenizer = load_tokenizer(byte_level)
    tokens = tokenizer.encode(TEXT)
    start = 0
    for token_id, end in zip(tokens.input_ids_N.tolist(), tokens.byte_end_N.tolist(), strict=True):
        assert tokenizer._bytes(token_id) == TEXT.encode()[start:end]
        start = end
    assert start == len(TEXT.encode())
    assert tokenizer.decode(tokens.input_ids_N) == TEXT


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_byte_ends_cover_any_text(byte_level_and_metaspace, text):
    for tokenizer in byte_level_and_metaspace:
        ends = tokenizer.encode(text).byte_end_N
        assert (np.diff(ends, prepend=0) >= 0).all()
        assert not len(ends) or ends[-1] == len(text.encode())


@pytest.fixture(scope="module")
def byte_level_and_metaspace(byte_level, metaspace):
    return load_tokenizer(byte_level), load_tokenizer(metaspace)


def test_a_bos_token_ends_at_byte_0_and_is_not_added_to_rendered_chats(metaspace):
    tokenizer = load_tokenizer(metaspace)
    tokens = tokenizer.encode("a b é")
    assert [tokenizer._inner.convert_ids_to_tokens(int(i)) for i in tokens.input_ids_N] == ["<s>", "▁a", "▁", "b", "▁é"]
    assert tokens.byte_end_N.tolist() == [0, 1, 2, 3, 6]
    assert tokenizer.encode("a", rendered=True).input_ids_N.tolist() == tokenizer.encode("a").input_ids_N.tolist()[1:]


def test_a_token_that_splits_a_character_ends_where_the_character_starts(metaspace):
    tokens = load_tokenizer(metaspace).encode("a日b")
    # <s>, ▁a, three bytes of one character, b
    assert tokens.byte_end_N.tolist() == [0, 1, 1, 1, 4, 5]


def test_the_assistants_messages_are_located_in_the_rendered_chat(byte_level):
    chat = load_tokenizer(byte_level).render(CHAT)
    assert [chat.text[start:end] for start, end in chat.assistant_spans] == ["A letter.<|end|>\n", "!<|end|>\n"]


def test_special_tokens_of_a_template_end_where_their_text_ends(byte_level):
    tokenizer = load_tokenizer(byte_level)
    tokens = tokenizer.encode("a<|end|>b", rendered=True)
    assert tokens.byte_end_N.tolist() == [1, 8, 9]


def test_a_chat_without_template_is_refused(metaspace):
    with pytest.raises(ModelError, match="has no chat template"):
        load_tokenizer(metaspace).render(CHAT)


def with_template(byte_level, folder, template):
    (folder / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_a_template_that_rejects_a_chat_is_a_corpus_error(byte_level, tmp_path):
    tokenizer = with_template(byte_level, tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CorpusError, match="rejects the chat: roles must alternate"):
        tokenizer.render(CHAT)


def test_a_template_that_changes_earlier_messages_has_text_but_no_spans(byte_level, tmp_path):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = with_template(byte_level, tmp_path, template)
    with pytest.raises(ModelError, match="loss_on=all"):
        tokenizer.render(CHAT)
    assert tokenizer.render(CHAT, spans=False).text == "4What is é?A letter.?!"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
