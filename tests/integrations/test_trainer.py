"""`transformers.Trainer`, TRL's `SFTTrainer`, and peft's adapters under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import gossamer
from gossamer import UserError
from gossamer.integrations import for_trainer
from tests.conftest import WORDS, prose
from tests.integrations.conftest import every_method, llama, one_each, rows, same, same_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`"),
]
STEPS, HALF = 6, 3
SAVE = {"save_strategy": "steps", "save_steps": HALF}


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return kind(**{**given, **options})


def trained(folder: Path, model: nn.Module, method: Any, resume: bool = False, **options: Any) -> Trainer:
    groups = options.pop("groups", {})
    args = arguments(folder, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(), optimizer_cls_and_kwargs=for_trainer(args, method, **groups)
    )
    return run(trainer, resume)


def run(trainer: Trainer, resume: bool) -> Trainer:
    """The whole run, or its second half."""
    counted = Counted()
    trainer.add_callback(counted)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{HALF}" if resume else None)
    assert counted.steps == (HALF if resume else STEPS)
    return trainer


class Counted(TrainerCallback):
    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every registered method trains a matrix; accumulation, clipping, decay, a schedule and dropout are on."""
    methods, layers = every_method()
    runs = []
    for resume in (False, True):
        model = llama(dtype, num_hidden_layers=layers)
        options = {**SAVE, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
        groups = {"rules": one_each(model, methods), "fallback_lr": 2e-2}
        runs.append(trained(tmp_path, model, gossamer.AdamW(), resume, groups=groups, **options))
    whole, resumed = runs
    assert len(whole.optimizer.optimizer.state) == len(list(whole.model.parameters()))
    same(whole.model, resumed.model)
    same_state(whole.optimizer, resumed.optimizer)


def test_our_adamw_is_trainers(tmp_path: Path) -> None:
    """With Trainer's own optimizer in float64: decay, schedule, clipping and groups are the same."""
    options = {"weight_decay": 0.3, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    ours = trained(tmp_path, llama(torch.float64), gossamer.AdamW(), **options).model
    theirs = Trainer(
        model=llama(torch.float64), args=arguments(tmp_path, optim="adamw_torch", **options), train_dataset=rows()
    )
    theirs.train()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.model.named_parameters(), strict=True):
        # the order of a handful of operations a step differs, over six steps of numbers of order one
        assert torch.allclose(one, other, rtol=0, atol=1e-13), name
    fresh = dict(llama(torch.float64).named_parameters())
    assert all((param - fresh[name]).abs().max() > 1e-3 for name, param in ours.named_parameters())


def made(folder: Path, model: nn.Module, method: Any, groups: dict[str, Any] | None = None, **options: Any) -> Any:
    """The optimizer that Trainer would make."""
    cls, kwargs = for_trainer(arguments(folder, **options), method, **(groups or {}))
    return cls()(model, **kwargs)


def test_decay_reaches_every_method_and_neither_norms_nor_biases(tmp_path: Path) -> None:
    methods, layers = every_method()
    model = llama(num_hidden_layers=layers)
    opt = made(tmp_path, model, methods[0], {"rules": one_each(model, methods)}, weight_decay=0.1)
    decay = {name: group["weight_decay"] for name, _, group in opt.members()}
    assert decay == {name: 0.0 if "norm" in name else 0.1 for name, _ in model.named_parameters()}
    assert {row.method for row in opt.plan()} == set(gossamer.methods())


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
        (["self_attn", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
        (r".*\.0\.mlp\.up_proj", ["layers.0.mlp.up_proj"]),
    ],
)
def test_target_modules_mean_what_they_mean_to_trainer(tmp_path: Path, targets: Any, chosen: list[str]) -> None:
    opt = made(tmp_path, llama(), "galore", {"rank": 4}, optim_target_modules=targets)
    for row in opt.plan():
        is_chosen = any(f"{module}.weight" in row.name for module in chosen)
        assert row.method == ("galore" if is_chosen else "adamw"), row.name
    assert opt.param_groups[0]["method"] == gossamer.GaLore(rank=4)


def test_a_name_with_hyperparameters_is_the_object(tmp_path: Path) -> None:
    named = made(tmp_path, llama(), "apollo", {"rank": 3, "betas": (0.8, 0.9), "fallback_lr": 0.5})
    object_ = made(tmp_path, llama(), gossamer.Apollo(rank=3, betas=(0.8, 0.9)), {"fallback_lr": 0.5})
    assert named.plan() == object_.plan()
    assert {group["lr"] for group in named.param_groups} == {1e-2, 0.5}


@pytest.mark.parametrize(
    ("method", "groups", "options", "message"),
    [
        ("adamw", {}, {"optim": "adamw_torch"}, "optim='adamw_torch' .* ignored"),
        ("adamw", {}, {"optim_args": "rank=4"}, "optim_args='rank=4' .* the method's"),
        ("adamw", {}, {"adam_beta1": 0.8}, "adam_beta1=0.8 .* pass betas"),
        ("adamw", {}, {"adam_beta2": 0.99}, "adam_beta2"),
        ("adamw", {}, {"adam_epsilon": 1e-6}, "adam_epsilon=1e-06 .* pass eps"),
        ("galor", {}, {}, "did you mean 'galore'"),
        ("galore", {"rnk": 4}, {}, "did you mean 'rank'"),
        (gossamer.AdamW(), {"eps": 1e-6}, {}, r"'eps' belongs in the method: AdamW\(...\)"),
        ("galore", {"rank": 4}, {"optim_target_modules": ["nothing"]}, "names no nn.Linear"),
        ("galore", {"rank": 4}, {"optim_target_modules": ["embed_tokens"]}, "names no nn.Linear"),
        ("galore", {"rank": 4, "rules": [("nothing", gossamer.AdamW())]}, {}, "matches no trainable parameter"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, method: Any, groups: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, llama(), method, groups, **options)


def test_flattened_parameters_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.deepspeed_plugin = object()  # as TrainingArguments(deepspeed=...) does where DeepSpeed is installed
    with pytest.raises(UserError, match="DeepSpeed flattens"):
        for_trainer(args, "adamw")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(llama(), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(UserError, match="FSDP1 flattens"):
            made(tmp_path, wrapped, "adamw")
    finally:
        dist.destroy_process_group()


def test_hyperparameter_search_changes_the_learning_rate(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    cls, kwargs = for_trainer(args, "adamw")
    args.learning_rate = 0.25  # what a search does, between trials
    assert cls()(llama(), **kwargs).param_groups[0]["lr"] == 0.25


# ---- peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_peft_train_and_resume(tmp_path: Path, dora: bool) -> None:
    """lora_A (r, n) and lora_B (m, r): a method of smaller rank trains them, one of larger rank leaves them dense."""
    runs = []
    for resume in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, use_dora=dora, target_modules="all-linear"))
        # LoRA-Pre of rank 2 for the attention; of rank 64, more than the factors have, for the rest
        method, large = gossamer.LoRAPre(rank=2), gossamer.LoRAPre(rank=64)
        options = {**SAVE, "groups": {"rules": [("mlp.*lora_[AB]", large)]}}
        runs.append(trained(tmp_path, model, method, resume, **options))
    whole, resumed = runs
    same(whole.model, resumed.model)
    same_state(whole.optimizer, resumed.optimizer)
    plan = {row.name: row for row in whole.optimizer.optimizer.plan()}
    assert plan.keys() == {name for name, param in whole.model.named_parameters() if param.requires_grad}
    for name, row in plan.items():
        factor = "lora_A" in name or "lora_B" in name
        assert row.method == ("lora-pre" if factor and "self_attn" in name else "adamw"), row
    fresh = llama().state_dict()
    frozen = {key: value for key, value in whole.model.state_dict().items() if "base_layer" in key}
    assert all(torch.equal(value, fresh[key[17:].replace(".base_layer", "")]) for key, value in frozen.items())


# ---- TRL -------------------------------------------------------------------------------------------------------------


def test_sft_trainer_resumes_with_the_same_bits(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"text": prose(60, seed)} for seed in range(24)])
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(WORDS.split())])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    runs = []
    for resume in (False, True):
        args = arguments(tmp_path, SFTConfig, **SAVE, max_length=16, bf16=False)
        trainer = SFTTrainer(
            model=llama(),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=for_trainer(args, "lora-pre-stable", rank=4),
        )
        runs.append(run(trainer, resume))
    whole, resumed = runs
    assert {row.method for row in whole.optimizer.optimizer.plan()} == {"lora-pre-stable", "adamw"}
    same(whole.model, resumed.model)
    same_state(whole.optimizer, resumed.optimizer)
