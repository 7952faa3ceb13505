"""Chat templates: the text is transformers', and what is wrong with one is told in a line."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmc import chat_template, tokenizer
from llmc.errors import ConfigError, FileFormatError, MissingDependencyError

pytest.importorskip("jinja2")

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {% endif %}
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
LLAMA3 = (
    "{{ bos_token }}{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if not date %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ 'Today: ' + date }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = """\
{{ bos_token }}
{%- for m in messages %}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- endif %}
  {%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
  {%- else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}
TALK = [
    {"role": "user", "content": " Was ist <b>\"1 & 1\"</b>? 日本 \n"},
    {"role": "assistant", "content": "Two.\n"},
    {"role": "user", "content": "{{ not a template }} {% nor this %}"},
]
TOOLS = [{"name": "f<", "says": "ä & \"b\""}]


def folder(path: Path, **config: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return path


def judge(template: str) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(tmp_path: Path, kind: str, prompt: bool) -> None:
    template = chat_template.load(folder(tmp_path, chat_template=TEMPLATES[kind]))
    assert template is not None
    variables: dict[str, Any] = {"date": "1 May"} if kind == "llama3" else {}
    tools = TOOLS if kind == "llama3" else None
    expected = judge(TEMPLATES[kind]).apply_chat_template(
        TALK, tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
    )
    assert template.render(TALK, add_generation_prompt=prompt, tools=tools, **variables) == expected
    assert "Was ist <b>\"1 & 1\"</b>? 日本" in expected and "{{ not a template }} {% nor this %}" in expected


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    """Text and ids of a conversation, by both; the special tokens' roles are read from what it wrote."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = tokenizers.decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator(["Be brief. What is one and one? Two."], trainer)
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="<|im_end|>")
    other.chat_template = CHATML
    other.save_pretrained(tmp_path)
    ours, template = tokenizer.load(tmp_path), chat_template.load(tmp_path)
    assert template is not None
    ids = ours.encode_special(template.render(TALK, add_generation_prompt=True))
    assert ids == other.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids[0] == 2 and ids.count(2) == len(TALK) + 2 and ids.count(3) == len(TALK) + 1
    assert (ours.special, ours.add_bos) == ((0, (3,)), False)
    assert ours.decode(ids) == other.decode(ids, clean_up_tokenization_spaces=False)


def test_the_day_is_today_s(tmp_path: Path) -> None:
    template = chat_template.ChatTemplate("{{ strftime_now('%Y') }}", tmp_path)
    assert template.render([]) in {str(datetime.date.today().year + n) for n in (-1, 0, 1)}


def test_where_a_folder_keeps_its_template(tmp_path: Path) -> None:
    """None; a string; several by name; and a file of its own, which goes before the field."""
    assert chat_template.load(folder(tmp_path)) is None
    (tmp_path / "empty").mkdir()
    assert chat_template.load(tmp_path / "empty") is None
    folder(tmp_path, chat_template=[{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    found = [chat_template.load(tmp_path, name) for name in ("default", "tool_use")]
    assert [made.render([]) for made in found if made] == ["a", "b"]
    with pytest.raises(ConfigError, match="default, tool_use, not 'rag'"):
        chat_template.load(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}ü", encoding="utf-8")
    made = chat_template.load(tmp_path)
    assert made is not None and made.render([]) == "</s>ü"
    assert made.path == tmp_path / "chat_template.jinja"


def test_special_tokens_of_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}|{{ eos_token }}"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": {"content": "<e>"}}))
    made = chat_template.load(tmp_path)
    assert made is not None and made.render([]) == "<b>|<e>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", r"tokenizer_config\.json: chat_template, line 2: Expected an expression"),
        ("{{ 'x' }", r"tokenizer_config\.json: chat_template, line 1: "),
        ("{% include 'x' %}", r"tokenizer_config\.json: chat_template, line 1: TypeError: no loader"),
        ("a\n{{ 1 / 0 }}", r"tokenizer_config\.json: chat_template, line 2: ZeroDivisionError: "),
        ("{{ messages[7].role }}", r"tokenizer_config\.json: chat_template, line 1: UndefinedError: "),
        # The sandbox: neither what lies behind an object, nor a change to what was given, nor endless loops.
        ("{{ messages.__class__.__mro__ }}", r"chat_template, line 1: SecurityError: "),
        ("{{ messages.append(1) }}", r"chat_template, line 1: SecurityError: "),
        ("{% for i in range(10000000) %}{% endfor %}", r"chat_template, line 1: OverflowError: "),
    ],
)  # fmt: skip
def test_templates_that_fail(tmp_path: Path, template: str, message: str) -> None:
    folder(tmp_path, chat_template=template)
    with pytest.raises(FileFormatError, match=message) as caught:
        made = chat_template.load(tmp_path)
        assert made is not None
        made.render(TALK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (MISTRAL, TALK[1:], r"messages: the chat template in .*_config\.json refuses them: roles must alternate"),
        (GEMMA, [{"role": "system", "content": ""}], "no system role"),
        (GEMMA, [TALK[0], {"content": "x"}], "messages: message 1 has no role"),
        (GEMMA, ["x"], "messages: message 0 has no role"),
    ],
)
def test_messages_that_are_refused(tmp_path: Path, template: str, messages: Any, message: str) -> None:
    made = chat_template.load(folder(tmp_path, chat_template=template))
    assert made is not None
    with pytest.raises(ConfigError, match=message):
        made.render(messages)


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer_config.json", b'{"chat_template": 1}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "chat_template 0"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "chat_template 0"),
        ("tokenizer_config.json", b'{"bos_token": 1}', "bos_token"),
        ("tokenizer_config.json", b'{"eos_token": {"text": "x"}}', "eos_token"),
        ("tokenizer_config.json", b"{", "JSON"),
        ("tokenizer_config.json", b"[]", "JSON"),
        ("tokenizer_config.json", b"\xff\xff", "JSON"),
        ("special_tokens_map.json", b"[" * 100_000, "JSON"),
        ("special_tokens_map.json", b'{"bos_token": []}', "bos_token"),
        ("chat_template.jinja", b"ab\xff", "byte 2"),
    ],
)
def test_bad_files_are_refused_by_name_and_field(tmp_path: Path, name: str, content: bytes, field: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        chat_template.load(tmp_path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{tmp_path / name}: {field}: ")


def test_without_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="pip install jinja2"):
        chat_template.load(folder(tmp_path, chat_template="x"))
