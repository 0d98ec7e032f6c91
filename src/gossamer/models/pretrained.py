"""Models with weights: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PARTS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a hub repository: no weights in other formats, which hold code."""


def locate(model: str) -> Path:
    """The folder of a model: the one that is named, or a copy of the hub's in the cache.

    Raises:
        UserError: a folder without config.json, or no folder and no such model on the hub, or no network.
    """
    if not model:
        raise UserError("model: none given; name a folder with config.json and weights, or a model of the hub")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model: {model} has no config.json")
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"model: {model!r} is no folder; allowed: a folder with config.json and weights, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_PARTS))
    except Exception as error:  # errors of the hub, of the network and of names have no common class
        raise UserError(
            f"model: {model!r} is no folder, and the Hugging Face hub does not give it: {first_line(error)[:200]}"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer's own errors
        raise UserError(f"model: cannot read the tokenizer in {folder}: {first_line(error)[:200]}") from error


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    labels: int | None = None,
    pad_id: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model, or with `labels` a sequence classifier with as many outputs, in evaluation mode.

    A classifier's head (with its pooler) that the folder does not hold is drawn anew; the global random state is left
    as it was.

    Args:
        pad_id: of the rows that a classifier is to read; by it a causal one finds a row's last token. None: its own.

    Raises:
        UserError: weights that are missing or cannot be read; a head of another width.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    kind: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if labels is not None:
        kind, options["num_labels"] = AutoModelForSequenceClassification, labels
        _check_head(folder, labels)
    shown, loud = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that a new head is new is what the caller asked for
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, report = kind.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
            )
    except Exception as error:  # the libraries' own: missing, torn or alien files
        raise UserError(f"model: cannot load {folder}: {first_line(error)[:200]}") from error
    finally:
        logging.set_verbosity(loud)
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(n for n in report["missing_keys"] if labels is None or not _of_head(model, n)):
        raise UserError(f"model: {folder} lacks {len(missing)} weights, such as {missing[0]}")
    if pad_id is not None:
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_id
    model.config.use_cache = False
    model.config.architectures = [type(model).__name__]
    return model.to(device).eval()


def head_width(folder: Path) -> int | None:
    """Outputs of the classification head that a folder holds; None: it holds none."""
    config = json.loads((folder / "config.json").read_text())
    if not any("SequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    return len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)


def _check_head(folder: Path, labels: int) -> None:
    width = head_width(folder)
    if width is not None and width != labels:
        raise UserError(f"model: the classification head of {folder} has {width} outputs, but the task needs {labels}")


def new_parts(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of a classifier's head."""
    return [name for name, _ in model.named_parameters() if _of_head(model, name)]


def _of_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter stands on top of the body; so does BERT's pooler, which only some of its models have."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
