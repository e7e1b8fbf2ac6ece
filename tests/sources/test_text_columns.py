"""Which columns are the text, told by what they hold; conversations and pairs; and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from multipruner.core.errors import CalibrationError
from multipruner.sources.rows import rows_of
from multipruner.sources.text.chat import Chat, messages_of
from multipruner.sources.text.words import has_words, is_prose
from tests.support.tiny import tiny_tokenizer

PROSE = [f"The {word} was seen near the river on day {n}." for n, word in enumerate(["fox", "owl", "bear", "cat"] * 5)]
CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
)


def write(folder: Path, **columns: Any) -> str:
    path = folder / "rows.jsonl"
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(*roles: str, key: str = "role", content: str = "content") -> list[list[dict[str, str]]]:
    return [[{key: role, content: f"{role} says {line}"} for role in roles] for line in PROSE]


def templated(template: Any = CHATML) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "column",
    [
        [f"{random.Random(n).getrandbits(128):032x}" for n in range(20)],
        [f"550e8400-e29b-41d4-a716-4466554400{n}" for n in range(10, 30)],
        [f"https://example.org/articles/{n}?lang=en" for n in range(20)],
        [f"{n}.5" for n in range(20)],
        [f"2024-01-{n + 1:02} 10:00:00" for n in range(20)],
        ["positive", "negative"] * 10,
        list(range(20)),
        [None] * 20,
    ],
    ids=["hashes", "uuids", "addresses", "numbers", "dates", "labels", "integers", "nothing"],
)
def test_what_is_no_text_is_left_alone(column: list[Any], tmp_path: Path) -> None:
    assert rows_of(write(tmp_path, id=column, body=PROSE), None, 1, 16).columns == ("body",)
    with pytest.raises(CalibrationError, match=r"no column that is clearly the text; .*--text-column"):
        rows_of(write(tmp_path, id=column), None, 1, 16)
    if isinstance(column[0], str) and column[0] != "positive":
        for named, source in (("id", write(tmp_path, id=column, body=PROSE)), (None, write(tmp_path, text=column))):
            with pytest.raises(CalibrationError, match=r"columns with text: (body|none)"):
                rows_of(source, named, 1, 16)


@pytest.mark.parametrize(
    ("values", "prose", "words"),
    [
        (["Er geht nach Hause."], True, True),
        (["彼は家に帰りました。"], True, True),
        (["он идёт домой"], True, True),
        (["คนไทยกลับบ้าน"], True, True),
        (["river"], False, True),
        (["w4 w5 w6"], True, True),
        (["deadbeef00 cafebabe11"], False, False),
        (["12 13 14", "3.5"], False, False),
        (["x" * 41], False, False),
        ([" ", ""], False, False),
    ],
)
def test_words_of_many_scripts(values: list[str], prose: bool, words: bool) -> None:
    assert (is_prose(values), has_words(values)) == (prose, words)


def test_several_columns_of_text_are_listed(tmp_path: Path) -> None:
    source = write(tmp_path, title=PROSE, body=PROSE[::-1], id=list(range(20)))
    with pytest.raises(CalibrationError, match="columns with text: title, body; choose with --text-column"):
        rows_of(source, None, 1, 16)
    assert list(rows_of(source, "body", 1, 16)) == PROSE[::-1]
    with pytest.raises(CalibrationError, match="did you mean 'body'"):
        rows_of(source, "bodi", 1, 16)


def test_a_lone_text_beside_lists_is_not_taken(tmp_path: Path) -> None:
    source = write(tmp_path, title=PROSE, paragraphs=[[line, line] for line in PROSE])
    with pytest.raises(CalibrationError, match=r"lists or objects: paragraphs\); columns with text: title; choose"):
        rows_of(source, None, 1, 16)
    assert list(rows_of(source, "title", 1, 16)) == PROSE
    mixed = write(tmp_path, text=[line if n % 5 else n for n, line in enumerate(PROSE)])
    with pytest.raises(CalibrationError, match="numbers among the texts: text"):
        rows_of(mixed, None, 1, 16)


def test_conversations_are_rendered_with_the_models_template(tmp_path: Path) -> None:
    source = write(tmp_path, id=[f"{n}" for n in range(20)], messages=talks("user", "assistant"))
    rows = rows_of(source, None, 1, 16, Chat(templated()))
    assert rows[0] == f"<user>user says {PROSE[0]}</user><assistant>assistant says {PROSE[0]}</assistant>"
    assert rows.columns == ("messages",) and rows.how == "the model's chat template"
    plain = rows_of(source, None, 1, 16, Chat(tiny_tokenizer()))
    assert plain[0] == f"user: user says {PROSE[0]}\n\nassistant: assistant says {PROSE[0]}"
    assert "the tokenizer has no chat template" in plain.line()


def test_sharegpt(tmp_path: Path) -> None:
    source = write(
        tmp_path, id=[f"{n}" for n in range(20)], conversations=talks("human", "gpt", key="from", content="value")
    )
    rows = rows_of(source, None, 1, 16, Chat(templated()))
    assert rows[3] == f"<user>human says {PROSE[3]}</user><assistant>gpt says {PROSE[3]}</assistant>"
    assert rows.columns == ("conversations",)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": PROSE, "completion": ["yes"] * 20}, ("prompt", "completion")),
        ({"question": PROSE, "answer": ["42"] * 20, "id": list(range(20))}, ("question", "answer")),
        ({"instruction": PROSE, "input": [""] * 20, "output": PROSE}, ("instruction", "output")),
        ({"instruction": PROSE, "input": ["it is late"] * 20, "output": PROSE}, ("input", "instruction", "output")),
        ({"system": ["Be brief."] * 20, "prompt": PROSE, "response": PROSE}, ("system", "prompt", "response")),
    ],
)
def test_pairs_are_rendered(columns: dict[str, list[Any]], expected: tuple[str, ...], tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, **columns), None, 1, 16, Chat(templated()))
    assert rows.columns == expected
    asked, answered = columns[expected[-2]][0], columns[expected[-1]][0]
    if "input" in expected:
        asked += "\n\nit is late"
    system = "<system>Be brief.</system>" if "system" in expected else ""
    assert rows[0] == f"{system}<user>{asked}</user><assistant>{answered}</assistant>"


def test_pairs_of_messages_and_a_text_that_is_there_already(tmp_path: Path) -> None:
    source = write(tmp_path, prompt=talks("user"), completion=talks("assistant"))
    rows = rows_of(source, None, 1, 16, Chat(templated()))
    assert rows[0] == f"<user>user says {PROSE[0]}</user><assistant>assistant says {PROSE[0]}</assistant>"
    source = write(tmp_path, text=PROSE, instruction=PROSE[::-1], output=PROSE)
    assert list(rows_of(source, None, 1, 16)) == PROSE, "as Alpaca has it"
    chosen = write(tmp_path, chosen=talks("user"), rejected=talks("user"))
    with pytest.raises(CalibrationError, match="columns with text: chosen, rejected"):
        rows_of(chosen, None, 1, 16)
    assert rows_of(chosen, "chosen", 1, 16).columns == ("chosen",)


def test_a_row_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    rows: list[Any] = talks("user") * 22
    rows[1] = [{"role": "user"}]  # not in the sample
    source = write(tmp_path, messages=rows)
    with pytest.raises(CalibrationError, match=r"row 2 of messages.*is no conversation"):
        rows_of(source, None, 1, 16)


def test_forms_of_messages() -> None:
    said = [{"role": "user", "content": "hello"}]
    assert messages_of([{"role": "user", "content": "hello"}]) == said
    assert messages_of([{"from": "Human", "value": "hello", "weight": None}]) == said
    assert messages_of({"role": ["user"], "content": ["hello"]}) == said
    assert messages_of([{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "image"}]}]) == said
    assert messages_of([*said, {"role": "assistant", "content": None}]) == said
    for other in ("hello", [], [1], [{"a": 1}], {"role": "user"}, [{"role": 1, "content": "x"}], None):
        assert messages_of(other) is None


def test_named_templates(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hello"}]
    (tmp_path / "mine.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    for name in ("mine.jinja", "tokenizer_config.json"):
        chat = Chat(tiny_tokenizer(), str(tmp_path / name))
        assert chat.render(said) == "<user>hello</user>" and name in chat.how
    assert Chat(templated(), "plain").render(said) == "user: hello"
    assert Chat(templated(), "chatml").render(said) == "<|im_start|>user\nhello<|im_end|>\n"
    several = templated({"default": CHATML, "tools": "tools"})
    assert Chat(several).render(said) == "<user>hello</user>" and Chat(several, "tools").render(said) == "tools"
    with pytest.raises(CalibrationError, match=r"no chat template 'vicuna': give a file \(Jinja\), or chatml, plain"):
        Chat(tiny_tokenizer(), "vicuna")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(CalibrationError, match=r"empty\.json"):
        Chat(tiny_tokenizer(), str(tmp_path / "empty.json"))


def test_what_a_template_refuses_is_counted_or_is_an_error(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    source = write(tmp_path, messages=[*talks("user")[:10], *talks("system")[10:]])
    rows = rows_of(source, None, 1, 16, Chat(templated(template)))
    assert (len(rows), rows.refused) == (10, 10) and "10 refused" in rows.line()
    source = write(tmp_path, messages=talks("system"))
    with pytest.raises(CalibrationError, match=r"refuses every row.*no system.*--chat-template"):
        rows_of(source, None, 1, 16, Chat(templated(template)))


def test_repeated_rows_are_counted(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, text=[*PROSE, *PROSE[:5], " "]), None, 1, 16)
    assert (len(rows), rows.found, rows.to_json()["duplicates"]) == (20, 25, 5)
