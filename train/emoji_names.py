"""What an emoji is called: the concept of a code-point sequence, and its caption in plain English.

The names are the English CLDR short names as the `emoji` package gives them. That package has dropped the
punctuation of sequences ("family: man, woman, boy" has become "family man woman boy") and calls a flag by its
country alone; both are put right here, so that a caption reads as somebody would type it. The same name is
used in every drawing style: it is what makes "a red apple, noto emoji" and "a red apple, fluent 3d emoji" one
concept in two styles.

Stands before training: `train/prepare.py` writes these captions into metadata.jsonl.
"""

import re

Sequence = tuple[int, ...]  # the code points of one emoji

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
VARIATION_SELECTOR = (
    0xFE0F  # "draw this as a picture": written or left out at will, so it tells no emoji from another
)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two of them spell a country's flag
TAG_END = 0xE007F  # ends a region's flag (England, Scotland, Wales)
FULLY_QUALIFIED = 2  # emoji.STATUS["fully_qualified"]: the one recommended spelling of an emoji

STYLE_WORDS = {"noto": "noto emoji", "fluent": "fluent 3d emoji", "openmoji": "openmoji emoji"}


def concept_key(sequence: Sequence) -> Sequence:
    """The sequence without variation selectors: equal for every spelling of the same emoji."""
    return tuple(point for point in sequence if point != VARIATION_SELECTOR)


def parse_slug(slug: str) -> Sequence | None:
    """Code points of a file name such as "1f468-200d-1f680"; None where it is no such name."""
    if not re.fullmatch(r"[0-9a-fA-F]{2,6}(-[0-9a-fA-F]{2,6})*", slug):
        return None
    sequence = tuple(int(part, 16) for part in slug.split("-"))
    return sequence if max(sequence) < 0x110000 else None


def make_slug(sequence: Sequence) -> str:
    """File name stem of a sequence: "1f468-200d-1f680" (hexadecimal, at least four digits each)."""
    return "-".join(f"{point:04x}" for point in sequence)


def emoji_concepts() -> dict[Sequence, tuple[Sequence, str]]:
    """Every emoji that has no skin tone: `concept_key` -> (recommended sequence, concept).

    Concepts are unique. Needs the `emoji` package (extra "data").
    """
    from emoji import EMOJI_DATA

    concepts = {}
    for text, entry in EMOJI_DATA.items():
        sequence = tuple(map(ord, text))
        if entry["status"] == FULLY_QUALIFIED and not SKIN_TONES.intersection(sequence):
            concepts[concept_key(sequence)] = (sequence, concept_name(sequence, entry["en"]))
    return concepts


# --- from the package's name to a concept -------------------------------------------------------------------

_HAIR = {
    "bald": "bald {0}",
    "beard": "{0} with a beard",
    "blond hair": "{0} with blond hair",
    "curly hair": "{0} with curly hair",
    "red hair": "{0} with red hair",
    "white hair": "{0} with white hair",
}
_MEMBER = r"(?:man|woman|boy|girl|adult|child)"
_GROUP = re.compile(rf"(family|kiss|couple with heart) ({_MEMBER}(?: {_MEMBER})*)")
_HAIRED = re.compile(rf"(man|woman|person) ({'|'.join(_HAIR)})")


def concept_name(sequence: Sequence, name: str) -> str:
    """The concept behind a name of the `emoji` package.

    ":red_apple:" -> "red apple"; ":France:" with the flag's code points -> "flag of France";
    ":man_red_hair:" -> "man with red hair"; ":kiss_woman_man:" -> "kiss: woman, man".
    """
    words = " ".join(name.strip(":").replace("_", " ").replace("\u2019", "'").split())
    if sequence[0] in REGIONAL_INDICATORS or sequence[-1] == TAG_END:
        return f"flag of {words}"
    if group := _GROUP.fullmatch(words):
        return f"{group[1]}: {', '.join(group[2].split())}"
    if haired := _HAIRED.fullmatch(words):
        return _HAIR[haired[2]].format(haired[1])
    return words


# --- from a concept to a caption ----------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Heads of phrases that name a substance, an activity or a state: no article before them.
_UNCOUNTED = _words(
    "bacon bread broccoli butter candy cheese coral corn custard falafel food garlic ginger mate meat "
    "milk oden popcorn rice sake salt spaghetti sushi water liquid wood yarn thread soap ice fire fog "
    "money luggage baggage polish voltage cooking exchange dna information construction copyright control "
    "infinity om khanda yang fuji zzz lowercase uppercase tennis badminton hockey lacrosse pong polo "
    "racing bowling camping littering smoking breast-feeding laughing foggy dizzy locked unlocked "
    "prohibited registered radioactive biohazard wireless star-struck plus minus multiply divide away "
    "together"
)
_PROPER = _words(
    "aquarius aries cancer capricorn gemini leo libra ophiuchus pisces sagittarius scorpio taurus virgo claus"
)
_UNIQUE = ("flag of ", "statue of liberty", "tokyo tower", "milky way")  # "the", as there is one of each
_PLURAL = _words("men women people children skis")
_SINGULAR = frozenset(["rhinoceros"])
_BEING = _words("man woman person face")  # "man lifting weights" is a man, no weights
# The head of a phrase is the word before the first of these ("bowl with spoon", "bow and arrow").
_AFTER_HEAD = _words(
    "with without of in on at behind over under for from and or not facing holding pointing showing"
)
_SIGNS = _words("sign symbol button arrow mark")  # "litter in bin sign" is a sign, no litter
_SPELT_WITH_VOWEL = _words("A AB ATM END ID NG O OK ON! SOS UP!")


def _is_plural(word: str) -> bool:
    """Plural by its ending; "bus", "dress" and "iris" end in s without being one."""
    if word in _PLURAL or word in _SINGULAR:
        return word in _PLURAL
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "'s"))


def _indefinite(concept: str) -> str:
    """The article "a" or "an", by the sound of the first word."""
    first = concept.split()[0]
    if first in _SPELT_WITH_VOWEL or re.match(r"(x-|hour|honest|heir)", first.lower()):
        return "an"
    if first.isupper() or re.match(r"(uni(?![nm])|eu|ew|one\b|us[ei]|uti)", first.lower()):
        return "a"
    return "an" if first[0].lower() in "aeiou" else "a"


def with_article(concept: str) -> str:
    """The concept with the article it reads best with: "a red apple", "an owl", "the flag of France".

    A rule by the head of the phrase, without a dictionary of English: plurals, substances, activities and
    proper names stand bare, single things of the world take "the", all else "a" or "an".
    """
    words = concept.lower().replace(":", "").replace(",", "").split()
    if concept.lower().startswith(_UNIQUE):
        return f"the {concept}"
    if words[0] == "no" or words[0] in _PLURAL or re.search(r"o'clock$|-thirty$", concept):
        return concept
    if words[0] in _BEING:
        return f"a {concept}"
    stop = next((i for i, word in enumerate(words) if i > 0 and word in _AFTER_HEAD), len(words))
    head = words[-1] if words[-1] in _SIGNS else words[stop - 1]
    if head in _PROPER or head in _UNCOUNTED or _is_plural(head):
        return concept
    return f"{_indefinite(concept)} {concept}"


def caption(concept: str, style: str) -> str:
    """What an image shows: `caption("red apple", "fluent")` is "a red apple, fluent 3d emoji"."""
    return f"{with_article(concept)}, {STYLE_WORDS[style]}"
