"""The callbacks follow the libraries into corners that the notebook does not show, and are no burden where a library is missing."""
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dit_nb import LightningRecorder, TrainerRecorder, open_run, supervised

g = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 6, generator=g), torch.randint(3, (50,), generator=g)
DATA, cross_entropy = TensorDataset(X, Y), supervised(F.cross_entropy)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


# Without the libraries

BLOCKED = "import sys; sys.modules.update(lightning=None, pytorch_lightning=None, transformers=None, accelerate=None)\n"


@pytest.mark.parametrize("name, extra", [("LightningRecorder", "lightning"), ("TrainerRecorder", "huggingface")])
def test_missing_library(name, extra):
    code = f"{BLOCKED}from dit_nb import *\ntry: {name}(None)\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install 'dit_nb[{extra}]'" in done.stdout, done.stderr


def test_import_leaves_the_libraries_alone():
    code = "import sys, dit_nb; print({'lightning', 'pytorch_lightning', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Lightning

pytestmark = pytest.mark.filterwarnings("ignore:.*(validation_step|LeafSpec|overfit|workers|pin_memory|tensorboard)")


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def L(request):
    logging.getLogger(request.param).setLevel(logging.ERROR)
    return pytest.importorskip(request.param)


def loader(data=DATA, **kw): return DataLoader(data, **{"batch_size": 8, "shuffle": True, **kw})


def module(L, dtype=torch.float32, one_cycle=False, own_loader=False, peek=False, hide=()):
    "A small module with BatchNorm and dropout; by its arguments it does one thing more."
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(.2), nn.Linear(8, 3)).to(dtype)

        def forward(self, x): return self.net(x)

        def training_step(self, batch, i):
            if peek and i == 2: next(iter(self.trainer.train_dataloader))
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, i): self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            opt = torch.optim.SGD(self.parameters(), lr=.1, momentum=.9)
            if not one_cycle: return opt
            schedule = torch.optim.lr_scheduler.OneCycleLR(opt, .2, total_steps=int(self.trainer.estimated_stepping_batches))      # makes the loader's first iterator
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def train_dataloader(self): return loader()

        def on_train_batch_start(self, batch, i): return -1 if (self.current_epoch, i) in hide else None
    if not own_loader: del Module.train_dataloader
    torch.manual_seed(1)
    return Module()


def fit(L, *callbacks, train=(), val=(), **kw):
    kinds = {k: kw.pop(k) for k in ("dtype", "one_cycle", "own_loader", "peek", "hide") if k in kw}
    torch.manual_seed(0)
    trained = module(L, **kinds)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", max_epochs=2)
    L.Trainer(callbacks=list(callbacks), **{**quiet, **kw}).fit(trained, *train, *val)
    return trained


@pytest.mark.parametrize("case", [
    dict(train=[loader(num_workers=2, persistent_workers=True)], limit_train_batches=3),              # workers draw ahead of a break
    dict(own_loader=True, one_cycle=True, accumulate_grad_batches=2),
    dict(train=[loader()], val=[loader(shuffle=False)], val_check_interval=.5, accumulate_grad_batches=3),
    dict(train=[loader()], accumulate_grad_batches=2, hide={(0, 4)}),                                  # a batch that is drawn, and skipped with the rest of the epoch
    dict(train=[loader()], reload_dataloaders_every_n_epochs=1, overfit_batches=2),
    dict(train=[loader(TensorDataset(X.double(), Y))], dtype=torch.float64, max_steps=9)],
    ids=["workers", "own loader", "validation", "skip", "overfit", "float64"])
def test_lightning(L, case):
    recorder = LightningRecorder(cross_entropy, every=3)
    assert same(fit(L, **case), fit(L, recorder, **case))
    assert recorder.run.steps and recorder.run.verify(None) < 1e-6 and list(recorder.run.marks) == ["epoch 1", "epoch 2"]


def test_lightning_refuses_a_second_iterator(L):
    with pytest.raises(RuntimeError, match="two iterators"): fit(L, LightningRecorder(cross_entropy), train=[loader()], peek=True)


def test_lightning_records_each_fit(L, tmp_path):
    recorder = LightningRecorder(cross_entropy)
    fit(L, recorder, train=[loader()])
    first = recorder.run
    fit(L, recorder, train=[loader()], max_epochs=1)
    assert (first.steps, recorder.run.steps) == (14, 7) and first.verify(None) < 1e-6
    kept = LightningRecorder(cross_entropy, path=tmp_path)
    fit(L, kept, train=[loader()])
    with pytest.raises(FileExistsError, match="overwrite"): fit(L, kept, train=[loader()])
    with pytest.raises(RuntimeError, match="nothing is recorded"): kept.run


# Hugging Face

class Rows(nn.Module):
    "A model as the Trainer wants them"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(.2), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


ROWS = [{"x": x, "labels": y, "name": str(y)} for x, y in zip(X.tolist(), Y.tolist())]


def row_loss(model, batch): return F.cross_entropy(model.net(batch["x"]), batch["labels"], reduction="none")


def train(*callbacks, folder="trained", resume=None, **kw):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, defaults = Rows(), {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": .01}
    args = transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", logging_strategy="no", **{**defaults, **kw})
    trainer = transformers.Trainer(model, args, transformers.default_data_collator, ROWS, ROWS[:9], callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("case", [dict(dataloader_num_workers=2, gradient_accumulation_steps=3), dict(eval_strategy="steps", eval_steps=3, eval_on_start=True), dict(max_steps=9, max_grad_norm=0.)],
                         ids=["workers", "evaluation", "max_steps"])
def test_trainer(case, tmp_path):
    recorder = TrainerRecorder(row_loss, every=3)
    assert same(train(folder=tmp_path, **case), train(recorder, folder=tmp_path, **case))
    assert recorder.run.steps and recorder.run.verify(None) < 1e-3 and list(recorder.run.marks) == ["epoch 1", "epoch 2"]


def test_trainer_stops_within_a_step(tmp_path):
    "The gradient of the micro-batch that came before the stop stays, and makes the next step one of three: of no rule."
    transformers = pytest.importorskip("transformers")
    class Stop(transformers.TrainerCallback):
        epochs = 0
        def on_epoch_begin(self, *args, **kw): self.epochs += 1
        def on_substep_end(self, args, state, control, **kw): control.should_epoch_stop = state.global_step == 1 and self.epochs == 1
    recorder = TrainerRecorder(row_loss)
    with pytest.raises(ValueError, match="gradient in step 1"): train(recorder, Stop(), folder=tmp_path, gradient_accumulation_steps=2)
    assert recorder.run.steps == 1


def test_trainer_resumes_between_epochs_only(tmp_path):
    train(folder=tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(NotImplementedError, match="within an epoch"): train(TrainerRecorder(row_loss), folder=tmp_path, resume=str(tmp_path / "checkpoint-3"))
    train(folder=tmp_path, save_strategy="epoch")
    recorder = TrainerRecorder(row_loss)
    train(recorder, folder=tmp_path, resume=str(tmp_path / "checkpoint-7"))
    assert recorder.run.marks == {"epoch 2": 7} and recorder.run.verify(None) < 1e-3


def test_program_that_fails(tmp_path):
    "Nobody asks for the run: it is written when the program ends."
    transformers = pytest.importorskip("transformers")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import transformers
from test_callbacks import *
class Fail(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 5: raise ZeroDivisionError
train(TrainerRecorder(row_loss, path={str(tmp_path / "run")!r}), Fail(), folder={str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr
    rows = [{k: v for k, v in r.items() if k != "name"} for r in ROWS]
    run = open_run(tmp_path / "run", Rows(), row_loss, rows, transformers.default_data_collator)
    assert run.steps == 5 and run.verify(None) < 1e-3
