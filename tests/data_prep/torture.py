"""Texts on which encoders are known, or likely, to part."""

import random
import string
import sys

SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\v",
    "\f",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "<pad>", "<|endoftext|>", "<", "s>", "<0x"]
MARK = "\u2581"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
SCRIPTS = [
    "e\u0301 a\u0308\u0323 \u1112\u1161\u11ab \u0e01\u0e33 \u0915\u094d\u0937",
    f"{FAMILY} \U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001f44d\U0001f3fd",
    "שלום עולם مرحبا بالعالم हिन्दी ไทย 한국어 日本語テキスト 中文字符。\uff0c字符",
    "naïve café — “quotes” … ½ ² \ufb01 \u212b A\u030a \ufeffBOM \u200b\u2060",
    "\ufffd\ufffd a\ufffdb",  # what a lone surrogate or a broken byte of the source becomes
]


def texts(pieces):
    """The set: name -> texts.

    Args:
        pieces: of the vocabulary, to be put together at random.
    """
    draw = random.Random(0)

    def mixed(parts, count=150, most=30):
        return ["".join(draw.choices(parts, k=draw.randint(1, most))) for _ in range(count)]

    planes = [
        "".join(chr(code) for code in range(start, start + 0x10000, 5) if not surrogate(code))
        for start in range(0, sys.maxunicode, 0x10000)
    ]
    points = [chr(code) for code in range(0, sys.maxunicode + 1, 61) if not surrogate(code)]
    words = [piece.replace(MARK, " ") for piece in pieces]
    return {
        "nothing and next to nothing": ["", " ", "  ", MARK, "\n", "\x00", "a", " a", "a ", " a "],
        "planes": planes,
        "any characters": mixed(points),
        "characters below 0x250 and spaces": mixed([*map(chr, range(0x250)), *" " * 200]),
        "control characters": mixed([*map(chr, range(33)), "\x7f", "\x80", "\x9f", "a"]),
        "runs of spaces": [f"a{' ' * n}b{' ' * (n // 2)}" for n in range(120)],
        "all kinds of space": mixed([*SPACES, "a", "the", "."]),
        "literal marks of space": mixed([MARK, MARK * 2, " ", "a", "the", "\n"]),
        "literal special pieces": [*SPECIAL, *mixed([*SPECIAL, " ", "a", "\n"])],
        "pieces": mixed(pieces),
        "pieces with spaces": mixed(words),
        "pieces without spaces": mixed([word.strip() for word in words]),
        "digits and punctuation": mixed([*string.digits, *string.punctuation, " "]),
        "scripts": [*SCRIPTS, *mixed(list(" ".join(SCRIPTS)))],
        "code": mixed(["    ", "\n", "\t", "def f(", "):", "# ", "->", "{", "}", "x_1", " = "]),
        "long runs": ["a" * 100_000, "\n" * 50_000, " " * 50_000, "ab" * 50_000],
        "200,000 letters in a row": ["".join(draw.choices(string.ascii_letters, k=200_000))],
        "ideographs in a row": ["".join(chr(draw.randint(0x4E00, 0x9FA5)) for _ in range(50_000))],
        "one long document": [" ".join(draw.choices([*words, "\n", "\r\n"], k=60_000))],
    }


def surrogate(code):
    return 0xD800 <= code < 0xE000
