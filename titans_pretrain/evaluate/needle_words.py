"""The words that needles' keys, and values of kind ``words``, are made of: adjective-noun."""

import hashlib

_ADJECTIVES = (
    "amber bold brave brief bright broad calm clean clear clever cold cool curly damp dark deep "
    "eager early empty faint fair fancy fast fierce fine firm flat fresh full gentle glad golden "
    "grand green happy hard heavy hidden hollow humble icy jolly keen kind large late light lively "
    "lone long loud lucky mellow mild misty modest narrow neat noble old pale plain proud quick "
    "quiet rapid rare round rough royal rusty sharp shiny short silent silver simple slim slow "
    "small smooth soft solid steady steep still strong sunny sweet swift tall tame thin tiny vast "
    "warm wide wild wise young"
)
_NOUNS = (
    "acorn anchor apple arrow badge basket beach bell bird boat bottle branch brick bridge brush "
    "bucket button cabin candle canoe castle chain chair cherry cliff cloud coat coin comet corner "
    "crown desert dream drum eagle engine fabric falcon feather field flame flute forest fountain "
    "garden gate glove grape hammer harbor hill honey horse island jacket kettle kite ladder lake "
    "lamp lantern leaf lemon letter maple market meadow mirror mountain needle ocean orchard paint "
    "paper pearl pebble pencil piano pillow pocket prairie puzzle ribbon river rocket saddle sail "
    "shell ship spoon stone stream table temple tiger tower train tunnel valley village violin "
    "wagon window"
)
PAIRS = tuple(f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split())


def fingerprint() -> str:
    """Tells one list from another."""
    return hashlib.sha256(" ".join(PAIRS).encode()).hexdigest()[:16]
