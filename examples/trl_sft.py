"""TRL's SFTTrainer, on adapters of peft: the same argument as for Trainer.

python examples/trl_sft.py [--model FOLDER] [--text FILE] [--steps N] [--out FOLDER]

Without a model, a tiny Llama whose tokenizer is made from the text.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gossamer.integrations import for_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a name on the hub")
parser.add_argument("--text", type=Path, default=Path(__file__), help="a line is a row")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="runs/trl_sft")
options = parser.parse_args()
lines = [line for line in options.text.read_text().splitlines() if line.strip()]
if options.model:
    model, tokenizer = (cls.from_pretrained(options.model) for cls in (AutoModelForCausalLM, AutoTokenizer))
else:
    torch.manual_seed(0)
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel()
    bpe.train_from_iterator(lines, BpeTrainer(vocab_size=320, special_tokens=["<eos>", "<pad>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))

args = SFTConfig(
    output_dir=options.out,
    max_steps=options.steps,
    learning_rate=5e-3,
    max_length=64,
    logging_steps=5,
    report_to="none",
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=Dataset.from_list([{"text": line} for line in lines]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    # of an adapter's factors: a rank below r, or their moments stay dense
    optimizer_cls_and_kwargs=for_trainer(args, "lora-pre", rank=4),
)
trainer.train()
