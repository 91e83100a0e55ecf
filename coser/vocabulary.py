"""The words for objects that a checkpoint has learnt, and whether a prompt has one near them.

`python -m coser.vocabulary RENDERS CHECKPOINT` writes two files into the checkpoint's folder:
`vocabulary.json`, {"kinds": {word: assets}, "phrases": {words: assets}, "colors": {word: assets}}, and
`vocabulary.safetensors`, the sentence embeddings of kinds and phrases in that order: `embeddings` int8 [W,D] times
`scales` float16 [W,1], normalised when read: eight bits move a cosine by .001 and halve the file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.data.assets import Asset, last_word
from coser.data.index import original_id
from coser.pipeline import CoSERPipeline
from coser.symmetry import Symmetries, load_symmetries

# Cosine, chosen on 532 captions of held-out assets and the words of the 1,612 assets whose kinds the shipped checkpoint
# has seen longest (with the words of plainer ones that came later, 34 of the 93 below would pass instead of 22):
# 95 % of the captions are called known (98 % of those whose kind is), 22 of 93 prompts for things that were never drawn
# (a helicopter passes for a drone), 1 of 22 in other languages and none of 19 that mean nothing.
KNOWN_FROM = 0.54
NEAR_FROM = 0.45  # below it the nearest word is nearest by chance: most nonsense and other languages lie there
SAME_FROM = 0.85  # cosine; a phrase so near a word that is kept says nothing new
MIN_KIND_COUNT = 3  # assets; of a word seen less often hardly anything has been learnt
SUGGESTED = 3
FILLERS = frozenset("""a an the this that these those some any no not very and or with without of on in at by for from
to into onto over under above below beside behind near next it its is are has have one two three four five six seven
eight nine ten gray silver golden violet magenta dark light bright pale""".split())  # at the end: colours and shades
INNER = re.compile(r"\b(?:of|with|and|on|in|for|from|to|at|by)\b")  # what ends a noun inside a phrase

Embed = Callable[[list[str]], Tensor]  # texts => unit vectors [B,D] float32 on the CPU


@dataclass(frozen=True)
class Verdict:
    """known: whether a word of the prompt, or all of it, lies near a word that was learnt. similarity: how near, a
    cosine; 0 where the prompt names no object at all. nearest: kinds of objects to suggest, the best first."""

    known: bool
    similarity: float
    nearest: tuple[str, ...]

    @property
    def note(self) -> str:
        """What to tell whoever asked, in a sentence or two; "" for known words."""
        if self.known:
            return ""
        near = self.similarity >= NEAR_FROM
        return ("None of these words is close to what this model has learnt ("
                f"{'nearest' if near else 'it knows, for example'}: {', '.join(self.nearest)}). It tries all the same.")


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint has learnt to draw.

    kinds: nouns, with how many assets each had; the commonest first. phrases: whole names of objects ("pine tree"),
    likewise. colors: colour words, likewise. embeddings [W,D]: unit vectors of kinds, then phrases. embed: the
    checkpoint's own text encoder, see `sentence_embedder`.
    """

    kinds: dict[str, int]
    phrases: dict[str, int]
    colors: dict[str, int]
    embeddings: Tensor = field(repr=False)
    embed: Embed = field(repr=False)

    def __post_init__(self):
        words = len(self.kinds) + len(self.phrases)
        if self.embeddings.shape[:1] != (words,):
            raise ValueError(f"embeddings must be one for each of {words} words, got {list(self.embeddings.shape)}")

    @cached_property
    def modifiers(self) -> frozenset[str]:
        """Words that only say more about an object ("wooden" of "wooden house"): alone they name none."""
        heads = {noun for phrase in (*self.kinds, *self.phrases) for noun in _nouns(phrase)}
        return frozenset(word for phrase in self.phrases for word in _words(phrase)) - heads

    def nearest(self, prompt: str) -> Verdict:
        """Whether the model knows what `prompt` asks for, by the cosine between sentence embeddings.

        Compared with the known words are each noun of the prompt (whatever is neither filler, colour nor modifier)
        and the prompt without fillers and colours.
        """
        words = [word for word in _words(prompt) if word not in FILLERS and word not in self.colors]
        if not words:
            return Verdict(False, 0.0, self._commonest())
        nouns = [word for word in dict.fromkeys(words) if word not in self.modifiers]
        texts = [[" ".join(words)], nouns] if nouns else [[" ".join(words)]]  # apart: padding to the longest costs
        cosines = torch.cat([self.embed(part) for part in texts]) @ self.embeddings.T
        similarity = float(cosines.max())
        suggested = cosines[:, :len(self.kinds)].amax(0).topk(min(SUGGESTED, len(self.kinds))).indices.tolist()
        kinds = list(self.kinds)
        nearest = tuple(kinds[i] for i in suggested) if similarity >= NEAR_FROM else self._commonest()
        return Verdict(similarity >= KNOWN_FROM, similarity, nearest)

    def nearest_kind(self, noun: str) -> str | None:
        """The kind nearest to a noun, if it is near enough for the noun to be known."""
        cosines = (self.embed([noun]) @ self.embeddings[:len(self.kinds)].T)[0]
        return list(self.kinds)[int(cosines.argmax())] if float(cosines.max()) >= KNOWN_FROM else None

    def _commonest(self) -> tuple[str, ...]:
        return tuple(self.kinds)[:SUGGESTED]

    def save(self, checkpoint: str | Path) -> None:
        """Writes vocabulary.json and vocabulary.safetensors into a checkpoint's folder."""
        folder = Path(checkpoint)
        words = {"kinds": self.kinds, "phrases": self.phrases, "colors": self.colors}
        (folder / "vocabulary.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", "utf-8")
        scales = (self.embeddings.abs().amax(1, keepdim=True) / 127).half()
        rounded = (self.embeddings / scales.float()).round().clamp(-127, 127).to(torch.int8)
        save_file({"embeddings": rounded, "scales": scales}, folder / "vocabulary.safetensors")


def load_vocabulary(checkpoint: str | Path, embed: Embed) -> Vocabulary | None:
    """The vocabulary in a checkpoint's folder; None where it has none, as hub ids and other models do not."""
    folder = Path(checkpoint)
    if not (folder / "vocabulary.json").is_file():
        return None
    words = json.loads((folder / "vocabulary.json").read_text("utf-8"))
    stored = load_file(folder / "vocabulary.safetensors")
    embeddings = F.normalize(stored["embeddings"].float() * stored["scales"].float(), dim=-1)
    return Vocabulary(words["kinds"], words["phrases"], words["colors"], embeddings, embed)


def usual_symmetries(checkpoint: str | Path, pipeline: CoSERPipeline, vocabulary: Vocabulary | None) -> Symmetries:
    """The symmetries of a checkpoint's kinds, also of nouns near them where it has a vocabulary.

    The pipeline's autoencoder takes the map that was measured with them.
    """
    found = load_symmetries(checkpoint, vocabulary.nearest_kind) if vocabulary else load_symmetries(checkpoint)
    if found.mirror:
        pipeline.vae.set_mirror(*found.mirror)
    return found


def learn_vocabulary(assets: Iterable[Asset], embed: Embed, min_kind_count: int = MIN_KIND_COUNT) -> Vocabulary:
    """The object words of training assets: kinds (last words) of at least `min_kind_count` of them, and their phrases.

    Phrases that mean nearly what another word does are left out, the rarer first. Repainted copies
    (`coser.data.recolor`) give colours alone, scenes of several assets (`coser.data.compose`) nothing: their words are
    their assets'. Raises ValueError when there is no such kind.
    """
    assets = [a for a in assets if a.object.strip() and not a.kinds]
    counts = Counter(last_word(a) for a in assets if a.id == original_id(a.id))
    assets = [a for a in assets if counts[last_word(a)] >= min_kind_count]
    if not assets:
        raise ValueError(f"assets must hold a kind of object at least {min_kind_count} times, "
                         f"got {max(counts.values(), default=0)} at most")
    originals = [a for a in assets if a.id == original_id(a.id)]
    kinds = _by_count(map(last_word, originals))
    phrases = {p: n for p, n in _by_count(a.object.lower() for a in originals).items() if p not in kinds}
    words = [*kinds, *phrases]
    embeddings = torch.cat([embed(words[i:i + 64]) for i in range(0, len(words), 64)])
    kept = _distinct(embeddings, len(kinds))
    return Vocabulary(kinds, {words[i]: phrases[words[i]] for i in kept[len(kinds):]},
                      _by_count(color for a in assets for color in a.colors), embeddings[kept], embed)


def _distinct(embeddings: Tensor, first: int) -> list[int]:
    """Indices of the `first` embeddings [W,D] and of those after them that lie apart from all that are kept."""
    kept = list(range(first))
    for i in range(first, len(embeddings)):
        if float((embeddings[kept] @ embeddings[i]).max()) < SAME_FROM:
            kept.append(i)
    return kept


def read_index(folder: str | Path) -> list[Asset]:
    """The training assets that a folder's index.jsonl lists, of packed assets or of renders; without their geometry.

    Raises ValueError where there is no index.
    """
    index = Path(folder) / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"{folder} must hold an index.jsonl, as folders of packed assets and of renders do")
    rows = [json.loads(line) for line in index.read_text("utf-8").splitlines() if line.strip()]
    return [Asset(row["id"], index, object=row.get("object", ""), colors=tuple(row.get("colors", ())),
                  kinds=tuple(row.get("kinds", ())))
            for row in rows if row.get("split", "train") == "train"]


def sentence_embedder(pipeline: CoSERPipeline) -> Embed:
    """Texts => the mean of their token states under the pipeline's text encoder, as unit vectors."""
    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        encoded = pipeline.encode_prompt(texts)
        states = encoded.states.float()
        mask = torch.ones(states.shape[:2]) if encoded.mask is None else encoded.mask.float()
        return F.normalize((states * mask.to(states.device)[..., None]).sum(1), dim=-1).cpu()
    return embed


def _by_count(words: Iterable[str]) -> dict[str, int]:
    """Words with their counts, the commonest first, equals by the alphabet."""
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))


def _words(text: str) -> list[str]:
    """The words of a text in lower case, of any alphabet; numbers and single letters are none."""
    return re.findall(r"[^\W\d_]+(?:['-]?[^\W\d_]+)+", text.lower())


def _nouns(phrase: str) -> list[str]:
    """What a phrase names: "pile of rocks" -> pile, rocks; "table lamp" -> lamp."""
    return [words[-1] for part in INNER.split(phrase) if (words := _words(part))]


def main(argv: list[str] | None = None) -> None:
    """Learn the words of the training assets that an index lists and write them into a checkpoint's folder."""
    parser = argparse.ArgumentParser(prog="python -m coser.vocabulary", description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path, help="folder of renders or packed assets, whose index.jsonl lists them")
    parser.add_argument("checkpoint", type=Path, help="pipeline folder: its text encoder reads the words")
    parser.add_argument("--min-kind-count", type=int, default=MIN_KIND_COUNT,
                        help="assets that a kind of object must have (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        embed = sentence_embedder(CoSERPipeline.from_pretrained(args.checkpoint))
        vocabulary = learn_vocabulary(read_index(args.index), embed, args.min_kind_count)
        vocabulary.save(args.checkpoint)
    except (ValueError, OSError) as error:
        parser.exit(1, f"coser: {error}\n")
    size = sum((args.checkpoint / f"vocabulary.{kind}").stat().st_size for kind in ("json", "safetensors"))
    print(f"{len(vocabulary.kinds)} kinds, {len(vocabulary.phrases)} phrases, {len(vocabulary.colors)} colours, "
          f"{size / 1000:.0f} kB in {args.checkpoint}")


if __name__ == "__main__":
    main()
