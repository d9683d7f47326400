"""Chat templates: goldens, parity with transformers, which tokens the assistant wrote, and templates that fail."""

from datetime import datetime

import numpy as np
import pytest
from chat_templates import (
    CHATML,
    CHATML_TAGGED,
    CHATS,
    LLAMA3,
    MISTRAL,
    PLAIN,
    SPECIALS,
    TEMPLATES,
    THINKING,
    TURN,
    tiny_tokenizer,
)

from lmlab.core.errors import UserError
from lmlab.data.chat import ChatTemplate, encode_chat, render
from lmlab.data.tokenizers import byte_tokenizer, wrap_tokenizer

DAY = datetime(2024, 7, 26)
GOLDENS = {
    "chatml": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi there?<|im_end|>\n"
    "<|im_start|>assistant\nHello! 2+2 = 4<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi there?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello! 2+2 = 4<|eot_id|>",
    "mistral": "<s>[INST] Hi there? [/INST] Hello! 2+2 = 4</s>",
    "plain": "User: Hi there?\nAssistant: Hello! 2+2 = 4\n",
}  # fmt: skip
# In the plain template the blank before the answer is a part of the answer's first token.
ANSWERS = {
    CHATML: "Hello! 2+2 = 4<|im_end|>", CHATML_TAGGED: "Hello! 2+2 = 4<|im_end|>", LLAMA3: "Hello! 2+2 = 4<|eot_id|>",
    MISTRAL: " Hello! 2+2 = 4</s>", THINKING: "Hello! 2+2 = 4<|im_end|>", PLAIN: " Hello! 2+2 = 4\n",
}  # fmt: skip


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIALS)


def written(source: str, messages: list, **settings) -> str:
    """The text of the tokens that count as the assistant's."""
    model = tiny_tokenizer()
    ids_T, mask_T = encode_chat(template(source), wrap_tokenizer(model, "</s>"), messages, now=DAY, **settings)
    return model.decode(ids_T[mask_T].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_chat_is_written_as_the_template_says(name):
    assert render(template(TEMPLATES[name]), TURN, now=DAY) == GOLDENS[name]


@pytest.mark.parametrize("source", ANSWERS, ids=TEMPLATES)
def test_the_assistant_wrote_the_content_and_what_ends_its_turn(source):
    assert written(source, TURN) == ANSWERS[source]
    assert written(source, CHATS["open"]) == ""


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, PLAIN], ids=["chatml", "llama3", "mistral", "plain"])
def test_every_answer_counts_or_the_last_one(source):
    both, last = written(source, CHATS["two"]), written(source, CHATS["two"], turns="last")
    assert both == ANSWERS[source] + last
    assert "🧑‍🚀\n x" in last


def test_prefixes_and_the_generation_tag_mark_the_same_tokens():
    tokenizer = wrap_tokenizer(tiny_tokenizer(), "</s>")
    for messages in CHATS.values():
        for turns in ("all", "last"):
            one, other = (
                encode_chat(template(source), tokenizer, messages, turns=turns) for source in (CHATML, CHATML_TAGGED)
            )
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[1], other[1])


def test_a_chat_that_is_rewritten_as_it_grows_says_what_to_do():
    thought = [TURN[0], {"role": "assistant", "content": "<think>hm</think>Yes"}]
    with pytest.raises(UserError, match=r"message 2 of 4 .*generation.*turns = \"last\""):
        written(THINKING, [*thought, *thought])
    assert written(THINKING, [*thought, *thought], turns="last") == "<think>hm</think>Yes<|im_end|>"


def test_bytes_read_a_chat_as_text():
    ids_T, mask_T = encode_chat(template(PLAIN), byte_tokenizer(), TURN)
    assert bytes(ids_T[mask_T].tolist()) == b"Hello! 2+2 = 4\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0]['content'] | tojson }}", '"<é>"'),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}", "2"),
        ("{% for m in [1, 2, 3] %}\n    {% if m == 2 %}\n{% break %}{% endif %}\n{{ m }}\n{% endfor %}", "1\n"),
        ("{{ tools is none }} {{ documents is none }} {{ nothing }}", "True True "),
        ("{{ strftime_now('%Y') }}", "2024"),
    ],
)
def test_what_templates_use(source, text):
    assert render(template(source), [{"role": "user", "content": "<é>"}], now=DAY) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (MISTRAL, "Conversation roles must alternate"),
        ("{{ messages[9].role.name }}", "has no element 9"),
        ("{% for %}", "at line 1"),
        ("{{ messages[0].content + none }}", "NoneType"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.clear() }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__x=1) %}", "__x"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "__x"),
    ],
)
def test_a_template_that_fails_is_one_message(source, message):
    with pytest.raises(
        UserError, match=r"(?s)^chat_template = [^\n]*" + message + r"[^\n]*Roles of the chat: assistant"
    ):
        render(template(source), TURN[1:])


def test_text_with_the_marks_is_refused_only_where_they_are_used():
    marked = [{"role": "user", "content": "a\ufdd0b"}]
    assert "a\ufdd0b" in render(template(CHATML), marked)
    with pytest.raises(UserError, match="noncharacters"):
        render(template(CHATML_TAGGED), marked)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_transformers_writes_the_same_chat(source, chat):
    transformers = pytest.importorskip("transformers", reason="the peer to compare with: pip install lmlab[peers]")
    # With trimmed places its mask breaks off at an answer that begins with a blank.
    model = tiny_tokenizer(trim_offsets=False)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **SPECIALS)
    if source == MISTRAL and chat == "system":
        pytest.skip("the template takes no system message")
    for prompt in (False, True):
        text = peer.apply_chat_template(
            CHATS[chat], chat_template=source, tokenize=False, add_generation_prompt=prompt
        )  # fmt: skip
        assert render(template(source), CHATS[chat], add_generation_prompt=prompt) == text
    theirs = peer.apply_chat_template(
        CHATS[chat], chat_template=source, return_dict=True, return_assistant_tokens_mask="{% generation" in source
    )  # fmt: skip
    ids_T, mask_T = encode_chat(template(source), wrap_tokenizer(tiny_tokenizer(), "</s>"), CHATS[chat])
    assert ids_T.tolist() == theirs["input_ids"]
    if source == CHATML_TAGGED:
        assert mask_T.astype(int).tolist() == theirs["assistant_masks"]
