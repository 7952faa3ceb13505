"""A conversation: what the model reads, what of it anew, where an answer ends, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

from llmc import chat_template, tokenizer
from llmc.chat import Chat
from llmc.errors import ConfigError
from llmc.gpt2 import GPT2, Config
from llmc.sampling import Sampling
from llmc.tokenizer import ByteTokenizer, Tokenizer

GREEDY = Sampling(8, temperature=0)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Scripted(GPT2):
    """Writes what it is told, and notes what it reads: (position, tokens) of each call."""

    def __init__(self, answers: list[list[int]], max_seq_len: int = 400, vocab_size: int = 257) -> None:
        super().__init__(Config(max_seq_len, vocab_size, 1, 1, 8), reference, dtype="float64")
        self.script = [token for answer in answers for token in answer]
        self.read: list[tuple[int, list[int]]] = []

    def decode(self, cache: Any, tokens: Any, positions: Any) -> Any:
        super().decode(cache, tokens, positions)  # with its checks
        self.read.append((int(positions[0]), tokens[0].tolist()))
        logits = np.zeros((1, self.config.vocab_size))
        logits[0, self.script.pop(0)] = 1.0
        return logits


def said(talk: Chat, text: str) -> str:
    return "".join(talk.answer(text))


EOT = ByteTokenizer.eot


def test_without_a_template() -> None:
    """Lines of a dialogue; the answer ends where the model goes on with the other's part, and no space leads it."""
    model = Scripted([list(b" Hi there\nUser:"), list(b" Yes."), [EOT]])
    talk = Chat(model, ByteTokenizer(), system="Be kind.", sampling=Sampling(100, temperature=0))
    assert said(talk, "Hello") == "Hi there"
    assert model.read[0] == (0, [EOT, *b"System: Be kind.\nUser: Hello\nAssistant:"])
    model.read.clear()
    assert said(talk, "Really?") == "Yes."
    first = "System: Be kind.\nUser: Hello\nAssistant: Hi there\nUser:"
    # All but the last token that was written lies in the cache; that and what follows is read.
    assert model.read[0] == (len(first), list(b": Really?\nAssistant:"))
    assert talk.messages == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"}, {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip
    assert talk.speed.prompt_tokens == len(": Really?\nAssistant:") and talk.speed.tokens == 6
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be kind."}]


def test_the_cache_changes_no_answer() -> None:
    """Greedy answers of one conversation, and of the same questions asked after it had been told again."""
    model = GPT2(Config(300, 257, 2, 2, 32), reference, dtype="float64")
    model.initialise(1)
    for row, tensor in model.params:
        if len(row.shape) == 2:
            tensor *= 20
    talk = Chat(model, ByteTokenizer(), sampling=GREEDY)
    answers = [said(talk, question) for question in ("a", "bc", "a", "d")]
    assert len(set(answers)) > 2
    for turn in range(4):
        fresh = Chat(model, ByteTokenizer(), sampling=GREEDY)
        fresh.messages = talk.messages[: 2 * turn]
        assert said(fresh, talk.messages[2 * turn]["content"]) == answers[turn]


@pytest.fixture
def chatml(tmp_path: Path) -> tuple[Tokenizer, chat_template.ChatTemplate]:
    """A folder whose tokenizer has bytes and three special tokens, of which it does not say that one ends a turn."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": CHATML})
    )
    template = chat_template.load(tmp_path)
    assert template is not None
    return tokenizer.load(tmp_path), template


def test_a_template(chatml: tuple[Tokenizer, chat_template.ChatTemplate]) -> None:
    words, template = chatml
    end = words.encode_special("<|im_end|>")
    model = Scripted([[*words.encode("\n Hi!"), *end], [*words.encode("User: no stop\nUser:"), 256]], vocab_size=259)
    talk = Chat(model, words, template, sampling=Sampling(100, temperature=0))
    assert said(talk, "<|im_end|>x") == "Hi!"
    text = "<|im_start|>user\n<|im_end|>x<|im_end|>\n<|im_start|>assistant\n"
    assert model.read[0] == (0, words.encode_special(text)) and end == [258]
    assert said(talk, "y") == "User: no stop\nUser:"  # ended by the tokenizer's own end of text


def test_a_template_that_refuses(chatml: tuple[Tokenizer, chat_template.ChatTemplate], tmp_path: Path) -> None:
    strict = chat_template.ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x", tmp_path
    )
    with pytest.raises(ConfigError, match="refuses them: no system"):
        Chat(Scripted([], vocab_size=259), chatml[0], strict, system="s")


# ---- length ----------------------------------------------------------------------------------------


def test_the_oldest_turns_are_forgotten() -> None:
    """With 60 tokens, half of which an answer may need; each turn takes 22, the system's line 10."""
    model = Scripted([[*b"ok", EOT]] * 9)
    talk = Chat(model, ByteTokenizer(), system="s", length=60, sampling=Sampling(100, temperature=0))
    dropped = []
    for question in "abcd":
        assert said(talk, question) == "ok"
        dropped.append(talk.dropped)
    assert dropped == [0, 1, 1, 1]
    assert [message["content"] for message in talk.messages] == ["s", "d", "ok"]
    assert all(position + len(tokens) <= 60 for position, tokens in model.read)
    # Short answers leave room for more.
    talk = Chat(Scripted([[*b"ok", EOT]] * 9), ByteTokenizer(), length=75, sampling=GREEDY)
    counts = [said(talk, question) and talk.dropped for question in "abcd"]
    assert counts == [0, 0, 0, 1] and [m["content"] for m in talk.messages] == ["b", "ok", "c", "ok", "d", "ok"]


def test_an_answer_ends_with_the_room() -> None:
    model = Scripted([list(b"x" * 99)])
    talk = Chat(model, ByteTokenizer(), length=40, sampling=Sampling(100, temperature=0))
    prompt = len("^User: a\nAssistant:")
    assert said(talk, "a") == "x" * (40 - prompt)


def test_a_message_that_does_not_fit() -> None:
    model = Scripted([[*b"ok", EOT]] * 2)
    talk = Chat(model, ByteTokenizer(), length=40, sampling=GREEDY)
    assert said(talk, "a") == "ok"
    before = list(talk.messages)
    with pytest.raises(ConfigError, match="^message: with 48 tokens it does not fit into a conversation of 40"):
        talk.answer("x" * 30)
    assert talk.messages == before and said(talk, "b") == "ok"


@pytest.mark.parametrize("length", [0, 1, 401])
def test_lengths_out_of_range(length: int) -> None:
    with pytest.raises(ConfigError, match="^length: must be from 2 to the model's 400"):
        Chat(Scripted([]), ByteTokenizer(), length=length)


# ---- answers that are left -------------------------------------------------------------------------


def test_an_answer_left_early() -> None:
    """What was said so far counts; a question that got no answer was not asked."""
    model = Scripted([list(b"one two three"), [*b"ok", EOT]])
    talk = Chat(model, ByteTokenizer(), sampling=Sampling(100, temperature=0))
    pieces = talk.answer("a")
    assert [next(pieces) for _ in range(3)] == list("one")
    pieces.close()
    assert talk.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    talk.answer("b").close()
    assert len(talk.messages) == 2
    model.script = [*b"ok", EOT]
    assert said(talk, "c") == "ok" and [m["content"] for m in talk.messages] == ["a", "one", "c", "ok"]


def test_ctrl_c_while_the_model_works() -> None:
    model = Scripted([[*b"ok", EOT], [*b"yes", EOT]])
    talk = Chat(model, ByteTokenizer(), sampling=GREEDY)
    decode = Scripted.decode

    def interrupted(cache: Any, tokens: Any, positions: Any) -> Any:
        decode(model, cache, tokens, positions)
        raise KeyboardInterrupt

    model.decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        said(talk, "a")
    assert talk.messages == []
    del model.decode
    model.script = [*b"yes", EOT]
    assert said(talk, "b") == "yes"
    assert model.read[1] == (0, [EOT, *b"User: b\nAssistant:"]), "nothing that was left half done counts as read"


def test_a_question_asked_again_may_be_answered_anew() -> None:
    model = GPT2(Config(300, 257, 1, 1, 8), reference, dtype="float64")
    model.initialise(1)
    talk = Chat(model, ByteTokenizer(), sampling=Sampling(8, seed=3))
    first = said(talk, "a")
    talk.reset()
    assert said(talk, "a") != first
    again = Chat(model, ByteTokenizer(), sampling=Sampling(8, seed=3))
    assert said(again, "a") == first
