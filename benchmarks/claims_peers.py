"""TRL's own DPO and KTO trainers on what `una export` writes of a cell's dataset, judged as ours are.

Loss, collator, optimizer and schedule are TRL's; token ids and reference log-probs are the exported ones, so that both
trainers read the same numbers. Rows are shuffled once per epoch's worth of data: TRL's KTO takes its mismatched
responses from the rows before, and reads in the order of the file.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import claims_offline as offline
import pyarrow.parquet as pq
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from train_peers import DPO, KTO, QUIET

from pipelines import export

TARGETS = {"dpo": "trl-preference", "kto": "trl-kto"}


def run(cell: offline.Cell, base: Path, work: Path) -> dict[str, Any]:
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as where:
        rows = exported(cell, offline.dataset(cell, base), Path(where) / "rows.parquet")
        began = time.process_time()
        trainer = build(cell, base, rows, where)
        trainer.train()
        seconds = time.process_time() - began
        trainer.save_model(f"{where}/policy")
        point = offline.judge(Path(where) / "policy", base, offline.held_out()[offline.TEST], cell.seed)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    found = {"step": len(losses), **point}
    return {"points": [found], "train_cpu_s": round(seconds, 2), "first_loss": losses[0], "trl": trl.__version__}


def exported(cell: offline.Cell, dataset: Path, file: Path) -> list[dict[str, Any]]:
    """The rows that `una export` writes, in an order of the cell's seed."""
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    export.command(parser.parse_args([str(dataset), "--to", TARGETS[cell.method], "--output", str(file)]))
    rows = pq.read_table(file).to_pylist()
    random.Random(cell.seed).shuffle(rows)
    return rows


def tokens(row: dict[str, Any]) -> dict[str, Any]:
    """What TRL's collators read of an exported row."""
    return {k: v for k, v in row.items() if k.endswith(("_ids", "_logps")) or k == "label"}


def build(cell: offline.Cell, base: Path, rows: list[dict[str, Any]], where: str) -> transformers.Trainer:
    dpo = cell.method == "dpo"
    size = offline.ROWS_PER_STEP // 2 if dpo else offline.ROWS_PER_STEP
    kept = [tokens(row) for row in rows]
    if not dpo:  # TRL's own cycling: a batch's mismatched responses are its responses, moved by one
        for start in range(0, len(kept), size):
            batch = kept[start : start + size]
            for i, row in enumerate(batch):
                row["KL_completion_ids"] = batch[i - 1]["completion_ids"]
    settings = {
        "output_dir": where,
        "num_train_epochs": offline.EPOCHS,
        "per_device_train_batch_size": size,
        "train_sampling_strategy": "random" if dpo else "sequential",
        "precompute_ref_log_probs": True,
        "max_length": None,
        "beta": cell.beta,
        "learning_rate": cell.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": cell.seed,
        **QUIET,
    }
    trainer = (DPO if dpo else KTO)(
        model=transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=(trl.DPOConfig if dpo else trl.KTOConfig)(**settings),
        train_dataset=Dataset.from_list(kept),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
