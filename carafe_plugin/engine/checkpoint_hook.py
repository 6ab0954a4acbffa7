"""Checkpoints that survive a kill at any moment.

mmengine's ``CheckpointHook`` deletes the old checkpoint before it writes the new one, in place. Here a file appears
under its name only when it is complete and on the disk, and what it replaces is deleted afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from carafe_plugin.engine.atomic import AtomicLocalBackend, use_atomic_writes
from carafe_plugin.engine.checkpoint import POINTER, read_checkpoint
from carafe_plugin.engine.config import find_type
from carafe_plugin.engine.writing import UNFINISHED

OUTDATED = "outdated_best_ckpts"  # in the message hub: best checkpoints about to be deleted
VALIDATED = "last_validated"  # in the message hub, and a file: the name of the newest checkpoint that was validated


class _LateRemoval:
    """A file backend whose removals wait for :meth:`remove_now`."""

    def __init__(self, backend: Any, paths: list[str]) -> None:
        self._backend = backend
        self._paths = paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._paths.append(path)

    rmtree = remove

    def remove_now(self, keep: set[str]) -> None:
        for path in self._paths:
            if path not in keep:
                _remove(self._backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):  # DeepSpeed's checkpoints are folders
        backend.rmtree(path)


def _same_weights(weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """The ``CheckpointHook`` of mmengine in an order that a kill cannot hurt. It takes the same arguments.

    The new checkpoint is written under a temporary name, renamed, named in ``last_checkpoint`` (itself renamed into
    place), and only then are outdated checkpoints deleted. This holds for ``save_best`` and ``published_keys`` too.

    A checkpoint is written before it is validated. Where a run was killed in between, resuming begins with that
    validation: else a best checkpoint and, at the end, the final metrics would be lost.
    """

    file_backend: Any

    def before_train(self, runner: Any) -> None:
        """Prepare the folder: see the parent; what a killed run left unfinished is deleted."""
        use_atomic_writes()
        super().before_train(runner)
        if is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                for leftover in Path(folder).glob(f"*.*{UNFINISHED}"):
                    _remove(LocalBackend(), str(leftover))
        resumed = self._resumed_from(runner)
        if self.save_best and runner._resume and runner._load_from:
            self._complete_best(runner)
        validated = self._was_validated(runner, resumed)
        if resumed and not validated and self._is_validation_due(runner):
            runner.logger.info(f"There is no record of a validation of {resumed}: it comes first.")
            runner.val_loop.run()

    def after_val_epoch(self, runner: Any, metrics: dict) -> None:
        """Keep a best checkpoint, and that the newest one has been validated."""
        newest = Path(str(runner.message_hub.runtime_info.get("last_ckpt", ""))).name
        runner.message_hub.update_info(VALIDATED, newest)  # in what the parent may write
        super().after_val_epoch(runner, metrics)
        if newest and is_main_process():
            AtomicLocalBackend().put_text(newest, Path(runner.work_dir, VALIDATED))

    def _resumed_from(self, runner: Any) -> str:
        """The name of the checkpoint with the state that the run goes on from; "" where it begins anew."""
        if not runner._resume or runner.iter == 0:
            return ""
        path = Path(str(runner._load_from or runner.message_hub.runtime_info.get("last_ckpt", "")))
        if path.parent.resolve() == Path(str(self.out_dir)).resolve():
            self.last_ckpt = str(path)  # the parent knows of none until one is written
        return path.name

    def _was_validated(self, runner: Any, name: str) -> bool:
        """Whether a checkpoint's validation is recorded, in itself or beside it, where no other record is left."""
        answer = [bool(name) and runner.message_hub.runtime_info.get(VALIDATED) == name]
        record = Path(runner.work_dir, VALIDATED)
        if is_main_process() and record.exists():
            if record.read_text(encoding="utf-8") == name:
                answer = [True]
            else:  # of a later state, or another run
                record.unlink()
        broadcast_object_list(answer)  # not every machine need see the folder
        return answer[0]

    def _is_validation_due(self, runner: Any) -> bool:
        """Whether the loop would have validated next the state that was resumed from."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop) and self.by_epoch:
            done, last = loop.epoch, loop.max_epochs
        elif isinstance(loop, IterBasedTrainLoop) and not self.by_epoch:
            done, last = loop.iter, loop.max_iters
        else:  # written in the middle of an epoch, which is repeated; after the last validation; by a loop of its own
            return False
        loop._decide_current_val_interval()
        has_reached = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        return runner.val_loop is not None and has_reached

    def _complete_best(self, runner: Any) -> None:
        """Do what a run was about to do that was killed between writing a best checkpoint and deleting the last one."""
        known = runner.message_hub.runtime_info
        step, unknown = runner.epoch if self.by_epoch else runner.iter, []
        # Of the state that was resumed from: a later best one comes again.
        for path in Path(str(self.out_dir)).glob(f"best_*_{self.filename_tmpl.format(step)}"):
            if path.is_file() and str(path) not in [known[name] for name in known if name.startswith("best_ckpt")]:
                best, resumed = read_checkpoint(str(path)), read_checkpoint(runner._load_from)
                if _same_weights(best["state_dict"], resumed["state_dict"]):  # else of another run
                    unknown.append(best["message_hub"]["runtime_info"])
        barrier()  # all processes have seen the files
        outdated = list(known.get(OUTDATED, ()))
        for info in unknown:
            for name in [name for name in info if name.startswith(("best_score", "best_ckpt"))]:
                if name.startswith("best_ckpt") and name in known and known[name] != info[name]:
                    outdated.append(known[name])
                runner.message_hub.update_info(name, info[name])
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = known.get("best_ckpt")
        else:
            self.best_ckpt_path_dict.update((key, known.get(f"best_ckpt_{key}")) for key in self.key_indicators)
        if unknown:
            self._save_checkpoint_with_step(runner, step, dict(epoch=runner.epoch, iter=runner.iter))
        if is_main_process():
            _LateRemoval(self.file_backend, outdated).remove_now(keep=self._bests())

    def _bests(self) -> set[Any]:
        return {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            steps = [*self.keep_ckpt_ids, step]
            outdated = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)
            # The file lists the outdated ones as well: a run killed before it deletes them deletes them on resuming.
            runner.message_hub.update_info("keep_ckpt_ids", steps)

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            AtomicLocalBackend().put_text(str(self.last_ckpt), Path(runner.work_dir, POINTER))
            for old in outdated:
                _remove(self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
        if outdated:
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        # The parent removes the previous best before it saves the new one: hold the removal back until both are safe.
        backend = self.file_backend
        outdated: list[str] = []
        # The checkpoint lists what is outdated: a run killed before it deletes that deletes it on resuming.
        runner.message_hub.update_info(OUTDATED, outdated)
        self.file_backend = late = _LateRemoval(backend, outdated)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        late.remove_now(keep=self._bests())


def use_atomic_checkpoints(cfg: Config) -> None:
    """Put :class:`AtomicCheckpointHook` in the place of mmengine's hook in ``cfg``, with the same settings.

    A hook of another type, and ``checkpoint=None`` (no checkpoints), are left alone.
    """
    hooks = cfg.get("default_hooks") or {}
    hook = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
    if hook and find_type(HOOKS, hook) is CheckpointHook:
        cfg.default_hooks = {**hooks, "checkpoint": {**hook, "type": f"{__name__}.AtomicCheckpointHook"}}
