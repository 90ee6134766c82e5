"""What the Fluent packages get wrong, found by setting every 3D picture beside its flat drawing, and how it is put right.

In: the emoji a file's name stands for. Out: the concept and tone its picture shows, or None where the name can't be put right.
The surprising thing: in the 3D package nearly every medium-light and medium skin tone are exchanged (284 of the 293 concepts that can
be compared with flat drawings), so that the file ...-1f3fc shows brown hair and the darker skin of the two.
"""

from __future__ import annotations

from emoji_table import Emoji

RIGHTLY_TONED = {  # 3D files whose tone is what their name says; every emoji of two people is, too
    "technologist",
    "man technologist",
    "woman technologist",
}
TWO_PEOPLE = ("kiss", "couple with heart", "people holding hands", "women holding hands", "men holding hands", "woman and man holding")
EXCHANGED_TONES = {"medium-light": "medium", "medium": "medium-light"}
MOUNTAIN_BIKING_TONES = {  # shown by the 3D files of "person mountain biking": light to dark the other way round, besides
    "light": "dark",
    "medium-light": "medium",
    "medium": "medium-dark",
    "medium-dark": "medium-light",
    "dark": "light",
}
EXCHANGED_CONCEPTS = {"deaf man": "deaf woman", "deaf woman": "deaf man"}  # in 3D, in every tone
FAINT_TONES = {"person in suit levitating", "snowboarder", "horse racing"}  # hardly any skin shows at 64 pixels

WRONG_PICTURES = {  # (style, concept, tone) -> what the file shows instead
    ("3D", "pregnant person", "dark"): "the medium-dark one",
    ("flat", "person taking bath", "medium-dark"): "the one without a tone",
    ("flat", "white square button", ""): "the black medium square",
    ("3D", "grinning cat", ""): "the cat face",
    ("flat", "grinning cat", ""): "the cat face",
    ("animated", "grinning cat", ""): "the cat face",
}


def find_shown(named: Emoji, style: str) -> tuple[str, str] | None:
    """(concept, tone) that the picture named `named` in this style really shows; None if the picture is to be left out.

    style: "3D", "flat", "line" or "animated".
    """
    if (style, named.concept, named.tone) in WRONG_PICTURES or (named.tone and named.concept in FAINT_TONES):
        return None
    if style != "3D":
        return named.concept, named.tone
    tone = named.tone
    if named.concept == "person mountain biking":
        tone = MOUNTAIN_BIKING_TONES.get(tone, tone)
    elif named.concept not in RIGHTLY_TONED and not named.concept.startswith(TWO_PEOPLE):
        tone = EXCHANGED_TONES.get(tone, tone)
    return EXCHANGED_CONCEPTS.get(named.concept, named.concept), tone
