"""The Ray actor that hosts a teacher to generate: it answers a batch of prompts and writes the answers to the store."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from actors.generate.generators import Generator, Prompt, open_generator
from actors.replicas.actor import ReplicaActor
from actors.replicas.work import QuarantinedRow, WorkItem, WorkResult
from actors.scoring.score_rows import process_rows
from pipeline.cache import quarantine
from pipeline.cache.storage.store import Store
from pipeline.config import TeacherSpec
from pipeline.config.capture import SamplingSpec
from pipeline.contracts import Completion, Document, IntArray
from pipeline.corpus.answers import PromptBatch, append_answer, prompt_name, write_answers
from pipeline.corpus.prepare import resolve_teacher_model
from pipeline.errors import CorpusError
from pipeline.identity import uniform
from pipeline.models.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The teacher that answers, its sampling, and the cache that holds the answers."""

    cache_uri: str
    teacher: TeacherSpec
    sampling: SamplingSpec
    threads: int
    """CPU threads of the engine."""
    positions: int
    """Tokens of the longest prompt and its answer."""


class GenerationActor(ReplicaActor[Generator]):
    """One replica of a generation pool, one call at a time. Calls may be repeated: a batch is written once."""

    def __init__(self, config: GenerationConfig) -> None:
        super().__init__(config.teacher.name, config.threads)
        self._config = config
        self._store = Store.open(config.cache_uri)
        self._tokenizer: Tokenizer = ByteTokenizer()
        self._positions = config.positions

    def open(self) -> None:
        """Open the engine. Raises ModelError and EngineDead."""
        self._engine = self._exit_on_dead_engine(lambda: self._open(self._open_generator))

    def warm_up(self) -> None:
        """Nothing: the first batch shows the throughput."""

    def generate(self, item: WorkItem, batch: PromptBatch) -> WorkResult:
        """Answer the prompts of a batch and write the answers; with `rows` set, answer these and discard the answers.

        Raises CorpusError, EngineDead and StorageError.
        """
        if item.rows is None and self._store.exists(batch.path):
            return WorkResult(item.item_id)
        excluded = {row.sequence_id for row in item.quarantined}
        prompts = [self._prompt(document, batch.author) for document in batch.prompts[slice(*(item.rows or (None,)))]]
        wanted = [prompt for prompt in prompts if prompt.max_tokens and prompt.sequence_id not in excluded]
        started_s = time.monotonic()
        processed, lost = self._exit_on_dead_engine(
            lambda: process_rows(self._opened.generate, wanted, one_by_one=item.one_by_one)
        )
        engine_s = time.monotonic() - started_s
        tokens = sum(len(completion.input_ids_N) - completion.prompt_tokens for _, completion in processed)
        if item.rows is not None:
            return WorkResult(item.item_id, tokens=tokens, engine_s=engine_s)
        lost = [*item.quarantined, *lost]
        self._write(batch, {prompt.sequence_id: completion for prompt, completion in processed}, lost)
        store_s = time.monotonic() - started_s - engine_s
        return WorkResult(item.item_id, len(processed), tokens, 0, engine_s, store_s, len(lost))

    def close(self) -> None:
        """Close the engine, which frees its memory."""
        if self._engine is not None:
            self._engine.close()

    def _open_generator(self) -> Generator:
        config = self._config
        model = resolve_teacher_model(config.teacher)
        if model is not None:
            self._tokenizer = load_tokenizer(model.path)
            self._positions = min(config.positions, model.positions or sys.maxsize)
        return open_generator(config.teacher, config.sampling, model, self._positions)

    def _write(self, batch: PromptBatch, completions: dict[str, Completion], lost: Sequence[QuarantinedRow]) -> None:
        """Quarantine first, so that a file never lacks an answer without a reason on record."""
        for row in lost:
            quarantine.record(self._store, row.sequence_id, batch.path, row.reason, row.engine_message)
        lost_ids = {row.sequence_id for row in lost}
        names = {prompt_name(document, batch.author): document for document in batch.prompts}
        answers = [
            self._answered(document, completions.get(name), batch.author)
            for name, document in names.items()
            if name not in lost_ids
        ]
        write_answers(self._store, batch.path, answers)

    def _prompt(self, document: Document, author: str) -> Prompt:
        """The document's token ids up to the answer. `max_tokens` is 0 where the prompt fills the context."""
        try:
            ids_N = self._tokens(document)
        except CorpusError as error:
            raise CorpusError(f"corpus document {document.id!r}: {error}") from error
        sampling = self._config.sampling
        free = max(0, self._positions - len(ids_N)) if len(ids_N) else 0
        seed = int(uniform("answer", sampling.seed, document.id) * 2**31)
        return Prompt(prompt_name(document, author), ids_N, seed, min(sampling.max_tokens, free))

    def _tokens(self, document: Document) -> IntArray:
        if document.messages is None:
            return self._tokenizer.encode(document.text or "").input_ids_N
        chat = self._tokenizer.render(document.messages, spans=False, add_generation_prompt=True)
        return self._tokenizer.encode(chat.text, rendered=True).input_ids_N

    def _answered(self, document: Document, completion: Completion | None, author: str) -> Document:
        if completion is None:
            return append_answer(document, "", author, finished=False)
        answer = self._tokenizer.decode(completion.input_ids_N[completion.prompt_tokens :])
        return append_answer(document, answer, author, finished=completion.finished)
