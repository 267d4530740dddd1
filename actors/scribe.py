"""The Ray actor that hosts a teacher as a writer: it takes a batch of prompts and leaves their answers in the store."""

import os
import sys

from actors.engines.writers import Prompt, Writer, open_writer
from pipeline.answers import PromptBatch, answered, write_answers
from pipeline.cache.storage import Store
from pipeline.config import TeacherSpec
from pipeline.config.capture import SamplingSpec
from pipeline.contracts import Completion, Document, IntArray
from pipeline.errors import CorpusError
from pipeline.identity import uniform
from pipeline.prepare import model_of
from pipeline.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


class Scribe:
    """One writer. Ray brings it back when it dies, and repeats the call that it was at: a batch is written once."""

    def __init__(self, cache_uri: str, teacher: TeacherSpec, sampling: SamplingSpec, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets it to 1; torch reads it when it is imported
        self._store, self._teacher, self._sampling = Store.open(cache_uri), teacher, sampling
        self._writer: Writer | None = None
        self._tokenizer: Tokenizer = ByteTokenizer()
        self._positions = sys.maxsize

    def write(self, batch: PromptBatch) -> None:
        """Answer the prompts and keep the answers. Raises ModelError, CorpusError, EngineDead and StorageError."""
        writer = self._writer = self._writer or self._open()
        prompts = [self._prompt(document) for document in batch.prompts]
        completions = iter(writer.generate([prompt for prompt in prompts if prompt.max_tokens]))
        answers = [
            self._answered(document, next(completions) if prompt.max_tokens else None)
            for document, prompt in zip(batch.prompts, prompts, strict=True)
        ]
        write_answers(self._store, batch.path, answers)

    def _open(self) -> Writer:
        model = model_of(self._teacher)
        if model is not None:
            self._tokenizer = load_tokenizer(model.path)
            self._positions = int(model.text_config.get("max_position_embeddings", sys.maxsize))
        return open_writer(self._teacher, self._sampling, model)

    def _prompt(self, document: Document) -> Prompt:
        """The document's tokens, up to where the answer begins. One that leaves no room is given no tokens to write."""
        try:
            ids_N = self._tokens(document)
        except CorpusError as error:
            raise CorpusError(f"corpus document {document.id!r}: {error}") from error
        room = max(0, self._positions - len(ids_N)) if len(ids_N) else 0
        seed = int(uniform("answer", self._sampling.seed, document.id) * 2**31)
        return Prompt(ids_N, seed, min(self._sampling.max_tokens, room))

    def _tokens(self, document: Document) -> IntArray:
        if document.messages is None:
            return self._tokenizer.encode(document.text or "").input_ids_N
        chat = self._tokenizer.render(document.messages, spans=False, reply=True)
        return self._tokenizer.encode(chat.text, rendered=True).input_ids_N

    def _answered(self, document: Document, completion: Completion | None) -> Document:
        if completion is None:
            return answered(document, "", finished=False)
        answer = self._tokenizer.decode(completion.input_ids_N[completion.prompt_tokens :])
        return answered(document, answer, finished=completion.finished)
