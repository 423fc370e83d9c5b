"""What several test files hold a run against: a float64 forward, live rows, and somebody else's
trainer."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from helpers import make_docs
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

ROW_KEY = ["step", "split", "category", "doc_id"]


def expected_logprob(model: Any, tokenizer: Any, doc: dict[str, Any]) -> float:
    """Return the float64 log p of the `chosen` response of a doc of `make_docs`, in the format
    hh."""
    prompt = f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:"
    ids = tokenizer.encode(f"{prompt} {doc['chosen']}")
    with torch.no_grad():
        logprobs = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(
        float(logprobs[i - 1, ids[i]]) for i in range(len(tokenizer.encode(prompt)), len(ids))
    )


def live_rows(run: Path) -> Any:
    """Return the rows of the live probe of a run, by `ROW_KEY`."""
    lines = [
        line
        for path in sorted(run.glob("probe/step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return pd.DataFrame([json.loads(line) for line in lines]).set_index(ROW_KEY).sort_index()


def make_trainer(
    model: Any, tokenizer: Any, out: Path, callback: TrainerCallback, **flags: Any
) -> Trainer:
    """Return a plain `transformers.Trainer` on 8 rows, as somebody else would write it."""
    rows = [
        {"input_ids": (ids := tokenizer.encode(doc["chosen"])), "labels": ids}
        for doc in make_docs(8)
    ]
    defaults = {
        "output_dir": str(out),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    arguments = TrainingArguments(**{**defaults, **flags})
    data: Any = rows
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
