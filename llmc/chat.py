"""A conversation with a model: what was said, and the cache that goes with it.

    chat = Chat(model, tokenizer, chat_template.load(folder), system="Be brief.")
    for piece in chat.answer("Hello"):
        print(piece, end="")

Every answer is written after the whole conversation as its template renders it.  Of that the cache has the beginning
from the answers before, so only what is new is read in.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

from llmc.chat_template import ChatTemplate
from llmc.errors import ConfigError
from llmc.model import Model
from llmc.sampling import Context, Sampling, Speed, write
from llmc.tokenizer import Tokenizer

LENGTH = 4096  # tokens of a conversation unless it is told otherwise: a cache for a long one may exceed the memory
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}  # where there is no template
NEXT_TURN = f"\n{NAMES['user']}:"  # with which such a model would write the other's part, too

Message = Mapping[str, str]


class Chat:
    """A conversation.

    `messages` are what was said so far, as a template takes them: objects with a "role" and a "content", first the
    system's, if there is one.  Without a template they become lines, "User: ..." and "Assistant: ...".

    `length` is the most tokens that the conversation may have (None: LENGTH, or what the model can look back over, if
    that is less).  Where a question and half of that, or `sampling.max_new_tokens`, do not fit any more, the oldest
    questions are forgotten with their answers; `dropped` is how many were before the last answer.  `speed` is that
    of the last answer.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, system: str = "",
        sampling: Sampling | None = None, length: int | None = None,
    ) -> None:
        most = model.config.max_seq_len
        length = min(most, LENGTH) if length is None else length
        if not 2 <= length <= most:
            raise ConfigError("length", f"must be from 2 to the model's {most}, got {length}")
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        sampling = Sampling(512) if sampling is None else sampling
        ends = dict.fromkeys((*sampling.stop_ids, *tokenizer.special.eos, *self._ends_of_turns()))
        stop = sampling.stop if template is not None else (*sampling.stop, NEXT_TURN)
        self._sampling = replace(sampling, stop_ids=tuple(ends), stop=stop)
        self._context = Context(model, length)
        self.messages: list[Message] = list(self._system)
        self.answers = 0
        self.dropped = 0
        self.speed = Speed()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Generator[str, None, None]:
        """The model's answer to `text`, piece by piece as it is written.

        Whoever leaves the iterator early ends the answer there.  ConfigError, at the call, for a text that does not fit
        even alone, or that the template refuses.
        """
        messages, ids, dropped = self._fit([*self.messages, {"role": "user", "content": text}])
        self.messages, self.dropped, self.speed = messages[:-1], dropped, Speed()
        room = min(self._sampling.max_new_tokens, self._context.cache.length - len(ids))
        # Every answer has a stream of random numbers of its own, so that a question asked again may be answered anew.
        sampling = replace(self._sampling, max_new_tokens=room, seed=self._sampling.seed + self.answers)
        self.answers += 1
        return self._answer(messages, ids, sampling)

    def _answer(self, messages: Sequence[Message], ids: list[int], sampling: Sampling) -> Generator[str, None, None]:
        said: list[str] = []
        complete = False
        try:
            pieces = write(self._model, [ids], sampling, self._tokenizer, context=self._context, speed=self.speed)
            for _, _, text in pieces:
                text = text if said else text.lstrip()
                if text:
                    said.append(text)
                    yield text
            complete = True
        finally:
            if said or complete:  # else the question was taken back
                self.messages = [*messages, {"role": "assistant", "content": "".join(said).rstrip()}]

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int], int]:
        """The messages that fit, their tokens, and how many questions had to go."""
        length = self._context.cache.length
        first, dropped = len(self._system), 0
        ids = self._ids(messages)
        while len(ids) > length - min(self._sampling.max_new_tokens, length // 2):
            following = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
            if not following:
                break
            messages = messages[:first] + messages[following[0] :]
            dropped += 1
            ids = self._ids(messages)
        if len(ids) >= length:
            raise ConfigError("message", f"with {len(ids)} tokens it does not fit into a conversation of {length}")
        return messages, ids, dropped

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return self._tokenizer.encode_special(self._template.render(messages, add_generation_prompt=True))
        lines = [f"{NAMES[message['role']]}: {message['content']}\n" for message in messages]
        bos = [self._tokenizer.special.bos] if self._tokenizer.add_bos else []
        ids = self._tokenizer.encode("".join(lines) + f"{NAMES['assistant']}:")
        return [token for token in bos if token is not None] + ids

    def _ends_of_turns(self) -> list[int]:
        """The special token that the template puts behind an answer: not every folder names it among those that end
        what its model writes."""
        if self._template is None:
            return []
        answer = "The answer."
        asked: list[Message] = [*self._system, {"role": "user", "content": "The question."}]
        text = self._template.render([*asked, {"role": "assistant", "content": answer}])
        rest = text[text.rfind(answer) + len(answer) :] if answer in text else ""
        ordinary = set(self._tokenizer.encode(rest))
        for token in self._tokenizer.encode_special(rest):
            if token not in ordinary:
                return [token]
            if self._tokenizer.decode_bytes([token]).strip():  # more text: there is no token for the end
                break
        return []
