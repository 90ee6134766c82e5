"""What each emoji is called: emojibase's labels and Fluent's file names, joined into one table of pictures.

In: the en and zh `data.json` of emojibase-data, and the file names of the picture packages.
Out: `Emoji` rows (hexcode, concept, tone, group) and the captions made of them.
The surprising part: Fluent's flat drawings are named by words, not by code points, and use older names than Unicode for some
forty emoji (`person-mage` is now just "mage"); `FLAT_NAME_TO_LABEL` is the whole list of those.
"""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # emojibase's tone numbers 1 to 5, in order
TONES_ZH = {"light": "浅肤色", "medium-light": "中等偏浅肤色", "medium": "中等肤色", "medium-dark": "中等偏深肤色", "dark": "深肤色"}
STYLES_ZH = {"3D": "立体", "flat": "扁平", "line": "线条", "animated": "动画"}
COUNTRY_FLAGS = ("country-flag", "subdivision-flag")  # not Fluent art

FLAT_NAME_TO_LABEL = {
    "blackbird": "black bird",
    "horizontal-traffic": "horizontal traffic light",
    "hugging-face": "smiling face with open hands",
    "keycap-asterisk": "keycap: *",
    "keycap-hashtag": "keycap: #",
    "knocked-out-face": "face with crossed-out eyes",
    "man-blonde-hair": "man: blond hair",
    "man-deaf": "deaf man",
    "man-merpeople": "merman",
    "man-with-bunny-ears": "men with bunny ears",
    "man-wrestling": "men wrestling",
    "person-blonde-hair": "person: blond hair",
    "person-deaf": "deaf person",
    "person-elf": "elf",
    "person-fairy": "fairy",
    "person-genie": "genie",
    "person-mage": "mage",
    "person-merpeople": "merperson",
    "person-superhero": "superhero",
    "person-supervillain": "supervillain",
    "person-vampire": "vampire",
    "person-with-bunny-ears": "people with bunny ears",
    "person-wrestling": "people wrestling",
    "person-zombie": "zombie",
    "phoenix-bird": "phoenix",
    "pouting-face": "enraged face",
    "red-triangle": "red triangle pointed up",
    "stuffedbread": "stuffed flatbread",
    "stuffedbread-flat": "stuffed flatbread",
    "vertical-traffic": "vertical traffic light",
    "woman-blonde-hair": "woman: blond hair",
    "woman-deaf": "deaf woman",
    "woman-merpeople": "mermaid",
    "woman-with-bunny-ears": "women with bunny ears",
    "woman-wrestling": "women wrestling",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji of one skin tone.

    hexcode: upper-case code points joined by "-", without the presentation selector FE0F.
    label: emojibase's English label without the skin tone.
    concept, concept_zh: its name without style and tone, as `name_concept` and `name_concept_zh` word it.
    tone: one of `TONES`, or "" for an emoji without a skin tone modifier.
    """

    hexcode: str
    label: str
    concept: str
    concept_zh: str
    tone: str
    group: str
    subgroup: str


def name_concept(label: str) -> str:
    """An emojibase English label without skin tone -> the words of a caption, in ASCII quotes and without a colon.

    "man: red hair" -> "man with red hair"; "family: man, woman, boy" -> "family of man, woman and boy"; "keycap: 3" -> "keycap 3".
    """
    words = label.replace("’", "'").replace("“", '"').replace("”", '"')
    head, colon, rest = words.partition(": ")
    if not colon:
        return words
    if rest == "bald":
        return f"bald {head}"
    if rest == "beard":
        return f"{head} with beard"
    if rest.endswith(" hair"):
        return f"{head} with {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    if head in ("kiss", "couple with heart", "family"):
        *most, last = rest.split(", ")
        return f"{head} of {', '.join(most)} and {last}"
    return f"{head}, {rest}"


def name_concept_zh(label: str) -> str:
    """An emojibase Chinese label without skin tone -> the words of a caption: "男人: 红发" -> "红发男人", "按键: 3" -> "按键 3"."""
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    if rest == "秃顶" or rest.endswith("发"):
        return f"{rest}{head}"
    if head == "按键":
        return f"{head} {rest}"
    return f"{head}，{rest}"


def write_captions(emoji: Emoji, style: str) -> dict[str, str]:
    """Captions in "en" and "zh" of one emoji drawn in one style ("3D", "flat", "line" or "animated").

    "3D waving hand, dark skin tone"; "立体 挥手，深肤色".
    """
    english = f"{style} {emoji.concept}"
    chinese = f"{STYLES_ZH[style]} {emoji.concept_zh}"
    if emoji.tone:
        english += f", {emoji.tone} skin tone"
        chinese += f"，{TONES_ZH[emoji.tone]}"
    return {"en": english, "zh": chinese}


def read_emoji_table(emojibase_tgz: Path) -> dict[str, Emoji]:
    """Every emoji with a group, flags of countries and mixed skin tones left out, by hexcode, in Unicode's order.

    emojibase_tgz: the npm tarball of emojibase-data. Raises KeyError if it lacks the files it should have.
    """
    with tarfile.open(emojibase_tgz) as package:
        english = _read_json(package, "package/en/data.json")
        chinese = {row["hexcode"]: row["label"] for row in _read_json(package, "package/zh/data.json")}
        names = _read_json(package, "package/meta/groups.json")
    table: dict[str, Emoji] = {}
    for row in sorted((row for row in english if "group" in row), key=lambda row: row["order"]):
        concept, concept_zh = name_concept(row["label"]), name_concept_zh(chinese[row["hexcode"]])
        group, subgroup = names["groups"][str(row["group"])], names["subgroups"][str(row["subgroup"])]
        if subgroup in COUNTRY_FLAGS:
            continue
        for variant in [row, *row.get("skins", [])]:
            number = variant.get("tone", 0)
            if isinstance(number, list):  # two people of different tones
                continue
            tone = TONES[number - 1] if number else ""
            hexcode = normalise_hexcode(variant["hexcode"])
            table[hexcode] = Emoji(hexcode, row["label"], concept, concept_zh, tone, group, subgroup)
    return table


def normalise_hexcode(name: str) -> str:
    """ "2a-fe0f-20e3" or "002A-20E3" -> "002A-20E3": upper case, four digits at least, no presentation selector."""
    points = (int(part, 16) for part in name.split("-"))
    return "-".join(f"{point:04X}" for point in points if point != 0xFE0F)


def find_flat_hexcodes(file_names: list[str], table: dict[str, Emoji]) -> dict[str, str]:
    """Fluent's word file names (without suffix) -> hexcodes of the table; names that mean no emoji of the table are left out.

    "waving-hand-dark" is the waving hand in its dark tone, "waving-hand-default" the one without a tone.
    """
    hexcodes = {(emoji.label, emoji.tone): emoji.hexcode for emoji in table.values()}
    labels = {_spell_as_file_name(emoji.label): emoji.label for emoji in table.values()} | FLAT_NAME_TO_LABEL
    found: dict[str, str] = {}
    for file_name in file_names:
        name, tone = file_name, ""
        if name not in labels:  # tested first: "police-car-light" is an emoji of its own, not a toned police car
            for ending in ("medium-light", "medium-dark", *TONES, "default"):
                if file_name.endswith("-" + ending):
                    name, tone = file_name.removesuffix("-" + ending), "" if ending == "default" else ending
                    break
        hexcode = hexcodes.get((labels.get(name, ""), tone))
        if hexcode is not None:
            found[file_name] = hexcode
    return found


def _spell_as_file_name(label: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", label) if not unicodedata.combining(c))
    plain = re.sub(r"[’“”'.&!]", "", plain.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _read_json(package: tarfile.TarFile, name: str):
    member = package.extractfile(name)
    if member is None:
        raise KeyError(f"{name} in {package.name} is not a file")
    return json.load(member)
