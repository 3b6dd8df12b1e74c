"""Text from elsewhere neither acts on a terminal, nor breaks out of a card, nor carries a secret into a message."""

import re

import pytest

from hf_trak.messages import markdown, markdown_code, mask_secrets, one_line, visible

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b31mc\u202edef\u2066g\u2028h\ni\tj\x00k\u200bl\U000e0041m\ud800n"


def test_no_character_of_control_is_left():
    shown = visible(HOSTILE)
    assert shown.isprintable()
    assert shown == (r"a\x1b[2J\x1b]0;title\x07b\x9b31mc\u202edef\u2066g\u2028h\ni\tj\x00k\u200bl\U000e0041m\ud800n")
    shown.encode()


@pytest.mark.parametrize("text", ["plain", "Naïve 東京 🙂", "👩‍👩‍👧 é", "עברית", "100 % <b>&amp; `x`"])
def test_words_of_any_script_stay(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "secret", "kept"),
    [
        ("no access to s3://KEY:sEcReT@bucket/index now", "sEcReT", "bucket/index now"),
        ("https://user:pa%40ss@host:8080/a?x=1", "pa%40ss", "host:8080/a?"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Signature=abc123&X-Amz-Credential=AKIA", "abc123", "b.s3.amazonaws.com/k?"),
        ("az://c/p?sv=2024&sig=Zm9v%3D, and more", "Zm9v", "az://c/p?"),
        ("https://host/a#access_token=abc123", "abc123", "https://host/a#"),
        ("token hf_AbCdEfGhIjKlMnOp is wrong", "AbCdEfGhIjKlMnOp", "token hf_"),
        ("Authorization: Bearer abc.def-ghi", "abc.def-ghi", "Bearer"),
        ("https://hf_AbCdEfGhIjKlMnOp@huggingface.co/me/x", "AbCdEfGhIjKlMnOp", "huggingface.co/me/x"),
        ("'gs://token@bucket/x'", "token", "bucket/x"),
    ],
)
def test_secrets_are_masked_and_places_stay(text, secret, kept):
    masked = mask_secrets(text)
    assert secret not in masked
    assert kept in masked
    assert "***" in masked


@pytest.mark.parametrize(
    "text", ["s3://bucket/my-index", "https://huggingface.co/me/x/tree/main", "a@b.c: no", "C:/x", "hf_trak"]
)
def test_what_is_no_secret_stays(text):
    assert mask_secrets(text) == text


def test_a_message_is_one_line():
    assert one_line("Bad:\n  a: 1 here\n  b: 2 here\n\nDo this.\x1b[0m") == r"Bad: a: 1 here; b: 2 here. Do this.\x1b[0m"


def test_markdown_shows_a_text_as_it_is():
    text = markdown("a | b\n# c `d` [e](http://x) <script>f</script> <!-- g -->")
    assert text == r"a \| b\n# c \`d\` \[e\](http://x) &lt;script&gt;f&lt;/script&gt; &lt;!-- g --&gt;".replace(
        r"\n", "\\\\n", 1
    )
    assert not re.search(r"(?<!\\)[|`\[\]]", text)


def test_a_code_span_cannot_be_left():
    assert markdown_code("a`b|c\n<!-- d -->") == "`a'b\\|c\\n< !-- d -- >`"
