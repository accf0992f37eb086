"""Train the network that the chapter on fine-tuning starts from: ResNet-32 on CIFAR-10, into book/pretrained.

python book/_tools/pretrain.py        needs the data set; two minutes on one core
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import save_file

from pslib import contenders, datasets, networks, tasks
from pslib.training import train


def main() -> None:
    """Train on all 50,000 photographs, reduced to 16 × 16, and keep the weights as float16, with a note of where they come from."""
    torch.set_num_threads(1)
    task = replace(tasks.get("cifar10-resnet32-bn"), load=partial(datasets.cifar10, None, None, 16), steps=2400, evaluations=1)
    history = train(task, lambda params: contenders.make("adamw", params, lr=3e-3, weight_decay=0.0), device="cpu", progress=True)
    assert history.model is not None
    learned = {name: t.half() if t.is_floating_point() else t for name, t in history.model.state_dict().items()}
    about = {
        "task": task.name, "optimizer": "AdamW, learning rate 3e-3 with cosine to 0", "steps": task.steps, "batch_size": task.batch_size,
        "seed": 0, "test_accuracy": round(history.final_metric, 3), "torch": torch.__version__, "data_sha256": task.load().sha256,
    }
    networks.PRETRAINED.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=networks.PRETRAINED.parent, suffix=".part", delete=False) as f:
        save_file(learned, f.name, {"about": json.dumps(about)})
    os.replace(f.name, networks.PRETRAINED)
    os.chmod(networks.PRETRAINED, 0o644)
    print(json.dumps(about))


if __name__ == "__main__":
    main()
