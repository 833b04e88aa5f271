"""The command line of `nemo llm pretrain` with recipes that upcycle: checked before they start."""

from typing import Any

import nemo_run as run

from nemo_upcycle.pipeline.context import CheckedContext, answered, factories
from nemo_upcycle.pipeline.executors.base import is_local
from nemo_upcycle.trainers.nemo.checks import check_data, check_kernels, check_parents, check_recipe
from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig
from nemo_upcycle.trainers.values import setting
from nemo_upcycle.utils.ranks import is_first_rank


class PretrainContext(CheckedContext):
    """NeMo's own context of `nemo llm pretrain`, which checks recipes that upcycle before they start."""

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """Leave the command lines of others' recipes to NeMo-Run."""
        factory = factories(fn).get(str(self.factory).partition("(")[0])
        if getattr(factory, "__module__", "").startswith("nemo_upcycle."):
            super().cli_execute(fn, args, entrypoint_type)
            return
        others = _OthersContext(name=self.name)
        others.__dict__.update(vars(self))
        with answered():
            others.cli_execute(fn, args, entrypoint_type)

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        """Parse the recipe and check it."""
        return _checked(super().parse_fn(fn, args, **default_kwargs), self)


class _OthersContext(run.cli.RunContext):
    """NeMo-Run's context as it is, until a recipe turns out to be one that upcycles: of a user's factory, or YAML."""

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        task = super().parse_fn(fn, args, **default_kwargs)
        restore = setting(task, "resume.restore_config")
        return _checked(task, self) if getattr(restore, "__fn_or_cls__", None) is UpcycleConfig else task


def _checked(task: run.Partial, ctx: run.cli.RunContext) -> run.Partial:
    """Check a training that `nemo llm pretrain` was told to start, and return it."""
    check_recipe(task)
    if is_local(ctx.executor):
        if not ctx.dryrun:
            check_kernels(task)
        check_data(task)
        check_parents(task, remote=not ctx.dryrun and is_first_rank())
    return task
