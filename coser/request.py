"""What may be asked for: one checked request, the same for app, command line and API."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from coser.cameras import ELEVATION
from coser.consistency import CONSISTENCY as DEFAULT_CONSISTENCY
from coser.models.block import BASELINES, MIXERS
from coser.pipeline import ELEVATIONS, NUM_VIEWS
from coser.pipeline import GUIDANCE_RESCALE as DEFAULT_GUIDANCE_RESCALE

PROMPT_LENGTH = (1, 300)  # characters; the pipeline reads the first 64 tokens, so hardly a word of these is lost
GUIDANCE_SCALE = (1.0, 12.0)
NUM_INFERENCE_STEPS = (1, 50)
SEED = (0, 2**31 - 1)
GUIDANCE_RESCALE = (0.0, 1.0)
SKIP_GUIDANCE_SCALE = (0.0, 6.0)
CONSISTENCY = (0.0, 1.0)
REDRAW = (0.0, 0.9)
MAX_FACES = (500, 200_000)
TEXTURE_SIZES = (512, 1024, 2048, 4096)  # pixels a side
COLORING = ("texture", "vertices")
ORIGINS = ("feet", "center")
SYMMETRY = {"none": (), "auto": None, "mirror": ("mirror",), "back": ("back",), "both": ("mirror", "back"),
            "quarter": ("mirror", "quarter"), "round": ("mirror", "round")}  # those of coser.pipeline.SYMMETRIES
MODULES = (*MIXERS, *BASELINES)  # that a checkpoint may have between its views
LONGEST_SIDE = (0.01, 100.0)  # metres


@dataclass(frozen=True)
class GenerationRequest:
    """What a visitor asks for, checked on construction: ValueError names the field, its value and what is allowed.

    prompt: 1 to 300 characters after trimming. num_views: 4 to 24, a closed ring. guidance_scale: 1 to 12.
    guidance_rescale: 0 to 1, how much of what guidance does to brightness and contrast is taken back.
    skip_guidance_scale: 0 to 6, how far views move away from what each would show by itself: they agree better, and
    show what was asked for less often.
    num_inference_steps: 1 to 50. elevation: 0 to 30 degrees. seed: 0 to 2**31 - 1; with `randomize_seed` it is
    drawn anew and the drawn one is reported back. consistency: 0 to 1, how much of the views is replaced by the
    object that they make together, at some steps. redraw: 0 to 0.9, the share of the steps that is taken once more,
    from the finished views noised again: tidier objects, named a little less often. negative_prompt: at most 300
    characters. mixers: the modules between views that work, some of adjacent, trajectory, glance, rectification,
    dense and temporal; those of the checkpoint that are left out are switched off. None: all that it has. symmetry:
    what the object is pulled to, one of SYMMETRY: "none" to nothing, "auto" to what the prompt's kind of object
    usually has, "mirror" to left and right alike, "back" to front and back, "both" to both, "quarter" to four sides
    alike, "round" to all. one_by_one: objects of a prompt for several ("a lantern on a barrel") are drawn one by
    one and put together (`coser.scene_prompts`); else in one go.
    """

    prompt: str
    num_views: int = 12
    guidance_scale: float = 4.0
    num_inference_steps: int = 20
    elevation: float = ELEVATION
    seed: int = 0
    randomize_seed: bool = False
    consistency: float = DEFAULT_CONSISTENCY
    negative_prompt: str = ""
    mixers: tuple[str, ...] | None = None
    symmetry: str = "none"
    one_by_one: bool = True
    guidance_rescale: float = DEFAULT_GUIDANCE_RESCALE
    skip_guidance_scale: float = 0.0
    redraw: float = 0.0

    def __post_init__(self):
        checked = {
            "prompt": _text("prompt", self.prompt, *PROMPT_LENGTH),
            "num_views": _whole("num_views", self.num_views, *NUM_VIEWS),
            "guidance_scale": _number("guidance_scale", self.guidance_scale, *GUIDANCE_SCALE),
            "num_inference_steps": _whole("num_inference_steps", self.num_inference_steps, *NUM_INFERENCE_STEPS),
            "elevation": _number("elevation", self.elevation, *ELEVATIONS),
            "seed": 0 if self.randomize_seed is True and self.seed is None else _whole("seed", self.seed, *SEED),
            "consistency": _number("consistency", self.consistency, *CONSISTENCY),
            "negative_prompt": _text("negative_prompt", self.negative_prompt, 0, PROMPT_LENGTH[1]),
            "mixers": None if self.mixers is None else _some_of("mixers", self.mixers, MODULES),
            "guidance_rescale": _number("guidance_rescale", self.guidance_rescale, *GUIDANCE_RESCALE),
            "skip_guidance_scale": _number("skip_guidance_scale", self.skip_guidance_scale, *SKIP_GUIDANCE_SCALE),
            "redraw": _number("redraw", self.redraw, *REDRAW),
            "symmetry": _one_of("symmetry", self.symmetry, tuple(SYMMETRY)),
        }
        for name in ("randomize_seed", "one_by_one"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {_shown(getattr(self, name))}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def with_drawn_seed(self) -> "GenerationRequest":
        """The request with its seed decided: drawn from the whole range where `randomize_seed` asks for it."""
        if not self.randomize_seed:
            return self
        return replace(self, seed=secrets.randbelow(SEED[1] + 1), randomize_seed=False)


@dataclass(frozen=True)
class AssetOptions:
    """What the asset shall be like, decided after the views: checked on construction as a GenerationRequest is.

    max_faces: the budget of triangles, 500 to 200,000. texture_size: pixels a side, 512, 1024, 2048 or 4096.
    coloring: "texture", or "vertices" for colours at the vertices and no texture. origin: "feet" puts the object on
    y = 0, in the middle over (0, 0, 0); "center" puts the middle of its box there. longest_side: of that box, metres,
    0.01 to 100.
    """

    max_faces: int = 10_000
    texture_size: int = 1024
    coloring: str = "texture"
    origin: str = "feet"
    longest_side: float = 1.0

    def __post_init__(self):
        checked = {"max_faces": _whole("max_faces", self.max_faces, *MAX_FACES),
                   "texture_size": _one_of("texture_size", self.texture_size, TEXTURE_SIZES),
                   "coloring": _one_of("coloring", self.coloring, COLORING),
                   "origin": _one_of("origin", self.origin, ORIGINS),
                   "longest_side": _number("longest_side", self.longest_side, *LONGEST_SIDE)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _one_of(name: str, value: object, allowed: tuple) -> object:
    found = [a for a in allowed if type(value) in (str, int, float) and a == value]
    if not found:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {_shown(value)}")
    return found[0]


def _some_of(name: str, values: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(values, (tuple, list)) or any(value not in allowed for value in values):
        raise ValueError(f"{name} must be some of {', '.join(allowed)}, got {_shown(values)}")
    return tuple(name for name in allowed if name in values)


def _text(name: str, value: object, shortest: int, longest: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {_shown(value)}")
    text = " ".join(value.split())
    if not shortest <= len(text) <= longest:
        raise ValueError(f"{name} must have {shortest} to {longest} characters, got {len(text)}")
    return text


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}")
    return float(value)


def _whole(name: str, value: object, low: int, high: int) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {_shown(value)}")
    return int(value)


def _shown(value: object) -> str:
    """A value for an error message, short whatever was sent."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
