"""The Trainer of transformers and LoRA of PEFT: two steps, saved, loaded; held against steps by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepdelta import GPT, PRESETS, GPTConfig, param_groups, use_backend
from deepdelta.hf import DeepDeltaForCausalLM, DeltaDecay
from deepdelta.hf.lines import FIVE


class Rows(Dataset[dict[str, Tensor]]):
    """Six rows of ids, the first label of each not counted."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(13, (9,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 3 + 1] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class DeltaTrainer(DeltaDecay, Trainer):  # type: ignore[misc]
    pass


def made(preset: str = "code-tc") -> DeepDeltaForCausalLM:
    sizes = {"vocab_size": 13, "dim": 12, "heads": 2, "layers": 2, "context": 16}
    gpt = GPT(GPTConfig(**sizes, residual=PRESETS[preset]), seed=3)
    use_backend(gpt, "reference")
    return DeepDeltaForCausalLM.from_gpt(gpt)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=0,
        data_seed=0, logging_steps=1, save_steps=2, disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


@pytest.mark.compatible(
    "Trainer: the steps made by hand, saved, loaded by the Auto classes", "transformers", "accelerate"
)
def test_the_trainer_makes_the_steps_that_are_made_by_hand(tmp_path):
    model, other = made(), made()
    trainer = DeltaTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), eval_dataset=Rows())
    order = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    optimizer = torch.optim.AdamW(param_groups(other, 0.1), lr=1e-2, betas=(0.9, 0.95))
    rows = {tuple(row["input_ids"].tolist()): row for row in map(Rows().__getitem__, range(6))}
    other.train()
    for step, ids in enumerate(order[:2]):
        labels = torch.stack([rows[tuple(one.tolist())]["labels"] for one in ids])
        loss = other(ids, labels=labels).loss
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    measured = trainer.evaluate()["eval_loss"]
    assert 0 < measured < 10
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(one.equal(two) for one, two in zip(back.parameters(), model.parameters(), strict=True))


@pytest.mark.compatible("Trainer: resumed, activation checkpointing", "transformers")
def test_the_trainer_goes_on_from_its_checkpoint_and_checkpoints_activations(tmp_path):
    def run(folder: Path, steps: int, **more: Any) -> Trainer:
        args = arguments(folder, **{"activation_checkpointing" if FIVE else "gradient_checkpointing": True})
        args.max_steps, args.save_steps = steps, 2
        trainer = DeltaTrainer(model=made(), args=args, train_dataset=Rows())
        trainer.train(**more)
        return trainer

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 3, resume_from_checkpoint=True)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.compatible("LoRA: trained, saved, loaded, merged, generating", "peft", "transformers")
def test_lora_trains_what_it_adds_and_comes_back(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = made()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["query", "value", "up"], task_type="CAUSAL_LM"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 2 and all("lora" in name for name in trained)
    DeltaTrainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Rows()).train()
    model.save_pretrained(tmp_path / "lora")
    ids = Rows()[0]["input_ids"][None]
    expected = model.eval()(ids).logits
    back = PeftModel.from_pretrained(made(), tmp_path / "lora").eval()
    torch.testing.assert_close(back(ids).logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(made().eval()(ids).logits, expected, atol=1e-4)
    drawn = back.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert drawn.equal(back.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False))
    merged = back.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(one.equal(before[name]) for name, one in made().state_dict().items())
