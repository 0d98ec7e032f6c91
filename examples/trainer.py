"""Hugging Face Trainer: one argument more, `optimizer_cls_and_kwargs`.

python examples/trainer.py [--model FOLDER] [--text FILE] [--steps N] [--out FOLDER] [--resume]

Without a model, a Llama of 64,000 parameters reads bytes.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

import gossamer
from gossamer.integrations import for_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a name on the hub, with its tokenizer")
parser.add_argument("--text", type=Path, default=Path(__file__))
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--length", type=int, default=64, help="tokens of a row")
parser.add_argument("--out", default="runs/trainer")
parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
options = parser.parse_args()

if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))
    ids = list(options.text.read_bytes())
starts = range(0, max(1, len(ids) - options.length), options.length // 4)
rows = [{"input_ids": row, "labels": row} for row in (ids[start : start + options.length] for start in starts)]

args = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    learning_rate=3e-3,
    weight_decay=0.01,
    warmup_steps=5,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=8,
    save_steps=max(1, options.steps // 2),
    logging_steps=5,
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=rows,
    optimizer_cls_and_kwargs=for_trainer(args, gossamer.LoRAPre(rank=16), fallback_lr=6e-3),
)
trainer.train(resume_from_checkpoint=options.resume)
