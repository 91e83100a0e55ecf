"""Several judges asked as one: those that see in different ways err about different things."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.judge import Asked, Judgement, ViewJudge, load_judge


class Judges(Asked):
    """The mean of what several judges say of the words that all of them know.

    One with a trunk of its own and one with a backbone named 70 and 73 % of the objects of 84 held-out rings first,
    both together 79 %. Sides are told by the first alone, whose rule for Janus rings is its own. Their embeddings lie
    end to end.
    """

    def __init__(self, judges: list[ViewJudge]):
        if not judges:
            raise ValueError("judges must be at least one, got none")
        self.judges = judges
        first = judges[0].config
        known = {name: tuple(word for word in first[name] if all(word in j.config[name] for j in judges))
                 for name in ("kinds", "colors")}
        self.config = SimpleNamespace(**known, **{name: first[name] for name in (
            "fronted_kinds", "janus_floor", "janus_ratio")})
        self._columns = {name: [[j.config[name].index(word) for word in words] for j in judges]
                         for name, words in known.items()}

    @property
    def device(self) -> torch.device:
        return self.judges[0].device

    @property
    def fingerprint(self) -> bytes:
        """What tells these judges from others."""
        return b"".join(judge.fingerprint for judge in self.judges)

    def judge_pictures(self, pictures: Tensor) -> Judgement:
        said = [judge.judge_pictures(pictures) for judge in self.judges]
        return Judgement(self._joined([s.embeddings for s in said]), said[0].sectors)

    def embed_text(self, texts: list[str]) -> Tensor:
        return self._joined([judge.embed_text(texts) for judge in self.judges])

    def name_kinds(self, embeddings: Tensor) -> Tensor:
        return self._mean_scores(embeddings, ViewJudge.name_kinds, self._columns["kinds"])

    def name_colors(self, embeddings: Tensor) -> Tensor:
        return self._mean_scores(embeddings, ViewJudge.name_colors, self._columns["colors"])

    def _joined(self, embeddings: list[Tensor]) -> Tensor:
        return torch.cat(embeddings, -1) / math.sqrt(len(self.judges))  # of length 1 again; cosines are means

    def _mean_scores(self, embeddings: Tensor, ask: Callable[[ViewJudge, Tensor], Tensor],
                     columns: list[list[int]]) -> Tensor:
        parts = embeddings.split([judge.config.embedding_dim for judge in self.judges], -1)
        return torch.stack([ask(judge, F.normalize(part, dim=-1)).log_softmax(-1)[:, known]
                            for judge, part, known in zip(self.judges, parts, columns)]).mean(0)


def load_judges(folders: list[Path], dtype: torch.dtype = torch.float32) -> ViewJudge | Judges:
    """The judge of one folder, or those of several as one."""
    judges = [load_judge(folder, dtype) for folder in folders]
    return judges[0] if len(judges) == 1 else Judges(judges)
