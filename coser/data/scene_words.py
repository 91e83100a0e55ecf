"""What compositions are made of and called: which kinds take part, how large they are in life, and their captions.

Assets are scaled to the unit sphere and know no size of their own, so the tables below, written by hand, say the
longest side of what each name usually stands for. A name holds for every asset whose object has all its words and ends
as it does ("spiky potted cactus" is a "potted cactus"), the longest name first; what no name holds for takes no part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from coser.data.assets import Asset, last_word, with_article
from coser.data.recolor import HUES


def metres(table: str) -> dict[str, float]:
    """"bar stool 0.75, bench 1.4" => {"bar stool": 0.75, "bench": 1.4}."""
    return {name: float(size) for name, size in (entry.strip().rsplit(" ", 1) for entry in table.split(","))}


# Metres, the longest side. Flat on top, so that things may lie there:
CARRIERS = metres("""table 1.3, coffee table 1.0, side table 0.55, small table 0.8, round table 1.0, dining table 1.6,
    desk 1.3, workbench 1.4, bench 1.4, chair 0.95, armchair 1.0, stool 0.55, bar stool 0.8, nightstand 0.55,
    cabinet 0.9, bedside cabinet 0.55, bed 2.0, sofa 1.9, couch 1.9, barrel 0.95, keg 0.6, trunk 0.9, stump 0.6,
    pedestal 1.0, pallet 1.2, shelf 1.2, bookcase 1.9, bookshelf 1.9, wardrobe 1.9, fridge 1.7, refrigerator 1.7,
    stove 0.9, oven 0.8, washing machine 0.85, flat rock 1.0, plate 0.26, cutting board 0.45, box 0.45, crate 0.6,
    chest 0.75""")
# Small enough to be put on something; of the carriers, these too:
PORTABLE = {name: CARRIERS[name] for name in ("box", "crate", "chest", "plate", "keg")} | metres("""apple 0.09,
    banana 0.18, bomb 0.2, book 0.25, bottle 0.28, bowl 0.22, bread 0.3, bucket 0.35, burger 0.13, cheeseburger 0.13,
    hamburger 0.13, cake 0.3, can 0.14, candle 0.2, cat 0.5, cauldron 0.5, cheese 0.25, coffee machine 0.4,
    compass 0.1, crown 0.25, cup 0.12, cupcake 0.09, donut 0.11, flask 0.2, frog 0.15, glass 0.18, goblet 0.2, ham 0.3,
    helmet 0.32, jar 0.16, lantern 0.4, table lamp 0.5, lemon 0.09, melon 0.3, microwave 0.5, monitor 0.5, muffin 0.1,
    mug 0.13, mushroom 0.15, onion 0.1, orange 0.1, pan 0.45, pear 0.11, pie 0.28, pillow 0.5, pineapple 0.35,
    potted plant 0.5, potted cactus 0.4, potted bush 0.5, laptop 0.38, pot 0.32, potato 0.12, potion 0.2, pumpkin 0.35,
    radio 0.35, rat 0.3, sack 0.6, sandwich 0.16, skull 0.22, steak 0.25, teacup 0.12, television 0.8, tomato 0.1,
    toaster 0.3, vase 0.35, watermelon 0.38""")
# What else stands on the floor:
STANDING = metres("""floor lamp 1.6, street lamp 4.5, cactus 1.4, plant 0.7, bush 1.1, tree 5.0, rock 0.9, boulder 1.4,
    gravestone 1.0, sign 1.8, signpost 2.0, bin 1.0, well 2.2, tent 2.5, campfire 0.9, cart 2.4, statue 2.0,
    fountain 2.8, car 4.2, taxi 4.4, suv 4.6, van 5.2, truck 6.5, tractor 4.0, ambulance 5.5, house 9.0, cottage 7.0,
    tower 14.0, windmill 13.0, church 14.0, barn 11.0, castle 20.0, man 1.8, woman 1.7, astronaut 1.8, robot 1.6,
    zombie 1.8, alien 1.4, wizard 1.8, knight 1.8, pirate 1.8, skeleton 1.8, dog 0.9, fox 0.9, wolf 1.4, cow 2.3,
    horse 2.4, deer 1.9, donkey 2.0, llama 1.8, sheep 1.3, pig 1.2, hydrant 0.8, wheelbarrow 1.5, log 1.5, anvil 0.6,
    backpack 0.5, traffic cone 0.6, mech 4.0, trash can 0.8, tree trunk 3.0,
    street lantern 3.0, wooden cart 2.4, ladder 2.8, snowman 1.7""")
SIZES = STANDING | PORTABLE | CARRIERS
# Kinds of rooms, which do not stand beside those of the open air or what is larger than a room's things.
INDOOR = frozenset("""desk armchair stool nightstand cabinet bed sofa couch bookcase bookshelf shelf wardrobe fridge
    refrigerator stove oven machine lamp microwave monitor laptop television plate""".split())
OUTDOOR = frozenset("gravestone bush campfire hydrant sign signpost boulder rock log stump cone pig sheep".split())
ROOM = 2.1  # metres
# Objects called so stand on no floor, are several, or are not what the table means; with the last ones nothing is on:
UNFIT = frozenset("""and with of on in from wall hanging ceiling overhead pendant upper mounted broken half chopped
    empty item hot flying fries dinner pizza takeout takeaway food set sink towel toilet scattered fallen group stack
    pile slice spilled floating satellite cracked toy
    crushed spilling gingerbread sitting melted""".split())
PEOPLE = frozenset({"man", "woman"})  # of them a colour is not said
NOT_CARRYING = frozenset("open opened empty filled stack vegetable".split())

# Sizes are pulled together, so that an apple on a table is still seen: ratio ** COMPRESSION, SMALLEST at least.
COMPRESSION, SMALLEST = 0.6, 0.28
SHRINKS = (1.0, 0.8, 0.64)  # tried in turn where the upper one finds no place to lie on

SIDES = {"left of": (0, -1), "right of": (0, 1), "behind": (2, -1), "in front of": (2, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "behind": "in front of", "in front of": "behind"}
RELATIONS = ("on", "beside", *SIDES, "and")  # "and": two of the first and one of the second, "two crates and a sack"
COLORS = frozenset(HUES) | frozenset("grey gray black white silver golden tan beige cyan copper bronze".split())
LEADING = frozenset("""small large big tall short long low wide thin tiny round square old flat simple thick narrow
    little deep dark light""".split())  # these words come before a colour
IRREGULAR = {"cactus": "cacti", "shelf": "shelves", "knife": "knives", "sheep": "sheep", "deer": "deer",
             "tomato": "tomatoes", "potato": "potatoes", "loaf": "loaves", "wolf": "wolves", "leaf": "leaves",
             "bus": "buses", "mouse": "mice", "goose": "geese"}


@dataclass(frozen=True)
class Part:
    """An asset as a scene shows it. name: its entry in the tables. color: what its own caption calls it, or ""."""

    asset: Asset
    name: str
    color: str

    @property
    def kind(self) -> str:
        return last_word(self.asset)

    @property
    def size(self) -> float:
        """Metres, the longest side."""
        return SIZES[self.name]

    @property
    def indoor(self) -> bool:
        return self.kind in INDOOR and self.size <= ROOM

    @property
    def outdoor(self) -> bool:
        return self.kind in OUTDOOR or self.size > ROOM

    @property
    def carries(self) -> bool:
        return self.name in CARRIERS and not NOT_CARRYING & _words(f"{self.asset.object} {self.asset.captions[0]}")

    def noun(self, detailed: bool = False, colored: bool = True) -> str:
        """"brown barrel"; detailed: by the whole name of the asset, "brown wooden barrel"."""
        words = (self.asset.object if detailed else self.name).lower().split()
        if colored and self.color and not COLORS & set(words):
            before = next((i for i, word in enumerate(words) if word not in LEADING), 0)
            words.insert(before, self.color)
        return " ".join(words)


def part_of(asset: Asset) -> Part | None:
    """An asset as part of a scene; None for one that no name holds for or whose name says that it cannot be."""
    words = _words(asset.object)
    if not words or UNFIT & words:
        return None
    names = [n for n in SIZES if n.split()[-1] == last_word(asset) and set(n.split()) <= words]
    if not names:
        return None
    named = asset.colors and asset.colors[0] in _words(asset.captions[0]) and last_word(asset) not in PEOPLE
    color = asset.colors[0] if named else ""
    return Part(asset, max(names, key=lambda n: len(n.split())), color)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def sizes_together(first: float, second: float) -> tuple[float, float]:
    """Longest sides of two things in life => those that a scene shows them with, the larger one's 1."""
    small = max((min(first, second) / max(first, second)) ** COMPRESSION, SMALLEST)
    return (small, 1.0) if first < second else (1.0, small)


def plural(noun: str) -> str:
    """"wooden box" => "wooden boxes"."""
    *before, last = noun.split()
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("man"):
        last = last[:-2] + "en"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def singular(noun: str) -> str:
    """"wooden boxes" => "wooden box"; the inverse of `plural`."""
    *before, last = noun.split()
    known = [one for one in (*IRREGULAR, *(name.split()[-1] for name in SIZES)) if plural(one) == last]
    if known:
        last = known[0]
    elif last.endswith("men"):
        last = last[:-2] + "an"
    elif re.search(r"..ies$", last):
        last = last[:-3] + "y"
    elif re.search(r"(ss|x|z|ch|sh)es$", last):
        last = last[:-2]
    elif re.search(r"[^s]s$", last):
        last = last[:-1]
    return " ".join([*before, last])


def scene_object(first: Part, relation: str, second: Part) -> str:
    """What a scene is called: "lantern on barrel", "two crates and a sack"."""
    if relation == "and":
        return f"two {plural(first.name)} and {with_article(second.name)}"
    return f"{first.name} {relation} {second.name}"


def scene_captions(first: Part, relation: str, second: Part, atop: bool = True) -> tuple[str, str, str, str]:
    """A scene's captions: short with colours, plain, detailed, and said the other way round.

    relation: one of RELATIONS. atop: of "on", whether it is the top that the first lies on, not a seat. Sides are those
    that the view from azimuth 0 shows, and every caption of a sided scene names them.
    """
    (a, plain_a, long_a), (b, plain_b, long_b) = (
        [with_article(noun) for noun in (p.noun(), p.noun(colored=False), p.noun(True))] for p in (first, second))
    if relation == "on":
        on = "on top of" if atop else "resting on"
        return (f"{a} on {b}", f"{plain_a} on {plain_b}", f"{long_a} {on} {long_b}", f"{b} with {a} on it")
    if relation == "beside":
        return (f"{a} beside {b}", f"{plain_a} next to {plain_b}", f"{long_a} standing beside {long_b}",
                f"{b} with {a} at its side")
    if relation in ("left of", "right of"):
        side, other = relation.split()[0], INVERSE[relation].split()[0]
        return (f"{a} {relation} {b}", f"{plain_a} to the {relation} {plain_b}",
                f"{long_a} on the {side} and {long_b} on the {other}", f"{b} to the {INVERSE[relation]} {a}")
    if relation in SIDES:
        return (f"{a} {relation} {b}", f"{plain_a} {relation} {plain_b}", f"{long_a} standing {relation} {long_b}",
                f"{b} {INVERSE[relation]} {a}")
    if relation != "and":
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    two, plain_two, long_two = (plural(n) for n in (first.noun(), first.noun(colored=False), first.noun(True)))
    return (f"two {two} and {b}", f"two {plain_two} and {plain_b}", f"a pair of {long_two} next to {long_b}",
            f"{b} and two {two}")
