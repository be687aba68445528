"""The loop: steps, examinations, checkpoints; on one device, on several, sharded or not.

In: a model, a `Task`, a `TrainConfig`. Out: a trained copy of the model and the rows of the log, in
the folder of the run. `accelerate` moves, wraps, scales, gathers and clips; so the same call runs
in one process, under `torchrun` and under `accelerate launch`.

A run is a function of its first weights, its config and its data: all order and chance come from
the place in the run (`loaders`, `randomness`). A checkpoint is written before the first step, at
the end of every epoch and, if wanted, within; a run that ends anywhere is continued from there and
reaches, on a CPU, the same bits. A run that reached its last epoch may be given more of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natcupy.train import checkpoint, loaders, randomness, run
from natcupy.train.checkpoint import Progress
from natcupy.train.config import TrainConfig, TrainError
from natcupy.train.machine import make_accelerator, own_state
from natcupy.train.optimizer import Average, make_optimizer, make_schedule
from natcupy.train.task import Task

TELL_EVERY_S = 0.5  # reading a number off a GPU waits for it
FEW_STEPS = 50  # of a whole run: most models learn little in so many


@dataclass
class Trained:
    """What a run leaves.

    Attributes:
        model: a copy, on the CPU, in eval mode, with the weights to keep; on every process.
        folder: of the run.
        history: rows of the log.
        scores: of these weights on the held-out items; empty without any.
        found: what the task's `examine` gave for them, on every process's share.
        epoch: whose weights they are, counted from 1.
        planned: how many epochs the run was to have, one number more for every extension.
        step_size: items per step.
        processes: that trained.
        peak_bytes: the most memory a process held.
        seconds: spent, those before a continuation included.
        main: whether this process is the one that writes.
    """

    model: nn.Module
    folder: Path
    history: list[dict[str, Any]]
    scores: dict[str, float]
    found: list[Any] | None
    epoch: int
    planned: list[int]
    step_size: int
    processes: int
    peak_bytes: int
    seconds: float
    main: bool


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    facts: dict[str, Any] | None = None,
    command: dict[str, Any] | None = None,
) -> Trained:
    """Train a model for a task, or continue to.

    Args:
        model: any module the task can run; it is trained in place, its last weights stay in it.
        task: what for.
        config: how, and where to.
        facts: JSON values that a continued run must share, besides the task's.
        command: JSON values for the record of the run, which a continuation need not share.

    Raises:
        TrainError: the run cannot start or go on; what was saved stays.
        ConfigError: settings that this machine cannot honour.
        DataError: an item that cannot be read.
        ImportError: the extra "train" is missing.
    """
    with randomness.restored(), own_state(), run.Hold() as hold:
        engine = _Engine(model, task, config, facts or {}, hold, command)
        try:
            return engine.run()
        finally:
            engine.close()


class _Engine:
    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        facts: dict[str, Any],
        hold: run.Hold,
        command: dict[str, Any] | None,
    ) -> None:
        self.task, self.config = task, config
        self.accelerator = accelerator = make_accelerator(config)
        self.device: torch.device = accelerator.device
        self.main: bool = accelerator.is_main_process
        plan = loaders.Plan.of(
            len(task.training_items), config, accelerator.num_processes, task.fewest,
            task.why_fewest,
        )  # fmt: skip
        self.plan = plan
        self.steps = plan.steps * (config.epochs + config.cooldown_epochs)
        self._on_main(lambda: run.claim(config, {**task.facts(), **facts}, hold, command))
        self.folder = Path(config.output).expanduser()
        self.copy = copy.deepcopy(model).to("cpu")
        self._start(model)
        self.sums: dict[str, Tensor] = {}
        self.bar = run.Bar(config, self.progress.step, self.steps, self.main)
        if self.main:
            self._tell_what_differs()

    def _tell_what_differs(self) -> None:
        """Say, before the first step, what is not as the config has it or as it should be."""
        plan, wanted = self.plan, self.config.batch_size
        if plan.batch_size < wanted:
            shares = plan.processes * plan.accumulate
            shared = f" for {plan.processes} processes x {plan.accumulate} passes"
            self.bar.say(
                f"{len(self.task.training_items):,} items make batches of {plan.batch_size}, not "
                f"{wanted}{shared if shares > 1 else ''}"
            )
        if not self.progress.step and self.steps < FEW_STEPS:
            smaller = "a smaller batch size (--batch-size, batch_size=) or "
            steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
            self.bar.say(
                f"the run is {steps}, few to learn from: "
                f"{smaller if plan.step_size > 1 else ''}more --epochs (epochs=) make more"
            )
        if self.progress.step and self.progress.step >= self.steps:
            cooldown = self.config.cooldown_epochs
            also = f" and {cooldown} of cool-down" if cooldown else ""
            self.bar.say(
                f"the run is finished ({self.config.epochs} of {self.config.epochs} epochs{also}), "
                "nothing is left to train. More --epochs (epochs=) extend it"
            )
        if self.extended:
            before, after = self.progress.epochs[-2:]
            self.bar.say(
                f"{before} epochs are done; extended to {after}: from here on at the rates of a "
                f"run of {after}"
            )

    def _start(self, model: nn.Module) -> None:
        """Model, optimizer, schedule and average, on their devices, as the checkpoint has them."""
        config, accelerator = self.config, self.accelerator
        if config.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise TrainError(
                    f"grad_checkpointing needs a model with set_grad_checkpointing, got "
                    f"{type(model).__name__}. Leave it out."
                )
            model.set_grad_checkpointing(True)
        # torch's FSDP takes contiguous parameters only.
        if config.channels_last and "FSDP" not in str(accelerator.distributed_type):
            model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, config)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self.adamw = getattr(self.optimizer, "optimizer", self.optimizer)
        self.schedule = make_schedule(self.adamw, config, self.plan.steps)
        self.average = Average(self.bare, config.ema_decay) if config.ema_decay else None
        self.at = self.folder / run.CHECKPOINT
        found = checkpoint.read(self.at) if config.resume else None
        start = Progress(0, self.plan.steps, self.plan.step_size, [config.epochs])
        self.progress = found or start
        self.earlier = self.progress.seconds
        self.begun = time.perf_counter()
        self.extended = False
        if found is None:
            self._save(best=False)
        else:
            self._restore(found)

    def close(self) -> None:
        self.bar.close()

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Trained:
        config, progress = self.config, self.progress
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if progress.history:
            self._on_main(lambda: run.complete_logs(self.folder, progress.history, config))
        epochs = config.epochs + config.cooldown_epochs
        for epoch in range(len(progress.history), epochs):
            row = self._epoch(epoch)
            wanted = (epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs
            if wanted and self.task.held_out_items is not None:
                row |= self._examined()[0]
            self._finish_epoch(row)
        return self._finish()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train to the end of an epoch; its row of the log."""
        config, progress, plan = self.config, self.progress, self.plan
        first = progress.step - epoch * plan.steps
        self.model.train()
        loader = loaders.training(
            self.task.training_items, plan, config, self.accelerator.process_index, epoch, first,
            self.task.collate, self.device,
        )  # fmt: skip
        batches = _read(loader)
        begun = told = time.perf_counter()
        for step in range(first, plan.steps):
            self._step(batches)
            self.bar.step()
            now = time.perf_counter()
            if self.bar.wanted and now - told > TELL_EVERY_S:
                told = now
                speed = (step + 1 - first) * plan.step_size / (now - begun)
                self._tell(epoch, speed)
            inside = step + 1 < plan.steps
            if inside and config.checkpoint_steps and progress.step % config.checkpoint_steps == 0:
                self._gather_sums()
                self._save(best=False)
        self._gather_sums()
        seconds = time.perf_counter() - begun
        means = {name: total / weight for name, (total, weight) in progress.sums.items()}
        return {
            "epoch": epoch + 1,
            "step": progress.step,
            "lr": self._top_rate(),
            **{f"train_{name}": value for name, value in means.items()},
            "items_per_s": (plan.steps - first) * plan.step_size / max(seconds, 1e-9),
            "seconds": seconds,
        }

    def _step(self, batches: Iterator[Any]) -> None:
        """One step of the optimizer."""
        config, progress = self.config, self.progress
        self.last_rate = max(group["lr"] for group in self.adamw.param_groups)
        for part in range(config.accumulate):
            batch = self.task.to_device(next(batches), self.device)
            place = (config.seed, 2, progress.step, part, self.accelerator.process_index)
            randomness.set_all(*place)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.model, batch)
                self.accelerator.backward(loss.total)
                if self.accelerator.sync_gradients and config.clip_grad:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self._add("loss", loss.total, loss.count)
            for name, value in loss.parts.items():
                self._add(name, value, loss.count)
        self.schedule.step()
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)

    def _examined(self) -> tuple[dict[str, float], list[Any]]:
        """The scores on the held-out items, and what every process found."""
        self.model.eval()
        batches = loaders.examination(
            self.task.held_out_items, self.plan.batch_size, self.config,
            self.accelerator.process_index, self.accelerator.num_processes, self.task.collate,
            self.device,
        )  # fmt: skip
        moved = ((self.task.to_device(batch, self.device), n) for batch, n in _read(batches))
        with self._kept_weights(), torch.no_grad(), self.accelerator.autocast():
            mine = self.task.examine(self.model, moved)
        found = self._gathered(mine)
        return self._usable(self.task.score(found)), found

    def _usable(self, scores: dict[str, float]) -> dict[str, float]:
        """The scores; none where one is NaN, since no epoch can be compared by it."""
        wrong = [f"{name} {value}" for name, value in scores.items() if not math.isfinite(value)]
        if wrong and self.main:
            self.bar.say(
                f"scores must be finite, got {', '.join(wrong)}: this examination does not count. "
                "Check the held-out items (there must be something to score), or lower lr"
            )
        return {} if wrong else scores

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        """Log the epoch, remember it if it is the best so far, and save."""
        progress = self.progress
        row["peak_bytes"] = run.peak_memory(self.device)
        better = self.task.is_better(row, progress.best)
        progress.history.append(row)
        progress.sums, self.sums = {}, {}
        if better:
            progress.best = row
        self._save(best=better)
        self._on_main(lambda: run.write_logs(self.folder, progress.history, self.config))
        if self.main:
            self.bar.say(_line(row, len(progress.history), self.config, self.task))

    def _finish(self) -> Trained:
        """The weights to keep, from the checkpoint: as they are also after a continuation."""
        progress, held_out = self.progress, self.task.held_out_items is not None
        best = self.config.keep == "best" and progress.best is not None
        state = self._kept_state(best)
        checkpoint.load_weights(self.bare, state, self.at)
        self.average = None
        scores, found = self._examined() if held_out else ({}, None)
        checkpoint.load_weights(self.copy, state, self.at)
        peak = max(self._gathered(run.peak_memory(self.device)))
        if self.main:
            self.bar.say(f"peak memory {peak / 2**20:,.0f} MiB on {self.device.type}")
        return Trained(
            model=self.copy.eval(),
            folder=self.folder,
            history=progress.history,
            scores=scores,
            found=found,
            epoch=progress.best["epoch"] if best else len(progress.history),
            planned=progress.epochs,
            step_size=self.plan.step_size,
            processes=self.accelerator.num_processes,
            peak_bytes=peak,
            seconds=progress.seconds,  # those of the last checkpoint: alike after a continuation
            main=self.main,
        )

    # -- saving and restoring ----------------------------------------------------------------------

    def _save(self, best: bool) -> None:
        """Write the checkpoint; with `best`, the weights that were examined too."""
        progress, main = self.progress, self.main
        progress.schedule = self.schedule.state_dict()
        scaler = getattr(self.accelerator, "scaler", None)
        progress.scaler = scaler.state_dict() if scaler is not None else {}
        progress.seconds = self._seconds()
        weights = checkpoint.whole(self.bare.state_dict().items(), main)
        optimizer = checkpoint.whole(checkpoint.optimizer_tensors(self.bare, self.adamw), main)
        average = self._average_tensors()
        kept = {**weights, **(average or {})} if best else None
        self._on_main(
            lambda: checkpoint.write(self.at, progress, weights, optimizer, average, kept)
        )

    def _average_tensors(self) -> dict[str, Tensor] | None:
        if self.average is None:
            return None
        named = zip(self.average.names, self.average.values, strict=True)
        return checkpoint.whole(named, self.main)

    def _restore(self, progress: Progress) -> None:
        plan = (self.plan.steps, self.plan.step_size)
        if (progress.steps_per_epoch, progress.step_size) != plan:
            raise TrainError(
                f"the run took {progress.step_size} items a step ({progress.steps_per_epoch} steps "
                f"an epoch), here it would be {plan[1]} ({plan[0]}). Change the number of "
                "processes, batch_size or accumulate so that their product is what it was."
            )
        self.extended = self._extend(progress)
        read = lambda name: checkpoint.tensors(self.at, name, progress.step)  # noqa: E731
        checkpoint.load_weights(self.bare, read(checkpoint.MODEL), self.at)
        checkpoint.load_optimizer(self.bare, self.adamw, read(checkpoint.OPTIMIZER))
        self.schedule.load_state_dict(progress.schedule)
        factor = self.schedule.lr_lambdas[0](self.schedule.last_epoch)  # of these epochs
        for group, lr in zip(self.adamw.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = lr * factor
        if progress.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress.scaler)
        if self.average is not None:
            values = read(checkpoint.AVERAGE)
            checkpoint.load_values(self.average.values, self.average.names, values)

    def _extend(self, progress: Progress) -> bool:
        """Give a finished run more epochs, if wanted."""
        planned, wanted = progress.epochs[-1], self.config.epochs
        if wanted == planned:
            return False
        done = len(progress.history)
        if wanted < planned or done < planned + self.config.cooldown_epochs:
            raise TrainError(
                f"epochs can only grow, and once a run is finished; {self.folder} has done {done} "
                f"of {planned + self.config.cooldown_epochs} (epochs was {planned}, now {wanted}). "
                f"Continue it with {planned} epochs, and then with more if it is to be extended; "
                "or choose another output."
            )
        progress.epochs.append(wanted)
        return True

    def _kept_state(self, best: bool) -> dict[str, Tensor]:
        if best:
            return checkpoint.tensors(self.at, checkpoint.BEST, self.progress.best["step"])
        state = checkpoint.tensors(self.at, checkpoint.MODEL, self.progress.step)
        if self.config.ema_decay:
            state |= checkpoint.tensors(self.at, checkpoint.AVERAGE, self.progress.step)
        return state

    def _kept_weights(self) -> contextlib.AbstractContextManager[None]:
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()

    # -- sums and processes ------------------------------------------------------------------------

    def _add(self, name: str, value: Tensor, count: int) -> None:
        """Add to this process's sums, on the device, without waiting for it."""
        weight = torch.full_like(value, count, dtype=torch.float64)  # no copy from the host
        pair = torch.stack([value.detach().double() * count, weight])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def _gather_sums(self) -> None:
        """Move what the processes summed into the run's progress. Raises for a loss of NaN."""
        for name, pair in self.sums.items():
            total, weight = self.accelerator.reduce(pair, "sum").tolist()
            before = self.progress.sums.get(name, [0.0, 0.0])
            self.progress.sums[name] = [before[0] + total, before[1] + weight]
        self.sums = {}
        loss = self.progress.sums["loss"][0]
        if loss != loss or abs(loss) == float("inf"):
            raise TrainError(
                f"the loss must be finite, it was {loss} before step {self.progress.step}. Lower "
                "lr, warm up longer, or set mixed_precision to 'bf16' or 'no'; the last checkpoint "
                "is whole."
            )

    def _tell(self, epoch: int, speed: float) -> None:
        means = {name: (pair[0] / pair[1]).item() for name, pair in self.sums.items()}
        epochs = self.config.epochs + self.config.cooldown_epochs
        self.bar.tell(f"epoch {epoch + 1}/{epochs}", means, speed)

    def _top_rate(self) -> float:
        return self.last_rate

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.begun

    def _gathered(self, mine: Any) -> list[Any]:
        """What every process has, on every process."""
        if self.accelerator.num_processes == 1:
            return [mine]
        found = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, mine)
        return found

    def _on_main(self, act: Any) -> Any:
        """Do something on the first process; where it fails, it fails on all."""
        error, result = None, None
        if self.main:
            try:
                result = act()
            except Exception as caught:
                error = caught
        errors = [text for text in self._gathered(error and f"{error}") if text is not None]
        if error is not None:
            raise error
        if errors:
            raise TrainError(errors[0])
        return result


def _read(loader: Any) -> Iterator[Any]:
    """The batches; an error from a worker process without its traceback."""
    from natcupy.data import DataError

    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(_ERROR)) from None


_ERROR = "natcupy.data.source.DataError: "


def _line(row: dict[str, Any], done: int, config: TrainConfig, task: Task) -> str:
    names = ("train_loss", *task.shown)
    values = [f"{name} {row[name]:.4g}" for name in names if name in row]
    epochs = config.epochs + config.cooldown_epochs
    return f"epoch {done}/{epochs}: {', '.join(values)}, {row['items_per_s']:.1f} items/s"
