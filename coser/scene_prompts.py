"""Sentences that ask for several objects, taken apart: which objects, how many of each, and how they stand.

A model that has learnt single objects draws "a lantern on a barrel" as neither. Its objects are drawn one by one then,
each from a prompt of its own, and put together in space (`coser.scene_meshes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coser.data.assets import before_details, with_article
from coser.data.scene_words import COLORS, LEADING, SIZES, metres, singular

# What no training scene is made of, but people ask for; metres, the longest side
ASKED_FOR = SIZES | metres("""ship 20, boat 5, sailboat 6, spaceship 12, rocket 15, plane 10, airplane 12,
    helicopter 10, bus 11, train 15, tank 7, bicycle 1.7, motorcycle 2.1, hill 12, mountain 30, island 15, pond 4,
    bridge 10, hut 4, cabin 6, shop 8, temple 20, pyramid 30, door 2, gate 3, fence 2, wall 3, rug 1.8, carpet 1.8,
    mat 0.9, basket 0.45, hat 0.3, sword 1.0, axe 0.9, shield 0.7, pistol 0.25, gun 0.3, rifle 1.0, hammer 0.4,
    key 0.1, coin 0.06, ring 0.05, gem 0.1, crystal 0.4, heart 0.3, star 0.4, flower 0.4, tulip 0.4, rose 0.4,
    carrot 0.2, egg 0.06, fish 0.35, bird 0.25, duck 0.35, chicken 0.4, penguin 0.8, parrot 0.35, owl 0.35, snake 1.2,
    spider 0.1, turtle 0.5, bear 1.8, elephant 4, lion 2, tiger 2.2, monkey 0.8, mouse 0.12, rabbit 0.4, ball 0.22,
    clock 0.3, phone 0.15, camera 0.15, guitar 1.0, piano 1.5, drum 0.5, flag 1.5, ghost 1.7, witch 1.7, king 1.8,
    queen 1.7, soldier 1.8, boy 1.4, girl 1.4, dragon 5, dinosaur 6, unicorn 2.2, gnome 0.4, teapot 0.2, kettle 0.25,
    cookie 0.08, pizza 0.35, ice cream 0.15, present 0.3, gift 0.3, toy 0.3""")
MOST_OBJECTS, MOST_COPIES = 4, 4
NUMBERS = {"a": 1, "an": 1, "the": 1, "one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
_NOUNS = {word for name in ASKED_FOR for word in name.split()[-1:]}  # an orange is one, and a colour
_EACH = rf"(?:{'|'.join(NUMBERS)})\s"  # what a new object begins with: "a red and white mushroom" is one
_STANDING = r"(?:(?:sitting|standing|lying|resting|placed|put)\s)?"
_PHRASES = {"on": "on top of|on|upon|atop", "beside": "beside|next to|near",
            "left of": "(?:(?:to|on|at) the )?left of", "right of": "(?:(?:to|on|at) the )?right of",
            "in front of": "in front of", "behind": "behind", "and": "and"}  # of coser.data.scene_words.RELATIONS
_RELATION = re.compile(rf"\s{_STANDING}(?:"
                       + "|".join(f"(?P<r{i}>{phrase})" for i, phrase in enumerate(_PHRASES.values()))
                       + rf")\s(?={_EACH})")
_LISTED = re.compile(rf",\s(?:and\s)?(?={_EACH})")
# "a barrel with a lantern on it": the other way round
_ATOP = re.compile(rf"^(?P<second>{_EACH}.+?)\swith\s(?P<first>{_EACH}.+?)\son (?:it|top|top of it)$")
# Before "and" these begin what belongs to one object: "a knight with a sword and a shield"
_BELONGING = re.compile(r"\b(?:with|of|in|holding|wearing|carrying|made|between)\b")


@dataclass(frozen=True)
class SceneObject:
    """One kind of object of a scene. prompt: of a single one, "a brown barrel". count: how many of them."""

    prompt: str
    count: int = 1

    @property
    def name(self) -> str:
        """Its noun with what describes it, without article: "brown barrel"."""
        return before_details(self.prompt.split(" ", 1)[1])


@dataclass(frozen=True)
class ScenePlan:
    """What a sentence asks for: kinds of objects, and what relates each after the first to all that come before it.

    relations: of `coser.data.scene_words.RELATIONS`, one fewer than objects; "a cat on a chair beside a table" is a cat
    that is "on" a chair, both "beside" a table. Empty for several copies of one object.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[str, ...]


def scene_plan(prompt: str) -> ScenePlan | None:
    """What a prompt asks for, where that is several objects; None where it is one, or more than can be told apart.

    Objects begin with an article or a number up to MOST_COPIES; there are at most MOST_OBJECTS kinds of them.
    """
    text = _LISTED.sub(" and ", " ".join(prompt.lower().split()).rstrip(" .!"))
    if re.search(r"[,;:.]", text):
        return None
    names, relations, begin = [], [], 0
    for found in _RELATION.finditer(text):
        relation = next(name for i, name in enumerate(_PHRASES) if found[f"r{i}"])
        if relation != "and" or not _BELONGING.search(text[begin:found.start()]):
            names.append(text[begin:found.start()])
            relations.append(relation)
            begin = found.end()
    names.append(text[begin:])
    if not relations and (turned := _ATOP.match(text)):
        names, relations = [turned["first"], turned["second"]], ["on"]
    objects = [_scene_object(name) for name in names]
    if None in objects or len(objects) > MOST_OBJECTS or len(objects) == objects[0].count == 1:
        return None
    if any(relation == "on" and one.count > 1 for relation, one in zip(relations, objects[1:])):
        return None
    return ScenePlan(tuple(objects), tuple(relations))


def _scene_object(text: str) -> SceneObject | None:
    """"two brown crates" => a brown crate, twice."""
    number, _, noun = text.partition(" ")
    head = before_details(noun)
    if number not in NUMBERS or not re.search(r"[^\W\d_]", head):  # "two of them" names nothing
        return None
    if set(head.split()) <= COLORS | LEADING and head.split()[-1] not in _NOUNS:  # nor does the first of "a red and a
        return None  # blue barrel"
    count = NUMBERS[number]
    if count > 1:
        noun = singular(head) + noun[len(head):]
    return SceneObject(with_article(noun), count)


class LifeSizes:
    """How large objects are in life, in metres: of the names in ASKED_FOR, or like the nearest of these.

    embed: texts => unit vectors [B,D], to find the nearest name by; without one, what is not listed measures a metre.
    """

    def __init__(self, embed: Callable[[list[str]], Tensor] | None = None):
        self.embed = embed
        self._embeddings: Tensor | None = None

    def of(self, name: str) -> float:
        """The longest side of what a noun with its adjectives names, such as "brown barrel"."""
        words = name.lower().split()
        listed = [n for n in ASKED_FOR if n.split()[-1] == words[-1] and set(n.split()) <= set(words)]
        if listed:
            return ASKED_FOR[max(listed, key=lambda n: len(n.split()))]
        if self.embed is None:
            return 1.0
        if self._embeddings is None:
            self._embeddings = torch.cat([self.embed([n]) for n in ASKED_FOR])
        return list(ASKED_FOR.values())[int((self._embeddings @ self.embed([words[-1]])[0]).argmax())]
