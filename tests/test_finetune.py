"""Fine-tuning: what is learnt is the answer and nothing else, in the same loop, to the same bits after a resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from gossamer.cli import main
from gossamer.data import IGNORED, Batch, TaskConfig
from gossamer.data.glue import GLUE, LabelledRows, read_glue
from gossamer.data.instructions import ExampleRows, open_instructions, render
from gossamer.distributed import World
from gossamer.errors import UserError
from gossamer.evaluate import token_loss
from gossamer.evaluate.labels import predict_labels
from gossamer.layers import Adapter, adapt, dense_state_dict, stand_ins
from gossamer.models import load_model, load_tokenizer
from gossamer.optim.contract import build, methods
from gossamer.train import Finetune, finetune, finetuning
from gossamer.train.finetuning import check_packing
from gossamer.train.schedule import Schedule


def make(base: Path, out: Path, method: str = "adamw", **changes: Any) -> Finetune[Any, Any]:
    task = {name: changes.pop(name) for name in list(changes) if name in TaskConfig.__dataclass_fields__}
    hyperparameters = {"rank": 4} if "rank" in methods()[method].cls.__dataclass_fields__ else {}
    defaults = {"device": "cpu", "batch_size": 4, "steps": 4, "lr": 1e-3}
    return Finetune(
        build(method, **hyperparameters), model=str(base), data=TaskConfig(**task), out=out, **(defaults | changes)
    )


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def events(out: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["event"] in kinds]


def last(out: Path) -> Path:
    return sorted((out / "checkpoints").iterdir())[-1]


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "question", "none"])
def test_only_the_answer_and_its_end_are_targets(base: Path, sums: str, template: Any) -> None:
    tokenizer: Any = load_tokenizer(base)
    data = open_instructions(TaskConfig("instructions", sums, template=template, examples=3), tokenizer, 256)
    batch = data.train.batch(0, 3, None)
    for row, (a, b) in enumerate([(0, 0), (1, 3), (2, 6)]):
        wanted = batch.targets[row][batch.targets[row] != IGNORED].tolist()
        assert wanted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(wanted[:-1]) == f" {a + b}"
        whole = render(template, f"{a}+{b}", "", tokenizer) + f" {a + b}"
        assert tokenizer.decode(batch.inputs["input_ids"][row], skip_special_tokens=True).startswith(whole)


def test_alpaca_says_more_where_there_is_an_input() -> None:
    plain, more = render("alpaca", "Add.", "", None), render("alpaca", "Add.", "1 and 2", None)
    assert plain.endswith("completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n")
    assert "paired with an input" in more and "### Input:\n1 and 2\n\n### Response:\n" in more


def test_packed_examples_do_not_see_one_another(base: Path, sums: str) -> None:
    """In float64: the loss of a packed row is the sum of the losses of its examples alone, up to rounding."""
    tokenizer: Any = load_tokenizer(base)
    packed = open_instructions(TaskConfig("instructions", sums, template="none", packing=True), tokenizer, 40)
    alone = open_instructions(TaskConfig("instructions", sums, template="none"), tokenizer, 40)
    assert packed.train.num_rows < alone.train.num_rows
    model = load_model(base, dtype=torch.float64, device=torch.device("cpu")).requires_grad_(False)
    check_packing(model, torch.device("cpu"))

    def total(rows: ExampleRows) -> float:
        batch = rows.batch(0, rows.num_rows, None)
        others = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
        return float(token_loss(model, batch.inputs["input_ids"], batch.targets, **others))

    # the loss itself is summed in fp32, whose rounding is 6e-8 a term
    assert total(packed.train) == pytest.approx(total(alone.train), rel=1e-5)


def test_a_model_that_packs_with_leaks_is_found_out() -> None:
    class Mean(nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            logits = input_ids.float().cumsum(1)[..., None].expand(-1, -1, 3)
            return type("Output", (), {"logits": logits})

    with pytest.raises(UserError, match="see one another in Mean"):
        check_packing(Mean(), torch.device("cpu"))


def test_what_is_too_long_or_refused_is_counted(base: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"query": f"what is {i}?", "response": "word " * (400 if i == 3 else 1), "type": kind}
        for i, kind in enumerate(["GSM_Rephrased", "MATH_FOBAR", "GSM_SV", "GSM_SV", "GSM_SV", "GSM_FOBAR", "GSM_SV"])
    ]
    records.insert(2, {"query": "nothing?", "response": " ", "type": "GSM_SV"})
    path = write_jsonl(tmp_path / "math.jsonl", records)
    config = TaskConfig("metamath", path, examples=3, valid_examples=1)
    data = open_instructions(config, load_tokenizer(base), 300)
    assert data.counts["train"]["passed_over"] == {"not of GSM8K": 1, "empty": 1, "longer than 300 tokens": 1}
    assert (data.train.num_rows, data.valid.num_rows, data.counts["train"]["read"]) == (3, 1, 7)
    assert "1 longer than 300 tokens" in data.summary


def test_as_many_are_held_out_as_are_asked_for(base: Path, tmp_path: Path) -> None:
    records = [{"instruction": f"say {i}", "output": str(i)} for i in range(60)]
    path, tokenizer = write_jsonl(tmp_path / "all.jsonl", records), load_tokenizer(base)
    for asked, held in ((None, 6), (25, 25)):
        data = open_instructions(TaskConfig("instructions", path, valid_examples=asked), tokenizer, 400)
        assert [data.counts[part]["examples"] for part in ("train", "valid")] == [60 - held, held]
    with pytest.raises(UserError, match="no training examples are left"):
        open_instructions(TaskConfig("instructions", path, valid_examples=60), tokenizer, 400)


def test_codefeedback_is_cut_after_its_first_block(base: Path, tmp_path: Path) -> None:
    answer = "Here:\n```python\nx = 1\n```\nThat was all.\n```\ny\n```"
    records: list[dict[str, object]] = [{"query": "x?", "answer": answer}] * 3 + [{"query": "y?", "answer": "No code."}]
    tokenizer: Any = load_tokenizer(base)
    data = open_instructions(
        TaskConfig("codefeedback", write_jsonl(tmp_path / "c.jsonl", records), valid_examples=1), tokenizer, 400
    )
    targets = data.train.batch(0, 1, None).targets[0]
    said = tokenizer.decode(targets[targets != IGNORED], skip_special_tokens=True)
    assert said == " Here:\n```python\nx = 1\n```"
    assert data.counts["train"]["passed_over"] == {"no code block": 1}


def test_every_epoch_has_every_row_once(base: Path, sums: str) -> None:
    data = open_instructions(TaskConfig("instructions", sums, template="none"), load_tokenizer(base), 64)
    rows = data.train
    first = rows.batch(0, rows.num_rows, seed=5)
    assert first.count == rows.num_tokens == rows.batch(0, rows.num_rows, None).count
    again = Batch({"x": torch.zeros(5, 2)}, torch.zeros(5, 2))
    assert [len(part.targets) for part in again.split(2)] == [2, 2, 1]


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods())
def test_every_method_fine_tunes(base: Path, sums: str, tmp_path: Path, method: str) -> None:
    config = make(base, tmp_path, method, task="instructions", data=sums, template="none", steps=2)
    result = finetune(config, quiet=True)
    assert result.score.loss < 7  # ln 300 = 5.7 is what random weights have
    start = events(tmp_path, "start")[0]
    assert start["config"]["data"]["task"] == "instructions" and start["data"]["train"]["examples"] == 54
    trained = safetensors.torch.load_file(last(tmp_path) / "model.safetensors")
    before = safetensors.torch.load_file(base / "model.safetensors")
    assert all(not torch.equal(trained[name], before[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize(("kind", "dtype"), [(None, "bfloat16"), ("lora", "float32"), ("dora", "bfloat16")])
def test_a_run_that_dies_ends_with_the_same_bits(
    base: Path, sums: str, tmp_path: Path, kind: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter(kind, rank=2, dropout=0.1 if kind else 0.0)
    options = {"task": "instructions", "data": sums, "packing": True, "template": "none", "max_length": 64}
    options |= {"adapter": adapter, "dtype": dtype, "steps": 5, "save_every": 2, "micro_batch_size": 2}
    finetune(make(base, tmp_path / "whole", "mlorc", **options), quiet=True)

    calls, loss = iter(range(1, 100)), finetuning.token_loss

    def die(*args: Any, **others: Any) -> Any:
        if next(calls) == 7:  # in the fourth step, of two micro-batches each
            raise KeyboardInterrupt
        return loss(*args, **others)

    monkeypatch.setattr(finetuning, "token_loss", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(make(base, tmp_path / "torn", "mlorc", **options), quiet=True)
    monkeypatch.undo()
    finetune(make(base, tmp_path / "torn", "mlorc", **options, resume=True), quiet=True)
    one, other = last(tmp_path / "whole"), last(tmp_path / "torn")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert events(tmp_path / "whole", "train", "eval") == events(tmp_path / "torn", "train", "eval")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_checkpoint_with_adapters_is_the_plain_model_that_they_make(base: Path, kind: Any) -> None:
    model: Any = load_model(base, dtype=torch.float64, device=torch.device("cpu"))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    names = adapt(model, Adapter(kind, rank=2), seed=3)
    assert len(names) == 14 and len(list(stand_ins(model))) == 14
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    merged = dense_state_dict(model)
    assert merged.keys() == plain.keys()
    assert not torch.equal(merged[f"{names[0]}.weight"], plain[f"{names[0]}.weight"])
    assert torch.equal(merged["lm_head.weight"], plain["lm_head.weight"])
    other = load_model(base, dtype=torch.float64, device=torch.device("cpu"))
    other.load_state_dict(merged)
    ids = torch.arange(10)[None]
    # the same function by other sums in float64; a few hundred terms of size one
    assert torch.allclose(model(ids).logits, other(ids).logits, rtol=0, atol=1e-12)


def test_adapters_train_alone_and_by_any_method(base: Path, sums: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "instructions", "data": sums, "template": "none"}
    config = make(base, tmp_path, "galore", adapter=Adapter("lora", rank=8, targets=("q_proj", "v_proj")), **options)
    finetune(config, quiet=True)
    start = events(tmp_path, "start")[0]
    assert {row["method"] for row in start["plan"]} == {"galore"}
    assert all("lora_" in row["name"] for row in start["plan"]) and len(start["plan"]) == 8
    assert len(start["replaced"]) == 4
    saved = safetensors.torch.load_file(last(tmp_path) / "model.safetensors")
    before = safetensors.torch.load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(saved[name], before[name])}
    assert changed == {f"{name}.weight" for name in start["replaced"]}


def test_masters_are_fp32_weights_and_bf16_products(base: Path, sums: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "instructions", "data": sums, "template": "none"}
    losses = {}
    for dtype in ("float32", "masters", "bfloat16"):
        finetune(make(base, tmp_path / dtype, dtype=dtype, **options), quiet=True)
        losses[dtype] = [event["loss"] for event in events(tmp_path / dtype, "train")]
        weights = safetensors.torch.load_file(last(tmp_path / dtype) / "model.safetensors")
        width = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        assert {value.dtype for value in weights.values()} == {width}
    assert losses["masters"] != losses["float32"]
    # bf16 keeps 8 bits: logits of size one are off by 4e-3, and so is the loss
    assert losses["masters"] == pytest.approx(losses["float32"], abs=0.03)


def test_micro_batches_change_nothing_but_rounding(base: Path, sums: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "instructions", "data": sums, "template": "none"}
    for name, micro in (("whole", None), ("parts", 1)):
        finetune(make(base, tmp_path / name, micro_batch_size=micro, **options), quiet=True)
    one, other = ([event["loss"] for event in events(tmp_path / name, "train")] for name in ("whole", "parts"))
    assert one == pytest.approx(other, rel=1e-5)  # fp32 sums in another order


def test_the_command_line_fine_tunes(base: Path, sums: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"finetune --model {base} --task instructions --data {sums} --template none --steps 2 --device cpu".split()
    words += f"--method lora-pre --method.rank 2 --adapter.kind lora --adapter.rank 4 --out {tmp_path / 'run'}".split()
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "run" / "log.jsonl")
    assert "lora beside 14 layers" in captured.err
    assert "instructions: 54 training examples, 6 of validation" in captured.err


def test_epochs_become_steps(base: Path, sums: str, tmp_path: Path) -> None:
    finetune(
        make(base, tmp_path, task="instructions", data=sums, template="none", epochs=0.5, batch_size=9), quiet=True
    )
    assert len(events(tmp_path, "train")) == 3  # half of 54 rows, 9 a step


def test_a_linear_schedule_ends_at_its_floor() -> None:
    rate = Schedule(10, 2, 0.0, decay="linear")
    assert [rate(step) for step in range(10)] == pytest.approx([0.5, 1, *(1 - i / 8 for i in range(1, 9))])


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_a_classifier_learns_and_is_scored(base: Path, colours: Path, tmp_path: Path) -> None:
    config = make(base, tmp_path, task="glue/sst2", data=str(colours), steps=40, batch_size=16, lr=3e-3, eval_every=20)
    result = finetune(config, quiet=True)
    assert result.score.metrics["accuracy"] >= 0.9 and result.score.tokens == 40
    assert [event["score"] for event in events(tmp_path, "eval", "end")][-1] == result.score.score
    head = json.loads((last(tmp_path) / "config.json").read_text())["architectures"]
    assert head == ["LlamaForSequenceClassification"]
    again = finetune(make(last(tmp_path), tmp_path / "more", task="glue/sst2", data=str(colours), steps=1), quiet=True)
    assert again.score.metrics["accuracy"] >= 0.9  # its head was read, not drawn anew


def test_what_a_row_stands_beside_does_not_change_its_label(base: Path, colours: Path, tmp_path: Path) -> None:
    """A causal model looks for the last token that is no padding, whatever its own configuration calls padding."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    rows = LabelledRows(read_glue("glue/sst2", str(colours), "dev"), load_tokenizer(folder), 32, False)
    assert rows.pad_id != 7 and not rows.batch(0, 40, None).inputs["attention_mask"].all()
    here = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load_model(folder, labels=2, pad_id=rows.pad_id, **here)
    alone, together = (predict_labels(model, rows, size, World(0, 1, torch.device("cpu"))) for size in (1, 40))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_trained_beside_adapters(base: Path, colours: Path, tmp_path: Path) -> None:
    config = make(base, tmp_path, task="glue/sst2", data=str(colours), adapter=Adapter("lora", rank=2), steps=2)
    finetune(config, quiet=True)
    names = [row["name"] for row in events(tmp_path, "start")[0]["plan"]]
    assert "score.weight" in names and all("lora_" in name for name in names if name != "score.weight")
    assert "score.weight" in safetensors.torch.load_file(last(tmp_path) / "model.safetensors")


def test_a_score_is_regression_where_the_label_is_a_number(base: Path, tmp_path: Path) -> None:
    for part, count in (("train", 12), ("dev", 6)):
        rows = [f"{i}\ta {i % 6}\tb {i % 6}\t{i % 6}.0" for i in range(count)]
        (tmp_path / f"{part}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tscore", *rows]) + "\n")
    result = finetune(make(base, tmp_path / "run", task="glue/stsb", data=str(tmp_path), steps=3), quiet=True)
    assert set(result.score.metrics) == {"pearson", "spearman"}


def test_an_encoder_sees_pairs_as_pairs(tmp_path: Path) -> None:
    """BERT: token types tell the sentences apart; its pooler and its head are new, and trained beside adapters."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "0", "1", "2", "3", "4", "5"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path)
    rows = "".join(f"{i}\ta {i % 6}\tb {'0 ' * (i % 2)}{i % 6}\t{i % 6}.0\n" for i in range(8))
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text(f"index\tsentence1\tsentence2\tscore\n{rows}")
    data = LabelledRows(read_glue("glue/stsb", str(tmp_path), "dev"), load_tokenizer(tmp_path), 7, regression=True)
    batch = data.batch(1, 2, None)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 8, 3, 6, 7, 3], [2, 5, 9, 3, 6, 9, 3]]  # the first one is cut
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    assert data.num_cut == 4 and batch.targets.tolist() == [1.0, 2.0] and batch.tokens == 14
    config = make(tmp_path, tmp_path / "run", task="glue/stsb", data=str(tmp_path), adapter=Adapter("lora", rank=2))
    finetune(config, quiet=True)
    names = {row["name"] for row in events(tmp_path / "run", "start")[0]["plan"]}
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= names
    assert all("lora_" in name for name in names if "pooler" not in name and "classifier" not in name)


@pytest.mark.parametrize("name", GLUE)
def test_glue_files_are_read_as_the_benchmark_writes_them(tmp_path: Path, name: str) -> None:
    task = GLUE[name]
    header = task.header or ("index", *task.columns, task.label)
    cells = {column: f'a "{column}' for column in header} | {task.label: task.labels[-1] if task.labels else "4.25"}
    line = "\t".join(cells[column] for column in header)
    folder = tmp_path / task.folder
    folder.mkdir()
    (folder / task.dev).write_text("\n".join([line] if task.header else ["\t".join(header), line]) + "\n")
    found = read_glue(f"glue/{name}", str(tmp_path), "dev")
    assert found.texts == [tuple(f'a "{column}' for column in task.columns)]
    assert found.labels == [len(task.labels) - 1 if task.labels else 4.25]


# --- Bad input --------------------------------------------------------------------------------------------------------


def refused(config: Finetune[Any, Any]) -> str:
    with pytest.raises(UserError) as error:
        finetune(config, quiet=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "line 2: an empty line"),
        ("{torn", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, not list"),
        ('{"instruction": "x"}', "line 2: no field 'output'; it has: instruction"),
        ('{"instruction": "x", "output": [1]}', "line 2: field 'output' is not text but list"),
    ],
)
def test_a_bad_line_is_named(base: Path, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"instruction": "1+1", "output": "2"})
    path.write_text(f"{good}\n{line}\n{good}\n")
    assert f"{path}, {said}" in refused(make(base, tmp_path / "run", task="instructions", data=str(path)))


def test_a_bad_label_is_named(base: Path, tmp_path: Path, colours: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\ngood\t1\nodd\t2\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\n")
    said = refused(make(base, tmp_path / "run", task="glue/sst2", data=str(tmp_path)))
    assert f"{tmp_path / 'train.tsv'}, line 3: label '2' is out of range; allowed: 0, 1" in said
    (tmp_path / "train.tsv").write_text("sentence\tlabel\ngood\n")
    said = refused(make(base, tmp_path / "run", task="glue/sst2", data=str(tmp_path)))
    assert "line 2: 1 columns, not 2" in said


def test_a_head_of_another_width_is_refused(base: Path, colours: Path, tmp_path: Path) -> None:
    finetune(make(base, tmp_path / "run", task="glue/sst2", data=str(colours), steps=1), quiet=True)
    (tmp_path / "RTE").mkdir()
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text("index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n")
    said = refused(make(last(tmp_path / "run"), tmp_path / "other", task="glue/stsb", data=str(tmp_path)))
    assert "has 2 outputs, but the task needs 1" in said


def test_other_bad_input_is_one_line(base: Path, sums: str, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for changes, said in (
        ({"task": "gsm9k"}, "task: unknown 'gsm9k' (did you mean 'gsm8k'?)"),
        ({"task": "glue/colla"}, "unknown glue/colla (did you mean 'cola'?)"),
        ({"task": "glue/rte", "packing": True}, "packing: means nothing to glue/rte"),
        ({"task": "glue/sst2", "data": str(colours / "train.tsv")}, "valid: none is named, and data is one file"),
        ({"task": "instructions"}, "needs a local file"),
        ({"task": "instructions", "data": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"task": "instructions", "data": sums, "template": "chat"}, "has no chat template"),
        ({"task": "instructions", "data": sums, "max_length": 600}, "max_length: 600 is longer than"),
        ({"task": "instructions", "data": sums, "max_length": 9}, "no training examples are left"),
        ({"task": "instructions", "data": sums, "prompt_field": "instr"}, "no field 'instr' (did you mean"),
        ({"task": "instructions", "data": sums, "template": "none",
          "adapter": Adapter("lora", targets=("nothing",))}, "'nothing' matches no hidden linear layer"),
    ):  # fmt: skip
        assert said in refused(make(base, out, **changes))
    assert "model: none given" in refused(Finetune(build("adamw"), out=out))
    with pytest.raises(UserError, match="epochs: inf is out of range"):
        make(base, out, epochs=float("inf"))
    with pytest.raises(UserError, match=r"dropout 1\.0"):
        Adapter("lora", dropout=1.0)
    with pytest.raises(UserError, match="examples: 0 is too small"):
        TaskConfig(examples=0)


def test_a_hub_name_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = refused(make(Path("someone/some-model"), tmp_path, task="gsm8k"))
    assert said.endswith("is no folder, and the Hugging Face hub does not give it: no route to host")
