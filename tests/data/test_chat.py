"""Conversations: what the chat template writes is read, the assistant's turns alone are learned from, and what is wrong is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
pytest.importorskip("jinja2")

from transformers import AutoTokenizer

from longtrain import cli
from longtrain.data.built import open_built, read_manifest
from longtrain.data.chat import token_ranges
from longtrain.data.packing import PackedDocuments
from longtrain.span import IGNORE_INDEX

TINY = Path(__file__).parents[2] / "configs" / "tiny_chat"
PROMPT = {"prompt": "What is a span?", "completion": "A range é."}
TURNS = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2 two"},
]}  # fmt: skip
TALK = {"prompt": [*TURNS["messages"][:4]], "completion": [TURNS["messages"][4]]}


@pytest.fixture
def tokenizer(tmp_path):
    """The tiny one, to be changed."""
    return Path(shutil.copytree(TINY, tmp_path / "tokenizer"))


def build(tmp_path, records, tokenizer=TINY, *flags):
    file, text = tmp_path / "chats.jsonl", "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records)
    if not file.exists() or file.read_text() != text:  # a build knows its inputs by when they were written
        file.write_text(text)
    return cli.main(
        ["data", "build", str(tmp_path / "out"), str(tmp_path / "chats.jsonl"), "--format", "chat", "--tokenizer", str(tokenizer), *flags]
    )


def learned(corpus, document):
    """The texts that are learned from, and the whole."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids, target = corpus.tokens(document).tolist(), corpus.is_target(document, 0, int(corpus.length_N[document]))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], target.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2).tolist()], tokenizer.decode(ids)


def test_the_assistant_s_turns_are_learned_from_and_nothing_else(tmp_path):
    assert build(tmp_path, [PROMPT, TURNS, TALK]) == 0
    corpus = open_built(tmp_path / "out")
    assert learned(corpus, 0) == (["A range é.<|end|>\n"], "<|start|>user\nWhat is a span?<|end|>\n<|start|>assistant\nA range é.<|end|>\n")
    turns, whole = learned(corpus, 1)
    assert turns == ["1<|end|>\n", "2 two<|end|>\n"] and whole.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\none?")
    assert learned(corpus, 2) == (["2 two<|end|>\n"], whole)
    expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(TURNS["messages"], return_dict=False)
    assert corpus.tokens(1).tolist() == expected
    assert corpus.name(1).endswith("chats.jsonl:2")


def test_the_last_turn_alone_is_learned_from_where_it_is_asked_for(tmp_path):
    assert build(tmp_path, [TURNS], TINY, "--turns", "last") == 0
    assert learned(open_built(tmp_path / "out"), 0)[0] == ["2 two<|end|>\n"]


def test_a_template_s_own_marks_say_what_the_assistant_wrote(tmp_path, tokenizer):
    (tokenizer / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{- '<|start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}"
        "{{- '<|end|>\\n' }}{%- endfor %}"
    )
    assert build(tmp_path, [TURNS, TALK], tokenizer) == 0
    corpus = open_built(tmp_path / "out")
    assert learned(corpus, 0)[0] == ["1", "2 two"] and learned(corpus, 1)[0] == ["2 two"]


def test_a_turn_that_the_template_marks_in_two_parts_is_learned_whole(tmp_path, tokenizer, capsys):
    (tokenizer / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{- '<|start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{% generation %}{{ m.content[:1] }}"
        "{% endgeneration %}{{- '|' }}{% generation %}{{ m.content[1:] }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}"
        "{{- '<|end|>\\n' }}{%- endfor %}"
    )
    assert build(tmp_path, [PROMPT, TALK], tokenizer) == 3
    assert "chats.jsonl:2 has 2 turns of the assistant, and the template marks 4" in capsys.readouterr().err
    assert learned(open_built(tmp_path / "out"), 0)[0] == ["A", " range é."]


FORGETS = """{%- for m in messages %}{{- '<|start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' and not loop.last %}{{- m.content |
upper }} {%- else %}{{- m.content }}{%- endif %}{{- '<|end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant\\n'
}}{%-
endif %}"""
THINK = {"messages": [{**m, "content": m["content"].replace("1", "one")} for m in TURNS["messages"]]}


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_one_to_learn_from(tmp_path, tokenizer, capsys):
    (tokenizer / "chat_template.jinja").write_text(FORGETS)
    assert build(tmp_path, [THINK, PROMPT], tokenizer) == 3
    error = capsys.readouterr().err
    assert (
        "chats.jsonl:1 has a turn (message 2) that the template writes otherwise when more messages follow; build with --turns last"
        in error
    )
    shutil.rmtree(tmp_path / "out")
    assert build(tmp_path, [THINK, PROMPT], tokenizer, "--turns", "last") == 0
    assert learned(open_built(tmp_path / "out"), 0)[0] == ["2 two<|end|>\n"]


BROKEN = {
    "no object": ("[1]", "is no JSON object"),
    "not JSON": ("{", "is not JSON"),
    "no conversation": ({"text": "a"}, "has neither messages nor prompt and completion (it has text)"),
    "both": ({**PROMPT, **TURNS}, "has neither messages nor prompt"),
    "no list": ({"messages": "hello"}, "has messages that is no list of messages"),
    "no role": ({"messages": [{"content": "a"}]}, "has messages that is no list of messages"),
    "no answer": ({"messages": TURNS["messages"][:2]}, "has no message of the assistant"),
    "tools": ({**TURNS, "tools": "all"}, "has tools that are no list"),
    "what the template refuses": (
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
        "is refused by the chat template",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_is_no_conversation_is_named_and_left_out(name, tmp_path, capsys):
    record, why = BROKEN[name]
    assert build(tmp_path, [PROMPT, record, TURNS]) == 3
    assert f"chats.jsonl:2 {why}" in capsys.readouterr().err
    assert len(open_built(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--format", "chat"], "--format chat needs a tokenizer"),
        (["--tokenizer", str(TINY), "--turns", "last"], "--turns has no effect without --format chat"),
        (["--format", "chat", "--tokenizer", str(TINY), "--end-token", "2"], "--end-token has no effect without another --format"),
        (["--format", "chat", "--tokenizer", str(TINY), "--special-tokens"], "--special-tokens has no effect without another --format"),
        (["--format", "chat", "--tokenizer", str(TINY), "--field", "x"], "--field has no effect"),
    ],
)
def test_options_without_effect_are_refused(flags, words, tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text(json.dumps(PROMPT))
    assert cli.main(["data", "build", str(tmp_path / "out"), str(tmp_path / "chats.jsonl"), *flags]) == 1
    assert words in capsys.readouterr().err


def test_a_tokenizer_without_a_template_or_none_at_all_is_refused(tmp_path, tokenizer, capsys):
    (tokenizer / "chat_template.jinja").unlink()
    assert build(tmp_path, [PROMPT], tokenizer) == 1
    assert "has no chat template; give the tokenizer of a model trained to chat" in capsys.readouterr().err
    assert build(tmp_path, [PROMPT], tmp_path / "nowhere") == 1
    error = capsys.readouterr().err
    assert "--tokenizer" in error and "nowhere" in error and error.count("\n") == 1


def test_an_interrupted_build_of_chats_goes_on_and_another_template_is_another_build(tmp_path, tokenizer, capsys):
    records = [PROMPT, TURNS, TALK] * 5
    assert build(tmp_path, records, tokenizer, "--shard-size", "200B") == 0
    whole = read_manifest(tmp_path / "out")
    assert len(whole["shards"]) > 3 and all("learned" in shard["bytes"] for shard in whole["shards"])
    done = whole["shards"][0]["documents"]
    read = sum(len(json.dumps(record)) + 1 for record in records[:done])
    stopped = {**whole, "shards": whole["shards"][:1], "at": [0, read, done]}
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "building.json").write_text(json.dumps(stopped))
    assert build(tmp_path, records, tokenizer, "--shard-size", "200B") == 0
    assert read_manifest(tmp_path / "out") == whole
    (tokenizer / "chat_template.jinja").write_text(FORGETS)
    assert build(tmp_path, records, tokenizer, "--shard-size", "200B") == 1
    assert "holds a finished build that differs (reading" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "one_document"])
@pytest.mark.parametrize("seq_len", [16, 37, 512])
def test_labels_are_the_tokens_learned_from_in_every_packing(packing, seq_len, tmp_path):
    assert build(tmp_path, [PROMPT, TURNS, TALK, PROMPT]) == 0
    corpus = open_built(tmp_path / "out")
    packed = PackedDocuments(corpus, seq_len, packing=packing)
    seen = 0
    for row in range(len(packed)):
        batch, pieces = packed.read_row(row), packed.row(row)
        expected = np.full(seq_len, IGNORE_INDEX)
        at = 0
        for piece in pieces:
            target = corpus.is_target(piece.document, 0, int(corpus.length_N[piece.document]))[piece.start : piece.stop]
            expected[at : at + len(piece)][target] = corpus.tokens(piece.document, piece.start, piece.stop)[target]
            assert packing == "concatenate" or target[1:].any(), "no piece without a target"
            at += len(piece)
            seen += target.sum()
        assert batch.labels_BT[0].tolist() == expected.tolist()
    every = sum(int(corpus.is_target(d, 0, int(corpus.length_N[d])).sum()) for d in range(len(corpus)))
    assert seen == every or packing != "concatenate"


def test_plain_text_of_the_same_tokenizer_mixes_with_chats(tmp_path):
    from longtrain.data.corpus import join

    assert build(tmp_path, [PROMPT, TURNS]) == 0
    (tmp_path / "a.txt").write_text("plain text")
    assert cli.main(["data", "build", str(tmp_path / "plain"), str(tmp_path / "a.txt"), "--tokenizer", str(TINY)]) == 0
    corpus = join([open_built(tmp_path / "plain"), open_built(tmp_path / "out")])
    assert corpus.has_prompts and corpus.is_target(0, 0, 5) is None and corpus.is_target(2, 0, 10) is not None
    packed = PackedDocuments(corpus, 64)
    labels = np.concatenate([packed.read_row(r).labels_BT[0].numpy() for r in range(len(packed))])
    assert (labels != IGNORE_INDEX).sum() == 10 + sum(corpus.is_target(d, 0, int(corpus.length_N[d])).sum() for d in (1, 2))


def test_a_token_on_the_border_belongs_to_the_prompt():
    assert token_ranges([0, 2, 5, 7, 9], [(3, 8), (9, 20)]) == [(2, 4), (4, 5)]
    assert token_ranges([0, 2], [(3, 4)]) == []


def test_info_counts_what_is_learned_from(tmp_path, capsys):
    assert build(tmp_path, [PROMPT]) == 0
    capsys.readouterr()
    assert cli.main(["data", "info", str(tmp_path / "out"), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "13 tokens of answers" in printed and "every checksum is right" in printed
