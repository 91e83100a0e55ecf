"""ViewJudge: names the object and the colour that views show, tells their sides, and says how near pictures lie to
sentences and to each other.

Conventions:
    pictures  [N,4,128,128] in [0,1]: premultiplied RGB and coverage, the form all parts of the judge take.
    sectors   eighths of the circle of azimuths, sector 0 around azimuth 0 (the front), then on as azimuth grows.
    ring      the views of one object; what is asked of a ring is asked of the mean of its views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from coser.data.assets import with_article
from coser.models.autoencoder import ResidualBlock
from coser.models.efficientnet_lite import FEATURES, EfficientNetLite
from coser.models.text_encoder import SentenceTextEncoder, load_tokenizer
from coser.views import ViewSet

SIZE = 128  # pixels a side of the pictures
SECTORS = 8
PATCH = 4  # no work is done at full resolution
BACKBONE_SIZE = 224  # pixels a side of what a backbone sees, which is what it was trained on
LEVELS = 6  # of each colour channel, for the colours that a backbone is told beside what it sees
PLACES, SECTOR_WIDTH = 4, 64
CLUSTER = 90.0  # degrees: fronts nearer to each other than this are one front
TOP = 5  # words that a verdict lists
MAX_TOKENS = 77
FIRST_SCALE, LARGEST_SCALE = 14.0, 100.0  # of cosines before a softmax (Radford et al. 2021, section 2.4)


def views_to_pictures(views: ViewSet) -> Tensor:
    """ViewSet of at least 128 x 128 pixels => pictures [N,4,128,128]."""
    if min(views.views.shape[-2:]) < SIZE:
        raise ValueError(f"views must be at least {SIZE} pixels a side, got {list(views.views.shape[-2:])}")
    return F.interpolate(torch.cat([views.views, views.masks], 1).float(), (SIZE, SIZE), mode="area")


def color_histogram(pictures: Tensor) -> Tensor:
    """The roots of the shares of colours in what pictures [N,4,S,S] show: [N,6**3], between neighbours by halves."""
    small = F.avg_pool2d(pictures.float(), PATCH).flatten(2)
    coverage = small[:, 3] * (small[:, 3] > 0.5)
    levels = (small[:, :3] / small[:, 3:].clamp_min(1e-6)).clamp(0, 1) * (LEVELS - 1)
    near = (1 - (levels[..., None] - torch.arange(LEVELS, device=levels.device)).abs()).clamp_min(0)
    red, green, blue = near.unbind(1)
    counts = torch.einsum("np,npr,npg,npb->nrgb", coverage, red, green, blue).flatten(1)
    return (counts / coverage.sum(1, keepdim=True).clamp_min(1e-6)).sqrt()


def azimuth_to_sector(azimuths: Tensor) -> Tensor:
    """Azimuths (degrees, any turn) => sectors, integers in [0,8)."""
    return (azimuths / (360 / SECTORS)).round().long() % SECTORS


@lru_cache(maxsize=1)
def _sentence_encoder():
    return load_tokenizer(), SentenceTextEncoder()


@torch.no_grad()
def sentence_states(texts: list[str], batch: int = 64) -> Tensor:
    """The mean MiniLM token state of each text, as the denoiser reads it: [M,384] float32."""
    tokenizer, encoder = _sentence_encoder()
    parts = []
    for i in range(0, len(texts), batch):
        tokens = tokenizer(texts[i:i + batch], padding=True, truncation=True, max_length=MAX_TOKENS,
                           return_tensors="pt")
        mask = tokens.attention_mask[..., None]
        parts.append((encoder(tokens.input_ids, tokens.attention_mask) * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Judgement:
    """What the judge says of N views, float32.

    embeddings [N,D], of length 1. sectors [N,8]: logarithms of the sectors' probabilities.
    """

    embeddings: Tensor
    sectors: Tensor


@dataclass(frozen=True)
class Verdict:
    """A ring of views against the words it was asked for.

    object_rank, color_rank: place of the word among all that the judge knows, 1 = its first guess; color_rank is None
    when no colour was asked for. top_objects, top_colors: its first guesses, best first. object_log_likelihood: the
    logarithm of the probability that it gives the object's word.
    """

    object_rank: int
    color_rank: int | None
    top_objects: tuple[str, ...]
    top_colors: tuple[str, ...]
    object_log_likelihood: float


class Asked:
    """What can be asked of a judge, or of several as one: all that follows from how it sees and names things.

    Needs `judge_pictures`, `name_kinds`, `name_colors`, `device`, and a `config` like ViewJudge's.
    """

    def judge(self, views: ViewSet) -> Judgement:
        """What the judge says of N views of at least 128 x 128 pixels, on the CPU."""
        return self.judge_pictures(views_to_pictures(views))

    def embed(self, views: ViewSet) -> Tensor:
        """Embeddings [N,D] of length 1."""
        return self.judge(views).embeddings

    def front_likeness(self, views: ViewSet) -> Tensor:
        """The probability, for each view, that it was taken from within 22.5 degrees of the front: [N]."""
        return self.judge(views).sectors[:, 0].exp()

    @torch.no_grad()
    def object_and_color(self, views: ViewSet, object_word: str, color_word: str | None = None) -> Verdict:
        """How high a ring of views ranks the words that it was asked for: `verdict` of their embeddings."""
        return self.verdict(self.embed(views), object_word, color_word)

    @torch.no_grad()
    def verdict(self, embeddings: Tensor, object_word: str, color_word: str | None = None) -> Verdict:
        """How high a ring of views with these embeddings [N,D] ranks the words that it was asked for.

        object_word: one of `config.kinds`, or words that end in one ("oak tree"). color_word: one of `config.colors`,
        or None. Raises ValueError for words that the judge was not taught.
        """
        kind = (object_word.split() or [""])[-1].lower()
        if kind not in self.config.kinds:
            raise ValueError(f"object_word must end in one of the {len(self.config.kinds)} kinds of the judge's "
                             f"config, got {object_word!r}")
        if color_word is not None and color_word not in self.config.colors:
            raise ValueError(f"color_word must be one of {', '.join(self.config.colors)}, got {color_word!r}")
        ring = ring_embedding(embeddings).to(self.device)[None]
        objects, colors = self.name_kinds(ring)[0], self.name_colors(ring)[0]
        return Verdict(_rank(objects, self.config.kinds, kind),
                       None if color_word is None else _rank(colors, self.config.colors, color_word),
                       first_guesses(objects, self.config.kinds), first_guesses(colors, self.config.colors),
                       float(objects.log_softmax(-1)[self.config.kinds.index(kind)]))

    @property
    def janus_rule(self) -> dict[str, float]:
        """The measured `floor` and `ratio` for `is_janus`; ValueError when they were never measured."""
        if self.config.janus_floor is None or self.config.janus_ratio is None:
            raise ValueError("this judge has no rule for Janus rings yet; it is measured at the end of its training")
        return {"floor": self.config.janus_floor, "ratio": self.config.janus_ratio}

    def has_front(self, object_word: str) -> bool:
        """Whether the Janus question makes sense for what these words name; trees look alike from all sides."""
        return (object_word.split() or [""])[-1].lower() in self.config.fronted_kinds


class ViewJudge(Asked, ModelMixin, ConfigMixin):
    """Pictures [N,4,128,128] => embeddings that sentences share, and the sector each was taken from.

    What a view shows is asked as a choice between sentences: "a <kind>" for objects, "a <colour> object" for colours.
    Classifiers beside the embedding named no more objects and fewer colours (figures: `coser.train_judge`).
    kinds, colors: the words it chooses from. channels, blocks: widths and residual blocks at 1/4 of the side, half of
    that, and so on. embedding_dim, text_dim: sizes of the shared space and of the sentences' states. fronted_kinds:
    kinds with a front that can be told from their other sides; only of them the Janus question is asked. janus_floor,
    janus_ratio: see `is_janus`. The last three are measured in training. backbone: name of an `EfficientNetLite` that
    stands in for channels and blocks; its weights are others' work on photographs and are not trained. Photographs
    taught it to see things, not to name colours, so it is told a histogram of those.
    """

    @register_to_config
    def __init__(self, kinds: tuple[str, ...], colors: tuple[str, ...], channels: tuple[int, ...] = (32, 64, 128, 256),
                 blocks: tuple[int, ...] = (1, 2, 2, 1), embedding_dim: int = 128, text_dim: int = 384,
                 fronted_kinds: tuple[str, ...] = (), janus_floor: float | None = None,
                 janus_ratio: float | None = None, backbone: str | None = None):
        super().__init__()
        width = FEATURES if backbone else channels[-1]
        self.trunk = EfficientNetLite(backbone).requires_grad_(False) if backbone else self._own_trunk(channels, blocks)
        self.to_embedding = nn.Linear(width + LEVELS**3 * bool(backbone), embedding_dim)
        # where things lie tells sides apart, so this one sees 4 x 4 places
        self.to_sectors = nn.Sequential(nn.Flatten(), nn.Linear(width * PLACES**2, SECTOR_WIDTH), nn.SiLU(),
                                        nn.Linear(SECTOR_WIDTH, SECTORS))
        self.text_projection = nn.Linear(text_dim, embedding_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        # saved with the weights: naming needs no text encoder
        self.register_buffer("kind_states", torch.zeros(len(kinds), text_dim))
        self.register_buffer("color_states", torch.zeros(len(colors), text_dim))

    @staticmethod
    def _own_trunk(channels: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
        layers: list[nn.Module] = [nn.PixelUnshuffle(PATCH), nn.Conv2d(3 * PATCH**2, channels[0], 3, padding=1)]
        for i, (width, count) in enumerate(zip(channels, blocks)):
            if i:
                layers.append(nn.Conv2d(channels[i - 1], width, 2, stride=2))
            layers += [ResidualBlock(width) for _ in range(count)]
        return nn.Sequential(*layers, nn.GroupNorm(channels[-1] // 16, channels[-1]), nn.SiLU())

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by before a softmax."""
        return self.log_scale.float().exp().clamp(max=LARGEST_SCALE)

    @property
    def fingerprint(self) -> bytes:
        """What tells this judge from others."""
        return self.to_embedding.weight.detach().float().cpu().numpy().tobytes()

    def read_words(self) -> None:
        """Takes the sentence states of the kinds and colours; done once, before training."""
        self.kind_states.copy_(sentence_states([with_article(k) for k in self.config.kinds]))
        self.color_states.copy_(sentence_states([with_article(f"{c} object") for c in self.config.colors]))

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """What the trunk makes of pictures: [N,F], and where it lies [N,W,4,4]; all that `say` needs of them."""
        assert pictures.shape[1:] == (4, SIZE, SIZE), pictures.shape
        pictures = pictures.to(self.device)
        on_white = pictures[:, :3] + 1 - pictures[:, 3:]
        features = self._features(on_white)
        seen = features.mean((2, 3))
        if self.config.backbone:
            seen = torch.cat([seen, color_histogram(pictures).to(seen.dtype)], 1)
        return seen, F.adaptive_avg_pool2d(features, PLACES)

    def say(self, seen: Tensor, places: Tensor) -> Judgement:
        """What is said of pictures that were looked at."""
        return Judgement(F.normalize(self.to_embedding(seen).float(), dim=-1),
                         self.to_sectors(places).float().log_softmax(-1))

    def forward(self, pictures: Tensor) -> Judgement:
        return self.say(*self.look(pictures))

    def _features(self, on_white: Tensor) -> Tensor:
        if not self.config.backbone:
            return self.trunk((on_white * 2 - 1).to(self.dtype).contiguous(memory_format=torch.channels_last))
        large = F.interpolate(on_white, (BACKBONE_SIZE, BACKBONE_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        large = large.to(self.dtype).contiguous(memory_format=torch.channels_last)
        # 64 at once outgrow a core's cache: 1.5 s in place of 0.6
        parts = large.split(8 if self.device.type == "cpu" else len(large))
        with torch.no_grad():
            return torch.cat([self.trunk(part) for part in parts])

    def embed_states(self, states: Tensor) -> Tensor:
        """Mean sentence states [M,384] => embeddings [M,D] of length 1."""
        return F.normalize(self.text_projection(states.to(self.device, self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """M sentences => embeddings [M,D] of length 1; their cosines with those of views say how well they fit."""
        return self.embed_states(sentence_states(texts))

    def name_kinds(self, embeddings: Tensor) -> Tensor:
        """Embeddings [M,D] of views or rings => scores [M,K] of the kinds, for a softmax."""
        return self.scale * embeddings @ self.embed_states(self.kind_states).T

    def name_colors(self, embeddings: Tensor) -> Tensor:
        """Embeddings [M,D] of views or rings => scores [M,C] of the colours, for a softmax."""
        return self.scale * embeddings @ self.embed_states(self.color_states).T

    @torch.no_grad()
    def judge_pictures(self, pictures: Tensor, batch: int = 32) -> Judgement:
        """What the judge says of pictures [N,4,128,128] and their mirror images together, on the CPU.

        A mirror image shows the same thing from the mirrored sector. Asking for both told 57 % of the sectors of assets
        kept aside where one told 54 %.
        """
        embeddings, sectors = [], []
        for part in pictures.split(batch):
            said, mirrored = self(part), self(part.flip(-1))
            embeddings.append(F.normalize(said.embeddings + mirrored.embeddings, dim=-1).cpu())
            both = torch.stack([said.sectors, mirrored.sectors[:, -torch.arange(SECTORS) % SECTORS]])
            sectors.append((both.logsumexp(0) - math.log(2)).cpu())
        return Judgement(torch.cat(embeddings), torch.cat(sectors))


def _rank(scores: Tensor, words: tuple[str, ...], word: str) -> int:
    return 1 + int((scores > scores[list(words).index(word)]).sum())


def first_guesses(scores: Tensor, words: tuple[str, ...]) -> tuple[str, ...]:
    """The TOP words with the highest scores [K], best first."""
    return tuple(words[i] for i in scores.argsort(descending=True)[:TOP].tolist())


def load_judge(folder: str | Path, dtype: torch.dtype = torch.float32) -> ViewJudge:
    """The judge saved in `folder`, ready to ask; nothing is looked up on the network."""
    return ViewJudge.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).eval()


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between azimuths, in [0,180]."""
    return ((a - b + 180) % 360 - 180).abs()


def second_front(front_likeness: Tensor, azimuths: Tensor) -> tuple[float, float]:
    """The front-likeness of a ring's most front-like view, and of the most front-like one at least 90 degrees from it.

    front_likeness [N] in [0,1]; azimuths [N], degrees.
    """
    if front_likeness.shape != azimuths.shape or front_likeness.ndim != 1 or not len(azimuths):
        raise ValueError("front_likeness and azimuths must both be [N] with N at least 1, got "
                         f"{list(front_likeness.shape)} and {list(azimuths.shape)}")
    first = front_likeness.argmax()
    far = angular_distance(azimuths, azimuths[first]) >= CLUSTER - 1e-3
    return float(front_likeness[first]), float(front_likeness[far].max()) if bool(far.any()) else 0.0


def is_janus(front_likeness: Tensor, azimuths: Tensor, floor: float, ratio: float) -> bool:
    """Whether a ring shows its front twice, in directions at least 90 degrees apart.

    The second front must be called one with at least the probability `floor`, and with at least `ratio` times the
    probability of the first. Where the first one lies does not matter: a ring that is merely turned has one front.
    """
    first, second = second_front(front_likeness, azimuths)
    return second >= floor and second >= ratio * first


def ring_embedding(embeddings: Tensor) -> Tensor:
    """Embeddings [...,N,D] of a ring's views => the direction of their mean [...,D], of length 1."""
    return F.normalize(embeddings.mean(-2), dim=-1)


def nearest_distances(embeddings: Tensor, reference_embeddings: Tensor) -> Tensor:
    """Cosine distance of each of R rings to the nearest of M reference rings: [R] in [0,2].

    embeddings [R,D], reference_embeddings [M,D]: see `ring_embedding`. For memorisation: generated rings should lie no
    nearer to the training assets than held-out assets do.
    """
    if embeddings.ndim != 2 or reference_embeddings.ndim != 2 or not len(reference_embeddings):
        raise ValueError("embeddings and reference_embeddings must be [R,D] and [M,D] with M at least 1, got "
                         f"{list(embeddings.shape)} and {list(reference_embeddings.shape)}")
    cosines = F.normalize(embeddings, dim=-1) @ F.normalize(reference_embeddings, dim=-1).T
    return 1 - cosines.max(1).values
