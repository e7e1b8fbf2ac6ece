"""A tokenizer with fewer tokens: any text can still be told, and what stays is told as before."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.vocabulary.choice import Choice, choose
from multipruner.vocabulary.ids import named_ids, renumbered
from multipruner.vocabulary.kinds import Kind, kind_of
from multipruner.vocabulary.tokenizer import cut_record, serialised, special_ids, tokenizer_of
from tests.support.trained_tokenizers import KINDS, TOKENS, corpus, trained

_TINY = ["a", "b", "c", "d", "ab", "abc", "abcd", "cd", "ba"]
TEXTS = st.one_of(st.text(max_size=60), st.sampled_from(corpus()).map(lambda line: line[:80]))


def cut(name: str, tokens: int | None, rows: list[str]) -> tuple[Any, Any, Choice, Kind]:
    """A dense tokenizer, the smaller one, and what was chosen by these rows."""
    dense = trained(name)
    record = serialised(dense, name)
    kind = kind_of(record, name)
    counts = Counter(one for row in rows for one in dense(row, add_special_tokens=False)["input_ids"])
    choice = choose(kind, counts, special_ids(record), tokens, 1)
    return dense, tokenizer_of(cut_record(record, kind, choice.numbers), dense), choice, kind


@pytest.mark.parametrize("name", KINDS)
@given(text=TEXTS, share=st.floats(0, 1), seed=st.integers(0, 20))
def test_any_text_is_told_and_told_back_as_by_the_dense_tokenizer(
    name: str, text: str, share: float, seed: int
) -> None:
    dense: Any = trained(name)
    kind = kind_of(serialised(dense, name), name)
    least = len(set(kind.alphabet) | {"<unk>", "<s>", "</s>", "<pad>"})
    tokens = least + 4 + int(share * (len(kind.numbers) - least - 4))
    _, smaller, choice, _ = cut(name, tokens, corpus()[seed::21][:20])
    old, new = dense(text)["input_ids"], smaller(text)["input_ids"]
    said = [tokenizer.decode(ids, skip_special_tokens=True) for tokenizer, ids in ((dense, old), (smaller, new))]
    assert said[0] == said[1] and len(choice.ids) <= tokens
    assert new[0] == smaller.bos_token_id == choice.numbers[dense.bos_token_id]
    if set(old) <= set(choice.ids) and name == "unigram":  # the likeliest pieces are the likeliest of fewer, too
        assert new == [choice.numbers[one] for one in old]


@pytest.mark.parametrize("name", KINDS)
def test_all_tokens_change_nothing(name: str) -> None:
    dense, smaller, choice, kind = cut(name, len(trained(name)), corpus()[:5])
    assert choice.ids == tuple(range(len(dense))) and len(kind.numbers) == len(dense)
    for line in corpus()[::7]:
        assert smaller(line)["input_ids"] == dense(line)["input_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_a_token_that_stays_is_reached_as_before(name: str) -> None:
    """What merging passes through stays with it: its own characters still become it."""
    dense, smaller, choice, kind = cut(name, 500 if "sentence" not in name else 600, corpus()[::3])
    models = [Tokenizer.from_str(each.backend_tokenizer.to_str()).model for each in (dense, smaller)]
    names = {number: token for token, number in kind.numbers.items()}
    reached = 0
    for number, old in enumerate(choice.ids):
        before, after = ([one.id for one in model.tokenize(names[old])] for model in models)
        if before == [old]:
            reached += 1
            assert after == [number], names[old]
    assert reached > 0.5 * len(choice.ids)


@pytest.mark.parametrize("name", KINDS)
def test_text_that_was_counted_is_told_in_few_more_tokens(name: str) -> None:
    """Of all that the text has, everything stays: it is told as before."""
    rows = corpus()[:30]
    dense, smaller, choice, _ = cut(name, None, rows)
    assert len(choice.ids) < len(dense) <= TOKENS + 256
    assert choice.seen == len({one for row in rows for one in dense(row, add_special_tokens=False)["input_ids"]})
    for row in rows:
        assert smaller(row)["input_ids"] == [choice.numbers[one] for one in dense(row)["input_ids"]]


def test_the_most_frequent_tokens_stay() -> None:
    """With a token come its parts; a token that does not fit any more makes room for a rarer one that does."""
    record = {
        "model": {
            "type": "BPE", "vocab": {token: number for number, token in enumerate(_TINY)},
            "merges": ["a b", "ab c", "abc d", "c d", "b a"],
        }
    }  # fmt: skip
    kind = kind_of(record, "model")
    names = list(kind.numbers)

    def kept(counts: dict[str, int], tokens: int) -> set[str]:
        found = choose(kind, {kind.numbers[one]: count for one, count in counts.items()}, (), tokens, 1)
        return {names[number] for number in found.ids} - set("abcd")

    assert kept({"abcd": 9, "ba": 3}, 7) == {"ab", "abc", "abcd"}
    assert kept({"abcd": 9, "ba": 3}, 6) == {"ba", "ab"}, "the dense order fills what is left over"
    assert kept({"abcd": 9, "cd": 8, "ba": 3}, 8) == {"ab", "abc", "abcd", "cd"}
    assert kept({"ab": 2000, "c": 1}, 6) == {"ab", "ba"}, "of what the text is made of, nearly"
    with pytest.raises(ConfigError, match="3 tokens are too few: 4 stay"):
        kept({}, 3)
    assert len(choose(kind, {4: 1}, (), 5, 4).ids) == 8, "raised to a multiple"


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedModelError, match="of the kind WordLevel; its vocabulary can be cut for BPE, Unigram"
    ):
        kind_of({"model": {"type": "WordLevel", "vocab": {}}}, "model")


def test_ids_in_settings_are_those_of_the_tokens_that_stay() -> None:
    settings = {
        "bos_token_id": 3, "eos_token_id": [5, 7], "pad_token_id": None, "hidden_size": 5, "sep_token_id": -1,
        "suppress_tokens": [2, 7], "bad_words_ids": [[3, 7], [2, 3], [7]], "nested": {"image_token_id": 9, "list": [5]},
        "sequence_bias": [[[3, 7], 0.5], [[2], 1.0]], "forced_decoder_ids": [[5, 7], [7, 2]],
    }  # fmt: skip
    assert sorted(named_ids(settings)) == [3, 5, 7, 9]
    found = renumbered(settings, {3: 0, 5: 1, 7: 2, 9: 3})
    assert found == {
        "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None, "hidden_size": 5, "sep_token_id": -1,
        "suppress_tokens": [2], "bad_words_ids": [[0, 2], [2]], "nested": {"image_token_id": 3, "list": [5]},
        "sequence_bias": [[[0, 2], 0.5]], "forced_decoder_ids": [[5, 2]],
    }  # fmt: skip
    json.dumps(found)
