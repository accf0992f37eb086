"""PS-DA-SGD and PS-SPS in Lightning, Hugging Face's Trainer, Accelerate, and a plain loop with torch.compile.

PS-DA-SGD needs nothing from any of them.  PS-SPS needs the loss:

- Lightning hands `step` a closure that returns it.  With `accumulate_grad_batches=k` that closure returns a k-th of the last
  micro-batch's loss, which belongs to no gradient: accumulate in manual optimization, `optimizer.step(lambda: total)`.
- Accelerate's wrapper takes a closure and no `loss=`: after `accelerator.backward(loss)`, `optimizer.step(lambda: loss)`.
- Trainer calls `step()` with nothing, so PS-SPS refuses; a subclass with a step hook hands the loss over (`trainer_with_loss`).

Every run is a process of its own, forked from one that has imported the clients and done nothing else.
"""

import contextlib
import importlib
import importlib.util
import math
import multiprocessing
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from pslib import PSDASGD, PSSPS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="These tests fork processes, which this system cannot.")

STEPS, SAVED, KILLED = 12, 5, 8  # optimizer steps in all, at the checkpoint, and when the process kills itself
BATCHES = 4  # an epoch, so that the checkpoint and the kill are both inside one
MODULES = {
    "lightning": ["lightning.pytorch"],
    "trainer": ["transformers.trainer", "accelerate"],
    "accelerate": ["accelerate"],
    "compile": ["torch._inductor.compile_fx"],
}


def sps(params, **settings):
    """PS-SPS with a bound that holds some of the few steps back and not the others, so that both it and the loss count."""
    return PSSPS(params, c=2.0, d0=2.0**-5, growth_rate=2.0, **settings)


OPTIMIZERS = pytest.mark.parametrize("optimizer", [PSDASGD, sps], ids=["PSDASGD", "PSSPS"])


# --- processes --------------------------------------------------------------------------------------

def serve(connection, folder):
    """For every request, import its modules, run its function in a forked process, and answer with that one's exit code."""
    os.environ.update(HF_HUB_OFFLINE="1", TORCHINDUCTOR_CACHE_DIR=str(folder), TORCHINDUCTOR_COMPILE_THREADS="1")
    # Compiling the kernels is most of what these tests cost: no check of vector instructions, which runs programs, and no header.
    os.environ.update(TORCHINDUCTOR_VEC_ISA_OK="0", TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS="0")
    forked = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):
        while True:
            modules, function, settings = connection.recv()
            for name in modules:
                importlib.import_module(name)
            process = forked.Process(target=function, kwargs=settings)
            process.start()
            process.join()
            connection.send(process.exitcode)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(client, function, **settings) -> exit code of a process in which function(**settings) ran."""
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    server = fresh.Process(target=serve, args=(theirs, tmp_path_factory.mktemp("inductor")))
    server.start()
    theirs.close()

    def start(client, function, **settings):
        for name in MODULES[client]:
            package = name.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"The package {package} is not installed.")
        ours.send((MODULES[client], function, settings))
        assert ours.poll(300), "no answer within five minutes"
        return ours.recv()

    yield start
    server.kill()
    server.join()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --- what is trained --------------------------------------------------------------------------------

def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))


def examples():
    """Batches of two examples; neighbouring ones differ a lot in loss."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES, 2, 3, generator=g)
    return x, x.sum(-1, keepdim=True).sin() + torch.arange(BATCHES).reshape(-1, 1, 1) % 2


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, STEPS)


def warm_up(optimizer):
    """From γ = 0, which no step of training may mind."""
    return LambdaLR(optimizer, lambda k: min(1.0, k / 3))


def plain(optimizer, schedule=cosine, clip=math.inf, accumulate=1, report=sum):
    """The loop that every client should amount to.  `report` makes the loss from those of the micro-batches, each over `accumulate`."""
    model = network()
    opt = optimizer(model.parameters())
    scheduler = schedule(opt)
    xs, ys = examples()
    for k in range(STEPS):
        parts = []
        for i in range(accumulate):
            j = (k * accumulate + i) % BATCHES
            loss = loss_of(model, xs[j], ys[j]) / accumulate
            loss.backward()
            parts.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step(**({"loss": report(parts)} if optimizer is sps else {}))
        opt.zero_grad()
        scheduler.step()
    return result(model, opt)


# --- what is compared -------------------------------------------------------------------------------

def result(model, optimizer, losses=()):
    state = optimizer.state_dict()
    return SimpleNamespace(
        parameters=[p.detach().clone() for p in model.parameters()], state=state["state"], groups=state["param_groups"], losses=list(losses)
    )


def save(folder, name, outcome):
    torch.save(vars(outcome), folder / f"{name}.pt")


def load(folder, name):
    return SimpleNamespace(**torch.load(folder / f"{name}.pt"))


def same(a, b):
    """Equal in every bit: tensors, their precision included, numbers, and what holds them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    assert same(a.parameters, b.parameters)
    assert same(a.state, b.state) and same(a.groups, b.groups)


def killed_and_resumed(start, folder, client, train, **settings):
    """Three processes: one that kills itself, one that resumes from its checkpoint, and one that is left alone."""
    (folder / "run").mkdir()
    (folder / "other").mkdir()
    settings["folder"] = folder / "run"
    assert start(client, train, **settings, name="killed", kill=True) == -signal.SIGKILL
    assert not (folder / "run" / "killed.pt").exists()
    assert start(client, train, **settings, name="resumed", resume=True) == 0
    settings["folder"] = folder / "other"
    assert start(client, train, **settings, name="whole") == 0
    whole, resumed = load(folder / "other", "whole"), load(folder / "run", "resumed")
    # The resumed process took only the steps after the checkpoint, so it did not simply begin again.
    assert len(whole.losses) == STEPS and resumed.losses == whole.losses[SAVED:]
    same_run(resumed, whole)
    assert not same(whole.parameters, [p.detach() for p in network().parameters()])
    return whole


# --- Lightning --------------------------------------------------------------------------------------

class Stream:
    """The batches in order, with the position as the state that Lightning's checkpoint keeps of a loader."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        xs, ys = examples()
        while self.position < BATCHES:
            self.position += 1
            yield xs[self.position - 1], ys[self.position - 1]
        self.position = 0

    def __len__(self):
        return BATCHES

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def lightning(folder, name, optimizer, kill=False, resume=False, manual=False, **trainer_settings):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.parts = network(), [], []
            self.automatic_optimization = not manual

        def training_step(self, batch, _):
            loss = loss_of(self.model, *batch)
            self.losses.append(loss.item())
            if manual:
                self.accumulate_two(loss / 2)
            return loss

        def accumulate_two(self, loss):
            self.manual_backward(loss)
            self.parts.append(loss.detach())
            if len(self.parts) == 2:
                total, self.parts = sum(self.parts), []
                self.optimizers().step(lambda: total)
                self.optimizers().zero_grad()
                self.lr_schedulers().step()

        def configure_optimizers(self):
            made = optimizer(self.parameters())
            return {"optimizer": made, "lr_scheduler": {"scheduler": cosine(made), "interval": "step"}}

    class Die(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == KILLED:
                die()

    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = Module()
    trainer = pl.Trainer(
        max_steps=STEPS, default_root_dir=folder, callbacks=[checkpoint] + [Die()] * kill, **quiet, **trainer_settings
    )
    trainer.fit(module, Stream(), ckpt_path=folder / f"step={SAVED}.ckpt" if resume else None)
    save(folder, name, result(module, trainer.optimizers[0], module.losses))


@OPTIMIZERS
def test_lightning_resumes_a_killed_run(start, tmp_path, optimizer):
    whole = killed_and_resumed(start, tmp_path, "lightning", lightning, optimizer=optimizer)
    same_run(whole, plain(optimizer))


def test_lightning_clips_and_accumulates_as_a_plain_loop(start, tmp_path):
    settings = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    assert start("lightning", lightning, folder=tmp_path, name="run", optimizer=PSDASGD, **settings) == 0
    expect(load(tmp_path, "run"), PSDASGD)


def test_ps_sps_accumulates_in_lightning_by_hand_only(start, tmp_path):
    """Lightning's own accumulation reports half of the second micro-batch's loss; manual optimization reports the whole one."""
    assert start("lightning", lightning, folder=tmp_path, name="own", optimizer=sps, accumulate_grad_batches=2) == 0
    assert start("lightning", lightning, folder=tmp_path, name="manual", optimizer=sps, manual=True) == 0
    whole, halved = plain(sps, accumulate=2), plain(sps, accumulate=2, report=lambda parts: parts[-1])
    same_run(load(tmp_path, "manual"), whole)
    same_run(load(tmp_path, "own"), halved)
    assert not same(whole.parameters, halved.parameters)


def expect(run, optimizer):
    """The run is the plain loop with gradients clipped to norm 0.1 and accumulated over two batches, and no loop without either."""
    same_run(run, plain(optimizer, clip=0.1, accumulate=2))
    for other in ({"clip": 0.1}, {"accumulate": 2}):
        assert not same(run.parameters, plain(optimizer, **other).parameters)


# --- Hugging Face's Trainer -------------------------------------------------------------------------

def trainer_with_loss():
    """The class to use in place of Trainer for an optimizer that needs the loss."""
    from transformers import Trainer

    class TrainerWithLoss(Trainer):
        total = 0.0

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)  # a micro-batch's share
            self.total = self.total + loss
            return loss

        def create_optimizer(self, *args, **kwargs):
            made = super().create_optimizer(*args, **kwargs)
            made.register_step_pre_hook(self.hand_over)
            return made

        def hand_over(self, optimizer, args, kwargs):
            total, self.total = self.total, 0.0
            return args[:1], {"loss": total}

    return TrainerWithLoss


def trainer(folder, name, optimizer, kill=False, resume=False, with_loss=False, dropout=0.0, **arguments):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network(dropout)
            self.losses = []

        def forward(self, x, labels):
            loss = loss_of(self.model, x, labels)
            self.losses.append(loss.item())
            return {"loss": loss}

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == KILLED:
                die()

    xs, ys = examples()
    data = [{"x": x, "labels": y} for x, y in zip(xs.flatten(0, 1), ys.flatten(0, 1), strict=True)]
    quiet = {"use_cpu": True, "report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    model = Model()
    optimizers = (optimizer(model.parameters()), None)
    if "lr_scheduler_type" not in arguments:
        optimizers = (optimizers[0], cosine(optimizers[0]))
    settings = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, save_strategy="steps", save_steps=SAVED, **quiet, **arguments
    )
    kind = trainer_with_loss() if with_loss else Trainer
    client = kind(model=model, args=settings, train_dataset=data, optimizers=optimizers, callbacks=[Die()] * kill)
    client.train(resume_from_checkpoint=resume)
    save(folder, name, result(model, optimizers[0], model.losses))


@OPTIMIZERS
def test_trainer_resumes_a_killed_run(start, tmp_path, optimizer):
    """With its own cosine schedule after a warm-up from 0, its shuffling, and dropout."""
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.0, "dropout": 0.2}
    killed_and_resumed(start, tmp_path, "trainer", trainer, optimizer=optimizer, with_loss=optimizer is sps, **settings)


@OPTIMIZERS
def test_trainer_clips_and_accumulates_as_a_plain_loop(start, tmp_path, optimizer):
    settings = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    assert start("trainer", trainer, folder=tmp_path, name="run", optimizer=optimizer, with_loss=optimizer is sps, **settings) == 0
    expect(load(tmp_path, "run"), optimizer)


def refused(folder, train, error, sentence, **settings):
    with pytest.raises(error, match=sentence):
        train(folder, "refused", **settings)


def test_trainer_alone_gives_ps_sps_no_loss(start, tmp_path):
    expected = {"error": ValueError, "sentence": "PSSPS.step needs the loss: call step"}
    assert start("trainer", refused, folder=tmp_path, train=trainer, optimizer=sps, **expected) == 0


# --- Accelerate -------------------------------------------------------------------------------------

def accelerated(folder, name, optimizer, kill=False, resume=False, schedule=warm_up, clip=None, accumulate=1, dropout=0.2, closure=True):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network(dropout)
    opt = optimizer(model.parameters())
    loader = DataLoader(TensorDataset(*(part.flatten(0, 1) for part in examples())), batch_size=2, generator=torch.Generator())
    model, opt, scheduler, loader = accelerator.prepare(model, opt, schedule(opt), loader)
    losses, first, parts = [], 0, []
    if resume:
        accelerator.load_state(folder / "checkpoint")
        first = SAVED
    done = first
    while done < STEPS:
        for x, y in accelerator.skip_first_batches(loader, done % BATCHES) if done == first else loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, x, y)
                accelerator.backward(loss)
                parts.append(loss.detach() / accumulate)
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                if optimizer is PSDASGD:
                    opt.step()
                elif closure:
                    opt.step(lambda: sum(parts))
                else:
                    opt.step(loss=sum(parts))
                scheduler.step()
                opt.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            losses.append(loss.item())
            parts.clear()
            if done == SAVED:
                accelerator.save_state(folder / "checkpoint")
            if kill and done == KILLED:
                die()
            if done == STEPS:
                break
    save(folder, name, result(model, opt, losses))


@OPTIMIZERS
def test_accelerate_resumes_a_killed_run(start, tmp_path, optimizer):
    """With a warm-up from 0, and dropout."""
    killed_and_resumed(start, tmp_path, "accelerate", accelerated, optimizer=optimizer)


@OPTIMIZERS
def test_accelerate_clips_and_accumulates_as_a_plain_loop(start, tmp_path, optimizer):
    settings = {"schedule": cosine, "clip": 0.1, "accumulate": 2, "dropout": 0.0}
    assert start("accelerate", accelerated, folder=tmp_path, name="run", optimizer=optimizer, **settings) == 0
    expect(load(tmp_path, "run"), optimizer)


def test_accelerate_takes_a_closure_and_no_loss(start, tmp_path):
    expected = {"error": TypeError, "sentence": "unexpected keyword argument 'loss'"}
    assert start("accelerate", refused, folder=tmp_path, train=accelerated, optimizer=sps, closure=False, **expected) == 0


# --- a plain loop with torch.compile ----------------------------------------------------------------

def compiled(folder, name, optimizer, what, fused, kill=False, resume=False):
    model = torch.compile(network()) if what == "model" else network()

    def forward_and_backward(x, y):
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    if what == "step":
        forward_and_backward = torch.compile(forward_and_backward)
    opt = optimizer(model.named_parameters(), fused=fused)
    scheduler = warm_up(opt)
    first, losses = 0, []
    kept = {"model": model, "optimizer": opt, "scheduler": scheduler}
    if resume:
        saved = torch.load(folder / "checkpoint")
        for key, part in kept.items():
            part.load_state_dict(saved[key])
        first = SAVED
    xs, ys = examples()
    for k in range(first, STEPS):
        opt.zero_grad()
        loss = forward_and_backward(xs[k % BATCHES], ys[k % BATCHES]).detach()
        opt.step(**({"loss": loss} if optimizer is sps else {}))
        scheduler.step()
        losses.append(loss.item())
        if k + 1 == SAVED:
            torch.save({key: part.state_dict() for key, part in kept.items()}, folder / "checkpoint")
        if kill and k + 1 == KILLED:
            die()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    save(folder, name, result(model, opt, losses))


@pytest.mark.parametrize("optimizer, what, fused", [
    (PSDASGD, "model", False), (PSDASGD, "step", True), (sps, "model", True), (sps, "step", False),
], ids=["PSDASGD-model-reference", "PSDASGD-step-fast", "PSSPS-model-fast", "PSSPS-step-reference"])
def test_a_loop_with_torch_compile_resumes_a_killed_run(start, tmp_path, optimizer, what, fused):
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"torch.compile needs a C++ compiler, and there is no {compiler}.")
    killed_and_resumed(start, tmp_path, "compile", compiled, optimizer=optimizer, what=what, fused=fused)
