"""Linear layers whose weight is low-rank, low-rank plus sparse, or low-rank beside a frozen matrix."""

from gossamer.layers.adapters import Adapter, adapt
from gossamer.layers.apply import apply, dense_state_dict, factored, merge_all, plain, stand_ins
from gossamer.layers.contract import FactoredLinear, Parametrization, Restart, merge, refactorize, weight
from gossamer.layers.lora import LoRA, LoRALinear, ReLoRA, ReLoRALinear
from gossamer.layers.loro import LORO, LOROLinear
from gossamer.layers.low_rank import LowRank, LowRankLinear
from gossamer.layers.sltrain import SLTrain, SLTrainLinear

PARAMETRIZATIONS: dict[str, type[Parametrization]] = {
    "low-rank": LowRank,
    "sltrain": SLTrain,
    "lora": LoRA,
    "relora": ReLoRA,
    "loro": LORO,
}
"""By the name that the command line knows."""


def name_of(parametrization: Parametrization) -> str:
    """The parametrization's name in `PARAMETRIZATIONS`."""
    return next(name for name, cls in PARAMETRIZATIONS.items() if cls is type(parametrization))


__all__ = [
    "LORO",
    "PARAMETRIZATIONS",
    "Adapter",
    "FactoredLinear",
    "LOROLinear",
    "LoRA",
    "LoRALinear",
    "LowRank",
    "LowRankLinear",
    "Parametrization",
    "ReLoRA",
    "ReLoRALinear",
    "Restart",
    "SLTrain",
    "SLTrainLinear",
    "adapt",
    "apply",
    "dense_state_dict",
    "factored",
    "merge",
    "merge_all",
    "name_of",
    "plain",
    "refactorize",
    "stand_ins",
    "weight",
]
