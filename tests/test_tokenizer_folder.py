"""Tokenizers of Hugging Face folders, trained here on a few lines: text and ids as the packages have them, text
streamed id by id, special tokens, and files that are not what they should be."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc import tokenizer
from llmc.errors import ConfigError, FileFormatError, LlmcError, MissingDependencyError

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

LINES = [
    "Once upon a time, there was a little dog.\n",
    "  Two spaces, and then a tab:\t12 + 345 = 357!\n\n",
    "It said: \"Hello, world\" and went home; the dog didn't.\n",
    "Größe, café, naïve. 日本語のテキスト 🙂 🙃\n",
] * 8
TEXTS = [
    "", "a", " ", "  ", "\n", " dog", "  dog  and\n\n cat ", "Once upon a time", "日本語 テキスト🙂", "👩‍👩‍👧 ﷽ ⁉️",
    "tab\tand\r\nnewline \n", "x\u2581y", "Ünseen: ŵ λ 中", "a\x00b", "<0x0A>", "12345 + 6",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# ---- vocabularies ----------------------------------------------------------------------------------


def byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen: bytes in an alphabet of their own."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    made.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    return made


def llama3() -> Any:
    """As Llama 3 and Qwen cut text into words."""
    made, pre_tokenizers = byte_level(), tokenizers.pre_tokenizers
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    cut = pre_tokenizers.Split(tokenizers.Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    return made


def fallback(prefix: Any, pre_tokenizer: Any, decoder: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<unk>", "<s>", "</s>", *BYTES], limit_alphabet=60, show_progress=False
    )
    # Metaspace only while training: the pieces' words are divided as sentencepiece does it.
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.normalizer = None
    made.train_from_iterator(LINES, trainer)
    made.normalizer, made.pre_tokenizer, made.decoder = prefix, pre_tokenizer, decoder
    # The trainer makes special tokens of the bytes, which in a model's file are ordinary ones.
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def llama2() -> Any:
    """As Llama 2's and Mistral's file: a space in front of any text, and no cutting into words."""
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    return fallback(
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        None,
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def gemma() -> Any:
    """As Gemma's: no space in front."""
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    return fallback(
        normalizers.Replace(" ", "\u2581"),
        None,
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def metaspace(scheme: str) -> Callable[[], Any]:
    """As newer files of Llama 2's kind."""

    def make() -> Any:
        decoders = tokenizers.decoders
        space = {"replacement": "\u2581", "prepend_scheme": scheme}
        return fallback(
            None,
            tokenizers.pre_tokenizers.Metaspace(split=False, **space),
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**space)]),
        )

    return make


def sentencepiece_model(kind: str = "unigram", **options: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, model_type=kind, vocab_size=400, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
        **{"remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    return written.getvalue()


JSON = {
    "byte-level": byte_level, "llama3": llama3, "llama2": llama2, "gemma": gemma,
    "metaspace-first": metaspace("first"), "metaspace-always": metaspace("always"),
    "metaspace-never": metaspace("never"),
}  # fmt: skip
MODELS = {
    "unigram": {}, "bpe": {"kind": "bpe"}, "no-prefix": {"add_dummy_prefix": False},
    "gemma-model": {"kind": "bpe", "user_defined_symbols": ["<turn>", "\u2581\u2581"], "add_dummy_prefix": False},
}  # fmt: skip
CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each vocabulary."""
    made = {}
    for kind in (*JSON, *MODELS):
        made[kind] = tmp_path_factory.mktemp(kind)
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        if kind in JSON:
            JSON[kind]().save(str(made[kind] / "tokenizer.json"))
        else:
            (made[kind] / "tokenizer.model").write_bytes(sentencepiece_model(**MODELS[kind]))
    return made


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, tokenizer.Tokenizer]:
    return {kind: tokenizer.load(folder) for kind, folder in folders.items()}


def streamed(t: tokenizer.Tokenizer, ids: list[int], start: bool = True) -> str:
    """Text as it appears while a model writes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(t.decode_bytes([i], start=start and n == 0)) for n, i in enumerate(ids)]
    return "".join([*pieces, decoder.decode(b"", final=True)])


# ---- text and ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*JSON, *MODELS])
def test_round_trips_whole_and_streamed(folders: dict[str, Path], kind: str) -> None:
    t = tokenizer.load(folders[kind])
    for text in TEXTS:
        ids = t.encode(text)
        if text.startswith(" ") and kind in ("metaspace-first", "metaspace-always"):
            continue  # a space is put in front only where there is none: afterwards nobody can tell
        expected = text.replace("\u2581", " ") if kind not in ("byte-level", "llama3") else text
        assert t.decode(ids) == expected
        assert t.decode_bytes(ids, start=True) == expected.encode()
        assert streamed(t, ids) == expected
        assert t.encode_batch([text, "a", text]) == [ids, t.encode("a"), ids]


@pytest.mark.parametrize("kind", JSON)
def test_json_decodes_as_transformers(folders: dict[str, Path], kind: str) -> None:
    judge = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    t = tokenizer.load(folders[kind])

    def judged(ids: list[int]) -> str:
        return judge.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for text in TEXTS:
        ids = t.encode(text)
        assert ids == judge.encode(text, add_special_tokens=False)
        assert t.decode(ids) == streamed(t, ids) == judged(ids)
    # Any ids at all, special ones too; the byte tokens alone are left to the texts: of bytes that are not UTF-8 the
    # package makes another number of U+FFFD.
    plain = [i for i in range(t.vocab_size) if judge.convert_ids_to_tokens(i) not in BYTES]
    draw = random.Random(0)
    for _ in range(200):
        ids = draw.choices(plain, k=draw.randrange(1, 8))
        assert t.decode(ids) == streamed(t, ids) == judged(ids), ids


@pytest.mark.parametrize("kind", MODELS)
def test_models_decode_as_sentencepiece(folders: dict[str, Path], kind: str) -> None:
    judge = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
    t = tokenizer.load(folders[kind])
    assert t.vocab_size == judge.vocab_size()
    for text in TEXTS:
        assert t.encode(text) == judge.encode(text)
    pieces = [i for i in range(t.vocab_size) if not (judge.is_byte(i) or judge.is_control(i) or judge.is_unknown(i))]
    draw = random.Random(0)
    for _ in range(200):
        ids = draw.choices(pieces, k=draw.randrange(1, 8))
        assert t.decode(ids) == streamed(t, ids) == judge.decode(ids), ids


def test_an_added_token_is_its_own_text(tmp_path: Path) -> None:
    """The package takes the letters of one for its alphabet of bytes.  And text is not cut where one may lie."""
    made = byte_level()
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("üé", "x y")])
    made.save(str(tmp_path / "tokenizer.json"))
    t = tokenizer.load(tmp_path)
    ids = t.encode("x    yüéx yz")
    assert len(ids) == 6 and t.decode(ids) == streamed(t, ids) == "x    yüéx yz"
    assert t.breaks == ""


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_comes_back(loaded: dict[str, tokenizer.Tokenizer], text: str) -> None:
    for kind in ("byte-level", "gemma", "llama2", "unigram"):
        t = loaded[kind]
        expected = text if kind == "byte-level" else text.replace("\u2581", " ")
        ids = t.encode(text)
        assert t.decode(ids) == streamed(t, ids) == expected


WORDS = ["Once", " ", "  ", "\n", "\t", " upon", "日本", "🙂", "'t", "12", "!", "<s>"]


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=12), data=st.data())
def test_tokens_of_parts_are_those_of_the_whole(
    loaded: dict[str, tokenizer.Tokenizer], words: list[str], data: st.DataObject
) -> None:
    """Cut anywhere that `breaks` allows."""
    text = "".join(words)
    for kind, t in loaded.items():
        assert t.breaks == " "
        places = [n for n in range(1, len(text)) if text[n] == " " and not text[n - 1].isspace()]
        cuts = [0, *sorted(data.draw(st.sets(st.sampled_from(places)))), len(text)] if places else [0, len(text)]
        first, *others = [text[a:b] for a, b in itertools.pairwise(cuts)]
        ids = [t.encode(first), *t.encode_batch(others, continued=True)]
        assert list(itertools.chain(*ids)) == t.encode(text), (kind, first, others)


@pytest.mark.parametrize("kind", [*JSON, *MODELS])
def test_text_that_goes_on_gets_nothing_in_front(loaded: dict[str, tokenizer.Tokenizer], kind: str) -> None:
    found = loaded[kind].encode_batch(["dog", " dog", "", "<s>"], continued=True)
    assert [loaded[kind].decode_bytes(ids) for ids in found] == [b"dog", b" dog", b"", b"<s>"]
    assert loaded[kind].special.bos not in found[3]


def test_text_with_half_a_character(folders: dict[str, Path]) -> None:
    for kind in ("byte-level", "unigram"):
        t = tokenizer.load(folders[kind])
        for encode in (t.encode, t.encode_special, lambda text, t=t: t.encode_batch([text])):
            with pytest.raises(ConfigError, match="text: character 1 is a lone surrogate"):
                encode("a\ud800")


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
@pytest.mark.parametrize("wrong", [-1, 2**40, None])
def test_ids_out_of_range(folders: dict[str, Path], kind: str, wrong: int | None) -> None:
    t = tokenizer.load(folders[kind])
    wrong = t.vocab_size if wrong is None else wrong
    with pytest.raises(ConfigError, match=f"id {wrong} at position 1 is not one of"):
        t.decode([0, wrong])


@pytest.mark.parametrize("kind", ["llama", "llama, not legacy", "gemma", "qwen"])
def test_transformers_own_kinds(tmp_path: Path, kind: str) -> None:
    """Files as its classes for the architectures write them."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("these classes are made of a vocabulary from transformers 5 on")
    pieces = ["\u2581", "a", "b", "\u2581a", "\u2581b", "ab", "\u2581\u2581"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581", "\u2581")]
    if kind == "qwen":
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        names, make = [*sorted(alphabet), "\u0120a", "<|endoftext|>"], transformers.Qwen2Tokenizer
        merges, options = [("\u0120", "a")], {}
    elif kind == "gemma":
        names, make = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, *pieces], transformers.GemmaTokenizer
        options = {}
    else:
        names, make = ["<unk>", "<s>", "</s>", *BYTES, *pieces], transformers.LlamaTokenizer
        options = {"legacy": kind == "llama"}
    judge = make(vocab={name: n for n, name in enumerate(names)}, merges=merges, **options)
    judge.save_pretrained(tmp_path)
    t = tokenizer.load(tmp_path)
    assert t.special == (judge.bos_token_id, (judge.eos_token_id,))
    for text in [*TEXTS, f"{judge.eos_token}ab {judge.eos_token} a"]:
        ids = t.encode_special(text)
        assert ids == judge.encode(text, add_special_tokens=False)
        assert t.decode(ids) == streamed(t, ids) == judge.decode(ids, clean_up_tokenization_spaces=False)


# ---- special tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*JSON, "unigram", "bpe"])
def test_names_of_special_tokens(folders: dict[str, Path], kind: str) -> None:
    """Text like any other, unless they are to count; then as transformers has it."""
    t = tokenizer.load(folders[kind])
    bos, (eos,) = t.special
    text = "<s>Once</s> upon<s><s>"
    plain, special = t.encode(text), t.encode_special(text)
    assert not {bos, eos} & set(plain)
    assert t.decode(plain) == text
    assert [i for i in special if i in (bos, eos)] == [bos, eos, bos, bos]
    assert t.decode([bos, eos]) == "<s></s>"
    if kind in JSON:
        judge = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
        assert special == judge.encode(text, add_special_tokens=False)
    else:
        judge = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
        assert special == [bos, *judge.encode("Once"), eos, *judge.encode(" upon"), bos, bos]


def test_what_sentencepiece_calls_user_defined_counts_everywhere(folders: dict[str, Path]) -> None:
    t = tokenizer.load(folders["gemma-model"])
    turn = t.encode("<turn>")
    assert len(turn) == 1 and t.decode(turn) == "<turn>"
    assert t.encode("a<turn>  b") == t.encode_special("a<turn>  b")
    assert streamed(t, t.encode("a<turn>   b")) == "a<turn>   b"


def copy(source: Path, to: Path, **files: Any) -> Path:
    """A folder's tokenizer, with other files of JSON beside it."""
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (to / f"{name}.json").write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("files", "bos", "eos", "add_bos", "eot"),
    [
        ({}, "<s>", ["</s>"], False, "</s>"),
        ({"tokenizer_config": {}}, None, [], False, None),
        ({"tokenizer_config": CONFIG | {"add_bos_token": True}}, "<s>", ["</s>"], True, "<s>"),
        ({"tokenizer_config": {"add_bos_token": True, "eos_token": "</s>"}}, None, ["</s>"], False, "</s>"),
        (
            {"tokenizer_config": {}, "special_tokens_map": {"eos_token": {"content": "<s>"}}},
            None, ["<s>"], False, "<s>",
        ),
        ({"special_tokens_map": {"eos_token": "<s>"}}, "<s>", ["</s>"], False, "</s>"),
        ({"config": {"bos_token_id": 2, "eos_token_id": 2}}, "<s>", ["</s>", "<|im_end|>"], False, "</s>"),
        (
            {"tokenizer_config": {}, "config": {"bos_token_id": 2, "eos_token_id": 1}},
            "<|im_end|>", ["</s>"], False, "</s>",
        ),
        (
            {"generation_config": {"eos_token_id": [2, 1]}, "config": {"eos_token_id": 0}},
            "<s>", ["</s>", "<|im_end|>"], False, "</s>",
        ),
        # A model's default ids, when the vocabulary is smaller.
        ({"config": {"bos_token_id": 100000, "eos_token_id": [100001]}}, "<s>", ["</s>"], False, "</s>"),
    ],
)  # fmt: skip
def test_roles_from_the_folder_s_files(
    folders: dict[str, Path], tmp_path: Path, files: Any, bos: str | None, eos: list[str], add_bos: bool,
    eot: str | None,
) -> None:  # fmt: skip
    t = tokenizer.load(copy(folders["byte-level"], tmp_path, **files))
    names = ["<s>", "</s>", "<|im_end|>"]
    assert t.special == (None if bos is None else names.index(bos), tuple(names.index(name) for name in eos))
    assert t.add_bos is add_bos
    if eot is None:
        with pytest.raises(ConfigError, match="names no token that ends a text"):
            t.eot  # noqa: B018
    else:
        assert t.eot == names.index(eot)


@pytest.mark.parametrize("given_bos", [None, False])
def test_bos_from_what_the_file_puts_in_front(folders: dict[str, Path], tmp_path: Path, given_bos: bool | None) -> None:
    """As Llama 3's file, whose tokenizer_config.json does not say; where it does, that counts."""
    made = tokenizers.Tokenizer.from_file(str(folders["byte-level"] / "tokenizer.json"))
    processors = tokenizers.processors
    template = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B", [("<s>", 0), ("</s>", 1)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    made.enable_truncation(2)
    made.enable_padding()
    made.save(str(tmp_path / "tokenizer.json"))
    if given_bos is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": given_bos}))
    t = tokenizer.load(tmp_path)
    assert (t.special, t.add_bos) == ((0, ()), given_bos is None)
    text = "It went home; the dog didn't."  # and is not cut off, as the file asks
    assert t.decode(t.encode(text)) == text
    assert [t.decode(ids) for ids in t.encode_batch([text, "a"])] == [text, "a"]


def test_roles_of_a_model_without_other_files(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((folders["unigram"] / "tokenizer.model").read_bytes())
    t = tokenizer.load(tmp_path)
    assert (t.special, t.add_bos, t.eot, t.name, t.files()) == ((1, (2,)), True, 1, str(tmp_path), [path])
    path.write_bytes(sentencepiece_model(bos_id=-1, eos_id=-1))
    t = tokenizer.load(tmp_path)
    assert (t.special, t.add_bos) == ((None, ()), False)
    with pytest.raises(ConfigError, match="names no token"):
        t.eot  # noqa: B018


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_added_to_a_model_later(folders: dict[str, Path], tmp_path: Path, legacy: bool) -> None:
    """<|im_end|> counts where special tokens do, <tool> everywhere; after them a space is put in front, or not."""
    size = tokenizer.load(folders["unigram"]).vocab_size
    end, tool = size, size + 2
    added = {str(end): {"content": "<|im_end|>", "special": True}, str(tool): {"content": "<tool>", "special": False}}
    added[str(size + 1)] = {"content": "<tool>s", "special": False}  # the longer name first
    config = {"added_tokens_decoder": added, "add_bos_token": False, "legacy": legacy}
    config |= {"bos_token": "</s>", "eos_token": "<|im_end|>"}
    t = tokenizer.load(copy(folders["unigram"], tmp_path, tokenizer_config=config))
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (t.vocab_size, t.special, t.add_bos, t.eot) == (size + 3, (2, (end,)), False, end)
    dog = judge.encode("dog") if legacy else judge.encode("xdog")[len(judge.encode("x")) :]
    assert t.decode(dog) == "dog"
    assert t.encode("a<tool>dog") == [*judge.encode("a"), tool, *dog]
    assert t.encode_special("a<|im_end|>dog<tool>") == [*judge.encode("a"), end, *dog, tool]
    assert end not in t.encode("a<|im_end|>dog")
    assert t.encode_batch(["a<tool>"]) == [t.encode("a<tool>")]
    assert t.encode("<tool>s<tool>") == [size + 1, tool]
    assert t.decode([tool, end]) == "<tool><|im_end|>"
    del added[str(size + 1)]  # an id that nobody took has no text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.load(tmp_path).decode([tool, size + 1]) == "<tool>"


# ---- loading ---------------------------------------------------------------------------------------


def test_what_load_takes(folders: dict[str, Path], tmp_path: Path) -> None:
    """tokenizer.json, else tokenizer.model, else llmc's own; or a file of any of these kinds."""
    json_file = folders["byte-level"] / "tokenizer.json"
    t = tokenizer.load(json_file)
    assert t.name == str(folders["byte-level"]) and t.encode("dog") == tokenizer.load(t.name).encode("dog")
    tokenizer.write_tokenizer_file(tmp_path / "tokenizer.bin", [b"a", b"b"], 1)
    assert isinstance(tokenizer.load(tmp_path), tokenizer.TokenizerFile)
    (tmp_path / "tokenizer.bin").rename(tmp_path / "mine.bin")
    for name, expected in (("bytes", "bytes"), ("mine.bin", str(tmp_path / "mine.bin"))):
        (tmp_path / "config.json").write_text(json.dumps({"llmc_tokenizer": name}))
        assert tokenizer.load(tmp_path).name == expected
    (tmp_path / "tokenizer.model").write_bytes((folders["bpe"] / "tokenizer.model").read_bytes())
    assert isinstance(tokenizer.load(tmp_path), tokenizer.SentencePieceTokenizer)
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    assert isinstance(tokenizer.load(tmp_path), tokenizer.HuggingFaceTokenizer)
    (tmp_path / "other.json").write_bytes(json_file.read_bytes())
    assert tokenizer.load(tmp_path / "other.json").name == str(tmp_path / "other.json")
    (tmp_path / "other.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert tokenizer.load(tmp_path / "other.model").name == str(tmp_path / "other.model")


def test_files_to_copy_make_the_tokenizer_again(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("byte-level", "unigram"):
        (tmp_path / kind).mkdir()
        t = tokenizer.load(
            copy(folders[kind], tmp_path / kind, generation_config={"eos_token_id": 0}, unrelated={}, config={})
        )
        (tmp_path / f"{kind} copied").mkdir()
        for path in t.files():
            (tmp_path / f"{kind} copied" / path.name).write_bytes(path.read_bytes())
        names = sorted(path.name for path in t.files())
        file = "tokenizer.json" if kind == "byte-level" else "tokenizer.model"
        assert names == ["generation_config.json", file, "tokenizer_config.json"]
        again = tokenizer.load(tmp_path / f"{kind} copied")
        assert (again.special, again.encode("dog")) == (t.special, t.encode("dog"))
    assert tokenizer.load("bytes").files() == []


def test_a_vocabulary_larger_than_the_model_s(folders: dict[str, Path]) -> None:
    for kind, file in (("byte-level", "tokenizer.json"), ("bpe", "tokenizer.model")):
        size = tokenizer.load(folders[kind]).vocab_size
        assert tokenizer.load(folders[kind], vocab_size=size).vocab_size == size
        message = rf"{file}: vocabulary: {size} ids are more than the {size - 1} that the model knows"
        with pytest.raises(FileFormatError, match=message):
            tokenizer.load(folders[kind], vocab_size=size - 1)
    with pytest.raises(ConfigError, match="tokenizer: bytes: 257 ids are more than the 256"):
        tokenizer.load("bytes", vocab_size=256)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has neither tokenizer\.json, tokenizer\.model nor tokenizer\.bin"):
        tokenizer.load(tmp_path)
    (tmp_path / "model").mkdir()
    tokenizer.write_tokenizer_file(tmp_path / "mine.bin", [b"a"], 0)
    for name in ("../mine.bin", "none.bin", 5):
        (tmp_path / "model" / "config.json").write_text(json.dumps({"llmc_tokenizer": name}))
        with pytest.raises(FileFormatError, match=r"config\.json: llmc_tokenizer: .* nor a file in this folder"):
            tokenizer.load(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer.model"):
        with pytest.raises(ConfigError, match="is neither bytes, gpt2 nor a tokenizer file or folder"):
            tokenizer.load(tmp_path / name)


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_without_the_package(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        tokenizer.load(folders["byte-level" if package == "tokenizers" else "unigram"])


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda spec: spec | changes


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (changed(model=None), "model"),
        (changed(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), "model"),
        (changed(model={"type": "Nonsense"}), "tokenizer"),
        (changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}), "tokenizer"),
        (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}), "tokenizer"),
        (changed(decoder=None), "decoder"),
        (changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder"),
        (changed(decoder={"type": "Sequence", "decoders": [{"type": "CTC", "pad_token": "", "word_delimiter_token": "",
                                                           "cleanup": True}]}), "decoder"),
        (changed(decoder={"type": "Strip", "content": " ", "start": 1, "stop": 0}), "decoder"),
        (changed(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ",
                                                                             "start": 0, "stop": 1}]}), "decoder"),
        (changed(decoder={"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}), "decoder"),
        (lambda spec: [spec], "model"),
        (lambda spec: {}, "model"),
    ],
)  # fmt: skip
def test_bad_json_is_refused_by_name_and_field(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], Any], field: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads((folders["byte-level"] / "tokenizer.json").read_text()))))
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}: {field}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: JSON: "):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("tokenizer_config", {"eos_token": "<none>"}, "eos_token"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token"),
        ("tokenizer_config", {"legacy": 1}, "legacy"),
        ("tokenizer_config", {"added_tokens_decoder": []}, ""),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: x"),
        ("tokenizer_config", {"added_tokens_decoder": {"7": {}}}, "added_tokens_decoder: 7"),
        ("special_tokens_map", {"bos_token": "<none>"}, "bos_token"),
        ("added_tokens", {"<x>": "7"}, "<x>"),
        ("added_tokens", {"<x>": -1}, "<x>"),
        ("generation_config", {"eos_token_id": "2"}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [2, True]}, "eos_token_id"),
        ("config", {"bos_token_id": -1}, "bos_token_id"),
    ],
)
@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_bad_companions_are_refused_by_name_and_field(
    folders: dict[str, Path], tmp_path: Path, kind: str, file: str, content: Any, field: str
) -> None:
    copy(folders[kind], tmp_path, **({"tokenizer_config": {}} | {file: content}))
    if not field:  # empty is as good as absent
        tokenizer.load(tmp_path)
        return
    with pytest.raises(FileFormatError) as caught:
        tokenizer.load(tmp_path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{tmp_path / file}.json: {field}: ")


def damaged(good: bytes) -> Iterator[bytes]:
    draw = random.Random(0)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        yield bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])


@pytest.mark.parametrize("kind", ["llama2", "unigram"])
def test_damaged_files_give_an_answer_or_a_typed_error(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    file = "tokenizer.json" if kind == "llama2" else "tokenizer.model"
    refused = 0
    for data in damaged((folders[kind] / file).read_bytes()):
        (tmp_path / file).write_bytes(data)
        try:
            t = tokenizer.load(tmp_path)
            t.decode(range(t.vocab_size))
        except LlmcError:
            refused += 1
    assert refused > 20
